//! The core of the coordinator: which rank does what, and when; what counts, and what ends a job.
//!
//! ```text
//!   sessions, people, clock            the shell's one task                         the world
//!   Event (a fact, with the   ──────▶  State::apply(now, event)  ──Decision──▶  commands to ranks and nodes,
//!   time it was seen)                  State::view() ──View──▶ status               files, the job's events
//! ```
//!
//! A state machine and nothing else: no clock, file, thread, network or randomness in here. The same events
//! at the same times give the same decisions.
//!
//! [`fleet`] knows nodes and seats; [`job`] is the life of a job, spread over `starting`, `rollout`, `step` and
//! `checkpoint`; [`groups`] collects chains; [`advantage`] judges them; [`plan`] deals them to the ranks;
//! [`metrics`] names what was measured.
//!
//! # Invariants (tests cite them)
//! - **C1** A chain counts at most once, however often it arrives.
//! - **C2** Nothing is trained on before all groups of the step are complete, and every group has exactly its
//!   chains: one that ended by a fault of the machinery is asked again, never counted as a reward of 0.
//! - **C3** Policy versions grow by one per training step, and a version counts only when every rank attests
//!   it with the same hash.
//! - **C4** Every wait has a deadline, and its error names who was waited for and what that rank last said. Only the
//!   wait of a queued job for other jobs has none: each of those ends.
//! - **C5** A job always ends: as soon as its ranks are gone, at the latest when the grace is over.
//! - **C6** After a job's `Ended` there is no decision about it, except `StopRanks` to a node that comes back
//!   from the dead.
//! - **C7** A rank that is gone, or was told to stop, gets no further command.
//! - **C8** What is late, foreign or from an older incarnation changes nothing.
//! - **C9** A seat holds at most one rank.

pub mod advantage;
mod checkpoint;
#[cfg(test)]
mod edges;
pub mod event;
mod fleet;
mod groups;
mod job;
mod metrics;
pub mod plan;
mod rollout;
pub mod settings;
mod starting;
mod step;
#[cfg(test)]
mod testing;
mod view;

use std::collections::BTreeMap;

use agentfly_common::error::Whose;

use event::{
    CoreFault, Decision, Event, JobEnd, JobId, JobSpec, JobState, Level, Moment, NodeFacts, NodeId, RankId,
};
use fleet::{Fleet, Seating};
use job::{Desk, Job, Life};
pub use settings::{CoreSettings, JobPlan};
pub use view::{JobView, NodeView, RankView, View};

/// All nodes and jobs.
#[derive(Debug)]
pub struct State {
    settings: CoreSettings,
    now: Moment,
    fleet: Fleet,
    jobs: BTreeMap<JobId, Job>,
    /// Jobs in the order they were submitted.
    order: Vec<JobId>,
}

impl State {
    /// No nodes, no jobs.
    #[must_use]
    pub fn new(settings: CoreSettings) -> Self {
        Self {
            settings,
            now: Moment::ZERO,
            fleet: Fleet::default(),
            jobs: BTreeMap::new(),
            order: Vec::new(),
        }
    }

    /// Takes in a fact and says what to do. Time that goes backwards is taken to stand still.
    pub fn apply(&mut self, now: Moment, event: Event) -> Vec<Decision> {
        self.now = self.now.max(now);
        let mut out = Vec::new();
        self.dispatch(event, &mut out);
        self.free_seats();
        self.start_waiting(&mut out);
        out
    }

    /// Whether this rank is part of a job that lives, so that a session of it may be opened.
    #[must_use]
    pub fn knows(&self, rank: &RankId) -> bool {
        self.jobs
            .get(&rank.job)
            .is_some_and(|job| job.member(rank).is_some() && !matches!(job.life, Life::Over(_)))
    }

    /// Whether the nodes that live now could hold a job, were they empty.
    ///
    /// # Errors
    /// What is missing, in words; also when no node has joined.
    pub fn could_hold(&self, spec: &JobSpec) -> Result<(), CoreFault> {
        match self.fleet.seats_for(&JobPlan::of(spec)?) {
            Seating::TooSmall(message) => Err(CoreFault { whose: Whose::Operator, message }),
            Seating::Now(_) | Seating::Later(_) => Ok(()),
        }
    }

    /// Nodes and jobs as they are, for people.
    #[must_use]
    pub fn view(&self) -> View {
        view::of(self.now, &self.fleet, self.order.iter().filter_map(|id| self.jobs.get(id)))
    }

    fn dispatch(&mut self, event: Event, out: &mut Vec<Decision>) {
        match event {
            Event::Tick => self.tick(out),
            Event::NodeJoined { node, facts } => self.node_joined(node, facts, out),
            Event::NodeHeard { node } => {
                for job in self.fleet.heard(&node, self.now) {
                    let (node, grace) = (node.clone(), self.settings.stop_grace);
                    out.push(Decision::StopRanks { node, job, grace });
                }
            }
            Event::NodeLeft { node, cause } => self.lose_node(&node, &cause, out),
            Event::JobSubmitted { job, spec } => self.submitted(job, &spec, out),
            Event::JobCancelled { job, why } => self.with_job(&job, out, |job, desk| job.cancel(why, desk)),
            Event::CheckpointCommitted { job, step, result } => {
                self.with_job(&job, out, |job, desk| job.checkpoint_committed(step, result, desk));
            }
            Event::RecorderDied { job } => self.with_job(&job, out, |job, desk| {
                job.fail_us(
                    "the job's recorder has died: nothing of it can be kept; please report this".to_owned(),
                    desk,
                );
            }),
            rank_event => self.of_rank(rank_event, out),
        }
    }

    /// What a rank said or did. In a job whose failure waits for its cause nothing goes on: only what tells
    /// of the cause is heard.
    fn of_rank(&mut self, event: Event, out: &mut Vec<Decision>) {
        let tells_of_ends =
            matches!(event, Event::RankHeard { .. } | Event::RankFailed { .. } | Event::RankExited { .. });
        if !tells_of_ends && self.is_undecided(&event) {
            return;
        }
        match event {
            Event::RankJoined { rank } => {
                self.with_rank(&rank, "its joining", out, |job, index, desk| job.rank_joined(index, desk));
            }
            Event::RankHeard { rank, activity, activity_seconds } => {
                self.with_rank(&rank, "a heartbeat", out, |job, index, desk| {
                    job.heard(index, activity, activity_seconds, desk.now);
                });
            }
            Event::StoreOpened { rank, host, port } => {
                self.with_rank(&rank, "an opened store", out, |job, index, desk| {
                    job.store_opened(index, host, port, desk);
                });
            }
            Event::RankReady { rank, policy_version, weights_hash } => {
                self.with_rank(&rank, "its readiness", out, |job, index, desk| {
                    job.rank_ready(index, policy_version, weights_hash, desk);
                });
            }
            Event::TrajectoryArrived { rank, shard, trajectory } => {
                self.with_rank(&rank, "a chain", out, |job, index, desk| {
                    job.trajectory_arrived(index, shard, *trajectory, desk);
                });
            }
            Event::RolloutDone { rank, shard, metrics } => {
                self.with_rank(&rank, "the end of a shard", out, |job, index, desk| {
                    job.rollout_done(index, shard, metrics, desk);
                });
            }
            Event::TrainDone { rank, step, policy_version, weights_hash, metrics } => {
                self.with_rank(&rank, "the end of a training step", out, |job, index, desk| {
                    job.train_done(index, step, (policy_version, weights_hash), metrics, desk);
                });
            }
            Event::CheckpointWritten { rank, step, files } => {
                self.with_rank(&rank, "a checkpoint", out, |job, index, desk| {
                    job.checkpoint_written(index, step, files, desk);
                });
            }
            Event::RankFailed { rank, fault } => {
                self.with_rank(&rank, "a failure", out, |job, index, desk| {
                    job.rank_failed(index, &fault, desk)
                });
            }
            Event::RankExited { rank, cause } => {
                self.with_rank(&rank, "its exit", out, |job, index, desk| {
                    job.rank_gone(index, &cause, Whose::Outside, desk);
                });
            }
            // Everything else went elsewhere in `dispatch`.
            _ => {}
        }
    }

    fn is_undecided(&self, event: &Event) -> bool {
        event.rank().and_then(|rank| self.jobs.get(&rank.job)).is_some_and(|job| job.pending.is_some())
    }

    fn with_job(&mut self, job: &JobId, out: &mut Vec<Decision>, act: impl FnOnce(&mut Job, &mut Desk<'_>)) {
        if let Some(job) = self.jobs.get_mut(job) {
            act(job, &mut Desk { now: self.now, settings: &self.settings, out });
        }
    }

    /// Lets a living member of a living job speak; anyone else is ignored (C8).
    fn with_rank(
        &mut self,
        rank: &RankId,
        what: &str,
        out: &mut Vec<Decision>,
        act: impl FnOnce(&mut Job, usize, &mut Desk<'_>),
    ) {
        self.with_job(&rank.job, out, |job, desk| match job.member(rank) {
            Some(index) => {
                job.ranks[index].heard = desk.now;
                act(job, index, desk);
            }
            None => job.ignore(what, rank, desk),
        });
    }

    fn submitted(&mut self, id: JobId, spec: &JobSpec, out: &mut Vec<Decision>) {
        if self.jobs.contains_key(&id) {
            let text = "submitted a second time under the same id: ignored".to_owned();
            return self.with_job(&id, out, |job, desk| job.log(Level::Warn, text, desk));
        }
        let plan = match JobPlan::of(spec) {
            Ok(plan) => plan,
            Err(fault) => {
                return out.push(never_begun(id, JobState::Failed, fault.message.clone(), Some(fault), spec));
            }
        };
        let done = plan.resume.as_ref().map_or(0, |point| point.step);
        if plan.is_done() {
            let detail = nothing_left(done);
            return out.push(never_begun(id, JobState::Finished, detail, None, spec));
        }
        self.order.push(id.clone());
        self.jobs.insert(id.clone(), Job::new(id, plan));
    }

    fn node_joined(&mut self, node: NodeId, facts: NodeFacts, out: &mut Vec<Decision>) {
        self.lose_node(&node, "its worker started anew", out);
        self.fleet.join(node, facts, self.now);
    }

    fn lose_node(&mut self, node: &NodeId, cause: &str, out: &mut Vec<Decision>) {
        for job in self.fleet.lose(node, cause.to_owned()) {
            self.with_job(&job, out, |job, desk| job.node_lost(node, cause, desk));
        }
    }

    fn tick(&mut self, out: &mut Vec<Decision>) {
        for (node, cause) in self.fleet.expired(self.settings.node_lease, self.now) {
            self.lose_node(&node, &cause, out);
        }
        for job in self.jobs.values_mut() {
            job.tick(&mut Desk { now: self.now, settings: &self.settings, out });
        }
    }

    /// Jobs that are over leave their seats.
    fn free_seats(&mut self) {
        for job in
            self.jobs.values_mut().filter(|job| matches!(job.life, Life::Over(_)) && !job.ranks.is_empty())
        {
            self.fleet.free(&job.id);
            job.ranks.clear();
        }
    }

    /// Gives free seats to waiting jobs, first come first served. A job that must only wait for others holds
    /// back those behind it, so that a large one is not starved; one that the cluster cannot hold does not.
    fn start_waiting(&mut self, out: &mut Vec<Decision>) {
        let mut ahead: Option<JobId> = None;
        for id in &self.order {
            let Some(job) = self.jobs.get_mut(id).filter(|job| matches!(job.life, Life::Queued)) else {
                continue;
            };
            let mut desk = Desk { now: self.now, settings: &self.settings, out };
            let (waits_for, could_fit) = match (self.fleet.seats_for(&job.plan), &ahead) {
                (Seating::Now(placements), None) => {
                    for (rank, placement) in (0..).zip(&placements) {
                        self.fleet.seat(placement, RankId { job: id.clone(), rank, incarnation: 1 });
                    }
                    job.start(placements, &mut desk);
                    continue;
                }
                (Seating::TooSmall(what), _) => (what, false),
                (Seating::Later(what), _) => {
                    ahead.get_or_insert_with(|| id.clone());
                    (what, true)
                }
                (Seating::Now(_), Some(first)) => (format!("waiting for job {first} to start first"), true),
            };
            job.stays_queued(waits_for, could_fit, &mut desk);
        }
    }
}

/// What a run is told whose checkpoint stands at its last step, or beyond.
fn nothing_left(steps: u64) -> String {
    format!(
        "nothing left to do: the run already has its {steps} steps; raise trainer.total_training_steps (and \
         trainer.total_epochs, which bounds it) to go on, or set trainer.resume_mode=disable to start anew"
    )
}

/// A job that ends before it has a life.
fn never_begun(
    job: JobId,
    state: JobState,
    detail: String,
    fault: Option<CoreFault>,
    spec: &JobSpec,
) -> Decision {
    let (policy_version, steps_done) =
        spec.resume.as_ref().map(|point| (point.policy_version, point.step)).unwrap_or_default();
    Decision::Ended { job, end: JobEnd { state, detail, fault, policy_version, steps_done } }
}
