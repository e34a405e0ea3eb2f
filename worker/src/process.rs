//! What a process needs around it: a parent it does not outlive.

use rustix::process::{Pid, Signal, getppid, set_parent_process_death_signal};

/// Asks the kernel to kill this process when its parent's starting thread ends, and checks that the parent
/// `parent_pid` is still there (it may have died before the request).
///
/// # Errors
/// When the kernel refuses, or the parent is gone already.
pub fn die_with_parent(parent_pid: u32) -> anyhow::Result<()> {
    set_parent_process_death_signal(Some(Signal::KILL))?;
    let parent = getppid().map_or(0, |pid: Pid| pid.as_raw_nonzero().get());
    anyhow::ensure!(
        u32::try_from(parent) == Ok(parent_pid),
        "the process that started this one (pid {parent_pid}) is gone; this one ends too"
    );
    Ok(())
}
