//! The life of one job: an enum, and a match for everything that can happen in each part of it.
//!
//! ```text
//!  Queued ─seats─▶ Starting ─all attest the same weights─▶ [validation] ─┐
//!                                                                       ▼
//!            ┌────────────────────────────── Rollout ─groups complete─▶ Training ─all attest─▶ [validation]
//!            │                                                                                    │
//!            └───────────── next step ◀──────────────────────────────────────────── [Checkpoint] ◀┘
//!  any of them ─done, fault or cancel─▶ Stopping ─all ranks gone, or grace over─▶ Over
//! ```
//!
//! `starting` forms the group of ranks, `rollout` gathers chains, `step` trains, `checkpoint` saves, each as
//! further methods of [`Job`]. Called by [`State`](super::State) only.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

use agentfly_common::error::Whose;
use agentfly_common::ids::PolicyVersion;

use super::checkpoint::Saving;
use super::event::{
    CoreFault, Decision, Device, JobEnd, JobId, JobState, Level, Moment, NodeId, Phase, RankCommand, RankId,
};
use super::fleet::Placement;
use super::rollout::Rollout;
use super::settings::{CoreSettings, JobPlan};
use super::starting::Starting;
use super::step::Training;
use crate::data::{Cursor, Order};

/// What every handler needs beside the job: the time, the limits, and where decisions go.
pub(crate) struct Desk<'a> {
    pub(crate) now: Moment,
    pub(crate) settings: &'a CoreSettings,
    pub(crate) out: &'a mut Vec<Decision>,
}

/// One job.
#[derive(Debug)]
pub(crate) struct Job {
    pub(crate) id: JobId,
    pub(crate) plan: JobPlan,
    pub(crate) ranks: Vec<Rank>,
    pub(crate) life: Life,
    /// Why it waits, while it is queued.
    pub(crate) waits_for: String,
    /// Since when it is queued and no node that lives could hold it.
    homeless_since: Option<Moment>,
    pub(crate) steps_done: u64,
    /// Weights all ranks hold, and their hash once attested.
    pub(crate) policy_version: PolicyVersion,
    pub(crate) weights_hash: String,
    /// Where the next batch of training rows begins.
    pub(crate) cursor: Cursor,
    pub(crate) order: Order,
    /// Shard ids are never used twice in a job, so a late answer is told from a new one.
    pub(crate) next_shard: u64,
    /// Training steps that left the weights as they were.
    pub(crate) unchanged_updates: u64,
    /// Whether a step was trained in this life of the job.
    pub(crate) trained: bool,
    /// A failure that another one may explain.
    pub(crate) pending: Option<Pending>,
}

/// A rank failed by something outside it, most often a collective. Until `until`, the death of another rank is
/// taken for the cause; nothing else is decided meanwhile.
#[derive(Debug)]
pub(crate) struct Pending {
    until: Moment,
    /// Index of the rank.
    rank: usize,
    fault: CoreFault,
}

/// Where a job stands.
#[derive(Debug)]
pub(crate) enum Life {
    Queued,
    Starting(Starting),
    Rollout(Box<Rollout>),
    Training(Box<Training>),
    Saving(Saving),
    Stopping(Stopping),
    Over(JobEnd),
}

/// Ranks are ending.
#[derive(Debug)]
pub(crate) struct Stopping {
    /// When the job ends even if a rank was not heard to exit.
    until: Moment,
    end: JobEnd,
}

/// One rank of the job.
#[derive(Debug)]
pub(crate) struct Rank {
    pub(crate) id: RankId,
    pub(crate) node: NodeId,
    pub(crate) device: Device,
    pub(crate) standing: Standing,
    /// What it said it does, and since when.
    pub(crate) activity: Option<(String, Moment)>,
    pub(crate) heard: Moment,
}

/// What is known of a rank's process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Standing {
    /// Its node was told to start it.
    Started,
    /// It opened its session.
    Joined,
    /// It is gone.
    Gone,
}

impl Job {
    pub(crate) fn new(id: JobId, plan: JobPlan) -> Self {
        let (steps_done, policy_version, cursor) = match &plan.resume {
            Some(point) => (point.step, point.policy_version, point.cursor),
            None => (0, PolicyVersion(0), Cursor::default()),
        };
        let order = Order::new(plan.train_rows, None, plan.data_seed, plan.shuffle);
        Self {
            id,
            plan,
            order,
            ranks: Vec::new(),
            life: Life::Queued,
            waits_for: String::new(),
            homeless_since: None,
            steps_done,
            policy_version,
            weights_hash: String::new(),
            cursor,
            next_shard: 1,
            unchanged_updates: 0,
            trained: false,
            pending: None,
        }
    }

    pub(crate) fn state(&self) -> JobState {
        match &self.life {
            Life::Queued => JobState::Queued,
            Life::Starting(_) => JobState::Starting,
            Life::Rollout(_) | Life::Training(_) | Life::Saving(_) => JobState::Running,
            Life::Stopping(_) => JobState::Stopping,
            Life::Over(end) => end.state,
        }
    }

    /// What it is doing, or why it ended.
    pub(crate) fn detail(&self) -> String {
        let total = self.plan.total_steps;
        match &self.life {
            Life::Queued => self.waits_for.clone(),
            Life::Starting(_) => format!("starting its ranks ({})", self.plan.world_size),
            Life::Rollout(rollout) => rollout.detail(total),
            Life::Training(training) => {
                format!(
                    "step {} of {total}: training, {} of {} ranks done",
                    training.step,
                    training.done.len(),
                    self.ranks.len()
                )
            }
            Life::Saving(saving) => format!("step {} of {total}: writing a checkpoint", saving.step),
            Life::Stopping(stopping) => format!("stopping: {}", stopping.end.detail),
            Life::Over(end) => end.detail.clone(),
        }
    }

    /// The index of a rank that is part of the job's present life and not gone.
    pub(crate) fn member(&self, rank: &RankId) -> Option<usize> {
        let index = rank.rank as usize;
        let known = self.ranks.get(index)?;
        (known.id == *rank && known.standing != Standing::Gone).then_some(index)
    }

    pub(crate) fn living_ranks(&self) -> impl Iterator<Item = &Rank> {
        self.ranks.iter().filter(|rank| rank.standing != Standing::Gone)
    }

    /// Seats were found: ranks start there.
    pub(crate) fn start(&mut self, placements: Vec<Placement>, desk: &mut Desk<'_>) {
        for (rank, placement) in (0..).zip(placements) {
            let id = RankId { job: self.id.clone(), rank, incarnation: 1 };
            let Placement { node, device, threads, ranks_on_node } = placement;
            desk.out.push(Decision::StartRank {
                node: node.clone(),
                rank: id.clone(),
                device,
                threads,
                ranks_on_node,
            });
            let (standing, heard) = (Standing::Started, desk.now);
            self.ranks.push(Rank { id, node, device, standing, activity: None, heard });
        }
        self.life = Life::Starting(Starting::new(desk.now));
        self.announce(desk);
    }

    /// It stays in the queue, for this reason. The wait for other jobs has no limit; that for nodes has one: those
    /// that could hold it were there when it was submitted, and may be gone for good.
    pub(crate) fn stays_queued(&mut self, waits_for: String, could_fit: bool, desk: &mut Desk<'_>) {
        let changed = self.waits_for != waits_for;
        self.waits_for = waits_for;
        self.homeless_since = match could_fit {
            true => None,
            false => Some(self.homeless_since.unwrap_or(desk.now)),
        };
        let limit = self.plan.start_deadline;
        match self.homeless_since {
            Some(since) if desk.now.saturating_sub(since) > limit => {
                let (seconds, waits_for) = (limit.as_secs(), &self.waits_for);
                let message = format!(
                    "queued without a place for longer than trainer.startup_timeout_seconds={seconds}: {waits_for}"
                );
                self.fail(CoreFault { whose: Whose::Outside, message }, desk);
            }
            _ if changed => self.announce(desk),
            _ => {}
        }
    }

    /// A rank was heard.
    pub(crate) fn heard(&mut self, rank: usize, activity: String, seconds: f64, now: Moment) {
        let rank = &mut self.ranks[rank];
        let ago = Moment::try_from_secs_f64(seconds).unwrap_or_default();
        rank.heard = now;
        rank.activity = Some((activity, now.saturating_sub(ago)));
    }

    /// A rank's process is gone, for `cause`.
    pub(crate) fn rank_gone(&mut self, rank: usize, cause: &str, whose: Whose, desk: &mut Desk<'_>) {
        let name = self.ranks[rank].id.rank;
        self.ranks[rank].standing = Standing::Gone;
        if matches!(self.life, Life::Stopping(_)) {
            self.log(Level::Info, format!("rank {name} ended: {cause}"), desk);
            self.end_if_empty(desk);
        } else if self.pending.as_ref().is_some_and(|pending| pending.rank == rank) {
            self.log(Level::Info, format!("rank {name} ended after it failed: {cause}"), desk);
        } else {
            let message = format!("rank {name} on node {} is gone: {cause}", self.ranks[rank].node);
            self.fail(CoreFault { whose, message }, desk);
        }
    }

    /// A rank says that it cannot go on; its process ends after that.
    pub(crate) fn rank_failed(&mut self, rank: usize, fault: &CoreFault, desk: &mut Desk<'_>) {
        let Rank { id, node, .. } = &self.ranks[rank];
        let message = format!("rank {} on node {node} failed: {}", id.rank, fault.message);
        let alone = self.ranks.len() == 1;
        match (&self.life, &self.pending, fault.whose) {
            (Life::Stopping(_), _, _) => self.log(Level::Info, message, desk),
            (_, None, Whose::Outside) if !alone => {
                self.log(Level::Warn, message.clone(), desk);
                let (until, fault) =
                    (desk.now + desk.settings.cause_margin, CoreFault { whose: fault.whose, message });
                self.pending = Some(Pending { until, rank, fault });
            }
            // The second to suffer explains nothing.
            (_, Some(_), Whose::Outside) => self.log(Level::Warn, message, desk),
            (_, _, whose) => self.fail(CoreFault { whose, message }, desk),
        }
    }

    /// All ranks of a node are gone with it.
    pub(crate) fn node_lost(&mut self, node: &NodeId, cause: &str, desk: &mut Desk<'_>) {
        let there = |rank: &&mut Rank| rank.node == *node && rank.standing != Standing::Gone;
        let mut lost = Vec::new();
        for rank in self.ranks.iter_mut().filter(there) {
            rank.standing = Standing::Gone;
            lost.push(rank.id.rank.to_string());
        }
        if lost.is_empty() {
            return;
        }
        let message = format!("node {node} is lost, and rank {} with it: {cause}", lost.join(", "));
        match self.life {
            Life::Stopping(_) => self.end_if_empty(desk),
            _ => self.fail(CoreFault { whose: Whose::Outside, message }, desk),
        }
    }

    /// A person ends the job.
    pub(crate) fn cancel(&mut self, why: String, desk: &mut Desk<'_>) {
        match self.life {
            Life::Stopping(_) | Life::Over(_) => {}
            _ => {
                self.pending = None;
                self.stop(JobState::Cancelled, format!("cancelled: {why}"), None, desk);
            }
        }
    }

    /// The job cannot go on. Only the first cause counts: what breaks after it breaks because of it. A failure
    /// that waited for its cause is told after it.
    pub(crate) fn fail(&mut self, fault: CoreFault, desk: &mut Desk<'_>) {
        let fault = match self.pending.take() {
            Some(pending) => {
                let message = format!("{}; with it, {}", fault.message, pending.fault.message);
                CoreFault { message, ..fault }
            }
            None => fault,
        };
        if !matches!(self.life, Life::Stopping(_) | Life::Over(_)) {
            self.log(Level::Error, fault.message.clone(), desk);
            self.stop(JobState::Failed, fault.message.clone(), Some(fault), desk);
        }
    }

    /// A bug of this program, seen in what a rank said.
    pub(crate) fn fail_us(&mut self, message: String, desk: &mut Desk<'_>) {
        self.fail(CoreFault { whose: Whose::Us, message }, desk);
    }

    pub(crate) fn finish(&mut self, detail: String, desk: &mut Desk<'_>) {
        self.stop(JobState::Finished, detail, None, desk);
    }

    fn stop(&mut self, state: JobState, detail: String, fault: Option<CoreFault>, desk: &mut Desk<'_>) {
        let (policy_version, steps_done) = (self.policy_version, self.steps_done);
        let until = desk.now + desk.settings.stop_grace + desk.settings.stop_margin;
        let end = JobEnd { state, detail: detail.clone(), fault, policy_version, steps_done };
        self.life = Life::Stopping(Stopping { until, end });
        let mut nodes: Vec<&NodeId> = Vec::new();
        for rank in self.ranks.iter().filter(|rank| rank.standing != Standing::Gone) {
            if rank.standing == Standing::Joined {
                let command = RankCommand::Stop { why: detail.clone() };
                desk.out.push(Decision::Command { rank: rank.id.clone(), command });
            }
            if !nodes.contains(&&rank.node) {
                nodes.push(&rank.node);
            }
        }
        for node in &nodes {
            let (job, grace) = (self.id.clone(), desk.settings.stop_grace);
            desk.out.push(Decision::StopRanks { node: (*node).clone(), job, grace });
        }
        if !nodes.is_empty() {
            self.announce(desk);
        }
        self.end_if_empty(desk);
    }

    fn end_if_empty(&mut self, desk: &mut Desk<'_>) {
        if self.ranks.iter().all(|rank| rank.standing == Standing::Gone) {
            self.end(desk);
        }
    }

    fn end(&mut self, desk: &mut Desk<'_>) {
        if let Life::Stopping(stopping) = &self.life {
            let end = stopping.end.clone();
            self.life = Life::Over(end.clone());
            desk.out.push(Decision::Ended { job: self.id.clone(), end });
        }
    }

    /// Time passed: whoever was waited for too long is named.
    pub(crate) fn tick(&mut self, desk: &mut Desk<'_>) {
        if let Some(pending) = self.pending.take() {
            match desk.now < pending.until {
                true => self.pending = Some(pending),
                false => self.fail(pending.fault, desk),
            }
            return;
        }
        let late = match &self.life {
            Life::Queued | Life::Over(_) => None,
            Life::Starting(starting) => self.late_start(starting, desk.now),
            Life::Rollout(rollout) => self.late_rollout(rollout, desk.settings.answer_margin, desk.now),
            Life::Training(training) => self.late_training(training, desk.now),
            Life::Saving(saving) => self.late_saving(saving, desk.now),
            Life::Stopping(stopping) if desk.now < stopping.until => None,
            Life::Stopping(_) => {
                self.end_late(desk);
                None
            }
        };
        if let Some(message) = late.or_else(|| self.silent(desk.settings.rank_silence, desk.now)) {
            self.fail(CoreFault { whose: Whose::Outside, message }, desk);
        }
    }

    /// Which joined ranks have not been heard for too long, in words.
    fn silent(&self, limit: Duration, now: Moment) -> Option<String> {
        if !matches!(self.life, Life::Starting(_) | Life::Rollout(_) | Life::Training(_) | Life::Saving(_)) {
            return None;
        }
        let is_silent = |rank: &usize| {
            let rank = &self.ranks[*rank];
            rank.standing == Standing::Joined && now.saturating_sub(rank.heard) > limit
        };
        let silent: Vec<usize> = (0..self.ranks.len()).filter(is_silent).collect();
        let one = |rank: &usize| {
            let Rank { id, node, heard, activity, .. } = &self.ranks[*rank];
            let doing =
                activity.as_ref().map_or("it had not said what it does".to_owned(), |(activity, since)| {
                    format!("it was in {activity}, since {} s", now.saturating_sub(*since).as_secs())
                });
            let seconds = now.saturating_sub(*heard).as_secs();
            format!("rank {} on node {node} has been silent for {seconds} s; last {doing}", id.rank)
        };
        let words: Vec<String> = silent.iter().map(one).collect();
        (!words.is_empty()).then(|| format!("{}; is it stopped or hung?", words.join(", and ")))
    }

    /// Grace and margin are over and a rank was not heard to exit: its node has ended it by force or is gone.
    fn end_late(&mut self, desk: &mut Desk<'_>) {
        let silent: Vec<String> = self
            .ranks
            .iter_mut()
            .filter(|rank| rank.standing != Standing::Gone)
            .map(|rank| {
                rank.standing = Standing::Gone;
                format!("rank {} on node {}", rank.id.rank, rank.node)
            })
            .collect();
        self.log(
            Level::Warn,
            format!("{} did not report its exit in time; ending anyway", silent.join(", ")),
            desk,
        );
        self.end(desk);
    }

    /// "waiting for rank 1 to train; it has been in all_reduce for 41 s" for each of `ranks`.
    pub(crate) fn waiting(&self, ranks: impl Iterator<Item = usize>, to: &str, now: Moment) -> String {
        let one = |rank: usize| {
            let Rank { id, activity, heard, .. } = &self.ranks[rank];
            let seconds = |since: &Moment| now.saturating_sub(*since).as_secs();
            let said = match activity {
                Some((activity, since)) => format!("it has been in {activity} for {} s", seconds(since)),
                None => "it has not said what it does".to_owned(),
            };
            format!("waiting for rank {} to {to}; {said} (last heard {} s ago)", id.rank, seconds(heard))
        };
        ranks.map(one).collect::<Vec<_>>().join(", and ")
    }

    /// Announces the job's state.
    pub(crate) fn announce(&self, desk: &mut Desk<'_>) {
        let (job, state, detail) = (self.id.clone(), self.state(), self.detail());
        desk.out.push(Decision::State { job, state, detail });
    }

    pub(crate) fn log(&self, level: Level, text: String, desk: &mut Desk<'_>) {
        desk.out.push(Decision::Log { job: self.id.clone(), level, text });
    }

    pub(crate) fn progress(&self, phase: Phase, step: u64, done: u64, total: u64, desk: &mut Desk<'_>) {
        desk.out.push(Decision::Progress { job: self.id.clone(), phase, step, done, total });
    }

    /// Something that came too late, twice, or from another life, and changes nothing.
    pub(crate) fn ignore(&self, what: &str, rank: &RankId, desk: &mut Desk<'_>) {
        if !matches!(self.life, Life::Over(_)) {
            let text = format!(
                "ignored {what} from rank {} (incarnation {}): not expected now",
                rank.rank, rank.incarnation
            );
            self.log(Level::Warn, text, desk);
        }
    }

    pub(crate) fn command(&self, rank: usize, command: RankCommand, desk: &mut Desk<'_>) {
        desk.out.push(Decision::Command { rank: self.ranks[rank].id.clone(), command });
    }

    pub(crate) fn command_all(&self, command: &RankCommand, desk: &mut Desk<'_>) {
        (0..self.ranks.len()).for_each(|rank| self.command(rank, command.clone(), desk));
    }

    pub(crate) fn resume_dir(&self) -> Option<PathBuf> {
        self.plan.resume.as_ref().map(|point| point.dir.clone())
    }
}

/// Rank metrics of one phase as one map. A name with `max` among its words takes the maximum, `min` the
/// minimum, `total` or `count` the sum, any other the mean over the ranks that gave it (verl's
/// `reduce_metrics`, which knows no sums).
pub(crate) fn reduce<'a>(of_ranks: impl Iterator<Item = &'a BTreeMap<String, f64>>) -> BTreeMap<String, f64> {
    let mut values: BTreeMap<&str, Vec<f64>> = BTreeMap::new();
    for (name, value) in of_ranks.flatten() {
        values.entry(name).or_default().push(*value);
    }
    let reduce = |name: &str, values: &[f64]| {
        let has = |word: &str| name.split(['/', '_', '.']).any(|part| part == word);
        let sum = values.iter().sum::<f64>();
        match () {
            () if has("max") => values.iter().copied().fold(f64::NEG_INFINITY, f64::max),
            () if has("min") => values.iter().copied().fold(f64::INFINITY, f64::min),
            () if has("total") || has("count") => sum,
            () => sum / values.len() as f64,
        }
    };
    values.into_iter().map(|(name, values)| (name.to_owned(), reduce(name, &values))).collect()
}
