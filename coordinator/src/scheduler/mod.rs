//! The scheduler: the one task that owns the core's state, and the handle that everyone else has.
//!
//! ```text
//!  sessions, people ──Message, mpsc(256)──▶ ┌───────────┐ ──▶ journal (first), feeds, shelf
//!  recorders ───────Recorded, mpsc(128)───▶ │ Scheduler │ ──▶ outboxes of nodes and ranks
//!  clock ───────────Tick each second──────▶ └───────────┘ ──▶ recorders
//! ```
//! Facts become the core's events in the order they come in; its decisions are carried out in order, before the
//! next fact is looked at.
//!
//! # Invariants
//! - **S1** Only this task touches [`State`].
//! - **S2** A decision about a job's life is in the journal before a watcher, a node or a rank hears of it.
//! - **S3** The task never waits for a peer: outboxes are filled without waiting. It waits for the disk alone.

mod decisions;
mod handle;
mod job;
pub mod sessions;
#[cfg(test)]
mod tests;
pub mod wire;

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use agentfly_common::ids::Purpose;
use agentfly_common::telemetry::names;
use agentfly_common::telemetry::spans::{Gathered, Span};
use agentfly_common::wire::unix_micros;
use agentfly_proto::v1 as pb;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::core::event::{CoreFault, Decision, Event, JobId, JobSpec, Moment, NodeId, RankId};
use crate::core::{CoreSettings, State};
use crate::failure::{Failure, Outcome};
use crate::feed::Feeds;
use crate::journal::{Journal, JournalError};
use crate::recorder::{Answers, Record, Recorded};
use crate::shelf::Shelf;
use crate::store::trace::{Process, SCHEDULER};
use crate::submission::Submission;

use handle::Message;
pub use handle::SchedulerHandle;
use job::OpenJob;
use sessions::{Sessions, Stuck};

/// Messages that may wait for the scheduler. Upload handlers wait behind it: that is the back-pressure.
const INBOX: usize = 256;
/// Jobs queued or running at the same time.
const MAX_OPEN_JOBS: usize = 32;

/// What the scheduler works with.
#[derive(Clone)]
pub struct Parts {
    /// Where events are kept.
    pub journal: Journal,
    /// What watchers wait on.
    pub feeds: Feeds,
    /// Where shards wait.
    pub shelf: Shelf,
    /// Recorders run here.
    pub recorders: TaskTracker,
}

/// The task's state.
pub struct Scheduler {
    core: State,
    parts: Parts,
    sessions: Sessions,
    jobs: BTreeMap<JobId, OpenJob>,
    began: Instant,
    inbox: mpsc::Receiver<Message>,
    answers: mpsc::Receiver<Recorded>,
    answer_to: Answers,
    nodes_alive: watch::Sender<usize>,
    /// Set while the head stops: no job is taken, and this is told when none is left.
    draining: Option<oneshot::Sender<()>>,
    closed: bool,
}

impl Scheduler {
    /// A scheduler and its handle.
    #[must_use]
    pub fn new(settings: CoreSettings, parts: Parts) -> (Self, SchedulerHandle) {
        let (to_inbox, inbox) = mpsc::channel(INBOX);
        let (answer_to, answers) = Answers::channel(MAX_OPEN_JOBS);
        let nodes_alive = watch::Sender::new(0);
        let handle = SchedulerHandle::new(to_inbox, nodes_alive.subscribe());
        let scheduler = Self {
            core: State::new(settings),
            parts,
            sessions: Sessions::default(),
            jobs: BTreeMap::new(),
            began: Instant::now(),
            inbox,
            answers,
            answer_to,
            nodes_alive,
            draining: None,
            closed: false,
        };
        // Whoever asks first finds the gauges there.
        scheduler.measure();
        (scheduler, handle)
    }

    /// Runs until `stop`.
    ///
    /// # Errors
    /// When the journal fails: without it nothing that is decided would be remembered.
    pub async fn run(mut self, stop: CancellationToken) -> anyhow::Result<()> {
        let mut tick = tokio::time::interval(Duration::from_secs(1));
        tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                () = stop.cancelled() => return Ok(()),
                _ = tick.tick() => self.tick().await?,
                Some(answer) = self.answers.recv() => self.recorded(answer).await?,
                Some(message) = self.inbox.recv() => self.take(message).await?,
            }
            self.measure();
        }
    }

    fn now(&self) -> Moment {
        self.began.elapsed()
    }

    async fn tick(&mut self) -> Result<(), JournalError> {
        for stuck in self.sessions.tick(self.now()) {
            let cause = "it took no commands for 10 seconds".to_owned();
            match stuck {
                Stuck::Node(node) => self.apply(Event::NodeLeft { node, cause }).await?,
                Stuck::Rank(rank) => {
                    let whose = agentfly_common::error::Whose::Outside;
                    let message = format!("rank {}: {cause}; its log may say why", rank.rank);
                    self.apply(Event::RankFailed { rank, fault: CoreFault { whose, message } }).await?;
                }
            }
        }
        self.bury_recorders().await?;
        self.apply(Event::Tick).await
    }

    /// Ends the jobs whose recorder has died. It answers an end before it closes its channel, so the answers that
    /// are there come first.
    async fn bury_recorders(&mut self) -> Result<(), JournalError> {
        let dead = |(id, job): (&JobId, &OpenJob)| job.lost_its_recorder().then(|| id.clone());
        let dead: Vec<JobId> = self.jobs.iter().filter_map(dead).collect();
        if dead.is_empty() {
            return Ok(());
        }
        while let Ok(answer) = self.answers.try_recv() {
            self.recorded(answer).await?;
        }
        for id in dead {
            match self.jobs.get_mut(&id).map(|job| job.end.take()) {
                Some(Some(end)) => self.ended_unrecorded(&id, end)?,
                Some(None) => self.apply(Event::RecorderDied { job: id }).await?,
                None => {}
            }
        }
        Ok(())
    }

    async fn take(&mut self, message: Message) -> Result<(), JournalError> {
        match message {
            Message::NodeJoined { node, facts, outbox, reply } => {
                let session = self.sessions.node_joined(node.clone(), outbox);
                // A caller that is gone has closed its session; the reader task reports that.
                let _ = reply.send(session);
                self.apply(Event::NodeJoined { node, facts }).await
            }
            Message::NodeHeard { node, session, memory_used_bytes } => {
                match self.sessions.node_heard(&node, session, Some(memory_used_bytes)) {
                    true => self.apply(Event::NodeHeard { node }).await,
                    false => Ok(()),
                }
            }
            Message::NodeLeft { node, session, cause } => {
                metrics::counter!(names::NODES_LEFT).increment(1);
                match self.sessions.node_left(&node, session) {
                    true => self.apply(Event::NodeLeft { node, cause }).await,
                    false => Ok(()),
                }
            }
            Message::RankJoined { rank, outbox, reply } => self.rank_joined(rank, outbox, reply).await,
            Message::RankLeft { rank, session } => {
                self.sessions.rank_left(&rank, session);
                Ok(())
            }
            Message::Said(event) => self.apply(*event).await,
            Message::Traced { rank, gathered } => {
                if self.core.knows(&rank) {
                    self.record(&rank.job, Record::Spans(Process::Rank(rank.rank), gathered)).await;
                }
                Ok(())
            }
            Message::Uploaded { rank, shard, trajectory, taken } => {
                let key = trajectory.key;
                let known = self.jobs.get_mut(&rank.job).is_some_and(|job| !job.is_first(shard, key));
                self.apply(Event::TrajectoryArrived { rank, shard, trajectory }).await?;
                let _ = taken.send(known);
                Ok(())
            }
            Message::MaySubmit { spec, reply } => {
                let _ = reply.send(self.may_submit(&spec));
                Ok(())
            }
            Message::Submit { submission, reply } => self.submit(*submission, reply).await,
            Message::Cancel { job, why, reply } => {
                let known = self.jobs.contains_key(&job);
                if known {
                    self.apply(Event::JobCancelled { job, why }).await?;
                }
                let _ = reply.send(known);
                Ok(())
            }
            Message::Details(reply) => {
                let jobs = self.core.view().jobs.into_iter();
                let _ = reply.send(jobs.map(|job| (job.job, job.detail)).collect());
                Ok(())
            }
            Message::Nodes(reply) => {
                let _ = reply.send(self.node_infos());
                Ok(())
            }
            Message::Drain { why, done } => self.drain(why, done).await,
            Message::Dismiss { why } => {
                let leave = pb::node_command::Kind::Leave(pb::Leave { why });
                self.sessions.to_all_nodes(self.now(), &leave);
                Ok(())
            }
        }
    }

    async fn rank_joined(
        &mut self,
        rank: RankId,
        outbox: sessions::Outbox<pb::RankCommand>,
        reply: oneshot::Sender<Result<u64, String>>,
    ) -> Result<(), JournalError> {
        if !self.core.knows(&rank) {
            let why = format!(
                "no living job has rank {} (incarnation {}) of {}",
                rank.rank, rank.incarnation, rank.job
            );
            let _ = reply.send(Err(why));
            return Ok(());
        }
        let session = self.sessions.rank_joined(rank.clone(), outbox);
        let _ = reply.send(Ok(session));
        self.apply(Event::RankJoined { rank }).await
    }

    async fn submit(
        &mut self,
        submission: Submission,
        reply: oneshot::Sender<Outcome<JobId>>,
    ) -> Result<(), JournalError> {
        if let Err(failure) = self.may_submit(&submission.spec) {
            let _ = reply.send(Err(failure));
            return Ok(());
        }
        let id = self.parts.journal.add_job(&submission.new_job)?;
        let Submission { spec, notes, .. } = &submission;
        let (spec, notes) = (Box::new(spec.clone()), notes.clone());
        match OpenJob::start(&id, submission, &self.parts, self.answer_to.clone()) {
            Ok(job) => self.jobs.insert(id.clone(), job),
            Err(error) => {
                let text = format!("{:#}", anyhow::Error::from(error));
                let detail = text.clone();
                let ended = pb::Ended {
                    state: "failed".to_owned(),
                    detail,
                    fault: None,
                    summary_json: String::new(),
                };
                self.parts.journal.append(&id, pb::job_event::Kind::Ended(ended))?;
                let _ = reply.send(Err(Failure::operator(anyhow::anyhow!(text))));
                return Ok(());
            }
        };
        self.parts.feeds.open(&id);
        for text in notes {
            self.log(&id, "info", text)?;
        }
        let _ = reply.send(Ok(id.clone()));
        self.apply(Event::JobSubmitted { job: id, spec }).await
    }

    fn may_submit(&self, spec: &JobSpec) -> Outcome {
        if self.closed {
            return Err(Failure::outside(anyhow::anyhow!(
                "the head is stopping; start it again, then the job"
            )));
        }
        if self.jobs.len() >= MAX_OPEN_JOBS {
            let text =
                format!("{MAX_OPEN_JOBS} jobs are queued or running already; wait for one, or cancel one");
            return Err(Failure::operator(anyhow::anyhow!(text)));
        }
        let fits = self.core.could_hold(spec);
        fits.map_err(|fault| Failure { whose: fault.whose, error: anyhow::anyhow!(fault.message) })
    }

    /// Cancels all jobs; `done` hears when none is left.
    async fn drain(&mut self, why: String, done: oneshot::Sender<()>) -> Result<(), JournalError> {
        self.closed = true;
        for job in self.jobs.keys().cloned().collect::<Vec<_>>() {
            self.apply(Event::JobCancelled { job, why: why.clone() }).await?;
        }
        self.draining = Some(done);
        self.check_drained();
        Ok(())
    }

    fn check_drained(&mut self) {
        if self.jobs.is_empty()
            && let Some(done) = self.draining.take()
        {
            let _ = done.send(());
        }
    }

    /// Gives the core a fact and carries out what it decides, facts that arise on the way included.
    async fn apply(&mut self, event: Event) -> Result<(), JournalError> {
        let began = Instant::now();
        let mut events = VecDeque::from([event]);
        while let Some(event) = events.pop_front() {
            metrics::counter!(names::EVENTS).increment(1);
            count(&event);
            let at_micros = unix_micros();
            let decisions = self.core.apply(self.now(), event);
            let decided_micros = unix_micros();
            let deals = decisions.iter().find_map(|decision| match decision {
                Decision::OfferShard { rank, .. } => Some(rank.job.clone()),
                _ => None,
            });
            for decision in decisions {
                events.extend(self.carry_out(decision, at_micros).await?);
            }
            if let Some(job) = deals {
                self.trace_dealing(&job, [at_micros, decided_micros, unix_micros()]).await;
            }
        }
        metrics::histogram!(names::EVENT_SECONDS).record(began.elapsed().as_secs_f64());
        Ok(())
    }

    /// Adds to a job's trace that a batch was judged, and handed out: from and to when.
    async fn trace_dealing(&mut self, job: &str, [from, judged, to]: [u64; 3]) {
        let span = |name: &str, from: u64, to: u64| Span {
            name: name.to_owned(),
            lane: SCHEDULER.to_owned(),
            start_micros: from,
            micros: to.saturating_sub(from),
            fields: BTreeMap::new(),
        };
        let spans = vec![span("advantages and shards", from, judged), span("hand out", judged, to)];
        self.record(job, Record::Spans(Process::Coordinator, Gathered { spans, dropped: 0 })).await;
    }

    #[expect(clippy::cast_precision_loss, reason = "gauges are floats")]
    fn measure(&self) {
        let nodes = self.sessions.nodes_alive();
        self.nodes_alive.send_if_modified(|now| std::mem::replace(now, nodes) != nodes);
        metrics::gauge!(names::NODES_ALIVE).set(nodes as f64);
        metrics::gauge!(names::RANKS_ALIVE).set(self.sessions.ranks_alive() as f64);
        let queued = self.jobs.values().filter(|job| job.is_queued()).count();
        metrics::gauge!(names::JOBS, "state" => "queued").set(queued as f64);
        metrics::gauge!(names::JOBS, "state" => "running").set((self.jobs.len() - queued) as f64);
    }

    fn node_infos(&self) -> Vec<pb::NodeInfo> {
        let view = self.core.view();
        view.nodes.into_iter().map(|node| wire::node_info(&node, self.memory_of(&node.node))).collect()
    }

    fn memory_of(&self, node: &NodeId) -> u64 {
        self.sessions.memory_used_bytes(node)
    }
}

/// Feeds the counters of what came in.
fn count(event: &Event) {
    let Event::TrajectoryArrived { trajectory, .. } = event else {
        return;
    };
    let purpose = match trajectory.key.purpose {
        Purpose::Train => "train",
        Purpose::Validation => "validation",
    };
    metrics::counter!(names::TRAJECTORIES, "purpose" => purpose).increment(1);
    metrics::counter!(names::TRAJECTORY_TOKENS, "purpose" => purpose)
        .increment(trajectory.token_ids.len() as u64);
    metrics::histogram!(names::CHAIN_SECONDS).record(trajectory.timings.total_seconds);
    if matches!(trajectory.outcome, agentfly_common::trajectory::Outcome::InfrastructureFault { .. }) {
        metrics::counter!(names::TRAJECTORY_FAULTS).increment(1);
    }
}
