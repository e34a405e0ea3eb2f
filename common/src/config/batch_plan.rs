//! Batch arithmetic, pure: how many chains a step has, and how they become optimizer steps.
//!
//! Called by `resolve` (without the data) and by the coordinator once the questions are counted. verl's meaning
//! of the keys, with AgentFly's unit: `ppo_mini_batch_size` counts chains. Ranks need not get equal numbers of
//! chains: they are dealt by tokens, and the loss is normalised over the whole mini-batch.

use serde::{Deserialize, Serialize};

use crate::config::error::ConfigError;
use crate::config::schema::{Actor, Config};

/// verl's default `ppo_mini_batch_size`: the size up to which an unset one takes whole steps.
const DEFAULT_MINI_BATCH: u64 = 256;
/// An unset mini-batch is not made smaller than this on its own.
const LEAST_DEFAULT_MINI_BATCH: u64 = 32;

/// How a rank cuts its part of a mini-batch into forward/backward passes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum MicroBatch {
    /// So many chains each.
    Chains(u32),
    /// As many chains as have so many tokens together (one longer chain is a micro-batch alone).
    Tokens(u32),
    /// By tokens, as many as each rank's memory has room for ([`crate::planner`]).
    Planned,
}

/// How a rank cuts its part, as the settings say.
#[must_use]
pub fn micro_batch(actor: &Actor) -> MicroBatch {
    match (actor.ppo_micro_batch_size_per_gpu, actor.ppo_max_token_len_per_gpu) {
        (Some(chains), _) if !actor.use_dynamic_bsz => MicroBatch::Chains(chains),
        (_, Some(tokens)) => MicroBatch::Tokens(tokens),
        (_, None) => MicroBatch::Planned,
    }
}

/// The numbers of a job.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BatchPlan {
    /// `data.train_batch_size`.
    pub prompts_per_step: u64,
    /// `agent.num_chains`.
    pub chains_per_prompt: u64,
    /// Their product.
    pub chains_per_step: u64,
    /// Chains an optimizer step, over all ranks; divides `chains_per_step`.
    pub mini_batch_chains: u64,
    /// Mini-batches in a pass over a step's chains.
    pub mini_batches: u64,
    /// Passes.
    pub ppo_epochs: u64,
    /// Optimizer steps a training step.
    pub updates_per_step: u64,
    /// Ranks.
    pub ranks: u64,
    /// How a rank cuts its part.
    pub micro_batch: MicroBatch,
    /// Questions to train on, after `data.train_max_samples`, when known.
    pub questions: Option<u64>,
    /// Whole batches an epoch (the rest of an epoch is dropped), when the questions are known.
    pub steps_per_epoch: Option<u64>,
    /// `trainer.total_epochs`.
    pub epochs: u64,
    /// `trainer.total_training_steps`.
    pub asked_steps: Option<u64>,
    /// Training steps: as many as were asked for, but no more than the epochs have (verl's loop runs over the
    /// epochs and ends early once the steps are done). While the questions are not known, what was asked for.
    pub total_steps: Option<u64>,
}

/// Plans the batches of `config`, with `questions` in its training files if they are counted already.
///
/// # Errors
/// `Impossible`, with the numbers and a way out, when something does not divide or there is too little data.
pub fn batch_plan(config: &Config, questions: Option<u64>) -> Result<BatchPlan, ConfigError> {
    let actor = &config.actor_rollout_ref.actor;
    let prompts_per_step = u64::from(config.data.train_batch_size);
    let chains_per_prompt = u64::from(config.agent.num_chains);
    let chains_per_step = prompts_per_step * chains_per_prompt;
    let ranks = u64::from(config.world_size());
    let mini_batch_chains = mini_batch(actor.ppo_mini_batch_size, chains_per_step)?;
    if mini_batch_chains < ranks {
        return Err(impossible(
            format!("a mini-batch of {mini_batch_chains} chains leaves some of {ranks} ranks without any"),
            "raise data.train_batch_size, agent.num_chains or actor_rollout_ref.actor.ppo_mini_batch_size, or lower \
             trainer.n_gpus_per_node",
        ));
    }
    let questions = questions.map(|all| config.data.train_limit().map_or(all, |limit| all.min(limit as u64)));
    let steps_per_epoch = questions.map(|count| count / prompts_per_step);
    if let (Some(0), Some(count)) = (steps_per_epoch, questions) {
        return Err(impossible(
            format!(
                "data.train_batch_size={prompts_per_step} needs more than the {count} questions to train on"
            ),
            &format!("set data.train_batch_size to {count} or less, or give more questions"),
        ));
    }
    let epochs = config.trainer.total_epochs;
    let asked_steps = config.trainer.total_training_steps;
    let from_epochs = steps_per_epoch.map(|steps| steps.saturating_mul(epochs));
    let mini_batches = chains_per_step / mini_batch_chains;
    let ppo_epochs = u64::from(actor.ppo_epochs);
    Ok(BatchPlan {
        prompts_per_step,
        chains_per_prompt,
        chains_per_step,
        mini_batch_chains,
        mini_batches,
        ppo_epochs,
        updates_per_step: mini_batches * ppo_epochs,
        ranks,
        micro_batch: micro_batch(actor),
        questions,
        steps_per_epoch,
        epochs,
        asked_steps,
        total_steps: asked_steps.into_iter().chain(from_epochs).min(),
    })
}

/// The mini-batch as given, or a whole step up to 256 chains, or the largest divisor of a step up to 256.
fn mini_batch(given: Option<u32>, chains_per_step: u64) -> Result<u64, ConfigError> {
    let divisor_up_to =
        |most: u64| (1..=most.min(chains_per_step)).rev().find(|d| chains_per_step.is_multiple_of(*d));
    let Some(given) = given.map(u64::from) else {
        return divisor_up_to(DEFAULT_MINI_BATCH)
            .filter(|mini| *mini == chains_per_step || *mini >= LEAST_DEFAULT_MINI_BATCH)
            .ok_or_else(|| {
                impossible(
                    format!("the {chains_per_step} chains of a step have no divisor from 32 to 256 to be a mini-batch"),
                    "set actor_rollout_ref.actor.ppo_mini_batch_size, or another data.train_batch_size",
                )
            });
    };
    if given > chains_per_step {
        return Err(impossible(
            format!("a mini-batch of {given} chains is larger than a step, which has {chains_per_step}"),
            &format!(
                "set actor_rollout_ref.actor.ppo_mini_batch_size (it counts chains) to {chains_per_step} or less"
            ),
        ));
    }
    if !chains_per_step.is_multiple_of(given) {
        let below = divisor_up_to(given).unwrap_or(1);
        return Err(impossible(
            format!("the {chains_per_step} chains of a step do not divide into mini-batches of {given}"),
            &format!(
                "set actor_rollout_ref.actor.ppo_mini_batch_size (it counts chains) to {below} or {chains_per_step}"
            ),
        ));
    }
    Ok(given)
}

fn impossible(problem: String, way_out: &str) -> ConfigError {
    ConfigError::Impossible { problem, way_out: way_out.to_owned() }
}

impl BatchPlan {
    /// The arithmetic in words, one fact a line.
    #[must_use]
    pub fn in_words(&self) -> Vec<String> {
        let ranks = count(self.ranks, "rank", "ranks");
        let mut lines = vec![
            format!(
                "{} × {} = {} a step",
                count(self.prompts_per_step, "prompt", "prompts"),
                count(self.chains_per_prompt, "chain", "chains"),
                count(self.chains_per_step, "chain", "chains"),
            ),
            format!(
                "→ {} of {} chains{} → {} a training step",
                count(self.mini_batches, "mini-batch", "mini-batches"),
                self.mini_batch_chains,
                if self.ppo_epochs > 1 { format!(", {} times over", self.ppo_epochs) } else { String::new() },
                count(self.updates_per_step, "optimizer step", "optimizer steps"),
            ),
            format!(
                "over {ranks}: {}{} of a mini-batch each, dealt by tokens",
                if self.mini_batch_chains.is_multiple_of(self.ranks) { "" } else { "about " },
                count((self.mini_batch_chains + self.ranks / 2) / self.ranks, "chain", "chains"),
            ),
            match self.micro_batch {
                MicroBatch::Chains(chains) => {
                    format!("in micro-batches of {} on a rank", count(chains.into(), "chain", "chains"))
                }
                MicroBatch::Tokens(tokens) => format!("in micro-batches of up to {tokens} tokens on a rank"),
                MicroBatch::Planned => "in micro-batches that each rank's memory has room for".to_owned(),
            },
        ];
        if let (Some(questions), Some(steps)) = (self.questions, self.steps_per_epoch) {
            let dropped = questions % self.prompts_per_step;
            lines.push(format!(
                "{} → {} an epoch{}",
                count(questions, "question", "questions"),
                count(steps, "step", "steps"),
                if dropped > 0 {
                    format!(" ({dropped} left over, others each epoch)")
                } else {
                    String::new()
                },
            ));
        }
        lines.push(match self.total_steps {
            Some(total) => {
                format!(
                    "{} in all = {}, {}",
                    count(total, "training step", "training steps"),
                    count(total.saturating_mul(self.chains_per_step), "chain", "chains"),
                    count(total.saturating_mul(self.updates_per_step), "optimizer step", "optimizer steps"),
                ) + &self.cut_by_epochs(total)
            }
            None => "training steps follow from the epochs once the questions are counted".to_owned(),
        });
        lines
    }

    /// What to say where the epochs end before the steps that were asked for.
    fn cut_by_epochs(&self, total: u64) -> String {
        match self.asked_steps {
            Some(asked) if asked > total => format!(
                ": trainer.total_epochs={} end before the {asked} of trainer.total_training_steps; raise \
                 trainer.total_epochs for more",
                self.epochs
            ),
            _ => String::new(),
        }
    }
}

fn count(number: u64, one: &str, many: &str) -> String {
    format!("{number} {}", if number == 1 { one } else { many })
}
