//! Training on complete groups, and what comes after each step.
//!
//! Advantages are computed once, here, over the whole batch; each rank gets its slice with the numbers that
//! must be global. A step counts when all ranks attest the next policy version with the same hash.

use std::collections::{BTreeMap, BTreeSet};

use agentfly_common::error::Whose;
use agentfly_common::ids::PolicyVersion;
use agentfly_common::trajectory::Trajectory;

use super::advantage::{self, Scored};
use super::event::{CoreFault, Decision, JobState, JudgedTrajectory, Level, Moment, Phase, RankCommand};
use super::job::{Desk, Job, Life, reduce};
use super::metrics::{self, Batch};
use super::plan;
use super::rollout::Rollout;
use super::starting::same_weights;

/// All ranks train on one batch.
#[derive(Debug)]
pub(crate) struct Training {
    pub(crate) step: u64,
    /// When the step began, with its rollout.
    step_began: Moment,
    since: Moment,
    /// What each rank reported.
    pub(crate) done: BTreeMap<usize, Trained>,
    /// What is known of the batch before it is trained on.
    batch_metrics: BTreeMap<String, f64>,
    /// Whether any token of the batch has an advantage other than 0.
    teaches: bool,
}

/// A rank's report of a step.
#[derive(Debug)]
pub(crate) struct Trained {
    policy_version: PolicyVersion,
    weights_hash: String,
    metrics: BTreeMap<String, f64>,
}

impl Job {
    /// The ranks hold the same weights: the first step, or a validation before it.
    pub(super) fn begin(&mut self, desk: &mut Desk<'_>) {
        let (job, detail) =
            (self.id.clone(), format!("all ranks hold policy version {}", self.policy_version));
        desk.out.push(Decision::State { job, state: JobState::Running, detail });
        if self.plan.validation_rows > 0 && (self.plan.validate_first || self.plan.validate_only) {
            self.start_validation(desk);
        } else {
            self.next_step(desk);
        }
    }

    pub(super) fn next_step(&mut self, desk: &mut Desk<'_>) {
        let (done, total) = (self.steps_done, self.plan.total_steps);
        if done >= total {
            self.finish(format!("{done} of {total} steps done"), desk);
        } else {
            self.start_rollout(desk);
        }
    }

    /// Groups are complete: judge the chains, keep them, and hand each rank its slice.
    pub(super) fn start_training(&mut self, rollout: Rollout, desk: &mut Desk<'_>) {
        let Rollout { step, since, purpose, faults, .. } = rollout;
        let groups_rerun = rollout.groups_rerun();
        let rollout_seconds = desk.now.saturating_sub(since).as_secs_f64();
        let Some(chains) = rollout.groups.into_chains() else {
            return self.fail_us(format!("step {step}: groups were not complete when training began"), desk);
        };
        let (no_room, of) = (metrics::without_room(chains.iter().map(|(chain, _)| chain)), chains.len());
        if chains.iter().all(|(chain, _)| chain.sampled_tokens() == 0) {
            let rows = chains.into_iter();
            let rows =
                rows.map(|(trajectory, row)| JudgedTrajectory { trajectory, advantage: None, row }).collect();
            desk.out.push(Decision::KeepTrajectories { job: self.id.clone(), purpose, step, rows });
            return self.fail(nothing_to_train_on(step, no_room, of), desk);
        }
        let advantages = match self.judge(step, &chains) {
            Ok(advantages) => advantages,
            Err(fault) => return self.fail(fault, desk),
        };
        let rows: Vec<_> = chains.iter().map(|(chain, _)| chain).zip(advantages.iter().copied()).collect();
        let teaches = rows.iter().any(|(chain, advantage)| chain.sampled_tokens() > 0 && *advantage != 0.0);
        let (mini_batch_rows, world_size) = (self.plan.mini_batch_rows, self.plan.world_size);
        let shards = plan::shards(step, self.policy_version, &rows, mini_batch_rows, world_size);
        let max_turn_tokens = self.plan.max_turn_tokens;
        let batch = Batch { step, rows: &rows, faults, groups_rerun, rollout_seconds, max_turn_tokens };
        let mut batch_metrics = batch.metrics();
        batch_metrics.extend(metrics::balance(&rows, &shards));
        batch_metrics.extend(reduce(rollout.measured.iter()));
        let rows = chains.into_iter().zip(advantages);
        let rows =
            rows.map(|((trajectory, row), a)| JudgedTrajectory { trajectory, advantage: Some(a), row });
        desk.out.push(Decision::KeepTrajectories {
            job: self.id.clone(),
            purpose,
            step,
            rows: rows.collect(),
        });
        if no_room > 0 {
            let text = format!(
                "step {step}: {no_room} of {of} chains have a prompt that leaves no room for a turn within {WINDOW}; \
                 nothing is learned from them"
            );
            self.log(Level::Warn, text, desk);
        }
        for (rank, shard) in self.ranks.iter().zip(shards) {
            desk.out.push(Decision::OfferShard { rank: rank.id.clone(), shard: Box::new(shard) });
        }
        let (step_began, done) = (since, BTreeMap::new());
        let training = Training { step, step_began, since: desk.now, done, batch_metrics, teaches };
        self.life = Life::Training(Box::new(training));
        self.progress(Phase::Train, step, 0, self.ranks.len() as u64, desk);
        self.command_all(&RankCommand::RunTrain { step, policy_version: self.policy_version }, desk);
    }

    /// The advantage of each chain.
    fn judge(&self, step: u64, chains: &[(Trajectory, usize)]) -> Result<Vec<f64>, CoreFault> {
        let scored = |(chain, _): &(Trajectory, usize)| {
            let (group, score, tokens) = (chain.key.group, chain.reward.value, chain.sampled_tokens());
            Scored { group, score, tokens }
        };
        let scored: Vec<Scored> = chains.iter().map(scored).collect();
        advantage::advantages(self.plan.estimator, &scored)
            .map_err(|error| CoreFault { whose: Whose::Operator, message: format!("step {step}: {error}") })
    }

    pub(crate) fn train_done(
        &mut self,
        rank: usize,
        step: u64,
        attested: (PolicyVersion, String),
        metrics: BTreeMap<String, f64>,
        desk: &mut Desk<'_>,
    ) {
        let id = self.ranks[rank].id.clone();
        match &mut self.life {
            Life::Training(training) if training.step == step && !training.done.contains_key(&rank) => {
                let (policy_version, weights_hash) = attested;
                training.done.insert(rank, Trained { policy_version, weights_hash, metrics });
                let done = training.done.len();
                self.progress(Phase::Train, step, done as u64, self.ranks.len() as u64, desk);
                if done == self.ranks.len() {
                    self.end_training(desk);
                }
            }
            Life::Stopping(_) => {}
            _ => self.ignore(&format!("the end of training step {step}"), &id, desk),
        }
    }

    /// All ranks have trained: attest, report, and go on.
    fn end_training(&mut self, desk: &mut Desk<'_>) {
        // `Queued` only stands in until the next life is set, below.
        let Life::Training(training) = std::mem::replace(&mut self.life, Life::Queued) else {
            return;
        };
        let Training { step, step_began, since, done, batch_metrics, teaches } = *training;
        let attested =
            done.iter().map(|(&rank, t)| (rank, (t.policy_version, t.weights_hash.clone()))).collect();
        let hash = match same_weights(self.policy_version.next(), &attested) {
            Ok(hash) => hash,
            Err(problem) => {
                return self.fail_us(format!("step {step}: wrong weights after training: {problem}"), desk);
            }
        };
        let of_ranks = reduce(done.values().map(|trained| &trained.metrics));
        if hash == self.weights_hash
            && let Err(problem) = self.excuse_unchanged(step, teaches, &of_ranks, desk)
        {
            return self.fail_us(problem, desk);
        }
        self.policy_version = self.policy_version.next();
        self.weights_hash = hash;
        self.steps_done = step;
        self.trained = true;
        let mut all = batch_metrics;
        all.extend(of_ranks);
        all.insert("training/unchanged_updates".to_owned(), self.unchanged_updates as f64);
        all.insert("training/epoch".to_owned(), self.cursor.epoch as f64);
        metrics::time(
            &mut all,
            desk.now.saturating_sub(since),
            desk.now.saturating_sub(step_began),
            self.ranks.len(),
        );
        desk.out.push(Decision::StepFinished { job: self.id.clone(), step, metrics: all });
        if self.plan.validates_after(step) { self.start_validation(desk) } else { self.save_or_go_on(desk) }
    }

    /// The update left the weights as they were: a fault, unless it had nothing to do.
    fn excuse_unchanged(
        &mut self,
        step: u64,
        teaches: bool,
        of_ranks: &BTreeMap<String, f64>,
        desk: &mut Desk<'_>,
    ) -> Result<(), String> {
        let metric = |name: &str| of_ranks.get(name).copied();
        let why = match () {
            () if self.plan.learning_rate == 0.0 || metric("actor/lr") == Some(0.0) => {
                "the learning rate is 0"
            }
            () if !teaches => "no chain did better or worse than its group",
            () if metric("actor/skipped_updates").is_some_and(|skipped| skipped > 0.0) => {
                "updates were skipped for values that are not finite"
            }
            () => {
                return Err(format!(
                    "step {step}: the update changed nothing: the learning rate is {}, chains have advantages, and the \
                     weights still have the hash {}",
                    self.plan.learning_rate, self.weights_hash
                ));
            }
        };
        self.unchanged_updates += 1;
        let text = format!(
            "step {step} left the weights unchanged, because {why} ({} such steps so far)",
            self.unchanged_updates
        );
        self.log(Level::Warn, text, desk);
        Ok(())
    }

    pub(super) fn end_validation(&mut self, rollout: Rollout, desk: &mut Desk<'_>) {
        let (step, purpose) = (rollout.step, rollout.purpose);
        let seconds = desk.now.saturating_sub(rollout.since).as_secs_f64();
        // A job resumes after a checkpoint, so what ran in this life tells a first validation from a later one.
        let before_training = !self.trained;
        let Some(chains) = rollout.groups.into_chains() else {
            return self.fail_us(format!("step {step}: validation ended before its chains were in"), desk);
        };
        let source_of = |row: usize| self.plan.validation_sources.get(row).map_or("unknown", String::as_str);
        let metrics =
            metrics::validation(chains.iter().map(|(chain, row)| (source_of(*row), chain)), seconds);
        let rows = chains.into_iter();
        let rows =
            rows.map(|(trajectory, row)| JudgedTrajectory { trajectory, advantage: None, row }).collect();
        desk.out.push(Decision::KeepTrajectories { job: self.id.clone(), purpose, step, rows });
        desk.out.push(Decision::ValidationFinished { job: self.id.clone(), step, metrics });
        match () {
            () if self.plan.validate_only => {
                self.finish("validated, as trainer.val_only says".to_owned(), desk)
            }
            () if before_training => self.next_step(desk),
            () => self.save_or_go_on(desk),
        }
    }

    fn save_or_go_on(&mut self, desk: &mut Desk<'_>) {
        if self.plan.saves_after(self.steps_done) { self.save(desk) } else { self.next_step(desk) }
    }

    /// Which ranks are late with their training, in words.
    pub(super) fn late_training(&self, training: &Training, now: Moment) -> Option<String> {
        let limit = self.plan.train_deadline;
        if now.saturating_sub(training.since) <= limit {
            return None;
        }
        let late: BTreeSet<usize> =
            (0..self.ranks.len()).filter(|rank| !training.done.contains_key(rank)).collect();
        let waiting = self.waiting(late.into_iter(), "finish training", now);
        let seconds = limit.as_secs();
        Some(format!("step {}: {waiting}; trainer.train_timeout_seconds={seconds} is over", training.step))
    }
}

/// The key that says how long a chain may be.
const WINDOW: &str = "actor_rollout_ref.rollout.max_model_len (unset: the model's window)";

/// The end of a job whose step of `of` chains has no sampled token: prompts that leave no room are the operator's;
/// without one, a worker sent chains that cannot be.
fn nothing_to_train_on(step: u64, no_room: usize, of: usize) -> CoreFault {
    if no_room == 0 {
        let message = format!(
            "step {step}: none of its {of} chains has a sampled token, though prompts left room for one"
        );
        return CoreFault { whose: Whose::Us, message };
    }
    let message = format!(
        "step {step}: none of its {of} chains has a sampled token, so there is nothing to train on: the prompts of \
         {no_room} leave no room for a turn within {WINDOW}; raise that, or shorten the questions in data.train_files \
         or agent.system_prompt"
    );
    CoreFault { whose: Whose::Operator, message }
}
