//! What the core must know to run a job: the head's limits, and the few numbers of a job's configuration.
//!
//! [`JobPlan::of`] is the only place in the core that reads [`Config`](agentfly_common::config::Config); all
//! other files see a [`JobPlan`].

use std::time::Duration;

use agentfly_common::config::{AdvEstimator, batch_plan};
use agentfly_common::error::Whose;

use super::advantage::Estimator;
use super::event::{CoreFault, JobSpec, ResumePoint};

/// The head's own limits, the same for every job.
#[derive(Debug, Clone)]
pub struct CoreSettings {
    /// A node silent for this long is taken for lost.
    pub node_lease: Duration,
    /// What a rank gets between "end" and being ended by force.
    pub stop_grace: Duration,
    /// How long after the grace the exit of a rank may take to be heard.
    pub stop_margin: Duration,
    /// A rank whose heartbeats stop for so long is taken for hung: they come each second, whatever it does.
    pub rank_silence: Duration,
    /// How long a rank's report of something outside it waits for a better cause: a collective fails on the
    /// living ranks before the death of the one that broke it is heard.
    pub cause_margin: Duration,
    /// What a rank may take beyond a rollout's own deadline, which it watches itself, to answer.
    pub answer_margin: Duration,
}

impl Default for CoreSettings {
    fn default() -> Self {
        Self {
            node_lease: Duration::from_secs(15),
            stop_grace: Duration::from_secs(10),
            stop_margin: Duration::from_secs(5),
            rank_silence: Duration::from_secs(60),
            cause_margin: Duration::from_secs(2),
            answer_margin: Duration::from_secs(30),
        }
    }
}

/// The numbers of a job that steer it. Everything else in its configuration concerns only its ranks.
#[derive(Debug, Clone)]
pub struct JobPlan {
    /// `trainer.n_gpus_per_node`: the ranks a node gets, if the nodes allow it.
    pub ranks_per_node: u32,
    /// Ranks in all: `trainer.n_gpus_per_node` × `trainer.nnodes`.
    pub world_size: u32,
    /// The job's seed.
    pub seed: u64,
    /// Seed of the order of the training rows.
    pub data_seed: u64,
    /// `data.train_batch_size`: prompts of a step.
    pub groups_per_step: usize,
    /// `agent.num_chains`: chains of a prompt.
    pub chains_per_group: u32,
    /// `actor.ppo_mini_batch_size`: chains of one optimizer step, over all ranks.
    pub mini_batch_rows: usize,
    /// `algorithm.adv_estimator`.
    pub estimator: Estimator,
    /// `actor.optim.lr`: with 0, an update that changes nothing is no fault.
    pub learning_rate: f64,
    /// The last training step.
    pub total_steps: u64,
    /// Rows of the training set.
    pub train_rows: usize,
    /// Rows of the validation set.
    pub validation_rows: usize,
    /// `data.shuffle`.
    pub shuffle: bool,
    /// Source of each validation row, for `val-core/{source}/…`.
    pub validation_sources: Vec<String>,
    /// `trainer.val_before_train`.
    pub validate_first: bool,
    /// `trainer.val_only`: end after that.
    pub validate_only: bool,
    /// `trainer.test_freq`, if positive.
    pub validate_every: Option<u64>,
    /// `trainer.save_freq`, if positive.
    pub save_every: Option<u64>,
    /// `rollout.max_tokens`: tokens a turn may have.
    pub max_turn_tokens: usize,
    /// `trainer.startup_timeout_seconds`: from starting the ranks to all of them attesting their weights, and for
    /// nodes that could hold the job to be there while it is queued.
    pub start_deadline: Duration,
    /// `trainer.rollout_timeout_seconds`: for the chains of one rollout shard.
    pub rollout_deadline: Duration,
    /// `trainer.train_timeout_seconds`: for one training step on all ranks.
    pub train_deadline: Duration,
    /// `trainer.checkpoint_timeout_seconds`: for writing a checkpoint, and again for committing it.
    pub checkpoint_deadline: Duration,
    /// Where the job goes on, if it resumes.
    pub resume: Option<ResumePoint>,
}

impl JobPlan {
    /// Reads the plan out of a job's configuration.
    ///
    /// # Errors
    /// If the batch sizes do not fit each other or the data.
    pub fn of(spec: &JobSpec) -> Result<Self, CoreFault> {
        let config = &spec.config;
        let (trainer, actor) = (&config.trainer, &config.actor_rollout_ref.actor);
        let batches =
            batch_plan(config, Some(spec.train_rows as u64)).map_err(|error| operator(error.to_string()))?;
        let total_steps = batches.total_steps.ok_or_else(|| {
            operator("the number of steps is not known: give trainer.total_training_steps".to_owned())
        })?;
        let by_std = config.algorithm.norm_adv_by_std_in_grpo;
        let estimator = match config.algorithm.adv_estimator {
            AdvEstimator::Grpo => Estimator::Grpo { by_std },
            AdvEstimator::GrpoPassK => Estimator::GrpoPassK { by_std },
            AdvEstimator::Rloo => Estimator::Rloo,
            AdvEstimator::Opo => Estimator::Opo,
            AdvEstimator::Gpg => Estimator::Gpg,
            AdvEstimator::ReinforcePlusPlusBaseline => Estimator::ReinforcePlusPlusBaseline,
        };
        let positive = |every: i64| u64::try_from(every).ok().filter(|&every| every > 0);
        Ok(Self {
            ranks_per_node: trainer.n_gpus_per_node,
            world_size: config.world_size(),
            seed: trainer.seed,
            data_seed: config.data_seed(),
            groups_per_step: config.data.train_batch_size as usize,
            chains_per_group: config.agent.num_chains,
            mini_batch_rows: usize::try_from(batches.mini_batch_chains).unwrap_or(usize::MAX),
            estimator,
            learning_rate: actor.optim.lr,
            total_steps,
            train_rows: spec.train_rows,
            validation_rows: spec.validation_rows,
            shuffle: config.data.shuffle,
            validation_sources: spec.validation_sources.clone(),
            validate_first: trainer.val_before_train,
            validate_only: trainer.val_only,
            validate_every: positive(trainer.test_freq),
            save_every: positive(trainer.save_freq),
            max_turn_tokens: config.actor_rollout_ref.rollout.max_tokens as usize,
            start_deadline: Duration::from_secs(trainer.startup_timeout_seconds),
            rollout_deadline: Duration::from_secs(trainer.rollout_timeout_seconds),
            train_deadline: Duration::from_secs(trainer.train_timeout_seconds),
            checkpoint_deadline: Duration::from_secs(trainer.checkpoint_timeout_seconds),
            resume: spec.resume.clone(),
        })
    }

    /// Whether the checkpoint that the job resumes is at its last step already, or beyond.
    #[must_use]
    pub fn is_done(&self) -> bool {
        self.resume.as_ref().is_some_and(|point| point.step >= self.total_steps)
    }

    /// Whether the policy is validated after `step`: every `validate_every` steps, and after the last.
    #[must_use]
    pub fn validates_after(&self, step: u64) -> bool {
        self.validation_rows > 0 && self.is_due(step, self.validate_every)
    }

    /// Whether a checkpoint is written after `step`: every `save_every` steps, and after the last, so that a
    /// trained model is never lost.
    #[must_use]
    pub fn saves_after(&self, step: u64) -> bool {
        self.is_due(step, self.save_every)
    }

    fn is_due(&self, step: u64, every: Option<u64>) -> bool {
        step == self.total_steps || every.is_some_and(|every| step.is_multiple_of(every))
    }
}

fn operator(message: String) -> CoreFault {
    CoreFault { whose: Whose::Operator, message }
}
