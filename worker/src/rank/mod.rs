//! A rank's life: one device, one job. It dials the coordinator, does what its session says, and ends.
//!
//! Started by the node as `worker rank …`. Invariants:
//! - **R1** it samples only under the policy version it was told and holds;
//! - **R2** its weights' hash is sent for every policy version before it samples with it;
//! - **R3** a failure is sent to the coordinator, with its owner, before the process ends;
//! - **R4** it never outlives its node.

mod activity;
mod checkpoint;
pub(crate) mod determinism;
mod generator;
mod job;
mod learner_config;
pub(crate) mod memory;
pub(crate) mod python;
mod rollout;
mod setup;
mod train;

use std::sync::Arc;
use std::time::Duration;

use agentfly_common::error::Whose;
use agentfly_common::secret::Secret;
use agentfly_common::telemetry::TRACE;
use agentfly_common::telemetry::spans::{Gathered, Spans};
use agentfly_proto::v1::{
    Fault, Purpose, RankCommand, RankHeartbeat, RankHello, RankId, RankMessage,
    rank_command::Kind as Command, rank_message::Kind as Say,
};
use anyhow::anyhow;
use tokio::sync::mpsc;
use tokio::sync::mpsc::error::SendTimeoutError;
use tokio::task::JoinSet;
use tokio_stream::wrappers::ReceiverStream;
use tracing::{Instrument as _, info_span};

use crate::connection::Connection;
pub use activity::Activity;
pub use job::Job;
pub use setup::{Address, DeviceName};

/// Messages waiting to be sent to the coordinator.
const OUTBOX: usize = 256;
/// How often the rank says that it lives.
const HEARTBEAT: Duration = Duration::from_secs(1);
/// How long the coordinator may take to open a session.
const SESSION_DEADLINE: Duration = Duration::from_secs(20);
/// How long messages may wait because the coordinator takes none.
const SAY_DEADLINE: Duration = Duration::from_secs(60);
/// How long a last message may take to leave.
const FAREWELL: Duration = Duration::from_secs(2);

/// How a rank is started.
#[derive(Debug, Clone)]
pub struct RankOptions {
    /// The coordinator, `host:port`.
    pub coordinator: String,
    /// What calls must carry.
    pub token: Secret,
    /// Who it is.
    pub id: RankId,
    /// The device it owns.
    pub device: DeviceName,
    /// CPU threads for tensor operations.
    pub threads: u32,
    /// Ranks that share this node's memory, itself included.
    pub ranks_on_node: u32,
    /// Where other ranks reach it.
    pub address: Address,
    /// Where its spans gather.
    pub spans: Spans,
}

/// The way to the coordinator: cheap to clone, held by everything that reports.
#[derive(Clone)]
pub struct Reporter {
    /// Messages of the session.
    outbox: mpsc::Sender<RankMessage>,
    /// For trajectories and shards.
    pub connection: Connection,
    /// Who speaks.
    pub id: RankId,
    /// What is being done.
    pub activity: Activity,
    /// What has been done, and how long it took.
    pub spans: Spans,
}

impl Reporter {
    /// Sends the spans that have ended, then what is to be said of the work they were: so a step's spans come
    /// before its end.
    ///
    /// # Errors
    /// As [`Self::say`].
    async fn report(&self, kind: Say) -> anyhow::Result<()> {
        let gathered = self.spans.take();
        if gathered != Gathered::default() {
            self.say(Say::Spans(gathered.into())).await?;
        }
        self.say(kind).await
    }

    /// Queues a message; waits while the session is slow, at most a minute.
    ///
    /// # Errors
    /// When the session is gone, or stuck.
    pub async fn say(&self, kind: Say) -> anyhow::Result<()> {
        let message = RankMessage { kind: Some(kind) };
        let coordinator = self.connection.address();
        self.outbox.send_timeout(message, SAY_DEADLINE).await.map_err(|error| match error {
            SendTimeoutError::Closed(_) => {
                anyhow!("the session with the coordinator at {coordinator} is closed")
            }
            SendTimeoutError::Timeout(_) => {
                anyhow!("the coordinator at {coordinator} took no message of this rank for {SAY_DEADLINE:?}")
            }
        })
    }
}

/// An error and who must act; the way every failure of a rank's work is reported.
#[derive(Debug, thiserror::Error)]
#[error("{cause:#}")]
pub struct RankError {
    /// Who must act.
    pub whose: Whose,
    /// What happened, the whole chain of causes (it is in the text, so it is no `source` of its own).
    pub cause: anyhow::Error,
}

impl RankError {
    /// Of settings, data, disks.
    pub fn operator(cause: impl Into<anyhow::Error>) -> Self {
        Self { whose: Whose::Operator, cause: cause.into() }
    }

    /// Of networks and other machines.
    pub fn outside(cause: impl Into<anyhow::Error>) -> Self {
        Self { whose: Whose::Outside, cause: cause.into() }
    }

    /// Of this program.
    pub fn us(cause: impl Into<anyhow::Error>) -> Self {
        Self { whose: Whose::Us, cause: cause.into() }
    }
}

/// Runs the rank until its session ends.
///
/// # Errors
/// What made it fail; it was reported to the coordinator if that was possible.
pub async fn run(options: RankOptions) -> anyhow::Result<()> {
    let connection = Connection::dial(&options.coordinator, options.token.expose()).await?;
    let (outbox, messages) = mpsc::channel(OUTBOX);
    let activity = Activity::new("joining");
    let (id, spans) = (options.id.clone(), options.spans.clone());
    let reporter = Reporter { outbox, connection, id, activity, spans };
    let hello = RankHello { rank: Some(options.id.clone()), pid: std::process::id() };
    reporter.say(Say::Hello(hello)).await?;
    let mut cluster = reporter.connection.cluster();
    let opening = cluster.rank_session(ReceiverStream::new(messages));
    let mut commands = tokio::time::timeout(SESSION_DEADLINE, opening)
        .await
        .map_err(|_| {
            anyhow!(
                "the coordinator at {} did not open a session in {SESSION_DEADLINE:?}",
                options.coordinator
            )
        })?
        .map_err(|status| anyhow!("the coordinator refused this rank: {}", status.message()))?
        .into_inner();
    let beats = tokio::spawn(heartbeat(reporter.clone()));
    let ended = tokio::select! {
        ended = obey(&mut commands, &options, &reporter) => ended,
        signal = agentfly_common::shutdown::stop_signal() => signal
            .map(|name| tracing::info!(name, "told to stop"))
            .map_err(RankError::us),
    };
    if let Err(error) = &ended {
        tracing::error!(error = format!("{error:#}"), "this rank fails");
        let fault = Fault {
            whose: agentfly_proto::v1::Whose::from(error.whose).into(),
            message: format!("{error:#}"),
        };
        if reporter.say(Say::Failed(fault)).await.is_ok() {
            // The coordinator answers a failure by ending the session: that is the receipt.
            let _ = tokio::time::timeout(FAREWELL, commands.message()).await;
        }
    }
    beats.abort();
    ended.map_err(anyhow::Error::from)
}

/// What a piece of work leaves behind.
enum Done {
    /// A prepared (or grouped) job.
    Job(Box<Job>),
    /// Only what was reported.
    Reported,
}

/// Does what the session says. Work runs beside the session, so that Stop is heard at any time; the
/// coordinator overlaps nothing but rollout shards.
async fn obey(
    commands: &mut tonic::Streaming<RankCommand>,
    options: &RankOptions,
    reporter: &Reporter,
) -> Result<(), RankError> {
    let mut desk = Desk::Empty;
    let mut work: JoinSet<Result<Done, RankError>> = JoinSet::new();
    loop {
        tokio::select! {
            message = commands.message() => {
                let message = message.map_err(|status| {
                    RankError::outside(anyhow!("the session with the coordinator broke: {}", status.message()))
                })?;
                match message.and_then(|m| m.kind) {
                    None => return Err(RankError::outside(anyhow!("the coordinator closed the session"))),
                    Some(Command::Stop(stop)) => {
                        tracing::info!(why = stop.why, "told to stop");
                        return Ok(());
                    }
                    Some(Command::Prepare(prepare)) => {
                        desk = Desk::Preparing(Vec::new());
                        let (options, reporter) = (options.clone(), reporter.clone());
                        work.spawn(async move {
                            let span = info_span!(target: TRACE, "prepare", lane = "rank");
                            let (job, say) =
                                setup::prepare(&options, &reporter, prepare).instrument(span).await?;
                            if let Some(say) = say {
                                reporter.report(say).await.map_err(RankError::outside)?;
                            }
                            Ok(Done::Job(Box::new(job)))
                        });
                    }
                    Some(command) => {
                        if let Some((job, command)) = desk.take(command)? {
                            begin(command, job, &mut work, reporter);
                        }
                    }
                }
            }
            Some(done) = work.join_next() => match done.map_err(|e| RankError::us(anyhow!("a task broke: {e}")))?? {
                Done::Job(prepared) => {
                    let job = Arc::new(*prepared);
                    for command in desk.prepared(job.clone()) {
                        begin(command, job.clone(), &mut work, reporter);
                    }
                }
                Done::Reported => {}
            },
        }
        if work.is_empty() {
            reporter.activity.set("waiting for the coordinator");
        }
    }
}

/// What commands find: a job, or one that is being prepared. This rank says that it is ready from within its
/// preparation, and with a group others may be ready first: what is asked by then waits here, in order.
enum Desk<J> {
    Empty,
    Preparing(Vec<Command>),
    Ready(Arc<J>),
}

impl<J> Desk<J> {
    /// The job to do `command` on; nothing while the command must wait.
    fn take(&mut self, command: Command) -> Result<Option<(Arc<J>, Command)>, RankError> {
        match self {
            Self::Empty => Err(RankError::us(anyhow!("a command came before Prepare"))),
            Self::Preparing(waiting) => {
                waiting.push(command);
                Ok(None)
            }
            Self::Ready(job) => Ok(Some((job.clone(), command))),
        }
    }

    /// The job is prepared; returns what waited for it.
    fn prepared(&mut self, job: Arc<J>) -> Vec<Command> {
        match std::mem::replace(self, Self::Ready(job)) {
            Self::Preparing(waiting) => waiting,
            Self::Empty | Self::Ready(_) => Vec::new(),
        }
    }
}

/// Starts the work of one command.
fn begin(command: Command, job: Arc<Job>, work: &mut JoinSet<Result<Done, RankError>>, reporter: &Reporter) {
    let reporter = reporter.clone();
    work.spawn(async move {
        let say = obey_one(command, job, &reporter).await?;
        reporter.report(say).await.map_err(RankError::outside)?;
        Ok(Done::Reported)
    });
}

/// Does the work of one command, as a span of the rank's lane; returns what to report of it.
async fn obey_one(command: Command, job: Arc<Job>, reporter: &Reporter) -> Result<Say, RankError> {
    match command {
        Command::FormGroup(form) => {
            let span = info_span!(target: TRACE, "join the group", lane = "rank");
            setup::form_group(&job, reporter, form).instrument(span).await
        }
        Command::RunRollout(rollout) => {
            let title = if rollout.purpose() == Purpose::Validation { "validation" } else { "rollout" };
            let span = info_span!(target: TRACE, "rollout", lane = "rank", title, step = rollout.step);
            rollout::run(job, reporter.clone(), rollout).instrument(span).await
        }
        Command::RunTrain(train) => {
            let span = info_span!(target: TRACE, "train", lane = "rank", step = train.step);
            train::run(&job, reporter, train).instrument(span).await
        }
        Command::WriteCheckpoint(write) => {
            let span = info_span!(target: TRACE, "write the checkpoint", lane = "rank", step = write.step);
            checkpoint::write(&job, reporter, write).instrument(span).await
        }
        Command::Prepare(_) | Command::Stop(_) => {
            Err(RankError::us(anyhow!("{command:?} is the session's own to obey")))
        }
    }
}

/// Says that the rank lives and what it does, until the session is gone.
async fn heartbeat(reporter: Reporter) {
    let mut ticks = tokio::time::interval(HEARTBEAT);
    loop {
        ticks.tick().await;
        let (activity, activity_seconds) = reporter.activity.get();
        if reporter.say(Say::Heartbeat(RankHeartbeat { activity, activity_seconds })).await.is_err() {
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use agentfly_policy::placement::Place;

    use super::*;

    #[test]
    fn commands_that_come_during_the_preparation_wait_for_it_in_order() {
        let rollout = |shard| {
            Command::RunRollout(agentfly_proto::v1::RunRollout { shard_id: shard, ..Default::default() })
        };
        let mut desk = Desk::<&str>::Empty;
        assert!(desk.take(rollout(1)).is_err());
        desk = Desk::Preparing(Vec::new());
        assert!(desk.take(Command::FormGroup(Default::default())).unwrap().is_none());
        assert!(desk.take(rollout(1)).unwrap().is_none());
        let waited = desk.prepared(Arc::new("job"));
        assert_eq!(waited, [Command::FormGroup(Default::default()), rollout(1)]);
        let (job, command) = desk.take(rollout(2)).unwrap().unwrap();
        assert_eq!((*job, command), ("job", rollout(2)));
    }

    #[test]
    fn options_print_without_the_token() {
        let options = RankOptions {
            coordinator: "head:6379".into(),
            token: Secret::new("hunter2"),
            id: RankId::default(),
            device: DeviceName(Place::Cpu),
            threads: 1,
            ranks_on_node: 1,
            address: Address("10.0.0.1".into()),
            spans: Spans::default(),
        };
        let printed = format!("{options:?}");
        assert!(printed.contains("head:6379") && !printed.contains("hunter2"), "{printed}");
    }
}
