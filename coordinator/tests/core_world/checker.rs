//! Watches everything that goes into the core and comes out of it, and fails at the first broken invariant.

use std::collections::{BTreeMap, BTreeSet};

use agentfly_common::ids::{ChainKey, PolicyVersion, Purpose};
use agentfly_common::trajectory::Outcome;
use agentfly_coordinator::core::View;
use agentfly_coordinator::core::event::{Decision, Event, JobId, JobSpec, JobState, RankCommand, RankId};

/// What has been seen of each job.
#[derive(Default)]
pub(crate) struct Checker {
    jobs: BTreeMap<JobId, Seen>,
    /// Ranks that were told to stop, or whose exit the core knows.
    stopped: BTreeSet<RankId>,
}

#[derive(Default)]
struct Seen {
    world_size: usize,
    rows_per_step: usize,
    total_steps: u64,
    ended: bool,
    /// Chains the core was told of, without those that ended by a fault.
    told: BTreeSet<ChainKey>,
    counted: BTreeSet<ChainKey>,
    /// Keys of the last step that was kept, without the chains that sampled nothing, and of the shards offered for it.
    kept: (u64, BTreeSet<ChainKey>),
    offered: BTreeSet<ChainKey>,
    attested: BTreeMap<u64, BTreeMap<u32, (PolicyVersion, String)>>,
    steps: u64,
}

impl Checker {
    pub(crate) fn submitted(&mut self, job: &str, spec: &JobSpec) {
        let config = &spec.config;
        let seen = Seen {
            world_size: config.world_size() as usize,
            rows_per_step: (config.data.train_batch_size * config.agent.num_chains) as usize,
            total_steps: config.trainer.total_training_steps.unwrap(),
            steps: spec.resume.as_ref().map_or(0, |point| point.step),
            ..Seen::default()
        };
        self.jobs.insert(job.to_owned(), seen);
    }

    /// An event is about to be told.
    pub(crate) fn before(&mut self, event: &Event) {
        if super::rank_of(&mut event.clone()).is_some_and(|rank| rank.incarnation == 0) {
            return; // C8: it must change nothing, so nothing may count that only it has said
        }
        match event {
            Event::RankExited { rank, .. } => {
                self.stopped.insert(rank.clone());
            }
            Event::TrajectoryArrived { rank, trajectory, .. } => {
                if matches!(trajectory.outcome, Outcome::Finished { .. }) {
                    self.seen(&rank.job).told.insert(trajectory.key);
                }
            }
            Event::TrainDone { rank, step, policy_version, weights_hash, .. } => {
                // The first report counts; what is said again changes nothing.
                let of_step = self.seen(&rank.job).attested.entry(*step).or_default();
                of_step.entry(rank.rank).or_insert((*policy_version, weights_hash.clone()));
            }
            _ => {}
        }
    }

    fn seen(&mut self, job: &str) -> &mut Seen {
        self.jobs.get_mut(job).unwrap()
    }

    pub(crate) fn decided(&mut self, decision: &Decision) {
        let job = job_of(decision).clone();
        let is_stop = matches!(decision, Decision::StopRanks { .. });
        assert!(is_stop || !self.seen(&job).ended, "C6: after the end of {job}: {decision:?}");
        match decision {
            Decision::Command { rank, command } => self.commanded(rank, command),
            Decision::KeepTrajectories { purpose, step, rows, .. } => {
                let seen = self.seen(&job);
                let keys: BTreeSet<_> = rows.iter().map(|row| row.trajectory.key).collect();
                assert_eq!(keys.len(), rows.len(), "C1: a chain is kept twice");
                for (key, row) in keys.iter().zip(rows) {
                    assert!(seen.counted.insert(*key), "C1: {key} counts twice");
                    assert!(seen.told.contains(key), "C2: {key} never came");
                    assert!(
                        matches!(row.trajectory.outcome, Outcome::Finished { .. }),
                        "C2: {key} had no end"
                    );
                }
                if *purpose == Purpose::Train {
                    assert_eq!(rows.len(), seen.rows_per_step, "C2: incomplete groups in step {step}");
                    let sampling = rows.iter().filter(|row| row.trajectory.sampled_tokens() > 0);
                    seen.kept = (*step, sampling.map(|row| row.trajectory.key).collect());
                    seen.offered.clear();
                }
            }
            Decision::OfferShard { shard, .. } => {
                let seen = self.seen(&job);
                for row in shard.mini_batches.iter().flat_map(|batch| &batch.rows) {
                    assert!(seen.kept.1.contains(&row.key), "C2: {} is offered and was not kept", row.key);
                    assert!(seen.offered.insert(row.key), "C1: {} is trained on twice", row.key);
                }
            }
            Decision::StepFinished { step, .. } => self.seen(&job).finished(*step),
            Decision::Ended { end, .. } => {
                let seen = self.seen(&job);
                seen.ended = true;
                assert_eq!(end.steps_done, seen.steps);
                assert_eq!(end.policy_version, PolicyVersion(seen.steps), "C3");
                assert_eq!(end.fault.is_some(), end.state == JobState::Failed);
                assert!(end.state != JobState::Finished || seen.steps == seen.total_steps);
            }
            _ => {}
        }
    }

    fn commanded(&mut self, rank: &RankId, command: &RankCommand) {
        assert!(!self.stopped.contains(rank), "C7: {rank:?} is gone and gets {command:?}");
        if matches!(command, RankCommand::Stop { .. }) {
            self.stopped.insert(rank.clone());
        }
        if let RankCommand::RunTrain { step, policy_version } = command {
            let seen = self.seen(&rank.job);
            assert_eq!(seen.kept.0, *step, "C2: trained before the groups were complete");
            assert_eq!(seen.offered, seen.kept.1, "C2: a chain is not trained on");
            assert_eq!((*step, *policy_version), (seen.steps + 1, PolicyVersion(seen.steps)), "C3");
        }
    }

    /// After each event: how things stand.
    pub(crate) fn after(&mut self, view: &View) {
        for node in &view.nodes {
            let seats: BTreeSet<_> = node.ranks.iter().map(|rank| rank.device).collect();
            assert_eq!(seats.len(), node.ranks.len(), "C9: two ranks on one seat: {node:?}");
        }
        for job in &view.jobs {
            let seen = &self.jobs[&job.job];
            assert_eq!(job.policy_version, PolicyVersion(seen.steps), "C3");
            assert!(!seen.ended || job.ranks.is_empty(), "C5: {} has ended and has ranks", job.job);
        }
    }
}

impl Seen {
    fn finished(&mut self, step: u64) {
        assert_eq!(step, self.steps + 1, "C3: steps follow each other");
        self.steps = step;
        let attested = &self.attested[&step];
        assert_eq!(attested.len(), self.world_size, "C3: step {step} ended before all ranks attested it");
        let kinds: BTreeSet<_> = attested.values().collect();
        assert_eq!(kinds.len(), 1, "C3: step {step} counts with {kinds:?}");
        assert!(kinds.iter().all(|(version, _)| *version == PolicyVersion(step)), "C3: {kinds:?}");
    }
}

fn job_of(decision: &Decision) -> &JobId {
    match decision {
        Decision::StartRank { rank, .. }
        | Decision::Command { rank, .. }
        | Decision::OfferShard { rank, .. } => &rank.job,
        Decision::StopRanks { job, .. }
        | Decision::State { job, .. }
        | Decision::Progress { job, .. }
        | Decision::KeepTrajectories { job, .. }
        | Decision::StepFinished { job, .. }
        | Decision::ValidationFinished { job, .. }
        | Decision::CommitCheckpoint { job, .. }
        | Decision::Log { job, .. }
        | Decision::Ended { job, .. } => job,
    }
}
