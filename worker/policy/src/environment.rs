//! The environment that libtorch computes well in.
//!
//! Whoever starts a process that computes gives it this: the worker's command line, its supervisor for ranks, and
//! the benchmark, which must measure what a rank does. What must stay true: what the user has set stays.

use std::os::unix::process::CommandExt as _;

/// Read once, before `main`, by the libraries below libtorch: it can only be given to a new process.
///
/// - glibc hands big blocks back to the kernel at once and takes them again page by page; training allocates and
///   frees gigabytes a second, so that costs more than the arithmetic. Keep them instead, in pages of 2 MiB: a decode
///   step reads all weights and the cache once, and finding small pages takes a sixth of its attention's time.
/// - OpenMP's threads spin while they wait for each other. Where anything else wants a core that slows a step down
///   many times over; asleep at once, they take longer to wake than a decode step's operators last. Spin for up to
///   half a millisecond, then sleep.
/// - Errors come back as values; c10d's warnings are stack traces.
const FOR_LIBTORCH: [(&str, &str); 3] = [
    (
        "GLIBC_TUNABLES",
        "glibc.malloc.mmap_threshold=4294967296:glibc.malloc.trim_threshold=8589934592:\
         glibc.malloc.top_pad=67108864:glibc.malloc.hugetlb=1",
    ),
    ("GOMP_SPINCOUNT", "10000"),
    ("TORCH_CPP_LOG_LEVEL", "ERROR"),
];

/// The part of it that is not set yet.
pub fn missing_for_libtorch() -> impl Iterator<Item = (&'static str, &'static str)> {
    FOR_LIBTORCH.into_iter().filter(|(name, _)| std::env::var_os(name).is_none())
}

/// Starts this program again, in its place, with what [`missing_for_libtorch`] says; does nothing where nothing is
/// missing.
///
/// # Errors
/// When the program cannot be started again.
pub fn with_environment_for_libtorch() -> std::io::Result<()> {
    let missing: Vec<_> = missing_for_libtorch().collect();
    if missing.is_empty() {
        return Ok(());
    }
    let mut again = std::process::Command::new(std::env::current_exe()?);
    Err(again.args(std::env::args_os().skip(1)).envs(missing).exec())
}
