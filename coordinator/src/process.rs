//! Processes: whether one is alive, waiting for its end, ending it, and children that die with us.
//!
//! Waiting is by pidfd, so a pid that is used again is never mistaken for the old process while we hold it.

use std::io::{Read, Seek, SeekFrom};
use std::os::fd::OwnedFd;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::process::{Pid, PidfdFlags, Signal};
use tokio::time::Instant;

/// A process we can wait for and signal, whoever started it.
#[derive(Debug)]
pub struct Watched {
    pidfd: OwnedFd,
}

impl Watched {
    /// `None` when no such process is alive.
    ///
    /// # Errors
    /// When the kernel refuses a pidfd.
    pub fn open(pid: u32) -> std::io::Result<Option<Self>> {
        let Some(pid) = i32::try_from(pid).ok().and_then(Pid::from_raw) else {
            return Ok(None);
        };
        match rustix::process::pidfd_open(pid, PidfdFlags::empty()) {
            Ok(pidfd) => Ok(Some(Self { pidfd })),
            Err(rustix::io::Errno::SRCH) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    /// Waits until it has ended; false when `deadline` passed first.
    ///
    /// # Errors
    /// When the pidfd cannot be polled.
    pub async fn ended_within(&self, deadline: Duration) -> std::io::Result<bool> {
        let pidfd = self.pidfd.try_clone()?;
        let waiting = tokio::task::spawn_blocking(move || ends_within(&pidfd, deadline));
        waiting.await.map_err(std::io::Error::other)?
    }

    /// Sends a signal; one that is already gone is fine.
    ///
    /// # Errors
    /// When we may not.
    pub fn signal(&self, signal: Signal) -> std::io::Result<()> {
        match rustix::process::pidfd_send_signal(&self.pidfd, signal) {
            Ok(()) | Err(rustix::io::Errno::SRCH) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }
}

/// Whether a process with this pid runs; one that has ended and was not yet collected does not.
#[must_use]
pub fn is_alive(pid: u32) -> bool {
    match Watched::open(pid) {
        Ok(Some(watched)) => !matches!(ends_within(&watched.pidfd, Duration::ZERO), Ok(true)),
        Ok(None) => false,
        // A process that we may not look at is a process.
        Err(_) => true,
    }
}

/// Waits on the pidfd, which is readable from the moment its process ends.
fn ends_within(pidfd: &OwnedFd, deadline: Duration) -> std::io::Result<bool> {
    let until = Instant::now() + deadline;
    loop {
        let left = until.saturating_duration_since(Instant::now());
        let left = Timespec {
            tv_sec: i64::try_from(left.as_secs()).unwrap_or(i64::MAX),
            tv_nsec: left.subsec_nanos().into(),
        };
        let mut fds = [PollFd::new(pidfd, PollFlags::IN)];
        match rustix::event::poll(&mut fds, Some(&left)) {
            Ok(ready) => return Ok(ready > 0),
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
}

/// Becomes `program`, to be ended by SIGTERM when the process `parent` ends. This runs in the child: the
/// kernel keeps the setting over `exec`.
///
/// # Errors
/// Returns only when the program could not be started, or when the parent is gone already.
pub fn exec_bound_to_parent(parent: u32, program: &Path, arguments: &[String]) -> std::io::Error {
    if let Err(error) = rustix::process::set_parent_process_death_signal(Some(Signal::TERM)) {
        return error.into();
    }
    let now = rustix::process::getppid().map(|pid| pid.as_raw_nonzero().get().unsigned_abs());
    if now != Some(parent) {
        return std::io::Error::other(format!("process {parent}, which started this one, is gone"));
    }
    std::process::Command::new(program).args(arguments).exec()
}

/// The last `lines` lines of a text file, at most 16 KiB of it; empty when it cannot be read.
#[must_use]
pub fn last_lines(path: &Path, lines: usize) -> Vec<String> {
    const TAIL_BYTES: u64 = 16 * 1024;
    let read = || -> std::io::Result<Vec<u8>> {
        let mut file = std::fs::File::open(path)?;
        let bytes = file.metadata()?.len();
        file.seek(SeekFrom::Start(bytes.saturating_sub(TAIL_BYTES)))?;
        let mut tail = Vec::new();
        file.take(TAIL_BYTES).read_to_end(&mut tail)?;
        Ok(tail)
    };
    let tail = read().unwrap_or_default();
    let text = String::from_utf8_lossy(&tail);
    let all: Vec<_> = text.lines().filter(|line| !line.trim().is_empty()).collect();
    all[all.len().saturating_sub(lines)..].iter().map(|&line| line.to_owned()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn the_end_of_a_process_is_seen() {
        let mut child = std::process::Command::new("sleep").arg("60").spawn().unwrap();
        let watched = Watched::open(child.id()).unwrap().unwrap();
        assert!(is_alive(child.id()));
        assert!(!watched.ended_within(Duration::from_millis(1)).await.unwrap());
        watched.signal(Signal::KILL).unwrap();
        assert!(watched.ended_within(Duration::from_secs(10)).await.unwrap());
        assert!(!is_alive(child.id()), "ended, though its parent has not collected it");
        child.wait().unwrap();
        assert!(Watched::open(child.id()).unwrap().is_none());
    }

    #[test]
    fn the_tail_of_a_log_is_its_last_lines() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log");
        let text: String = (0..5000).map(|i| format!("line {i}\n\n")).collect();
        std::fs::write(&path, text).unwrap();
        assert_eq!(last_lines(&path, 2), ["line 4998", "line 4999"]);
        assert!(last_lines(&dir.path().join("none"), 2).is_empty());
    }
}
