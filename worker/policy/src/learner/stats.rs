//! What a training step reports, reduced so that every rank reports the same.

use std::collections::BTreeMap;

use agentfly_common::ids::PolicyVersion;

use super::error::LearnerError;
use super::offpolicy::OffPolicySums;
use super::optimizer::Update;
use super::ranks::Ranks;

/// Wall seconds by phase; over ranks the slowest counts.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct PhaseSeconds {
    /// Log-probs of the reference.
    pub reference: f64,
    /// Log-probs before the first update.
    pub old_log_prob: f64,
    /// Forward and backward of all micro-batches.
    pub forward_backward: f64,
    /// Waiting for and summing gradients.
    pub all_reduce: f64,
    /// Norm, clip, AdamW, copy into the model: of this rank's share.
    pub optimizer: f64,
    /// Fetching the shares that other ranks have updated.
    pub all_gather: f64,
    /// The whole step (this rank's own).
    pub total: f64,
}

/// What a training step did.
#[derive(Debug, Clone, PartialEq)]
pub struct StepStats {
    /// The version of the weights after it.
    pub policy_version: PolicyVersion,
    /// By verl's names.
    pub metrics: BTreeMap<String, f64>,
    /// Updates skipped because a value of them was not finite.
    pub skipped_updates: u32,
    /// Where the time went.
    pub phases: PhaseSeconds,
    /// Tokens of all ranks' rows, padding not counted.
    pub tokens: u64,
    /// Those with loss.
    pub loss_tokens: u64,
}

/// Sums of one optimizer update over this rank's tokens, in the order of [`UPDATE_SUMS`].
pub(super) type UpdateSums = [f64; UPDATE_SUMS];

/// Aggregated policy loss, KL loss and entropy; plain sums of clipped, dual-clipped and log π_old − log π.
pub(super) const UPDATE_SUMS: usize = 6;

/// What gathers during a step.
#[derive(Debug, Default)]
pub(super) struct StepSums {
    /// Sums over applied updates of the aggregated and token-averaged values.
    pub(super) updates: UpdateSums,
    pub(super) grad_norm: f64,
    pub(super) applied: u32,
    pub(super) skipped: u32,
    pub(super) off_policy: OffPolicySums,
    pub(super) tokens: u64,
    pub(super) phases: PhaseSeconds,
}

impl StepSums {
    /// Adds one update's sums of this rank; the last three are averaged over the mini-batch's tokens. Those of a
    /// skipped update are not numbers to average: it is only counted.
    pub(super) fn add_update(&mut self, update: Update, sums: &UpdateSums, global_loss_tokens: u64) {
        if !update.applied {
            self.skipped += 1;
            return;
        }
        for (index, (total, sum)) in self.updates.iter_mut().zip(sums).enumerate() {
            *total += if index < 3 { *sum } else { sum / global_loss_tokens as f64 };
        }
        self.grad_norm += update.grad_norm;
        self.applied += 1;
    }

    /// Reduces over ranks and names the values.
    pub(super) fn finish(
        mut self,
        ranks: &Ranks,
        lr: f64,
        kl_coef: Option<f64>,
        loss_tokens: u64,
    ) -> Result<StepStats, LearnerError> {
        let mut sums = self.updates.to_vec();
        sums.extend(self.off_policy.sums);
        sums.push(self.tokens as f64);
        ranks.sums(&mut sums)?;
        let (updates, rest) = sums.split_at(UPDATE_SUMS);
        let (off_policy, tokens) = rest.split_at(self.off_policy.sums.len());
        self.off_policy.sums.copy_from_slice(off_policy);
        let phases = &mut self.phases;
        let mut seconds = [
            phases.reference,
            phases.old_log_prob,
            phases.forward_backward,
            phases.all_reduce,
            phases.optimizer,
            phases.all_gather,
        ];
        ranks.maxima(&mut self.off_policy.maxima)?;
        ranks.maxima(&mut seconds)?;
        [
            phases.reference,
            phases.old_log_prob,
            phases.forward_backward,
            phases.all_reduce,
            phases.optimizer,
            phases.all_gather,
        ] = seconds;

        let mut metrics: BTreeMap<String, f64> =
            self.off_policy.metrics().into_iter().map(|(name, value)| (name.to_owned(), value)).collect();
        let mut set = |name: &str, value: f64| metrics.insert(name.to_owned(), value);
        set("actor/lr", lr);
        set("actor/skipped_updates", f64::from(self.skipped));
        if let Some(coefficient) = kl_coef {
            set("actor/kl_coef", coefficient);
        }
        if self.applied > 0 {
            let count = f64::from(self.applied);
            set("actor/pg_loss", updates[0] / count);
            set("actor/entropy", updates[2] / count);
            set("actor/pg_clipfrac", updates[3] / count);
            set("actor/pg_clipfrac_lower", updates[4] / count);
            set("actor/ppo_kl", updates[5] / count);
            set("actor/grad_norm", self.grad_norm / count);
            if kl_coef.is_some() {
                set("actor/kl_loss", updates[1] / count);
            }
        }
        Ok(StepStats {
            policy_version: PolicyVersion::default(),
            metrics,
            skipped_updates: self.skipped,
            phases: self.phases,
            tokens: tokens[0] as u64,
            loss_tokens,
        })
    }
}
