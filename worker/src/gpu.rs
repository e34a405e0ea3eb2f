//! The NVIDIA GPUs of this machine, whether or not this program can use them.
//!
//! Read by the plan of a rank on a GPU and by `worker doctor`. The driver's own tool is asked for names and memory, so
//! that nothing here needs CUDA. What must stay true: numbers are those that CUDA gives a rank, which is why ranks run
//! with [`CUDA_ORDER`].

use std::io::Read as _;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc;
use std::time::Duration;

use agentfly_common::machine::{Visible, gpus, visible_gpus};

/// CUDA's own order is the fastest first; nvidia-smi's is the PCI bus's.
pub(crate) const CUDA_ORDER: (&str, &str) = ("CUDA_DEVICE_ORDER", "PCI_BUS_ID");
/// How long the driver's tool may take; a GPU that hangs must not hang a node.
const DEADLINE: Duration = Duration::from_secs(20);

/// One GPU.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct Gpu {
    /// As CUDA counts in a rank: the `N` of `cuda:N`.
    pub index: u32,
    /// Its model; unknown without nvidia-smi.
    pub name: Option<String>,
    /// Its memory.
    pub memory_bytes: Option<u64>,
    /// What of it is free now.
    pub free_bytes: Option<u64>,
}

/// A line of nvidia-smi.
struct Told {
    /// In the order of the PCI bus.
    index: u32,
    uuid: String,
    gpu: Gpu,
}

/// Every GPU that a rank would see; names and memory where nvidia-smi tells them in time.
#[must_use]
pub fn list() -> Vec<Gpu> {
    let count = gpus();
    if count == 0 {
        return Vec::new();
    }
    let value = std::env::var("CUDA_VISIBLE_DEVICES").ok();
    let told = ask().map(|text| parse(&text)).unwrap_or_default();
    seen(told, visible_gpus(value.as_deref()).as_deref(), count)
}

/// What nvidia-smi told, in the order and under the numbers of a process that sees only `visible` of it. What it did
/// not tell, a MIG device's part of a GPU among it, is there under its number, of unknown kind and size.
fn seen(told: Vec<Told>, visible: Option<&[Visible]>, count: u32) -> Vec<Gpu> {
    let unknown = |index| Gpu { index, name: None, memory_bytes: None, free_bytes: None };
    let find = |entry: Visible| {
        told.iter().find(|one| match &entry {
            Visible::Index(index) => one.index == *index,
            Visible::Uuid(start) => one.uuid.starts_with(start.as_str()),
        })
    };
    (0..count)
        .map(|index| {
            let entry = match visible {
                None => Some(Visible::Index(index)),
                Some(list) => list.get(index as usize).cloned(),
            };
            entry.and_then(find).map_or_else(|| unknown(index), |one| Gpu { index, ..one.gpu.clone() })
        })
        .collect()
}

/// What nvidia-smi prints: `index, UUID, name, MiB, MiB free` a line.
fn ask() -> Option<String> {
    let mut child = Command::new("nvidia-smi")
        .args(["--query-gpu=index,uuid,name,memory.total,memory.free", "--format=csv,noheader,nounits"])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .ok()?;
    let mut stdout = child.stdout.take()?;
    let (told, answer) = mpsc::sync_channel(1);
    std::thread::spawn(move || {
        let mut text = String::new();
        let read = stdout.read_to_string(&mut text);
        told.send(read.map(|_| text))
    });
    let text = answer.recv_timeout(DEADLINE);
    end(child);
    text.ok()?.ok()
}

/// Ends a child that has said its last word. A driver that hangs keeps it from dying even when killed, so nobody waits
/// for it but a thread of its own.
fn end(mut child: Child) {
    std::thread::spawn(move || {
        let _has_ended = child.kill();
        child.wait()
    });
}

fn parse(text: &str) -> Vec<Told> {
    let mib = |field: Option<&str>| field?.parse::<u64>().ok()?.checked_mul(1 << 20);
    let gpu = |line: &str| {
        let mut fields = line.split(',').map(str::trim);
        let (index, uuid) = (fields.next()?.parse().ok()?, fields.next()?.to_owned());
        let name = fields.next().map(str::to_owned);
        let gpu = Gpu { index, name, memory_bytes: mib(fields.next()), free_bytes: mib(fields.next()) };
        Some(Told { index, uuid, gpu })
    };
    text.lines().filter_map(gpu).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const TOLD: &str = "\
0, GPU-1a2b, NVIDIA A10, 23028, 22000
1, GPU-3c4d, NVIDIA H100 80GB HBM3, 81559, 81008
2, GPU-5e6f, NVIDIA T4, [N/A], [N/A]

No devices
";

    /// What a process sees with this `CUDA_VISIBLE_DEVICES`: number, model, MiB.
    fn seen_with(value: Option<&str>, count: u32) -> Vec<(u32, Option<String>, Option<u64>)> {
        let seen = seen(parse(TOLD), visible_gpus(value).as_deref(), count);
        seen.into_iter().map(|gpu| (gpu.index, gpu.name, gpu.memory_bytes.map(|bytes| bytes >> 20))).collect()
    }

    fn gpu(index: u32, name: &str, mib: Option<u64>) -> (u32, Option<String>, Option<u64>) {
        (index, Some(name.to_owned()), mib)
    }

    #[test]
    fn what_nvidia_smi_prints_is_read() {
        let all = seen_with(None, 3);
        let h100 = gpu(1, "NVIDIA H100 80GB HBM3", Some(81_559));
        assert_eq!(all, [gpu(0, "NVIDIA A10", Some(23_028)), h100, gpu(2, "NVIDIA T4", None)]);
        assert_eq!(parse(TOLD)[1].gpu.free_bytes, Some(81_008 << 20));
    }

    #[test]
    fn a_rank_finds_its_gpu_under_the_number_that_cuda_gives_it() {
        let h100 = |index| gpu(index, "NVIDIA H100 80GB HBM3", Some(81_559));
        assert_eq!(seen_with(Some("1"), 1), [h100(0)]);
        assert_eq!(seen_with(Some("2,1"), 2), [gpu(0, "NVIDIA T4", None), h100(1)]);
        assert_eq!(seen_with(Some("GPU-3c"), 1), [h100(0)]);
        assert_eq!(seen_with(Some("MIG-77"), 1), [(0, None, None)], "a part of a GPU is not the whole");
    }

    #[test]
    fn without_nvidia_smi_gpus_are_there_of_unknown_kind() {
        let seen = seen(Vec::new(), None, 2);
        assert!(seen.iter().map(|gpu| gpu.index).eq([0, 1]) && seen.iter().all(|gpu| gpu.name.is_none()));
    }
}
