//! Gathering chains: shards of groups go to the ranks, chains come back one by one, groups are complete or
//! they do not count.
//!
//! A chain that ended by a fault of the machinery (a sandbox that broke, an engine that failed) has no reward. Its
//! group is asked again, as a new shard on the next rank; chains of the group that were fine are sampled again with
//! the same seeds and counted once. A chain that ran into a limit of its own (turns, tokens, time) would do so
//! again: it is finished, has a reward and counts like any other. Whatever is asked again, the step's time is
//! counted from its start.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use agentfly_common::error::Whose;
use agentfly_common::ids::{PolicyVersion, Purpose};
use agentfly_common::trajectory::{Outcome, Trajectory};

use super::event::{CoreFault, Level, Moment, Phase, RankCommand};
use super::groups::{Groups, Taken};
use super::job::{Desk, Job, Life};

/// How often a group is asked again before the job gives up.
const RERUNS: u32 = 3;

/// One phase of generating.
#[derive(Debug)]
pub(crate) struct Rollout {
    pub(crate) purpose: Purpose,
    pub(crate) step: u64,
    pub(crate) since: Moment,
    pub(crate) groups: Groups,
    policy_version: PolicyVersion,
    chains_per_group: u32,
    shards: BTreeMap<u64, Shard>,
    /// Groups with a chain that ended by a fault, and its cause, until they are asked again.
    faulted: BTreeMap<u32, String>,
    reruns: BTreeMap<u32, u32>,
    /// Chains that ended by a fault of the machinery.
    pub(crate) faults: u64,
    /// What the ranks measured.
    pub(crate) measured: Vec<BTreeMap<String, f64>>,
}

/// Groups one rank was asked for.
#[derive(Debug)]
struct Shard {
    rank: usize,
    groups: BTreeSet<u32>,
    done: bool,
    deadline: Moment,
}

/// What to make of a chain that arrived.
enum Arrival {
    Counts,
    Faulted,
    Again,
    Late,
    Broken(String),
}

impl Rollout {
    pub(crate) fn detail(&self, total_steps: u64) -> String {
        let (what, step) = match self.purpose {
            Purpose::Train => ("rollout", self.step),
            Purpose::Validation => ("validation", self.step),
        };
        let (done, total) = (self.groups.arrived(), self.groups.total());
        format!("step {step} of {total_steps}: {what}, {done} of {total} chains")
    }

    pub(crate) fn phase(&self) -> Phase {
        match self.purpose {
            Purpose::Train => Phase::Rollout,
            Purpose::Validation => Phase::Validation,
        }
    }

    /// Groups that were asked more than once.
    pub(crate) fn groups_rerun(&self) -> usize {
        self.reruns.len()
    }

    fn is_over(&self) -> bool {
        self.groups.complete() && self.shards.values().all(|shard| shard.done)
    }

    fn arrive(&mut self, rank: usize, shard: u64, chain: Trajectory, next_shard: u64) -> Arrival {
        let key = chain.key;
        let Some(asked) = self.shards.get(&shard) else {
            if shard < next_shard {
                return Arrival::Late;
            }
            return Arrival::Broken(format!("chain {key} came for shard {shard}, which was never asked for"));
        };
        if asked.rank != rank || !self.groups.knows(&key) || !asked.groups.contains(&key.group) {
            return Arrival::Broken(format!(
                "chain {key} was not asked for in shard {shard} (of rank {})",
                asked.rank
            ));
        }
        if chain.policy_version != self.policy_version {
            return Arrival::Broken(format!(
                "chain {key} was sampled by policy version {}, expected {}",
                chain.policy_version, self.policy_version
            ));
        }
        if let Outcome::InfrastructureFault { cause } = chain.outcome {
            if self.groups.has(&key) {
                return Arrival::Again;
            }
            self.faults += 1;
            self.faulted.insert(key.group, cause);
            return Arrival::Faulted;
        }
        if let Err(broken) = chain.check() {
            return Arrival::Broken(broken.to_string());
        }
        if !chain.reward.value.is_finite() {
            return Arrival::Broken(format!("chain {key} has the reward {}", chain.reward.value));
        }
        match self.groups.take(chain) {
            Taken::New => Arrival::Counts,
            Taken::Duplicate => Arrival::Again,
        }
    }

    /// Groups of an ended shard that must be asked again, with the cause.
    fn faulted_after(&mut self, shard: u64) -> Result<BTreeMap<u32, String>, CoreFault> {
        let Shard { rank, groups, .. } = &self.shards[&shard];
        let mut again = BTreeMap::new();
        for &group in groups {
            let fault = self.faulted.remove(&group);
            let Some(missing) = self.groups.missing_of(group) else {
                continue;
            };
            let Some(cause) = fault else {
                let message = format!("rank {rank} ended shard {shard}, but chain {missing} never came");
                return Err(CoreFault { whose: Whose::Us, message });
            };
            let reruns = self.reruns.entry(group).or_default();
            if *reruns == RERUNS {
                let times = RERUNS + 1;
                let message = format!(
                    "chain {missing} failed {times} times for reasons that are not its own, last on rank {rank}: {cause}"
                );
                return Err(CoreFault { whose: Whose::Outside, message });
            }
            *reruns += 1;
            again.insert(group, cause);
        }
        Ok(again)
    }
}

impl Job {
    /// Starts the rollout of the next training step.
    pub(super) fn start_rollout(&mut self, desk: &mut Desk<'_>) {
        let rows = self.order.next_batch(&mut self.cursor, self.plan.groups_per_step);
        self.generate(Purpose::Train, self.steps_done + 1, self.plan.chains_per_group, rows, desk);
    }

    /// Starts a validation of the weights as they are: every row of the validation set, one chain each.
    pub(super) fn start_validation(&mut self, desk: &mut Desk<'_>) {
        self.generate(
            Purpose::Validation,
            self.steps_done,
            1,
            (0..self.plan.validation_rows).collect(),
            desk,
        );
    }

    fn generate(&mut self, purpose: Purpose, step: u64, chains: u32, rows: Vec<usize>, desk: &mut Desk<'_>) {
        let count = u32::try_from(rows.len()).unwrap_or(u32::MAX);
        self.life = Life::Rollout(Box::new(Rollout {
            purpose,
            step,
            since: desk.now,
            groups: Groups::new(purpose, step, chains, rows),
            policy_version: self.policy_version,
            chains_per_group: chains,
            shards: BTreeMap::new(),
            faulted: BTreeMap::new(),
            reruns: BTreeMap::new(),
            faults: 0,
            measured: Vec::new(),
        }));
        let world = self.plan.world_size;
        let bound =
            |rank: u32| u32::try_from(u64::from(rank) * u64::from(count) / u64::from(world)).unwrap_or(count);
        for rank in 0..world {
            let groups: BTreeSet<u32> = (bound(rank)..bound(rank + 1)).collect();
            if !groups.is_empty() {
                self.ask(rank as usize, groups, desk);
            }
        }
        self.rollout_progress(desk);
    }

    /// Asks a rank for all chains of `groups`.
    fn ask(&mut self, rank: usize, groups: BTreeSet<u32>, desk: &mut Desk<'_>) {
        let shard = self.next_shard;
        let Life::Rollout(rollout) = &mut self.life else {
            return;
        };
        let deadline = rollout.since + self.plan.rollout_deadline;
        self.next_shard += 1;
        let command = RankCommand::RunRollout {
            shard,
            purpose: rollout.purpose,
            step: rollout.step,
            policy_version: rollout.policy_version,
            chains: rollout.chains_per_group,
            groups: groups.iter().map(|&group| (group, rollout.groups.row(group))).collect(),
            deadline: deadline.saturating_sub(desk.now),
        };
        rollout.shards.insert(shard, Shard { rank, groups, done: false, deadline });
        self.command(rank, command, desk);
    }

    fn rollout_progress(&self, desk: &mut Desk<'_>) {
        if let Life::Rollout(rollout) = &self.life {
            let (done, total) = (rollout.groups.arrived(), rollout.groups.total());
            self.progress(rollout.phase(), rollout.step, done, total, desk);
        }
    }

    pub(crate) fn trajectory_arrived(
        &mut self,
        rank: usize,
        shard: u64,
        chain: Trajectory,
        desk: &mut Desk<'_>,
    ) {
        let id = self.ranks[rank].id.clone();
        let key = chain.key;
        let arrival = match &mut self.life {
            Life::Rollout(rollout) => rollout.arrive(rank, shard, chain, self.next_shard),
            Life::Stopping(_) => return,
            _ => Arrival::Late,
        };
        match arrival {
            Arrival::Counts => self.rollout_progress(desk),
            Arrival::Faulted | Arrival::Again => {}
            Arrival::Late => self.ignore(&format!("chain {key} of shard {shard}"), &id, desk),
            Arrival::Broken(problem) => {
                let message = format!("rank {rank} sent a chain that cannot be trained on: {problem}");
                self.fail_us(message, desk);
            }
        }
    }

    pub(crate) fn rollout_done(
        &mut self,
        rank: usize,
        shard: u64,
        metrics: BTreeMap<String, f64>,
        desk: &mut Desk<'_>,
    ) {
        let id = self.ranks[rank].id.clone();
        let rollout = match &mut self.life {
            Life::Rollout(rollout) => rollout,
            Life::Stopping(_) => return,
            _ => return self.ignore(&format!("the end of shard {shard}"), &id, desk),
        };
        let Some(asked) = rollout.shards.get_mut(&shard).filter(|asked| asked.rank == rank && !asked.done)
        else {
            return self.ignore(&format!("the end of shard {shard}"), &id, desk);
        };
        asked.done = true;
        rollout.measured.push(metrics);
        let again = match rollout.faulted_after(shard) {
            Ok(again) => again,
            Err(fault) => return self.fail(fault, desk),
        };
        if !again.is_empty() {
            for (group, cause) in &again {
                let text =
                    format!("group {group} is asked again: a chain of it failed on rank {rank}: {cause}");
                self.log(Level::Warn, text, desk);
            }
            self.ask((rank + 1) % self.ranks.len(), again.into_keys().collect(), desk);
        }
        self.end_rollout_if_over(desk);
    }

    fn end_rollout_if_over(&mut self, desk: &mut Desk<'_>) {
        if !matches!(&self.life, Life::Rollout(rollout) if rollout.is_over()) {
            return;
        }
        // `Queued` only stands in until the next life is set, below.
        let Life::Rollout(rollout) = std::mem::replace(&mut self.life, Life::Queued) else {
            return;
        };
        match rollout.purpose {
            Purpose::Train => self.start_training(*rollout, desk),
            Purpose::Validation => self.end_validation(*rollout, desk),
        }
    }

    /// Which ranks are late with their chains, in words.
    pub(super) fn late_rollout(&self, rollout: &Rollout, margin: Duration, now: Moment) -> Option<String> {
        let open = rollout.shards.values().filter(|shard| !shard.done);
        let late: BTreeSet<usize> =
            open.filter(|shard| now > shard.deadline + margin).map(|s| s.rank).collect();
        if late.is_empty() {
            return None;
        }
        let (done, total) = (rollout.groups.arrived(), rollout.groups.total());
        let waiting = self.waiting(late.into_iter(), "finish its chains", now);
        let limit = self.plan.rollout_deadline.as_secs();
        Some(format!(
            "step {}: {waiting}; {done} of {total} chains are in and trainer.rollout_timeout_seconds={limit} is over",
            rollout.step
        ))
    }
}
