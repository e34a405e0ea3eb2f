//! From a step's batch to the next policy version: PPO-style updates of the decoder's weights.
//!
//! The device thread owns one [`Learner`] and calls [`Learner::train`] with this rank's share of each step.
//! What must stay true:
//! - The update depends on neither micro-batches nor ranks: every denominator is global, gradients are summed,
//!   never averaged, and each weight is updated by one rank or by all from the same sum, so weights stay bit-equal.
//! - The `[tokens, vocab]` logits never exist whole.
//! - Faults are found before the first update wherever they can be; a step that fails later leaves the learner
//!   refusing further steps until a checkpoint is loaded.

mod aggregate;
mod checkpoint;
mod config;
#[cfg(test)]
mod edges;
mod error;
mod forward;
mod gradients;
mod kl;
mod log_probs;
mod loss;
mod microbatch;
mod offpolicy;
mod optimizer;
mod plan;
mod ranks;
mod schedule;
mod shard;
mod stats;
mod step;
mod warmup;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::Instant;

use agentfly_c10d::{AdamWHyper, Group};
use agentfly_common::batch::TrainShard;
use agentfly_common::ids::PolicyVersion;
use agentfly_common::telemetry::TRACE;
use tracing::info_span;

pub use aggregate::{Aggregation, Denominators, UnknownAggregation};
pub use config::{LearnerConfig, MicroBatchLimit};
pub use error::{LearnerError, NonFinite, RowName};
pub use kl::{KlBase, KlEstimator, UnknownKl};
pub use loss::{ClipRange, PolicyTerms, ppo_clip};
pub use offpolicy::OffPolicySums;
pub use schedule::{LrSchedule, Schedule};
pub use stats::{PhaseSeconds, StepStats};
pub use warmup::{SupervisedRow, SupervisedStats};

use crate::device::panic_text;
use crate::model::Decoder;
use optimizer::{Optimizer, Update};
use ranks::Ranks;

/// The trainer of one rank: its share of the optimizer's state, the frozen reference, and the version of the weights.
///
/// The decoder itself is the caller's, who also generates with it; each call here takes it.
#[derive(Debug)]
pub struct Learner {
    config: LearnerConfig,
    schedule: LrSchedule,
    optimizer: Optimizer,
    reference: Option<Decoder>,
    ranks: Ranks,
    version: PolicyVersion,
    /// Training steps done, which the schedule counts.
    steps: u64,
    skips_in_a_row: u32,
    broken: bool,
}

impl Learner {
    /// A learner at policy version 0. `decoder` holds the initial weights; with `reference` a frozen copy of
    /// them is kept for the KL loss. To resume, make the learner from the initial weights first (the reference
    /// is those), then [`Learner::load`].
    ///
    /// # Errors
    /// On a setting that cannot be trained with, and when memory is out.
    pub fn new(
        config: LearnerConfig,
        decoder: &Decoder,
        reference: bool,
        group: Option<Group>,
    ) -> Result<Self, LearnerError> {
        config.check()?;
        if config.use_kl_loss && !reference {
            let needed = "needs a reference policy: keep one";
            return Err(LearnerError::Config { field: "use_kl_loss", value: "true".to_owned(), needed });
        }
        let reference = match reference {
            true => Some(decoder.cast(decoder.kind(), decoder.device())?),
            false => None,
        };
        let ranks = Ranks::new(group, decoder.device());
        let (index, count) = if config.shard_optimizer { (ranks.index(), ranks.count()) } else { (0, 1) };
        Ok(Self {
            schedule: config.schedule(),
            optimizer: Optimizer::new(decoder, index, count)?,
            reference,
            ranks,
            version: PolicyVersion::default(),
            steps: 0,
            skips_in_a_row: 0,
            broken: false,
            config,
        })
    }

    /// The version of the weights it holds.
    #[must_use]
    pub fn policy_version(&self) -> PolicyVersion {
        self.version
    }

    /// What ranks attest: the model's weights and, where those are rounded copies, the f32 masters behind them,
    /// so that an update too small for bf16 still shows. It does not depend on how the masters are shared. All ranks
    /// must call it at the same time.
    ///
    /// # Errors
    /// [`LearnerError::OtherDecoder`]; when memory is out or a rank is lost.
    pub fn weights_hash(&self, decoder: &Decoder) -> Result<String, LearnerError> {
        self.check_decoder(decoder)?;
        // The others wait for this rank's part of the masters.
        self.hash(decoder).inspect_err(|_| self.ranks.leave())
    }

    fn hash(&self, decoder: &Decoder) -> Result<String, LearnerError> {
        let model = decoder.weights_hash()?;
        if decoder.kind() == tch::Kind::Float {
            return Ok(model);
        }
        let mut hasher = blake3::Hasher::new();
        hasher.update(model.as_bytes());
        for lane in self.optimizer.master_digest(&self.ranks)? {
            hasher.update(&lane.to_le_bytes());
        }
        Ok(hasher.finalize().to_hex().to_string())
    }

    /// The settings.
    #[must_use]
    pub fn config(&self) -> &LearnerConfig {
        &self.config
    }

    /// One training step: every mini-batch of the shard, `ppo_epochs` times, one optimizer update each. All
    /// ranks call it with their shards of the same step; all return the same metrics and hold the same weights.
    ///
    /// # Errors
    /// See [`LearnerError`]. A step that fails half-way, or for a peer, has left the group, so that peers fail at once
    /// instead of at their deadline: make a new learner in a new group, and load a checkpoint.
    pub fn train(&mut self, decoder: &mut Decoder, shard: &TrainShard) -> Result<StepStats, LearnerError> {
        let started = Instant::now();
        self.check_ready(decoder)?;
        let prepared = self.prepare(decoder, shard)?;
        let mut stats =
            self.guarded(decoder, |learner, decoder| learner.update_all(decoder, shard, &prepared))?;
        self.version = self.version.next();
        self.steps += 1;
        stats.policy_version = self.version;
        stats.phases.total = started.elapsed().as_secs_f64();
        tracing::debug!(step = shard.step, version = %self.version, tokens = stats.tokens, "training step done");
        Ok(stats)
    }

    /// An error unless this learner can change weights, and those of this decoder.
    fn check_ready(&self, decoder: &Decoder) -> Result<(), LearnerError> {
        self.ranks.check()?;
        if self.broken {
            return Err(LearnerError::Broken);
        }
        self.check_decoder(decoder)
    }

    /// An error unless this is the decoder that the learner was made from: it holds a share of that one's weights, and
    /// sums of their gradients.
    fn check_decoder(&self, decoder: &Decoder) -> Result<(), LearnerError> {
        if self.optimizer.is_of(decoder) {
            return Ok(());
        }
        // The others wait in their first collective.
        self.ranks.leave();
        Err(LearnerError::OtherDecoder)
    }

    /// Runs `body`, which changes weights, with the decoder's gradients gathered in the optimizer's sums. If it fails,
    /// the learner is broken and out of its group.
    fn guarded<T>(
        &mut self,
        decoder: &mut Decoder,
        body: impl FnOnce(&mut Self, &Decoder) -> Result<T, LearnerError>,
    ) -> Result<T, LearnerError> {
        self.broken = true;
        // tch's operators panic where they fail.
        let result = catch_unwind(AssertUnwindSafe(|| {
            self.optimizer.zero_grad()?;
            decoder.gather_gradients(Some(&|name| self.optimizer.gradient_of(name)))?;
            body(self, decoder)
        }));
        let result = result.unwrap_or_else(|panic| Err(LearnerError::Torch(panic_text(&*panic))));
        let result = decoder.gather_gradients(None).map_err(LearnerError::from).and(result);
        match &result {
            Ok(_) => self.broken = false,
            Err(_) => self.ranks.leave(),
        }
        result
    }

    /// Sums the gathered gradients over ranks, applies them and shares the result. Where a rank's loss (`wrong`) or the
    /// norm is not finite, all ranks skip the update; those in a row are counted.
    fn apply(
        &mut self,
        decoder: &Decoder,
        lr: f64,
        wrong: Option<NonFinite>,
        phases: &mut PhaseSeconds,
    ) -> Result<Update, LearnerError> {
        let started = Instant::now();
        // A loss that is not finite may have a finite gradient: a clamp has none where it cuts.
        if wrong.is_some() {
            self.optimizer.spoil_grad()?;
        }
        info_span!(target: TRACE, "sum the gradients").in_scope(|| self.optimizer.reduce(&self.ranks))?;
        phases.all_reduce += started.elapsed().as_secs_f64();
        let started = Instant::now();
        let (beta1, beta2) = self.config.betas;
        let (weight_decay, eps) = (self.config.weight_decay, self.config.eps);
        let hyper = AdamWHyper { lr, beta1, beta2, weight_decay, eps };
        let (ranks, grad_clip) = (&self.ranks, self.config.grad_clip);
        let update = info_span!(target: TRACE, "optimizer")
            .in_scope(|| self.optimizer.step(decoder, ranks, grad_clip, &hyper))?;
        phases.optimizer += started.elapsed().as_secs_f64();
        if update.applied {
            let started = Instant::now();
            info_span!(target: TRACE, "gather the weights")
                .in_scope(|| self.optimizer.gather(decoder, &self.ranks))?;
            phases.all_gather += started.elapsed().as_secs_f64();
            self.skips_in_a_row = 0;
            return Ok(update);
        }
        let mut anywhere = [f64::from(u8::from(wrong.is_some()))];
        self.ranks.maxima(&mut anywhere)?;
        let last = match wrong {
            Some(wrong) => wrong,
            None if anywhere[0] > 0.0 => NonFinite::Elsewhere,
            None => NonFinite::GradNorm(update.grad_norm),
        };
        self.skips_in_a_row += 1;
        let (skipped, allowed) = (self.skips_in_a_row, self.config.max_grad_skips);
        tracing::warn!(cause = %last, skipped, allowed, "update skipped: a value is not finite");
        match skipped > allowed {
            true => Err(LearnerError::TooManySkips { skipped, allowed, last }),
            false => Ok(update),
        }
    }
}
