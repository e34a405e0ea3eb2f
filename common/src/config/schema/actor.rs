//! `actor_rollout_ref.{model,actor}.*`: the network and its optimization. Read by the learner in each rank.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::Rollout;
use crate::config::checks::Checks;
use crate::config::choices::{KlLossType, LossAggMode, LrSchedule, PolicyLossMode};

/// `actor_rollout_ref.*`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ActorRolloutRef {
    /// The network.
    pub model: Model,
    /// Its optimization.
    pub actor: Actor,
    /// Its sampling.
    pub rollout: Rollout,
    /// Deadline of a collective between ranks, in seconds.
    pub nccl_timeout: u64,
}

impl ActorRolloutRef {
    pub(crate) fn check(&self, checks: &mut Checks) {
        let path = &self.model.path;
        checks.that("actor_rollout_ref.model.path", !path.as_os_str().is_empty(), "expected a folder");
        checks.at_least_one("actor_rollout_ref.nccl_timeout", self.nccl_timeout);
        self.actor.check(checks);
        self.rollout.check(checks);
    }

    /// `nccl_timeout` as a duration.
    #[must_use]
    pub fn collective_timeout(&self) -> std::time::Duration {
        std::time::Duration::from_secs(self.nccl_timeout)
    }
}

/// `actor_rollout_ref.model.*`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Model {
    /// Hugging Face directory.
    pub path: PathBuf,
    /// Whether activations may be computed again in the backward pass, where memory asks for it.
    pub enable_gradient_checkpointing: bool,
}

/// `actor_rollout_ref.actor.*`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Actor {
    /// Chains an optimizer step over all ranks; `None`: see `batch_plan`.
    pub ppo_mini_batch_size: Option<u32>,
    /// Chains a forward/backward pass on a rank; `None` fills by tokens.
    pub ppo_micro_batch_size_per_gpu: Option<u32>,
    /// Fill by tokens in any case.
    pub use_dynamic_bsz: bool,
    /// Tokens a micro-batch filled by tokens may hold; `None`: as many as memory has room for.
    pub ppo_max_token_len_per_gpu: Option<u32>,
    /// Passes over a step's chains.
    pub ppo_epochs: u32,
    /// Largest global L2 norm of the gradient.
    pub grad_clip: f64,
    /// ε of the PPO clip.
    pub clip_ratio: f64,
    /// Lower ε; `None` is `clip_ratio`.
    pub clip_ratio_low: Option<f64>,
    /// Upper ε; `None` is `clip_ratio`.
    pub clip_ratio_high: Option<f64>,
    /// c of the dual clip.
    pub clip_ratio_c: f64,
    /// Aggregation.
    pub loss_agg_mode: LossAggMode,
    /// Constant of `seq-mean-token-sum-norm`, which needs it.
    pub loss_scale_factor: Option<f64>,
    /// Weight of the entropy bonus.
    pub entropy_coeff: f64,
    /// Whether the KL term is in the loss.
    pub use_kl_loss: bool,
    /// Its weight.
    pub kl_loss_coef: f64,
    /// Its estimator.
    pub kl_loss_type: KlLossType,
    /// The policy loss.
    pub policy_loss: PolicyLoss,
    /// AdamW and its schedule.
    pub optim: Optim,
    /// How ranks share the optimizer's state.
    pub fsdp_config: FsdpConfig,
}

impl Actor {
    fn check(&self, checks: &mut Checks) {
        const MINI: &str = "actor_rollout_ref.actor.ppo_mini_batch_size";
        const MICRO: &str = "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu";
        const TOKENS: &str = "actor_rollout_ref.actor.ppo_max_token_len_per_gpu";
        checks.that(MINI, self.ppo_mini_batch_size != Some(0), "expected at least 1, or null");
        checks.that(MICRO, self.ppo_micro_batch_size_per_gpu != Some(0), "expected at least 1, or null");
        checks.that(TOKENS, self.ppo_max_token_len_per_gpu != Some(0), "expected at least 1, or null");
        checks.at_least_one("actor_rollout_ref.actor.ppo_epochs", self.ppo_epochs);
        checks.above("actor_rollout_ref.actor.grad_clip", self.grad_clip, 0.0);
        checks.at_least("actor_rollout_ref.actor.clip_ratio", self.clip_ratio, 0.0);
        checks.within("actor_rollout_ref.actor.clip_ratio_low", self.clip_low(), 0.0, 1.0);
        checks.at_least("actor_rollout_ref.actor.clip_ratio_high", self.clip_high(), 0.0);
        checks.above("actor_rollout_ref.actor.clip_ratio_c", self.clip_ratio_c, 1.0);
        if let Some(factor) = self.loss_scale_factor {
            checks.above("actor_rollout_ref.actor.loss_scale_factor", factor, 0.0);
        }
        if self.loss_agg_mode == LossAggMode::SeqMeanTokenSumNorm && self.loss_scale_factor.is_none() {
            checks.impossible(
                "actor_rollout_ref.actor.loss_agg_mode=seq-mean-token-sum-norm divides by \
                 actor_rollout_ref.actor.loss_scale_factor, which is not set"
                    .to_owned(),
                "give actor_rollout_ref.actor.loss_scale_factor, such as the longest reply in tokens",
            );
        }
        checks.finite("actor_rollout_ref.actor.entropy_coeff", self.entropy_coeff);
        checks.at_least("actor_rollout_ref.actor.kl_loss_coef", self.kl_loss_coef, 0.0);
        self.optim.check(checks);
    }

    /// Lower clip range ε_low.
    #[must_use]
    pub fn clip_low(&self) -> f64 {
        self.clip_ratio_low.unwrap_or(self.clip_ratio)
    }

    /// Upper clip range ε_high.
    #[must_use]
    pub fn clip_high(&self) -> f64 {
        self.clip_ratio_high.unwrap_or(self.clip_ratio)
    }
}

/// `actor_rollout_ref.actor.fsdp_config.*`, as far as it means something here.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FsdpConfig {
    /// Ranks that share one copy of the optimizer's state: −1 is all, 1 gives each rank a copy of its own.
    pub fsdp_size: i64,
}

impl FsdpConfig {
    /// Whether each rank of a job keeps and updates only its share of the optimizer's state.
    #[must_use]
    pub fn shards_optimizer(&self) -> bool {
        self.fsdp_size != 1
    }

    pub(crate) fn check(&self, ranks: u32, checks: &mut Checks) {
        let fits = [-1, 1, i64::from(ranks)].contains(&self.fsdp_size);
        let expected = format!(
            "expected -1 (all {ranks} ranks share the optimizer's state) or 1 (each holds all of it); groups of ranks \
             that share are not supported"
        );
        checks.that("actor_rollout_ref.actor.fsdp_config.fsdp_size", fits, expected);
    }
}

/// `actor_rollout_ref.actor.policy_loss.*`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PolicyLoss {
    /// The loss.
    pub loss_mode: PolicyLossMode,
}

/// `actor_rollout_ref.actor.optim.*`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Optim {
    /// Learning rate.
    pub lr: f64,
    /// Warm-up steps; −1 follows the ratio.
    pub lr_warmup_steps: i64,
    /// Warm-up as a part of all steps.
    pub lr_warmup_steps_ratio: f64,
    /// After the warm-up.
    pub lr_scheduler_type: LrSchedule,
    /// Cosine's floor as a part of `lr`; null is 0.
    #[serde(deserialize_with = "null_is_zero")]
    pub min_lr_ratio: f64,
    /// Cosine's cycles.
    pub num_cycles: f64,
    /// Decoupled weight decay.
    pub weight_decay: f64,
    /// β₁ and β₂.
    pub betas: [f64; 2],
}

impl Optim {
    fn check(&self, checks: &mut Checks) {
        checks.at_least("actor_rollout_ref.actor.optim.lr", self.lr, 0.0);
        let warmup = "actor_rollout_ref.actor.optim.lr_warmup_steps";
        checks.that(warmup, self.lr_warmup_steps >= -1, "expected -1 (follow the ratio) or more");
        checks.within(
            "actor_rollout_ref.actor.optim.lr_warmup_steps_ratio",
            self.lr_warmup_steps_ratio,
            0.0,
            1.0,
        );
        checks.within("actor_rollout_ref.actor.optim.min_lr_ratio", self.min_lr_ratio, 0.0, 1.0);
        checks.above("actor_rollout_ref.actor.optim.num_cycles", self.num_cycles, 0.0);
        checks.at_least("actor_rollout_ref.actor.optim.weight_decay", self.weight_decay, 0.0);
        let betas_fit = self.betas.iter().all(|beta| (0.0..1.0).contains(beta));
        checks.that("actor_rollout_ref.actor.optim.betas", betas_fit, "expected two numbers ≥ 0 and < 1");
    }

    /// Warm-up steps of a job of `total_steps`: `lr_warmup_steps` if ≥ 0, else the ratio, rounded down (verl).
    #[must_use]
    pub fn warmup_steps(&self, total_steps: u64) -> u64 {
        // The ratio is within [0, 1], so the product is exact enough and never negative.
        #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, clippy::cast_precision_loss)]
        u64::try_from(self.lr_warmup_steps)
            .unwrap_or((self.lr_warmup_steps_ratio * total_steps as f64) as u64)
    }
}

fn null_is_zero<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<f64, D::Error> {
    Ok(Option::<f64>::deserialize(deserializer)?.unwrap_or(0.0))
}
