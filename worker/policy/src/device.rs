//! The device thread: one OS thread that owns the decoder, the engine and what a rank keeps beside them (its
//! learner), and the async handle through which everything else reaches it.
//!
//! What must stay true: tensors are touched on this thread alone; work that is not a decode step runs between
//! decode steps; a panic in any of it becomes the caller's error and the thread lives on; every caller gets an
//! answer or a [`DeviceError::Stopped`].

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Mutex, PoisonError};

use agentfly_common::ids::PolicyVersion;
use agentfly_common::sampling::Generation;
use agentfly_common::telemetry::TRACE;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::{Instant, sleep_until};
use tracing::field::Empty;
use tracing::info_span;

use crate::engine::{Engine, EngineError, TurnRequest};
use crate::model::Decoder;

/// Messages that may wait for the device before senders do.
const MAILBOX_MESSAGES: usize = 1024;
/// What [`DeviceHandle::admit`] does, for errors.
const GENERATING: &str = "generating a turn";

/// What the device thread owns.
#[derive(Debug)]
pub struct Device<S> {
    /// The policy.
    pub decoder: Decoder,
    /// Generates with it.
    pub engine: Engine,
    /// The version of its weights.
    pub policy_version: PolicyVersion,
    /// What else lives here: a rank's learner, say.
    pub extra: S,
}

/// Work the device did not do, or did not finish.
#[derive(Debug, thiserror::Error)]
pub enum DeviceError {
    /// The thread has ended.
    #[error("{what}: the device thread has stopped")]
    Stopped {
        /// What was asked of it.
        what: &'static str,
    },
    /// The work panicked.
    #[error("{what} failed on the device thread: {message}")]
    Panicked {
        /// What was asked of it.
        what: &'static str,
        /// The panic's message.
        message: String,
    },
    /// The operating system gave no thread.
    #[error("cannot start the device thread: {0}")]
    Spawn(std::io::Error),
    /// The turn was refused or failed.
    #[error(transparent)]
    Engine(#[from] EngineError),
    /// The forward pass failed for every running turn.
    #[error("the decode step failed, and every running turn with it: {0}")]
    Step(String),
    /// What [`DeviceHandle::start`] was given could not be made.
    #[error("cannot set up the device: {0:#}")]
    Setup(anyhow::Error),
}

type Answer = oneshot::Receiver<Result<Generation, DeviceError>>;
type Reply = oneshot::Sender<Result<Generation, DeviceError>>;
type Job<S> = Box<dyn FnOnce(&mut Device<S>) + Send>;

enum Message<S> {
    Generate(TurnRequest, Asker),
    Call(Job<S>),
    Stop(oneshot::Sender<()>),
}

/// Who waits for a turn.
struct Asker {
    /// Whether the turn's chain has a slot.
    has_slot: watch::Sender<bool>,
    reply: Reply,
}

/// What the device does at its next step. Beside the mailbox because it must neither wait nor be lost.
#[derive(Debug, Default)]
struct Wishes {
    /// Chains whose turn ends with what it has.
    cut: Vec<u64>,
    /// Chains to forget.
    released: Vec<u64>,
}

/// [`Wishes`] of every handle.
type SharedWishes = Arc<Mutex<Wishes>>;

fn wish(wishes: &SharedWishes, what: impl FnOnce(&mut Wishes)) {
    what(&mut wishes.lock().unwrap_or_else(PoisonError::into_inner));
}

/// A turn whose chain has a slot, or had one. Dropping it cancels the turn; the chain and its cache stay until
/// [`DeviceHandle::release`].
#[derive(Debug)]
pub struct AdmittedTurn {
    chain: u64,
    has_slot: watch::Receiver<bool>,
    answer: Answer,
    wishes: SharedWishes,
}

/// How far [`AdmittedTurn::until`] came.
#[derive(Debug)]
pub enum Progress {
    /// The turn is over.
    Ended(Generation),
    /// The chain lost its slot and its cache to an older one; [`AdmittedTurn::resumed`] waits for its return.
    Paused,
}

impl AdmittedTurn {
    /// Samples to the turn's end, however often the chain is paused.
    ///
    /// # Errors
    /// When the engine refused the request, the forward pass fails, or the thread has stopped.
    pub async fn finish(mut self) -> Result<Generation, DeviceError> {
        self.ended().await
    }

    /// Samples to the turn's end, or until its chain is paused, or to the first decode step after `deadline`: then what
    /// is sampled by then, maybe nothing, with [`StopReason::TimeLimit`](agentfly_common::sampling::StopReason::TimeLimit).
    ///
    /// # Errors
    /// As [`Self::finish`].
    pub async fn until(&mut self, deadline: Instant) -> Result<Progress, DeviceError> {
        let paused = has_slot(&mut self.has_slot, false);
        tokio::select! {
            biased;
            answer = &mut self.answer => return answered(answer).map(Progress::Ended),
            // An error means that the turn is over, and the answer on its way.
            Ok(()) = paused => return Ok(Progress::Paused),
            () = sleep_until(deadline) => wish(&self.wishes, |wishes| wishes.cut.push(self.chain)),
        }
        self.ended().await.map(Progress::Ended)
    }

    /// Waits until the chain has a slot again or the turn is over.
    pub async fn resumed(&mut self) {
        let _over = has_slot(&mut self.has_slot, true).await;
    }

    async fn ended(&mut self) -> Result<Generation, DeviceError> {
        answered((&mut self.answer).await)
    }
}

fn answered(
    answer: Result<Result<Generation, DeviceError>, oneshot::error::RecvError>,
) -> Result<Generation, DeviceError> {
    answer.map_err(|_| DeviceError::Stopped { what: GENERATING })?
}

/// Waits until a chain has a slot, or has none.
async fn has_slot(slot: &mut watch::Receiver<bool>, wanted: bool) -> Result<(), watch::error::RecvError> {
    slot.wait_for(|has| *has == wanted).await.map(drop)
}

/// The way to the device thread; clones share it. When the last one is dropped the thread ends.
pub struct DeviceHandle<S> {
    mailbox: mpsc::Sender<Message<S>>,
    wishes: SharedWishes,
}

impl<S> Clone for DeviceHandle<S> {
    fn clone(&self) -> Self {
        Self { mailbox: self.mailbox.clone(), wishes: Arc::clone(&self.wishes) }
    }
}

impl<S> std::fmt::Debug for DeviceHandle<S> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("DeviceHandle").field("stopped", &self.mailbox.is_closed()).finish()
    }
}

impl<S: 'static> DeviceHandle<S> {
    /// Starts the thread and waits until `make`, run on it, has made what it owns.
    ///
    /// # Errors
    /// When there is no thread to be had, or `make` fails or panics.
    pub async fn start(
        make: impl FnOnce() -> anyhow::Result<Device<S>> + Send + 'static,
    ) -> Result<Self, DeviceError> {
        let (mailbox, inbox) = mpsc::channel(MAILBOX_MESSAGES);
        let wishes = SharedWishes::default();
        let (made, ready) = oneshot::channel();
        let worker = Worker { inbox, wishes: Arc::clone(&wishes), running: Vec::new() };
        let run = move || {
            let what = "setting up the device";
            match catch_unwind(AssertUnwindSafe(make)) {
                Ok(Ok(device)) => {
                    // Nobody listening means nobody holds the mailbox either: the loop ends at once.
                    let _nobody_listens = made.send(Ok(()));
                    worker.run(device);
                }
                Ok(Err(error)) => drop(made.send(Err(DeviceError::Setup(error)))),
                Err(panic) => {
                    drop(made.send(Err(DeviceError::Panicked { what, message: panic_text(&*panic) })));
                }
            }
        };
        std::thread::Builder::new().name("device".to_owned()).spawn(run).map_err(DeviceError::Spawn)?;
        ready.await.map_err(|_| DeviceError::Stopped { what: "setting up the device" })??;
        Ok(Self { mailbox, wishes })
    }

    /// Hands in a turn and waits until its chain has a slot, however long others hold them all. Dropping the
    /// future withdraws the turn. A turn that the engine refuses is let in, too: its end says why.
    ///
    /// # Errors
    /// When the thread has stopped.
    pub async fn admit(&self, request: TurnRequest) -> Result<AdmittedTurn, DeviceError> {
        let (chain, wishes) = (request.chain, Arc::clone(&self.wishes));
        let ((slot, has_slot), (reply, answer)) = (watch::channel(false), oneshot::channel());
        let message = Message::Generate(request, Asker { has_slot: slot, reply });
        self.mailbox.send(message).await.map_err(|_| DeviceError::Stopped { what: GENERATING })?;
        let mut turn = AdmittedTurn { chain, has_slot, answer, wishes };
        turn.resumed().await;
        Ok(turn)
    }

    /// Forgets a chain, at the device's next step.
    pub fn release(&self, chain: u64) {
        wish(&self.wishes, |wishes| wishes.released.push(chain));
    }

    /// Runs `f` on the device thread between decode steps; `what` is for errors. It runs to its end even if
    /// this future is dropped after it was sent.
    ///
    /// # Errors
    /// When `f` panics or the thread has stopped.
    pub async fn call<R: Send + 'static>(
        &self,
        what: &'static str,
        f: impl FnOnce(&mut Device<S>) -> R + Send + 'static,
    ) -> Result<R, DeviceError> {
        let (reply, answer) = oneshot::channel();
        let job: Job<S> = Box::new(move |device| {
            let outcome = catch_unwind(AssertUnwindSafe(|| f(device)))
                .map_err(|panic| DeviceError::Panicked { what, message: panic_text(&*panic) });
            let _caller_is_gone = reply.send(outcome);
        });
        self.mailbox.send(Message::Call(job)).await.map_err(|_| DeviceError::Stopped { what })?;
        answer.await.map_err(|_| DeviceError::Stopped { what })?
    }

    /// Ends the thread after the messages before this one, and waits until it has dropped everything it owns.
    /// Turns still running get [`DeviceError::Stopped`].
    pub async fn stop(&self) {
        let (done, ended) = oneshot::channel();
        if self.mailbox.send(Message::Stop(done)).await.is_ok() {
            // An error means the thread ended before it could answer, which is what was asked for.
            let _already_gone = ended.await;
        }
    }
}

/// The thread's side.
struct Worker<S> {
    inbox: mpsc::Receiver<Message<S>>,
    wishes: SharedWishes,
    running: Vec<(u64, Asker)>,
}

impl<S> Worker<S> {
    fn run(mut self, mut device: Device<S>) {
        loop {
            let next = if device.engine.has_work() {
                match self.inbox.try_recv() {
                    Ok(message) => Some(message),
                    Err(mpsc::error::TryRecvError::Empty) => None,
                    Err(mpsc::error::TryRecvError::Disconnected) => return,
                }
            } else {
                match self.inbox.blocking_recv() {
                    Some(message) => Some(message),
                    None => return,
                }
            };
            // Here and not before the wait: what was dropped or wished before a message was sent is so before it.
            self.cancel_dropped(&mut device.engine);
            self.grant(&mut device.engine);
            match next {
                Some(Message::Generate(request, asker)) => self.submit(&mut device.engine, request, asker),
                Some(Message::Call(job)) => job(&mut device),
                Some(Message::Stop(done)) => {
                    self.inbox.close();
                    drop(device);
                    drop(self);
                    let _caller_is_gone = done.send(());
                    return;
                }
                None => self.step(&mut device),
            }
        }
    }

    fn grant(&self, engine: &mut Engine) {
        let mut wishes = Wishes::default();
        wish(&self.wishes, |shared| wishes = std::mem::take(shared));
        wishes.cut.into_iter().for_each(|chain| engine.cut_short(chain));
        wishes.released.into_iter().for_each(|chain| engine.release(chain));
    }

    fn submit(&mut self, engine: &mut Engine, request: TurnRequest, asker: Asker) {
        if asker.reply.is_closed() {
            return;
        }
        let chain = request.chain;
        match engine.submit(request) {
            Ok(()) => self.running.push((chain, asker)),
            Err(error) => drop(asker.reply.send(Err(error.into()))),
        }
    }

    /// Ends the turns that nobody waits for any more.
    fn cancel_dropped(&mut self, engine: &mut Engine) {
        self.running.retain(|(chain, asker)| {
            if asker.reply.is_closed() {
                engine.cancel(*chain);
            }
            !asker.reply.is_closed()
        });
    }

    /// One decode step.
    fn step(&mut self, device: &mut Device<S>) {
        let Device { decoder, engine, policy_version, .. } = device;
        let step = || traced_round(engine, |engine| engine.step(decoder, *policy_version));
        let outcome = catch_unwind(AssertUnwindSafe(step));
        let failure = match outcome {
            Ok(Ok(ended)) => {
                for (chain, result) in ended {
                    self.answer(chain, result.map_err(DeviceError::from));
                }
                self.announce_slots(engine);
                return;
            }
            Ok(Err(error)) => error.to_string(),
            Err(panic) => panic_text(&*panic),
        };
        tracing::error!(turns = self.running.len(), error = failure, "decode step failed");
        for (chain, asker) in std::mem::take(&mut self.running) {
            engine.cancel(chain);
            let _caller_is_gone = asker.reply.send(Err(DeviceError::Step(failure.clone())));
        }
        // A step that stopped half-way may have left half a cache.
        engine.forget_weights();
    }

    fn answer(&mut self, chain: u64, result: Result<Generation, DeviceError>) {
        if let Some(place) = self.running.iter().position(|(id, _)| *id == chain) {
            let (_, asker) = self.running.swap_remove(place);
            let _caller_is_gone = asker.reply.send(result);
        }
    }

    /// Tells those whose chain got a slot, or lost it; they wait for a chain that ends.
    fn announce_slots(&mut self, engine: &Engine) {
        for (chain, asker) in &self.running {
            let has = engine.is_admitted(*chain);
            asker.has_slot.send_if_modified(|had| std::mem::replace(had, has) != has);
        }
    }
}

/// One round of the engine as a span of the device's lane, named after what it computed.
pub fn traced_round<T>(engine: &mut Engine, round: impl FnOnce(&mut Engine) -> T) -> T {
    let span = info_span!(
        target: TRACE, "round", lane = "device", steps = 1, title = Empty, prefill_tokens = Empty, decode_tokens = Empty
    );
    if span.is_disabled() {
        return round(engine);
    }
    let before = engine.stats();
    let done = span.in_scope(|| round(engine));
    let after = engine.stats();
    let prefilled = after.prefill_tokens - before.prefill_tokens;
    let decoded = after.decode_tokens - before.decode_tokens;
    let title = match (prefilled, decoded) {
        (0, _) => "decode",
        (_, 0) => "prefill",
        _ => "prefill and decode",
    };
    span.record("title", title).record("prefill_tokens", prefilled).record("decode_tokens", decoded);
    done
}

/// What a panic said.
pub(crate) fn panic_text(panic: &(dyn Any + Send)) -> String {
    match (panic.downcast_ref::<String>(), panic.downcast_ref::<&str>()) {
        (Some(text), _) => text.lines().next().unwrap_or_default().to_owned(),
        (None, Some(text)) => (*text).to_owned(),
        (None, None) => "a panic without a message".to_owned(),
    }
}
