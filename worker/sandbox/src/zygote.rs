//! One warm interpreter and the thread that keeps it.
//!
//! The keeper thread starts the zygote, hands its replies to the calls they belong to, and reaps it. It lives exactly
//! as long as the zygote: the kernel ties the zygote's life to it (see `spawn.rs`). When the zygote ends, for whatever
//! reason, every waiting call learns so at once, because its channel closes.

use std::collections::HashMap;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec};

use crate::error::{SandboxError, system};
use crate::limits::Limits;
use crate::protocol::{Reply, Request};
use crate::spawn::{Recipe, Spawned, spawn};
use crate::usage::{self, Watcher};

/// Importing sympy from a cold network disk takes seconds; a zygote that needs longer than this will never come.
const READY_DEADLINE: Timespec = Timespec { tv_sec: 120, tv_nsec: 0 };
/// The keeper answers within the deadlines of its own steps; this one is beyond their sum.
const START_DEADLINE: Duration = Duration::from_secs(150);

/// Tasks that a user may have more than when a session began.
const SESSION_TASK_SLACK: u32 = 1024;

/// A reply, with the process's descriptor if it is the first.
pub(crate) type Event = (Reply, Option<OwnedFd>);
/// A call gets three events at most: spawned, fault, exited.
const EVENTS_PER_CALL: usize = 4;

#[derive(Debug, Default)]
struct Calls {
    waiting: HashMap<u32, SyncSender<Event>>,
    last: u32,
    closed: bool,
}

/// A running zygote. Dropping it ends it and every snippet on it.
#[derive(Debug)]
pub(crate) struct Zygote {
    process: Arc<Spawned>,
    calls: Arc<Mutex<Calls>>,
    keeper: Option<JoinHandle<()>>,
    /// Requests taken so far.
    served: AtomicU64,
    /// Anonymous memory when it became ready, in bytes: what each of its children starts with.
    pub(crate) image_bytes: u64,
    /// Landlock's version; below 1 there is none.
    pub(crate) landlock: i64,
    /// Who its snippets are, and how many snippets that may be, if they share a user namespace with others.
    crowd: Option<(u32, u32)>,
}

struct Ready {
    process: Arc<Spawned>,
    landlock: i64,
    image_bytes: u64,
}

impl Zygote {
    /// Starts one and waits until it is warm.
    ///
    /// # Errors
    /// As [`spawn`], and [`SandboxError::ZygoteStart`] with the end of its error output.
    pub(crate) fn start(recipe: Arc<Recipe>) -> Result<Self, SandboxError> {
        let calls = Arc::new(Mutex::new(Calls::default()));
        let crowd = (!recipe.tier.has_namespaces()).then_some((recipe.uid, recipe.slots));
        let (report, ready) = sync_channel(1);
        let of_keeper = Arc::clone(&calls);
        let keeper = std::thread::Builder::new()
            .name("sandbox-zygote".into())
            .spawn(move || keep(&recipe, &of_keeper, &report))
            .map_err(system("starting a keeper thread"))?;
        let ready = ready.recv_timeout(START_DEADLINE).map_err(|_| SandboxError::ZygoteStart {
            reason: format!("its keeper thread gave no answer within {START_DEADLINE:?}"),
            log: String::new(),
        })??;
        Ok(Self {
            process: ready.process,
            calls,
            keeper: Some(keeper),
            served: AtomicU64::new(0),
            image_bytes: ready.image_bytes,
            landlock: ready.landlock,
            crowd,
        })
    }

    /// Requests taken so far; `None` once it has ended.
    pub(crate) fn served(&self) -> Option<u64> {
        (!lock(&self.calls).closed).then(|| self.served.load(Ordering::Relaxed))
    }

    /// Sends a request (its call number is set here) and returns the channel of its events.
    ///
    /// # Errors
    /// When the zygote has ended.
    pub(crate) fn submit(
        &self,
        mut request: Request,
        descriptors: &[BorrowedFd<'_>],
    ) -> io::Result<(u32, Receiver<Event>)> {
        let (sender, receiver) = sync_channel(EVENTS_PER_CALL);
        {
            let mut calls = lock(&self.calls);
            if calls.closed {
                return Err(io::ErrorKind::BrokenPipe.into());
            }
            calls.last = calls.last.wrapping_add(1);
            request.call = calls.last;
            calls.waiting.insert(request.call, sender);
        }
        self.served.fetch_add(1, Ordering::Relaxed);
        request.send(self.process.socket.as_fd(), descriptors).inspect_err(|_| self.retire(request.call))?;
        Ok((request.call, receiver))
    }

    /// Ends the interest in a call; its later events are dropped.
    pub(crate) fn forget(&self, call: u32) {
        lock(&self.calls).waiting.remove(&call);
    }

    /// Takes no further call after one that could not be sent: the caller learns of a zygote's end before its keeper may
    /// have, and must not be given the same one again. Calls that run on it finish.
    fn retire(&self, call: u32) {
        let mut calls = lock(&self.calls);
        calls.closed = true;
        calls.waiting.remove(&call);
    }

    /// The kernel's limit for a snippet that may have so many tasks. It counts a user's by user namespace. Without one of a
    /// snippet's own those that the user has now come on top, and what the pool's other snippets may still make, so that a
    /// snippet finds its own share free, though it may take theirs; and for a session, which lives long, what else the user
    /// may come to have meanwhile.
    pub(crate) fn kernel_task_limit(&self, tasks: u32, session: bool) -> u32 {
        let Some((uid, slots)) = self.crowd else { return tasks };
        let to_come = if session { SESSION_TASK_SLACK } else { 0 };
        usage::tasks_of(uid).saturating_add(tasks.saturating_mul(slots)).saturating_add(to_come)
    }

    /// Watches a session of this zygote by its first process. `tasks` are those that it may have, its own two among them.
    pub(crate) fn session_watcher(&self, process_id: i32, limits: &Limits, tasks: u32) -> Watcher {
        let watcher = self.watcher(process_id, limits);
        if self.crowd.is_some() { watcher.with_most_tasks(tasks) } else { watcher }
    }

    /// Watches a snippet of this zygote by its first process.
    pub(crate) fn watcher(&self, process_id: i32, limits: &Limits) -> Watcher {
        let directory = self.process.home.as_ref().map(|home| home.join(process_id.to_string()));
        Watcher::new(process_id, limits, self.image_bytes, directory)
    }

    /// Ends it: for a zygote that does not answer.
    pub(crate) fn kill(&self) {
        self.process.end();
    }
}

impl Drop for Zygote {
    fn drop(&mut self) {
        self.process.end();
        if let Some(keeper) = self.keeper.take() {
            // The end of the process closes the socket, which ends the keeper. A panic there has been printed.
            let _ = keeper.join();
        }
    }
}

/// The keeper thread.
fn keep(recipe: &Recipe, calls: &Mutex<Calls>, report: &SyncSender<Result<Ready, SandboxError>>) {
    match spawn(recipe).and_then(wait_until_ready) {
        Ok(ready) => {
            let process = Arc::clone(&ready.process);
            if report.send(Ok(ready)).is_ok() {
                hand_out_replies(&process, calls);
            }
            process.end();
            let log = process.log_tail();
            if !log.is_empty() {
                tracing::error!(%log, "sandbox zygote ended with a fault");
            }
        }
        Err(error) => {
            // The starter may have given up; then there is nobody to tell.
            let _ = report.send(Err(error));
        }
    }
    let mut calls = lock(calls);
    calls.closed = true;
    calls.waiting.clear();
}

fn wait_until_ready(process: Spawned) -> Result<Ready, SandboxError> {
    let fault =
        |reason: String, process: &Spawned| SandboxError::ZygoteStart { reason, log: process.log_tail() };
    let mut polled = [PollFd::new(&process.socket, PollFlags::IN)];
    let ready = rustix::io::retry_on_intr(|| rustix::event::poll(&mut polled, Some(&READY_DEADLINE)))
        .map_err(system("waiting for the zygote"))?;
    if ready == 0 {
        let limit = Duration::from_secs(READY_DEADLINE.tv_sec.cast_unsigned());
        return Err(fault(
            format!("it was not ready within {limit:?}; are all modules of preload needed?"),
            &process,
        ));
    }
    match Reply::receive(process.socket.as_fd()) {
        Ok(Some((Reply::Ready { landlock, image_bytes }, _))) => {
            Ok(Ready { process: Arc::new(process), landlock, image_bytes })
        }
        Ok(None) => Err(fault("it ended while it started".into(), &process)),
        Ok(Some((other, _))) => {
            Err(fault(format!("its first message was {other:?} instead of Ready"), &process))
        }
        Err(error) => Err(fault(format!("its first message could not be read: {error}"), &process)),
    }
}

/// Routes replies until the socket closes or stops making sense.
fn hand_out_replies(process: &Spawned, calls: &Mutex<Calls>) {
    loop {
        let (reply, descriptor) = match Reply::receive(process.socket.as_fd()) {
            Ok(Some(event)) => event,
            Ok(None) => return,
            Err(error) => {
                tracing::error!(%error, "sandbox zygote ended: its reply could not be read");
                return;
            }
        };
        let (call, last) = match &reply {
            Reply::Spawned { call } | Reply::Fault { call, .. } => (*call, false),
            Reply::Exited { call, .. } => (*call, true),
            Reply::Ready { .. } | Reply::Begun | Reply::TurnEnded { .. } => continue,
        };
        let mut calls = lock(calls);
        let sender = if last { calls.waiting.remove(&call) } else { calls.waiting.get(&call).cloned() };
        if let Some(sender) = sender {
            // Full or closed means that the call has given up.
            let _ = sender.try_send((reply, descriptor));
        }
    }
}

fn lock(calls: &Mutex<Calls>) -> MutexGuard<'_, Calls> {
    // Every change under the lock is complete, so a panic elsewhere leaves a usable state.
    calls.lock().unwrap_or_else(PoisonError::into_inner)
}
