//! What this machine has, as far as a plan depends on it: memory, and what its CPU multiplies in hardware.
//!
//! Read by the node's hello, each rank's plan, `worker doctor` and the coordinator's preflight, so that all of them
//! say the same. What must stay true: where a container may use less than the machine has, that is what is there.

mod control_group;
mod gpus;

pub use gpus::{Visible, gpus, visible_gpus};

use std::path::Path;

use sysinfo::System;

/// Memory of this machine, or of the container that this process is in, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Memory {
    /// All of it.
    pub total_bytes: u64,
    /// What could be taken now without swapping.
    pub available_bytes: u64,
}

/// Reads the memory of this machine, within the limits of the control groups that this process is in.
#[must_use]
pub fn memory() -> Memory {
    let mut system = System::new();
    system.refresh_memory();
    let (total_bytes, available_bytes) = (system.total_memory(), system.available_memory());
    let own = std::fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
    match control_group::limits(&own, Path::new("/sys/fs/cgroup")) {
        Some(limits) => Memory {
            total_bytes: total_bytes.min(limits.total_bytes),
            available_bytes: available_bytes.min(limits.available_bytes),
        },
        None => Memory { total_bytes, available_bytes },
    }
}

/// Most memory that this process has had at a time, in bytes: `VmHWM`, resident pages of every kind.
#[must_use]
pub fn peak_bytes() -> Option<u64> {
    status_line(&std::fs::read_to_string("/proc/self/status").ok()?, "VmHWM:")
}

/// `NAME   123 kB` as bytes.
fn status_line(status: &str, name: &str) -> Option<u64> {
    let line = status.lines().find_map(|line| line.strip_prefix(name))?;
    line.split_whitespace().next()?.parse::<u64>().ok()?.checked_mul(1024)
}

/// Processors this process may run on.
#[must_use]
pub fn cores() -> u32 {
    std::thread::available_parallelism().map_or(1, |n| u32::try_from(n.get()).unwrap_or(u32::MAX))
}

/// Whether this CPU multiplies bf16 in hardware; where it does not, f32 is what is taken unless bf16 is asked for.
#[must_use]
pub fn cpu_computes_bf16() -> bool {
    #[cfg(target_arch = "x86_64")]
    return std::arch::is_x86_feature_detected!("avx512bf16");
    #[cfg(not(target_arch = "x86_64"))]
    return false;
}

/// Intel's AMX for bf16: libtorch's "medium" precision rounds f32 products to bf16 on it.
#[must_use]
pub fn cpu_has_bf16_matrix_unit() -> bool {
    std::fs::read_to_string("/proc/cpuinfo").is_ok_and(|info| info.contains("amx_bf16"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_counted_in_bytes() {
        let memory = memory();
        assert!(memory.total_bytes > 64 << 20 && memory.available_bytes <= memory.total_bytes, "{memory:?}");
        let peak = peak_bytes().unwrap();
        assert!((1 << 20..memory.total_bytes).contains(&peak), "{peak}");
        assert_eq!(status_line("Name:\tx\nVmHWM:\t   2048 kB\n", "VmHWM:"), Some(2 << 20));
        assert_eq!(status_line("Name:\tx\n", "VmHWM:"), None);
    }
}
