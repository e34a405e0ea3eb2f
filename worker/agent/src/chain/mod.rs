//! One chain: prompt, turns, tool calls, reward — and its exact tokens.
//!
//! The worker runs many of these side by side with [`run_chain`]; the rollout engine stands behind
//! [`Generator`]. What must stay true: sampled ids enter the trajectory as they were sampled and everything else
//! is outside the loss; every token of a chain comes from one policy version; a fault of the machinery ends as
//! [`agentfly_common::trajectory::Outcome::InfrastructureFault`], never as a reward of 0; every wait ends by
//! the chain's own limit or its step's deadline, and a chain that reached its own limit keeps what it sampled.

mod record;
mod row;
mod run;
mod state;

use std::sync::Arc;
use std::time::Duration;

use agentfly_common::ids::{ChainKey, PolicyVersion};
use agentfly_common::sampling::{Generation, SamplingParams};
use agentfly_common::seed::JobSeed;
use agentfly_common::trajectory::BrokenTrajectory;
use async_trait::async_trait;
use serde_json::{Map, Value};
use tokio::time::Instant;

use crate::agents::Agent;
use crate::clock::Clock;
use crate::rewards::{RewardFault, RewardFunction};
use crate::template::{ChatTemplate, TemplateError};
use crate::tokenizer::TokenizerError;
use crate::tools::ToolSet;

pub use row::{MissingQuestion, QUESTION_FIELDS, question_of};
pub use run::run_chain;

/// What the engine needs to sample one turn.
#[derive(Debug, Clone, PartialEq)]
pub struct TurnInput<'a> {
    /// The chain; on turn 0 chains of the same group (same purpose, step and group) have the same `context`.
    pub chain: &'a ChainKey,
    /// The turn, 0-based.
    pub turn: u32,
    /// Everything before the turn, generation prompt included: enough to start over on an empty cache.
    pub context: &'a [u32],
    /// The end of `context` that the engine has not seen: the prompt on turn 0, afterwards what follows the
    /// last sampled id.
    pub new_tokens: &'a [u32],
    /// How to sample; `max_tokens` already fits the chain's budget.
    pub sampling: SamplingParams,
    /// The seed of this turn's random stream.
    pub seed: u64,
}

/// The engine could not sample.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("the rollout engine failed: {cause}")]
pub struct GenerateFault {
    /// What happened.
    pub cause: String,
}

/// Samples turns: the rollout engine, or a script in tests.
#[async_trait]
pub trait Generator: Send + Sync {
    /// Waits until the engine has room for one more turn and begins to sample this one. The wait is not the
    /// chain's own time: its clock stands still. Dropping the future withdraws the turn.
    ///
    /// # Errors
    /// The engine's fault; the chain is run again.
    async fn admit(&self, turn: TurnInput<'_>) -> Result<Box<dyn Sampling>, GenerateFault>;

    /// The chain is over: what the engine keeps for it may go. Called once a chain, also when it is cancelled.
    fn release(&self, chain: &ChainKey);
}

/// A turn that the engine has let in. Dropping it cancels the turn.
#[async_trait]
pub trait Sampling: Send {
    /// Samples to the turn's end: at least one id, at most `sampling.max_tokens`. When the chain's own time is over
    /// first, what is sampled by then, maybe nothing, with
    /// [`StopReason::TimeLimit`](agentfly_common::sampling::StopReason::TimeLimit). While the engine has paused the
    /// chain for others, its time stands still.
    ///
    /// # Errors
    /// The engine's fault; the chain is run again.
    async fn until_over(self: Box<Self>, clock: &Clock) -> Result<Generation, GenerateFault>;
}

/// One chain to run.
#[derive(Debug, Clone)]
pub struct ChainSpec {
    /// Which chain of the job.
    pub key: ChainKey,
    /// The data row's id, for people.
    pub prompt_id: String,
    /// The user's turn, see [`question_of`].
    pub question: String,
    /// The data row, for the reward.
    pub row: Arc<Map<String, Value>>,
    /// The weights that must sample every turn.
    pub policy_version: PolicyVersion,
    /// The job's seed.
    pub seed: JobSeed,
    /// At most this many turns (`agent.max_steps`).
    pub max_turns: u32,
    /// At most this many tokens, prompt and observations included; `None` leaves it to the engine.
    pub max_model_len: Option<u32>,
    /// How each turn is sampled.
    pub sampling: SamplingParams,
    /// The chain's own time (`trainer.chain_timeout_seconds`): sampling once the engine has let it in, tools, and
    /// the reward. Then it finishes as [`agentfly_common::trajectory::FinishReason::Timeout`] with the tokens it
    /// has; its reward still gets a minute. Waiting for a place in the engine or in a sandbox is not counted.
    pub time_limit: Duration,
    /// When the step's time (`trainer.rollout_timeout_seconds`) is over, every wait included.
    pub step_deadline: Instant,
}

/// What chains of one job share.
#[derive(Clone)]
pub struct ChainDeps {
    /// The rollout engine.
    pub generator: Arc<dyn Generator>,
    /// The chat template, with its tokenizer.
    pub template: Arc<ChatTemplate>,
    /// The agent type.
    pub agent: Arc<dyn Agent>,
    /// Its tools.
    pub tools: ToolSet,
    /// The reward; `None` leaves every reward at 0.
    pub reward: Option<Arc<dyn RewardFunction>>,
    /// Replaces the agent's system prompt: a literal `\n` becomes a newline, `{tools}` the tools' schemas.
    pub system_prompt: Option<String>,
}

/// A chain that would fail the same way again: a fault of the data, the configuration or this program.
#[derive(Debug, thiserror::Error)]
pub enum ChainError {
    /// The template failed.
    #[error("{key} (row {prompt_id:?}): {source}")]
    Template {
        /// The chain.
        key: ChainKey,
        /// The row.
        prompt_id: String,
        /// Why.
        source: TemplateError,
    },
    /// The tokenizer failed.
    #[error("{key} (row {prompt_id:?}): {source}")]
    Tokenizer {
        /// The chain.
        key: ChainKey,
        /// The row.
        prompt_id: String,
        /// Why.
        source: TokenizerError,
    },
    /// The reward cannot be computed from this row.
    #[error("{key}: {source}")]
    Reward {
        /// The chain.
        key: ChainKey,
        /// Why.
        source: RewardFault,
    },
    /// The chain's own time passed and there is nothing to train on.
    #[error(
        "{key} (row {prompt_id:?}): its {limit_seconds} s passed before it had sampled one token, while it waited for \
         {waited_for}; raise trainer.chain_timeout_seconds"
    )]
    NothingSampled {
        /// The chain.
        key: ChainKey,
        /// The row.
        prompt_id: String,
        /// Its limit.
        limit_seconds: f64,
        /// What it waited for.
        waited_for: &'static str,
    },
    /// The step's time passed before the chain ended.
    #[error(
        "{key} (row {prompt_id:?}): the time of the step was over while this chain waited for {waited_for}; raise \
         trainer.rollout_timeout_seconds, or give a step fewer chains (data.train_batch_size, agent.num_chains)"
    )]
    StepOver {
        /// The chain.
        key: ChainKey,
        /// The row.
        prompt_id: String,
        /// What it waited for.
        waited_for: &'static str,
    },
    /// The finished chain breaks an invariant.
    #[error(transparent)]
    Broken(#[from] BrokenTrajectory),
}

#[cfg(test)]
mod tests;
