//! The NVIDIA GPUs of this machine, whether or not this program can use them.
//!
//! Read by the node's hello, by the plan of a rank on a GPU, and by `worker doctor`. The driver's own tool is asked for
//! names and memory, so that nothing here needs CUDA.

use std::io::Read as _;
use std::process::{Command, Stdio};
use std::sync::mpsc;
use std::time::Duration;

/// How long the driver's tool may take; a GPU that hangs must not hang a node.
const DEADLINE: Duration = Duration::from_secs(20);
/// More than any machine has.
const MOST_GPUS: u32 = 64;

/// One GPU.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct Gpu {
    /// As CUDA counts.
    pub index: u32,
    /// Its model; unknown without nvidia-smi.
    pub name: Option<String>,
    /// Its memory.
    pub memory_bytes: Option<u64>,
    /// What of it is free now.
    pub free_bytes: Option<u64>,
}

/// NVIDIA's driver makes one device file per GPU.
#[must_use]
pub fn present() -> u32 {
    let is_gpu = |index: &u32| std::path::Path::new(&format!("/dev/nvidia{index}")).exists();
    u32::try_from((0..MOST_GPUS).filter(is_gpu).count()).unwrap_or(0)
}

/// Every GPU; names and memory where nvidia-smi tells them in time.
#[must_use]
pub fn list() -> Vec<Gpu> {
    let present = present();
    if present == 0 {
        return Vec::new();
    }
    let told = ask().map(|text| parse(&text)).unwrap_or_default();
    if told.is_empty() {
        let unknown = |index| Gpu { index, name: None, memory_bytes: None, free_bytes: None };
        return (0..present).map(unknown).collect();
    }
    told
}

/// What nvidia-smi prints: `index, name, MiB, MiB free` a line.
fn ask() -> Option<String> {
    let mut child = Command::new("nvidia-smi")
        .args(["--query-gpu=index,name,memory.total,memory.free", "--format=csv,noheader,nounits"])
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
    // After its last word it ends by itself; one that hangs is ended.
    let _has_ended = child.kill();
    let _reaped = child.wait();
    text.ok()?.ok()
}

fn parse(text: &str) -> Vec<Gpu> {
    let mib = |field: Option<&str>| field?.parse::<u64>().ok()?.checked_mul(1 << 20);
    let gpu = |line: &str| {
        let mut fields = line.split(',').map(str::trim);
        let index = fields.next()?.parse().ok()?;
        let name = fields.next().map(str::to_owned);
        Some(Gpu { index, name, memory_bytes: mib(fields.next()), free_bytes: mib(fields.next()) })
    };
    text.lines().filter_map(gpu).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_nvidia_smi_prints_is_read() {
        let gpus =
            parse("0, NVIDIA H100 80GB HBM3, 81559, 81008\n1, NVIDIA A10, [N/A], [N/A]\n\nNo devices\n");
        assert_eq!(gpus.len(), 2);
        assert_eq!((gpus[0].index, gpus[0].memory_bytes), (0, Some(81_559 << 20)));
        assert_eq!((gpus[1].name.as_deref(), gpus[1].memory_bytes), (Some("NVIDIA A10"), None));
    }
}
