//! A finished chain, as tokens: the one thing that travels from rollout to loss.
//!
//! Invariants, checked by [`Trajectory::check`] wherever one enters a process:
//! - **T1** `token_ids`, `loss_mask` and `log_probs` have one entry per token.
//! - **T2** a log-prob is finite, at most 0, and exactly 0 where the mask is 0.
//! - **T3** the first token is never trained on (nothing predicts it).

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::ids::{ChainKey, PolicyVersion};

/// One finished chain.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Trajectory {
    /// Which chain of the job this is.
    pub key: ChainKey,
    /// The data row's `id`, for people.
    pub prompt_id: String,
    /// The weights that sampled every token of it.
    pub policy_version: PolicyVersion,
    /// Prompt, turns and observations exactly as the policy saw and sampled them; length T.
    pub token_ids: Vec<u32>,
    /// True on the tokens the policy sampled; length T.
    pub loss_mask: Vec<bool>,
    /// The rollout's log-prob of each sampled token, 0 elsewhere; length T.
    pub log_probs: Vec<f32>,
    /// What a person reads: the messages in order.
    pub messages: Vec<Message>,
    /// How it ended.
    pub outcome: Outcome,
    /// What it earned.
    pub reward: Reward,
    /// Where its time went.
    pub timings: Timings,
}

/// One message of a chain, for tools, rewards and people; never re-tokenised.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Message {
    /// `system`, `user`, `assistant` or `tool`.
    pub role: Role,
    /// Its text.
    pub content: String,
    /// The tool that answered, for tool messages.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tool: Option<String>,
}

/// Who speaks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Role {
    /// The agent's instructions.
    System,
    /// The question.
    User,
    /// The policy.
    Assistant,
    /// A tool's observation.
    Tool,
}

/// How a chain ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "kind")]
pub enum Outcome {
    /// By its own doing: its reward counts, whatever it is.
    Finished {
        /// The finish reason.
        reason: FinishReason,
    },
    /// By a fault of the machinery (a tool pool that died, say): it is run again and never counts as a
    /// reward of 0.
    InfrastructureFault {
        /// What happened.
        cause: String,
    },
}

/// AgentFly's finish reasons, and [`FinishReason::Timeout`], which AgentFly has not: its chains have no clock.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FinishReason {
    /// The agent or a tool said so.
    Terminal,
    /// No (valid) tool call was made.
    NoToolCalls,
    /// `agent.max_steps` turns were taken.
    MaxTurns,
    /// The token budget of the chain is spent.
    MaxModelLen,
    /// The chain's own time (`trainer.chain_timeout_seconds`) is spent, and it had sampled something by then.
    Timeout,
}

/// What a chain earned: one number, and named parts (`acc`, …).
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Reward {
    /// The scalar the advantage is computed from.
    pub value: f64,
    /// Named numbers beside it; `acc` feeds validation accuracy.
    #[serde(default)]
    pub parts: BTreeMap<String, f64>,
}

/// Seconds of a chain by phase.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct Timings {
    /// Waiting for and running generation.
    pub generate_seconds: f64,
    /// In tools.
    pub tool_seconds: f64,
    /// In the reward.
    pub reward_seconds: f64,
    /// From start to end.
    pub total_seconds: f64,
    /// Generations.
    pub turns: u32,
    /// Tool calls made.
    pub tool_calls: u32,
}

/// A trajectory that breaks an invariant: a fault of this program, never of the user.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum BrokenTrajectory {
    /// T1.
    #[error("{key}: {ids} token ids, {mask} mask entries and {log_probs} log-probs should be equally many")]
    Lengths {
        /// The chain.
        key: ChainKey,
        /// Number of ids.
        ids: usize,
        /// Number of mask entries.
        mask: usize,
        /// Number of log-probs.
        log_probs: usize,
    },
    /// T2.
    #[error("{key}: token {index} (trained on: {trained}) has log-prob {log_prob}; {rule}")]
    LogProb {
        /// The chain.
        key: ChainKey,
        /// Position of the token.
        index: usize,
        /// Its mask.
        trained: bool,
        /// Its log-prob.
        log_prob: f32,
        /// What should hold.
        rule: &'static str,
    },
    /// T3.
    #[error("{key}: the first token is marked as sampled, but nothing can have predicted it")]
    FirstToken {
        /// The chain.
        key: ChainKey,
    },
}

impl Trajectory {
    /// Checks the invariants T1–T3.
    ///
    /// # Errors
    /// Names the chain, the token and the values of the first violation.
    pub fn check(&self) -> Result<(), BrokenTrajectory> {
        let (key, n) = (self.key, self.token_ids.len());
        if self.loss_mask.len() != n || self.log_probs.len() != n {
            let (mask, log_probs) = (self.loss_mask.len(), self.log_probs.len());
            return Err(BrokenTrajectory::Lengths { key, ids: n, mask, log_probs });
        }
        if self.loss_mask.first() == Some(&true) {
            return Err(BrokenTrajectory::FirstToken { key });
        }
        for (index, (&trained, &log_prob)) in self.loss_mask.iter().zip(&self.log_probs).enumerate() {
            let broken = |rule| Err(BrokenTrajectory::LogProb { key, index, trained, log_prob, rule });
            match trained {
                true if !(log_prob.is_finite() && log_prob <= 0.0) => {
                    return broken("must be finite and ≤ 0");
                }
                false if log_prob != 0.0 => return broken("must be 0 on tokens the policy did not sample"),
                _ => {}
            }
        }
        Ok(())
    }

    /// Number of tokens the policy sampled.
    #[must_use]
    pub fn sampled_tokens(&self) -> usize {
        self.loss_mask.iter().filter(|&&m| m).count()
    }
}
