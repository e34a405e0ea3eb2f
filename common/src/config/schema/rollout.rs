//! `actor_rollout_ref.rollout.*`: sampling, the one place of it. `agent.generation_config.*` are other names of
//! the same keys, so that training tempers with the temperature that sampled. Read by the rollout engine.

use serde::{Deserialize, Serialize};

use crate::config::checks::Checks;
use crate::config::choices::Dtype;
use crate::sampling::{DIVISORS, SamplingParams, is_divisor};

/// `actor_rollout_ref.rollout.*`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Rollout {
    /// Divisor of the logits, see [`is_divisor`].
    pub temperature: f64,
    /// Nucleus mass.
    pub top_p: f64,
    /// Most likely tokens; −1 is all.
    pub top_k: i64,
    /// Tokens a turn at most; what is left of the chain may be less.
    pub max_tokens: u32,
    /// Tokens a chain; `None` is the model's window.
    pub max_model_len: Option<u32>,
    /// Chains a rank samples in one batch.
    pub max_num_seqs: u32,
    /// Number type in rollout and training.
    pub dtype: Dtype,
    /// On GPUs: launch decode steps kernel by kernel, not as CUDA graphs.
    pub enforce_eager: bool,
    /// Refuse devices on which a chain's tokens depend on what else is in its batch.
    pub full_determinism: bool,
    /// Sampling in validation.
    pub val_kwargs: ValKwargs,
}

/// `actor_rollout_ref.rollout.val_kwargs.*`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ValKwargs {
    /// False is greedy.
    pub do_sample: bool,
    /// Divisor of the logits, or 0: greedy.
    pub temperature: f64,
    /// Nucleus mass.
    pub top_p: f64,
    /// Most likely tokens; −1 is all.
    pub top_k: i64,
}

impl Rollout {
    pub(crate) fn check(&self, checks: &mut Checks) {
        let temperature = "actor_rollout_ref.rollout.temperature";
        checks.that(temperature, is_divisor(self.temperature), format!("expected {DIVISORS}"));
        checks.mass("actor_rollout_ref.rollout.top_p", self.top_p);
        checks.top_k("actor_rollout_ref.rollout.top_k", self.top_k);
        checks.at_least_one("actor_rollout_ref.rollout.max_tokens", self.max_tokens);
        checks.at_least_one("actor_rollout_ref.rollout.max_num_seqs", self.max_num_seqs);
        let window = "actor_rollout_ref.rollout.max_model_len";
        checks.that(window, self.max_model_len != Some(0), "expected at least 1, or null");
        let val = &self.val_kwargs;
        let fits = val.temperature == 0.0 || is_divisor(val.temperature);
        let temperature = "actor_rollout_ref.rollout.val_kwargs.temperature";
        checks.that(temperature, fits, format!("expected 0 (greedy), or {DIVISORS}"));
        checks.mass("actor_rollout_ref.rollout.val_kwargs.top_p", val.top_p);
        checks.top_k("actor_rollout_ref.rollout.val_kwargs.top_k", val.top_k);
    }

    /// Sampling of a training turn; the template adds `stop_ids`.
    #[must_use]
    pub fn training_sampling(&self, stop_ids: Vec<u32>) -> SamplingParams {
        SamplingParams {
            temperature: self.temperature,
            top_p: self.top_p,
            top_k: u32::try_from(self.top_k).ok(),
            max_tokens: self.max_tokens,
            stop_ids,
        }
    }

    /// Sampling of a validation turn: greedy unless `val_kwargs.do_sample`.
    #[must_use]
    pub fn validation_sampling(&self, stop_ids: Vec<u32>) -> SamplingParams {
        let val = &self.val_kwargs;
        let max_tokens = self.max_tokens;
        if !val.do_sample {
            return SamplingParams { temperature: 0.0, top_p: 1.0, top_k: None, max_tokens, stop_ids };
        }
        let top_k = u32::try_from(val.top_k).ok();
        SamplingParams { temperature: val.temperature, top_p: val.top_p, top_k, max_tokens, stop_ids }
    }
}
