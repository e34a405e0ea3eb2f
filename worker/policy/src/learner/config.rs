//! What a learner can be told. Defaults are verl's (`actor_rollout_ref.actor`); the worker fills it from the
//! job's configuration.

use agentfly_common::sampling::is_divisor;

use super::aggregate::Aggregation;
use super::error::LearnerError;
use super::kl::{KlBase, KlEstimator};
use super::loss::ClipRange;
use super::microbatch::TokenBatch;
use super::schedule::{LrSchedule, Schedule};

/// How many rows go through the model at a time. The result does not depend on it, memory and speed do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MicroBatchLimit {
    /// This many rows (`ppo_micro_batch_size_per_gpu`).
    Rows(usize),
    /// As many rows as hold this many tokens (`ppo_max_token_len_per_gpu`); a longer row goes alone.
    Tokens(usize),
}

/// Settings of a [`super::Learner`].
#[derive(Debug, Clone, PartialEq)]
pub struct LearnerConfig {
    /// Peak learning rate.
    pub lr: f64,
    /// Training steps of warm-up.
    pub lr_warmup_steps: u64,
    /// The curve after warm-up.
    pub lr_scheduler: Schedule,
    /// The cosine's floor, as a part of `lr`.
    pub min_lr_ratio: f64,
    /// Full waves of the cosine.
    pub num_cycles: f64,
    /// Training steps of the whole job.
    pub total_training_steps: u64,
    /// AdamW's decoupled decay, applied to every parameter.
    pub weight_decay: f64,
    /// AdamW's β₁ and β₂.
    pub betas: (f64, f64),
    /// AdamW's ε.
    pub eps: f64,
    /// Largest L2 norm of the whole gradient.
    pub grad_clip: f64,
    /// ε of the trust region where the next two are `None`.
    pub clip_ratio: f64,
    /// ε_l.
    pub clip_ratio_low: Option<f64>,
    /// ε_h.
    pub clip_ratio_high: Option<f64>,
    /// Dual clip, above 1.
    pub clip_ratio_c: f64,
    /// How tokens become one loss.
    pub loss_agg_mode: Aggregation,
    /// The constant of `seq-mean-token-sum-norm`, which needs it.
    pub loss_scale_factor: Option<f64>,
    /// Weight of the entropy bonus.
    pub entropy_coeff: f64,
    /// Whether the loss holds the divergence from the reference.
    pub use_kl_loss: bool,
    /// Its weight.
    pub kl_loss_coef: f64,
    /// Its estimator.
    pub kl_loss_type: KlEstimator,
    /// Passes over a step's mini-batches.
    pub ppo_epochs: u32,
    /// Rows at a time.
    pub micro_batch: MicroBatchLimit,
    /// In micro-batches of more tokens than this each block is computed a second time on the way back instead of
    /// keeping its activations (`model.enable_gradient_checkpointing`): less memory, a third more work.
    pub recompute_above: usize,
    /// The temperature of the rollout, by which logits are divided.
    pub temperature: f64,
    /// Updates in a row that may be skipped for a value that is not finite: the policy loss, KL loss or entropy of
    /// some micro-batch, or the norm of the whole gradient, on any rank. Such an update changes nothing on any rank;
    /// one more of them ends the run with the value and its rows. Between two of the others they may be as many as
    /// there are: `actor/skipped_updates` counts them.
    pub max_grad_skips: u32,
    /// Whether each of several ranks keeps and updates its share of the optimizer's state, or all of it
    /// (`fsdp_config.fsdp_size` -1 or 1).
    pub shard_optimizer: bool,
}

impl Default for LearnerConfig {
    fn default() -> Self {
        Self {
            lr: 1e-6,
            lr_warmup_steps: 0,
            lr_scheduler: Schedule::Constant,
            min_lr_ratio: 0.0,
            num_cycles: 0.5,
            total_training_steps: 1,
            weight_decay: 0.01,
            betas: (0.9, 0.999),
            eps: 1e-8,
            grad_clip: 1.0,
            clip_ratio: 0.2,
            clip_ratio_low: None,
            clip_ratio_high: None,
            clip_ratio_c: 3.0,
            loss_agg_mode: Aggregation::TokenMean,
            loss_scale_factor: None,
            entropy_coeff: 0.0,
            use_kl_loss: false,
            kl_loss_coef: 0.001,
            kl_loss_type: KlEstimator { base: KlBase::K3, straight_through: false },
            ppo_epochs: 1,
            micro_batch: MicroBatchLimit::Tokens(2048),
            recompute_above: usize::MAX,
            temperature: 1.0,
            max_grad_skips: 10,
            shard_optimizer: true,
        }
    }
}

impl LearnerConfig {
    /// Whether a micro-batch's blocks are computed a second time.
    pub(super) fn recomputes(&self, batch: &TokenBatch) -> bool {
        batch.ids.numel() > self.recompute_above
    }

    /// Refuses what cannot be trained with.
    ///
    /// # Errors
    /// [`LearnerError::Config`] with the first field that is wrong.
    pub fn check(&self) -> Result<(), LearnerError> {
        let clip = self.clip();
        rule("clip_ratio_low", clip.low, (0.0..1.0).contains(&clip.low), "must lie in [0, 1)")?;
        rule("clip_ratio_high", clip.high, at_least_0(clip.high), "must be at least 0")?;
        rule("clip_ratio_c", clip.dual, clip.dual > 1.0, "must be above 1")?;
        let scale = self.loss_scale_factor;
        let scale_known =
            self.loss_agg_mode != Aggregation::SeqMeanTokenSumNorm || scale.is_some_and(positive);
        rule(
            "loss_scale_factor",
            scale,
            scale_known,
            "seq-mean-token-sum-norm divides by it: must be above 0",
        )?;
        rule("entropy_coeff", self.entropy_coeff, self.entropy_coeff.is_finite(), "must be finite")?;
        rule("kl_loss_coef", self.kl_loss_coef, self.kl_loss_coef.is_finite(), "must be finite")?;
        rule("ppo_epochs", self.ppo_epochs, self.ppo_epochs > 0, "must be at least 1")?;
        let (MicroBatchLimit::Rows(micro) | MicroBatchLimit::Tokens(micro)) = self.micro_batch;
        rule("micro_batch", self.micro_batch, micro > 0, "must be at least 1")?;
        let needed =
            "must be above 0, for a greedy rollout has no gradient, and its inverse a normal float32";
        rule("temperature", self.temperature, is_divisor(self.temperature), needed)?;
        self.check_optimizer()
    }

    fn check_optimizer(&self) -> Result<(), LearnerError> {
        let part = |x: f64| (0.0..=1.0).contains(&x);
        rule("lr", self.lr, at_least_0(self.lr), "must be at least 0")?;
        rule("min_lr_ratio", self.min_lr_ratio, part(self.min_lr_ratio), "must lie in [0, 1]")?;
        rule("weight_decay", self.weight_decay, at_least_0(self.weight_decay), "must be at least 0")?;
        let decays = [self.betas.0, self.betas.1].iter().all(|beta| (0.0..1.0).contains(beta));
        rule("betas", self.betas, decays, "must lie in [0, 1)")?;
        rule("eps", self.eps, positive(self.eps), "must be above 0")?;
        rule("grad_clip", self.grad_clip, positive(self.grad_clip), "must be above 0")
    }

    /// The trust region.
    #[must_use]
    pub fn clip(&self) -> ClipRange {
        ClipRange {
            low: self.clip_ratio_low.unwrap_or(self.clip_ratio),
            high: self.clip_ratio_high.unwrap_or(self.clip_ratio),
            dual: self.clip_ratio_c,
        }
    }

    /// The learning rate's curve.
    #[must_use]
    pub fn schedule(&self) -> LrSchedule {
        LrSchedule {
            lr: self.lr,
            kind: self.lr_scheduler,
            warmup_steps: self.lr_warmup_steps,
            total_steps: self.total_training_steps,
            min_lr_ratio: self.min_lr_ratio,
            num_cycles: self.num_cycles,
        }
    }
}

fn positive(x: f64) -> bool {
    x.is_finite() && x > 0.0
}

fn at_least_0(x: f64) -> bool {
    x.is_finite() && x >= 0.0
}

fn rule(
    field: &'static str,
    value: impl std::fmt::Debug,
    holds: bool,
    needed: &'static str,
) -> Result<(), LearnerError> {
    match holds {
        true => Ok(()),
        false => Err(LearnerError::Config { field, value: format!("{value:?}"), needed }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_temperatures_that_are_taken_are_those_the_kernels_divide_by() {
        for temperature in
            [0.0, -1.0, 1e-39, 2.9e-39, 3e-39, 0.7, 8.5e37, 8.6e37, 1e39, f64::INFINITY, f64::NAN]
        {
            let config = LearnerConfig { temperature, ..LearnerConfig::default() };
            let divides = agentfly_c10d::ops::is_divisor(temperature);
            assert_eq!(config.check().is_ok(), divides, "{temperature:e}");
        }
    }
}
