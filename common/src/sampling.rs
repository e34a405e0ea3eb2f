//! How tokens are drawn, and what comes back: the contract between the agent loop and the rollout engine.

use serde::{Deserialize, Serialize};

/// What [`is_divisor`] asks for, in words.
pub const DIVISORS: &str = "a number above 0 whose inverse is a normal float32 (3e-39 to 8.5e37)";

/// Whether logits can be divided by this temperature, as every kernel does: by multiplying with its inverse in f32.
#[must_use]
pub fn is_divisor(temperature: f64) -> bool {
    temperature > 0.0 && ((1.0 / temperature) as f32).is_normal()
}

/// How one turn is sampled. vLLM's and verl's meaning of each field.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct SamplingParams {
    /// 0 is greedy; otherwise logits are divided by it before anything else, see [`is_divisor`].
    pub temperature: f64,
    /// Nucleus: the smallest set of most likely tokens whose mass reaches this; 1 keeps all.
    pub top_p: f64,
    /// The k most likely tokens; `None` keeps all.
    pub top_k: Option<u32>,
    /// At most this many tokens in this turn, the stop token included.
    pub max_tokens: u32,
    /// Sampling one of these ends the turn; the stop token is part of the turn and of the loss.
    pub stop_ids: Vec<u32>,
}

/// Why a turn ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum StopReason {
    /// One of `stop_ids` was sampled.
    Stop,
    /// `max_tokens`, or the engine's window, was reached.
    Length,
    /// The time its caller gave it was over: the ids are what was sampled by then, maybe none.
    TimeLimit,
}

/// What the policy sampled in one turn.
#[derive(Debug, Clone, PartialEq)]
pub struct Generation {
    /// The sampled ids, the stop token included.
    pub ids: Vec<u32>,
    /// For each id its log-prob under the tempered distribution before top-p/top-k (as the learner computes
    /// it); at temperature 0 that of the untempered distribution.
    pub log_probs: Vec<f32>,
    /// Why it ended.
    pub stop: StopReason,
    /// The weights that sampled it.
    pub policy_version: crate::ids::PolicyVersion,
}
