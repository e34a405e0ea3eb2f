//! What a node has: cores, memory, devices. Asked for more than there is, it refuses with the numbers.

use agentfly_common::machine::{cores, gpus, memory};
use agentfly_common::secret::Secret;
use agentfly_proto::v1::{Device, NodeHello};

/// How a node is started.
#[derive(Debug, Clone)]
pub struct NodeOptions {
    /// The coordinator, `host:port`.
    pub join: String,
    /// What the coordinator's calls must carry.
    pub token: Secret,
    /// Which devices it offers.
    pub devices: DeviceRequest,
    /// CPU cores it offers; `None`: all it may run on.
    pub cpus: Option<u32>,
    /// The address other ranks reach its ranks at.
    pub address: String,
}

/// How many devices of each kind.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DeviceRequest {
    /// So many of each.
    Each {
        /// GPUs; `None`: all there are.
        gpus: Option<u32>,
        /// CPU ranks; `None`: one when there is no GPU.
        cpu_ranks: Option<u32>,
    },
    /// So many of one kind: GPUs where this program can use as many, else CPU ranks.
    Ranks(u32),
}

/// The hello of a node with these options.
///
/// # Errors
/// When it has fewer GPUs than asked for, or nothing to offer at all.
pub(super) fn hello(options: &NodeOptions) -> anyhow::Result<NodeHello> {
    let cpus = options.cpus.unwrap_or_else(cores);
    let devices = devices(options.devices, gpus(), agentfly_policy::placement::cuda_built())?;
    Ok(NodeHello {
        node_id: format!("{}-{}", hostname(), std::process::id()),
        hostname: hostname(),
        pid: std::process::id(),
        cpus,
        memory_bytes: memory().total_bytes,
        devices,
        version: env!("CARGO_PKG_VERSION").to_owned(),
        address: options.address.clone(),
    })
}

fn devices(request: DeviceRequest, present: u32, cuda_built: bool) -> anyhow::Result<Vec<Device>> {
    let usable = if cuda_built { present } else { 0 };
    let (gpus, cpu_ranks) = match request {
        DeviceRequest::Each { gpus, cpu_ranks } => (gpus.unwrap_or(usable), cpu_ranks),
        DeviceRequest::Ranks(ranks) if ranks <= usable => (ranks, Some(0)),
        DeviceRequest::Ranks(ranks) => (0, Some(ranks)),
    };
    if gpus > usable {
        let why = match (present, cuda_built) {
            (0, _) => {
                "no NVIDIA GPU is to be seen (no /dev/nvidiaN, or CUDA_VISIBLE_DEVICES hides them)".to_owned()
            }
            (n, false) => format!(
                "this machine has {n}, but this program is built with a CPU libtorch; \
                 build with LIBTORCH=<CUDA libtorch> and --features nccl"
            ),
            (n, true) => format!("this machine has {n}"),
        };
        anyhow::bail!("--num-gpus {gpus} was asked for: {why}; use --num-gpus {usable} --num-cpu-ranks N");
    }
    let cpu_ranks = cpu_ranks.unwrap_or(u32::from(gpus == 0));
    if gpus + cpu_ranks == 0 {
        anyhow::bail!("--num-gpus 0 and --num-cpu-ranks 0 leave nothing to train on; give at least one");
    }
    let device = |kind: &str, index| Device { kind: kind.to_owned(), index };
    let mut all: Vec<Device> = (0..gpus).map(|i| device("cuda", i)).collect();
    all.extend((0..cpu_ranks).map(|i| device("cpu", i)));
    Ok(all)
}

fn hostname() -> String {
    sysinfo::System::host_name().unwrap_or_else(|| "localhost".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ask(
        gpus: Option<u32>,
        cpu_ranks: Option<u32>,
        present: u32,
        built: bool,
    ) -> Result<Vec<String>, String> {
        named(DeviceRequest::Each { gpus, cpu_ranks }, present, built)
    }

    fn named(request: DeviceRequest, present: u32, built: bool) -> Result<Vec<String>, String> {
        devices(request, present, built)
            .map(|d| d.iter().map(|d| format!("{}:{}", d.kind, d.index)).collect())
            .map_err(|e| e.to_string())
    }

    #[test]
    fn options_print_without_the_token() {
        let options = NodeOptions {
            join: "head:6379".into(),
            token: Secret::new("hunter2"),
            devices: DeviceRequest::Ranks(1),
            cpus: None,
            address: "10.0.0.1".into(),
        };
        let printed = format!("{options:?}");
        assert!(printed.contains("head:6379") && !printed.contains("hunter2"), "{printed}");
    }

    #[test]
    fn devices_are_what_was_asked_for_or_all_there_is() {
        assert_eq!(ask(None, None, 2, true).unwrap(), ["cuda:0", "cuda:1"]);
        assert_eq!(ask(None, None, 0, true).unwrap(), ["cpu:0"]);
        assert_eq!(ask(Some(0), Some(2), 8, true).unwrap(), ["cpu:0", "cpu:1"]);
        assert_eq!(ask(Some(1), Some(1), 8, true).unwrap(), ["cuda:0", "cpu:0"]);
    }

    #[test]
    fn ranks_of_one_kind_sit_on_gpus_only_where_this_program_can_use_enough_of_them() {
        let two = DeviceRequest::Ranks(2);
        assert_eq!(named(two, 2, true).unwrap(), ["cuda:0", "cuda:1"]);
        assert_eq!(named(two, 1, true).unwrap(), ["cpu:0", "cpu:1"]);
        assert_eq!(named(two, 8, false).unwrap(), ["cpu:0", "cpu:1"]);
    }

    #[test]
    fn more_gpus_than_there_are_is_refused_with_the_numbers() {
        let error = ask(Some(8), None, 0, true).unwrap_err();
        assert!(error.contains("--num-gpus 8") && error.contains("no NVIDIA GPU"), "{error}");
        assert!(ask(Some(8), None, 4, true).unwrap_err().contains("has 4"));
        assert!(ask(Some(1), None, 4, false).unwrap_err().contains("CPU libtorch"));
        assert!(ask(Some(0), Some(0), 0, false).unwrap_err().contains("nothing to train on"));
    }
}
