//! Runs one snippet on a zygote and watches it from outside: time, memory, output, end.
//!
//! Called by the pool with a slot held. Everything that ends a snippet is decided here or in the kernel; whatever the
//! snippet does, this function returns: at the latest after [`SPAWN_DEADLINE`], its wall limit and twice [`END_DEADLINE`].

use std::fs;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::fs::SealFlags;
use rustix::process::Signal;

use crate::capture::Capture;
use crate::error::{SandboxError, system};
use crate::limits::Limits;
use crate::outcome::{Outcome, Status, text_of};
use crate::protocol::{ECHO, Reply, Request, SESSION};
use crate::spawn::memory_file;
use crate::usage::Watcher;
use crate::zygote::{Event, Zygote};

/// A fork takes milliseconds; the zygote serves few slots.
pub(crate) const SPAWN_DEADLINE: Duration = Duration::from_secs(20);
/// From SIGKILL, or from the process's end, to the zygote's report.
pub(crate) const END_DEADLINE: Duration = Duration::from_secs(20);
const FIRST_SAMPLE: Duration = Duration::from_millis(20);
const SAMPLE_EVERY: Duration = Duration::from_millis(50);

/// Why there is no outcome.
#[derive(Debug)]
pub(crate) enum Fault {
    /// The zygote had ended before the snippet started: safe to try again on another one.
    NotStarted,
    /// A fault to report.
    Sandbox(SandboxError),
}

impl From<SandboxError> for Fault {
    fn from(error: SandboxError) -> Self {
        Self::Sandbox(error)
    }
}

/// How the process ended, as the zygote saw it, or how a turn did, as its session's first process saw it.
pub(crate) struct End {
    pub(crate) wait_status: i32,
    pub(crate) max_rss_bytes: u64,
    pub(crate) cpu_microseconds: u64,
}

/// Runs `code` with `limits`, which have been checked.
pub(crate) fn run(
    zygote: &Zygote,
    code: &str,
    seed: u64,
    echo: bool,
    limits: &Limits,
) -> Result<Outcome, Fault> {
    let start = Instant::now();
    let (mut capture, [stdout, stderr]) = Capture::new(limits.output_bytes)?;
    let code = sealed(code)?;
    let request = request(zygote, limits, seed, if echo { ECHO } else { 0 });
    let descriptors = [code.as_fd(), stdout.as_fd(), stderr.as_fd()];
    let (call, events) = zygote.submit(request, &descriptors).map_err(|_| Fault::NotStarted)?;
    let _forget = Forget { zygote, call };
    drop((stdout, stderr, code)); // the child holds the only writing ends, so that its end is theirs
    let process = wait_for_process(zygote, &events)?;
    let mut watcher = zygote.watcher(host_process_id(&process)?, limits);
    let kill = || {
        // Everything it has made ends with it: by its pid namespace, or else by the zygote. It may have ended just now.
        let _ = rustix::process::pidfd_send_signal(&process, Signal::KILL);
    };
    let ended_by = watch(process.as_fd(), &kill, &mut capture, &mut watcher, limits)?;
    capture.drain();
    let end = wait_for_end(zygote, &events)?;
    Ok(outcome_of(capture, &end, ended_by, limits, watcher.peak_bytes, zygote.image_bytes, start))
}

/// The code as a file that nobody can change.
pub(crate) fn sealed(code: &str) -> Result<fs::File, SandboxError> {
    let code = memory_file(c"code", code.as_bytes())?;
    let seals = SealFlags::WRITE | SealFlags::GROW | SealFlags::SHRINK | SealFlags::SEAL;
    rustix::fs::fcntl_add_seals(&code, seals).map_err(system("sealing the code"))?;
    Ok(code)
}

/// What a zygote is asked; it gets its number when it is sent.
pub(crate) fn request(zygote: &Zygote, limits: &Limits, seed: u64, flags: u32) -> Request {
    Request {
        call: 0,
        tasks: zygote.kernel_task_limit(limits.tasks, flags & SESSION != 0),
        seed,
        memory_bytes: limits.memory_bytes,
        cpu_seconds: kernel_cpu_seconds(limits),
        tmp_bytes: limits.tmp_bytes,
        file_bytes: limits.file_bytes,
        open_files: limits.open_files,
        flags,
    }
}

/// Tells the zygote's keeper that nobody waits any more.
struct Forget<'a> {
    zygote: &'a Zygote,
    call: u32,
}

impl Drop for Forget<'_> {
    fn drop(&mut self) {
        self.zygote.forget(self.call);
    }
}

/// The kernel's limit for each process, in case the supervisor's samples come late: two seconds above its own.
fn kernel_cpu_seconds(limits: &Limits) -> u64 {
    limits.cpu.as_secs().saturating_add(2)
}

pub(crate) fn wait_for_process(zygote: &Zygote, events: &Receiver<Event>) -> Result<OwnedFd, Fault> {
    match events.recv_timeout(SPAWN_DEADLINE) {
        Ok((Reply::Spawned { .. }, Some(process))) => Ok(process),
        Ok((Reply::Fault { text, .. }, _)) => Err(SandboxError::Setup(text).into()),
        Ok((other, _)) => {
            zygote.kill();
            Err(SandboxError::Setup(format!("the zygote answered {other:?} instead of a process")).into())
        }
        Err(RecvTimeoutError::Disconnected) => Err(Fault::NotStarted),
        Err(RecvTimeoutError::Timeout) => {
            zygote.kill();
            Err(SandboxError::Setup(format!(
                "the zygote did not fork within {SPAWN_DEADLINE:?} and was ended"
            ))
            .into())
        }
    }
}

/// The number that the host's `/proc` knows the process by; 0 if it has ended already.
pub(crate) fn host_process_id(process: &OwnedFd) -> Result<i32, SandboxError> {
    let path = format!("/proc/self/fdinfo/{}", process.as_raw_fd());
    let text = fs::read_to_string(&path).map_err(system("reading the process's id"))?;
    let id = text.lines().find_map(|line| line.strip_prefix("Pid:")?.trim().parse::<i32>().ok());
    Ok(id.unwrap_or(0).max(0))
}

/// Polls until `ended` is readable, as the descriptor of a process is at its end. Returns the limit for which it was
/// killed, if it was.
pub(crate) fn watch(
    ended: BorrowedFd<'_>,
    kill: &dyn Fn(),
    capture: &mut Capture,
    watcher: &mut Watcher,
    limits: &Limits,
) -> Result<Option<Status>, SandboxError> {
    let start = Instant::now();
    let (mut ended_by, mut deadline) = (None, start + limits.wall);
    let mut next_sample = start + FIRST_SAMPLE;
    loop {
        let until = if ended_by.is_some() { deadline } else { deadline.min(next_sample) };
        if wait_for_any(ended, capture, until)? {
            return Ok(ended_by);
        }
        capture.drain();
        let now = Instant::now();
        if ended_by.is_some() {
            if now >= deadline {
                return Err(SandboxError::Setup(format!(
                    "a killed snippet did not end within {END_DEADLINE:?}"
                )));
            }
            continue;
        }
        if capture.truncated {
            ended_by = Some(Status::OutputLimit);
        } else if now >= deadline {
            ended_by = Some(Status::Timeout);
        } else if now >= next_sample {
            next_sample = now + SAMPLE_EVERY;
            ended_by = watcher.over_limit();
        }
        if ended_by.is_some() {
            kill();
            deadline = now + END_DEADLINE;
        }
    }
}

/// Waits for output, for the end or for a moment. True at the end.
fn wait_for_any(ended: BorrowedFd<'_>, capture: &Capture, until: Instant) -> Result<bool, SandboxError> {
    let left = until.saturating_duration_since(Instant::now());
    let timeout = Timespec::try_from(left).unwrap_or(Timespec { tv_sec: 1, tv_nsec: 0 });
    let mut polled = vec![PollFd::from_borrowed_fd(ended, PollFlags::IN)];
    if !capture.truncated {
        polled.extend(capture.polled());
    }
    match rustix::event::poll(&mut polled, Some(&timeout)) {
        Ok(_) | Err(rustix::io::Errno::INTR) => {}
        Err(errno) => return Err(system("watching a snippet")(errno)),
    }
    Ok(polled.first().is_some_and(|ended| !ended.revents().is_empty()))
}

fn wait_for_end(zygote: &Zygote, events: &Receiver<Event>) -> Result<End, SandboxError> {
    match events.recv_timeout(END_DEADLINE) {
        Ok((Reply::Exited { wait_status, max_rss_bytes, cpu_microseconds, .. }, _)) => {
            Ok(End { wait_status, max_rss_bytes, cpu_microseconds })
        }
        Ok((Reply::Fault { text, .. }, _)) => Err(SandboxError::Setup(text)),
        Ok((other, _)) => {
            Err(SandboxError::Setup(format!("the zygote answered {other:?} instead of an end")))
        }
        Err(RecvTimeoutError::Disconnected) => Err(SandboxError::ZygoteLost),
        Err(RecvTimeoutError::Timeout) => {
            zygote.kill();
            Err(SandboxError::ZygoteLost)
        }
    }
}

pub(crate) fn outcome_of(
    capture: Capture,
    end: &End,
    ended_by: Option<Status>,
    limits: &Limits,
    sampled_peak_bytes: u64,
    image_bytes: u64,
    start: Instant,
) -> Outcome {
    let truncated = capture.truncated;
    let ended_by = if truncated { Some(Status::OutputLimit) } else { ended_by };
    let (status, exit_code) = status_of(end, ended_by, limits);
    let [stdout, stderr] = capture.into_bytes().map(|bytes| text_of(bytes, truncated));
    Outcome {
        status,
        stdout,
        stderr,
        exit_code,
        seconds: start.elapsed().as_secs_f64(),
        peak_bytes: sampled_peak_bytes.max(end.max_rss_bytes.saturating_sub(image_bytes)),
        output_truncated: truncated,
    }
}

/// `ended_by` is what the supervisor wanted; a process that had ended by itself just before keeps its own end.
fn status_of(end: &End, ended_by: Option<Status>, limits: &Limits) -> (Status, Option<i32>) {
    let status = end.wait_status;
    if ended_by == Some(Status::OutputLimit) {
        return (Status::OutputLimit, None);
    }
    if libc::WIFEXITED(status) {
        let code = libc::WEXITSTATUS(status);
        return (if code == 0 { Status::Ok } else { Status::Error }, Some(code));
    }
    let signal = libc::WTERMSIG(status);
    if signal != libc::SIGKILL {
        return (Status::Error, Some(-signal));
    }
    if let Some(limit) = ended_by {
        return (limit, None);
    }
    if u128::from(end.cpu_microseconds) >= limits.cpu.as_micros() {
        return (Status::Timeout, None);
    }
    (Status::Killed, Some(-signal))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ended(wait_status: i32, cpu_microseconds: u64, by: Option<Status>) -> (Status, Option<i32>) {
        status_of(&End { wait_status, max_rss_bytes: 0, cpu_microseconds }, by, &Limits::default())
    }

    #[test]
    fn the_status_says_who_ended_it() {
        let (exit_137, segv, kill) = (137 << 8, libc::SIGSEGV, libc::SIGKILL);
        assert_eq!(ended(0, 0, None), (Status::Ok, Some(0)));
        assert_eq!(
            ended(exit_137, 0, None),
            (Status::Error, Some(137)),
            "137 is the snippet's own code, no kill"
        );
        assert_eq!(ended(segv, 0, None), (Status::Error, Some(-11)));
        assert_eq!(ended(kill, 0, Some(Status::Memory)), (Status::Memory, None));
        assert_eq!(ended(kill, 10_000_000, None), (Status::Timeout, None), "the kernel's CPU limit");
        assert_eq!(ended(kill, 0, None), (Status::Killed, Some(-9)), "somebody else's kill");
        assert_eq!(ended(0, 0, Some(Status::Timeout)), (Status::Ok, Some(0)), "it was faster than the kill");
        assert_eq!(ended(0, 0, Some(Status::OutputLimit)), (Status::OutputLimit, None));
    }
}
