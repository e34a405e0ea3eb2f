//! One session: turns that share their variables and their `/tmp`, in processes that live on between them.
//!
//! The other side is `python/session.py`, which also says how a turn that fails leaves no trace in the state. What must
//! stay true: a session is one trajectory's; whatever its code does, a turn ends by its limits, and dropping the session
//! ends every process of it.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::net::{AddressFamily, SocketFlags, SocketType};
use rustix::process::Signal;

use crate::capture::Capture;
use crate::error::{SandboxError, system};
use crate::limits::Limits;
use crate::outcome::{Outcome, Status};
use crate::protocol::{Order, Reply, SESSION};
use crate::supervise::{
    END_DEADLINE, End, Fault, SPAWN_DEADLINE, host_process_id, outcome_of, request, sealed, wait_for_process,
    watch,
};
use crate::usage;
use crate::zygote::{Event, Zygote};

/// Processes that a session has beside those of its code: its first one, and the head that a turn is a copy of.
const OWN_TASKS: u32 = 2;

/// A session that waits for its next turn.
#[derive(Debug)]
pub(crate) struct Session {
    zygote: Arc<Zygote>,
    call: u32,
    events: Receiver<Event>,
    /// Its first process: everything ends with it.
    process: OwnedFd,
    process_id: i32,
    socket: OwnedFd,
}

/// What a turn left.
#[derive(Debug)]
pub(crate) struct Ended {
    pub(crate) outcome: Outcome,
    /// What it did to the variables is their state now.
    pub(crate) kept: bool,
    /// The session goes on: with this turn's state or, where that is not kept, with the one before.
    pub(crate) alive: bool,
}

impl Session {
    /// Makes a session that keeps to `limits`, of which those of time and output are each turn's own.
    ///
    /// # Errors
    /// [`Fault::NotStarted`] if the zygote had ended, other faults as for a snippet.
    pub(crate) fn begin(zygote: Arc<Zygote>, seed: u64, limits: &Limits) -> Result<Self, Fault> {
        let (socket, theirs) =
            rustix::net::socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)
                .map_err(system("a session's socket"))?;
        let limits = Limits { tasks: limits.tasks.saturating_add(OWN_TASKS), ..limits.clone() };
        let asked = zygote.submit(request(&zygote, &limits, seed, SESSION), &[theirs.as_fd()]);
        let (call, events) = asked.map_err(|_| Fault::NotStarted)?;
        drop(theirs);
        let process = wait_for_process(&zygote, &events).inspect_err(|_| zygote.forget(call))?;
        let process_id = host_process_id(&process).inspect_err(|_| zygote.forget(call))?;
        let session = Self { zygote, call, events, process, process_id, socket };
        match session.receive(SPAWN_DEADLINE)? {
            Some(Reply::Begun) => Ok(session),
            _ => Err(session.why_it_did_not_begin()),
        }
    }

    /// Runs a turn. `Err` when there is nothing to run it in any more: nothing of the code has run.
    pub(crate) fn turn(
        &mut self,
        code: &str,
        echo: bool,
        limits: &Limits,
    ) -> Result<Result<Ended, SandboxError>, Gone> {
        let start = Instant::now();
        let prepared = Capture::new(limits.output_bytes).and_then(|pipes| Ok((pipes, sealed(code)?)));
        let ((mut capture, [stdout, stderr]), code) = match prepared {
            Ok(prepared) => prepared,
            Err(error) => return Ok(Err(error)),
        };
        let descriptors = [code.as_fd(), stdout.as_fd(), stderr.as_fd()];
        Order::Turn { echo }.send(self.socket.as_fd(), &descriptors).map_err(|_| Gone)?;
        drop((stdout, stderr, code));
        let tasks = limits.tasks.saturating_add(OWN_TASKS);
        let mut watcher = self.zygote.session_watcher(self.process_id, limits, tasks);
        let kill = || {
            // It may have ended just now; one that does not answer is killed as a whole below.
            let _ = Order::EndTurn.send(self.socket.as_fd(), &[]);
        };
        let watched = watch(self.socket.as_fd(), &kill, &mut capture, &mut watcher, limits);
        let ended_by = watched.or_else(|error| {
            // What the code did to its head does not answer: the session goes, the outcome is the code's.
            let late = start.elapsed() >= limits.wall;
            if late { Ok(Some(Status::Timeout)) } else { Err(error) }
        });
        Ok(ended_by.and_then(|ended_by| {
            capture.drain();
            let (end, kept, alive) = match self.receive(Duration::ZERO)? {
                Some(Reply::TurnEnded { wait_status, max_rss_bytes, kept, .. }) => {
                    let end = End { wait_status, max_rss_bytes, cpu_microseconds: 0 };
                    (end, kept, !watcher.files_over_limit)
                }
                _ => (self.end_of_all()?, false, false),
            };
            let image_bytes = self.zygote.image_bytes;
            let outcome = outcome_of(capture, &end, ended_by, limits, watcher.peak_bytes, image_bytes, start);
            Ok(Ended { outcome, kept, alive })
        }))
    }

    /// How the session ended that a turn has taken with it, or an operator.
    fn end_of_all(&self) -> Result<End, SandboxError> {
        let _ = rustix::process::pidfd_send_signal(&self.process, Signal::KILL); // where it does not answer
        match self.events.recv_timeout(END_DEADLINE) {
            Ok(_) => Ok(End { wait_status: libc::SIGKILL, max_rss_bytes: 0, cpu_microseconds: 0 }),
            // The zygote has ended and everything with it: that is no doing of the code's.
            Err(_) => Err(SandboxError::ZygoteLost),
        }
    }

    /// Memory that it holds between turns, beyond the warm image that it shares with its zygote.
    pub(crate) fn resident_bytes(&self) -> u64 {
        usage::resident(self.process_id, self.zygote.image_bytes)
    }

    /// The next reply of its first process; `None` if it has ended, or says nothing for so long.
    fn receive(&self, patience: Duration) -> Result<Option<Reply>, SandboxError> {
        let timeout = Timespec::try_from(patience).unwrap_or(Timespec { tv_sec: 1, tv_nsec: 0 });
        let mut polled = [PollFd::new(&self.socket, PollFlags::IN)];
        let ready = rustix::io::retry_on_intr(|| rustix::event::poll(&mut polled, Some(&timeout)))
            .map_err(system("waiting for a session"))?;
        if ready == 0 {
            return Ok(None);
        }
        // It is trusted, but a message that makes no sense is no reason to trust it further.
        Ok(Reply::receive(self.socket.as_fd()).ok().flatten().map(|(reply, _)| reply))
    }

    fn why_it_did_not_begin(&self) -> Fault {
        let text = match self.events.recv_timeout(Duration::from_millis(200)) {
            Ok((Reply::Fault { text, .. }, _)) => text,
            // None of its code has run.
            Err(RecvTimeoutError::Disconnected) => return Fault::NotStarted,
            Ok((Reply::Exited { wait_status, .. }, _)) => {
                format!("a session ended before its first turn (wait status {wait_status})")
            }
            _ => format!("a session did not begin within {SPAWN_DEADLINE:?}"),
        };
        SandboxError::Setup(text).into()
    }
}

/// The session had ended before the turn.
#[derive(Debug)]
pub(crate) struct Gone;

impl Drop for Session {
    fn drop(&mut self) {
        let _ = rustix::process::pidfd_send_signal(&self.process, Signal::KILL);
        // Until the zygote has reaped it, so that nothing is left when whoever ends it goes on.
        let _ = self.events.recv_timeout(END_DEADLINE);
        self.zygote.forget(self.call);
    }
}
