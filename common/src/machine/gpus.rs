//! How many NVIDIA GPUs a program on this machine sees: what the driver made, less what `CUDA_VISIBLE_DEVICES` hides.
//!
//! Asked by the node's hello, `worker doctor` and the coordinator's preflight. Needs neither CUDA nor nvidia-smi.

/// More than any machine has.
const MOST_GPUS: u32 = 64;

/// An entry of `CUDA_VISIBLE_DEVICES`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Visible {
    /// A GPU's number in the order of the PCI bus.
    Index(u32),
    /// The beginning of a GPU's or a MIG device's UUID.
    Uuid(String),
}

/// The value of `CUDA_VISIBLE_DEVICES` as CUDA reads it: the list ends at its first entry that is none; `None`: not set,
/// nothing is hidden.
#[must_use]
pub fn visible_gpus(value: Option<&str>) -> Option<Vec<Visible>> {
    let entry = |text: &str| {
        let text = text.trim();
        let uuid = ["GPU-", "MIG-"].iter().any(|kind| text.starts_with(kind));
        if uuid { Some(Visible::Uuid(text.to_owned())) } else { text.parse().ok().map(Visible::Index) }
    };
    Some(value?.split(',').map_while(entry).collect())
}

/// GPUs that this program would see. NVIDIA's driver makes one device file each, `/dev/nvidiaN`; N may begin anywhere.
#[must_use]
pub fn gpus() -> u32 {
    let exists = |index: &u32| std::path::Path::new(&format!("/dev/nvidia{index}")).exists();
    let present = (0..MOST_GPUS).filter(exists).count();
    let value = std::env::var("CUDA_VISIBLE_DEVICES").ok();
    count(u32::try_from(present).unwrap_or(0), visible_gpus(value.as_deref()).as_deref())
}

fn count(present: u32, visible: Option<&[Visible]>) -> u32 {
    let Some(visible) = visible else { return present };
    let there = |entry: &&Visible| match entry {
        Visible::Index(index) => *index < present,
        Visible::Uuid(_) => present > 0,
    };
    u32::try_from(visible.iter().take_while(there).count()).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hidden_gpus_are_not_counted() {
        let seen = |present, value| count(present, visible_gpus(value).as_deref());
        assert_eq!(seen(4, None), 4);
        assert_eq!(seen(4, Some("2,0")), 2);
        assert_eq!(seen(4, Some("1,-1,0")), 1, "the list ends at what is none");
        assert_eq!(seen(4, Some("1,9,0")), 1);
        assert_eq!(seen(4, Some("GPU-8f, MIG-2a")), 2);
        assert_eq!((seen(4, Some("")), seen(0, Some("0")), seen(0, Some("GPU-8f"))), (0, 0, 0));
    }
}
