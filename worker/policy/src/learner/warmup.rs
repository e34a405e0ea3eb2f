//! Supervised warm-up: next-token cross-entropy on given rows, with the learner's own optimizer, micro-batches
//! and head in pieces. It makes a small model that can already call a tool before reinforcement learning starts.

use tch::Kind;

use super::error::{LearnerError, NonFinite, RowName};
use super::forward;
use super::microbatch::{Row, TokenBatch};
use super::plan::{places, plan};
use super::stats::PhaseSeconds;
use super::{Learner, LearnerConfig};
use crate::model::{Decoder, EMBEDDING};

/// One example: T tokens, and which of them to learn.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SupervisedRow {
    /// Length T.
    pub token_ids: Vec<u32>,
    /// True on the tokens to learn; length T, never the first.
    pub loss_mask: Vec<bool>,
}

/// What a supervised step did, over all ranks.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct SupervisedStats {
    /// Mean negative log-prob of the learned tokens before the update.
    pub loss: f64,
    /// How many there were.
    pub loss_tokens: u64,
    /// Gradient norm before clipping.
    pub grad_norm: f64,
    /// False when loss or norm was not finite and the update was skipped.
    pub applied: bool,
}

impl Learner {
    /// One update by cross-entropy over the learned tokens of all ranks' rows (temperature 1), with rate `lr`:
    /// neither the schedule nor the policy version advances.
    ///
    /// # Errors
    /// As [`Learner::train`], and [`LearnerError::Config`] for a rate that is negative or not finite.
    pub fn supervised_step(
        &mut self,
        decoder: &mut Decoder,
        rows: &[SupervisedRow],
        lr: f64,
    ) -> Result<SupervisedStats, LearnerError> {
        self.check_ready(decoder)?;
        let vocab = decoder.config().vocab;
        // By the rule of the settings' own rate.
        let rate = LearnerConfig { lr, ..self.config.clone() }.check();
        let checked = rate.and_then(|()| {
            rows.iter()
                .enumerate()
                .map(|(i, row)| Row::new(RowName::Supervised(i), &row.token_ids, &row.loss_mask, vocab))
                .collect::<Result<Vec<_>, _>>()
        });
        let count = |rows: &Vec<Row<'_>>| rows.iter().map(|row| row.targets.len()).sum::<usize>() as f64;
        let mut agreed = [f64::from(u8::from(checked.is_err())), checked.as_ref().map_or(0.0, count)];
        self.ranks.sums(&mut agreed)?;
        let checked = checked?;
        if agreed[0] > 0.0 {
            return Err(LearnerError::PeerRefused { step: 0 });
        }
        if agreed[1] == 0.0 {
            return Err(LearnerError::NoLossTokens { step: 0, mini_batch: 0 });
        }
        self.guarded(decoder, |learner, decoder| {
            learner.cross_entropy_update(decoder, &checked, agreed[1], lr)
        })
    }

    fn cross_entropy_update(
        &mut self,
        decoder: &Decoder,
        rows: &[Row<'_>],
        tokens: f64,
        lr: f64,
    ) -> Result<SupervisedStats, LearnerError> {
        let (mut total, mut wrong) = ([0.0], None);
        let embedding = self.optimizer.gradient_of(EMBEDDING)?;
        for planned in plan(rows, self.config.micro_batch, decoder.is_batch_invariant()) {
            let chosen: Vec<&Row<'_>> = places(&planned).into_iter().map(|i| &rows[i]).collect();
            let batch = TokenBatch::new(rows, &planned, decoder.device())?;
            let recompute = self.config.recomputes(&batch);
            forward::backward(decoder, &batch, 1.0, recompute, &embedding, |_, terms| {
                let loss = -terms.log_prob.sum(Kind::Float) / tokens;
                let value = loss.f_double_value(&[])?;
                if !value.is_finite() {
                    let (rows, first) = (chosen.len(), chosen[0].name);
                    let found = NonFinite::Loss { what: "cross-entropy", value, rows, first };
                    wrong.get_or_insert(found);
                }
                total[0] += value;
                Ok(loss)
            })?;
        }
        let update = self.apply(decoder, lr, wrong, &mut PhaseSeconds::default())?;
        self.ranks.sums(&mut total)?;
        let (grad_norm, applied) = (update.grad_norm, update.applied);
        Ok(SupervisedStats { loss: total[0], loss_tokens: tokens as u64, grad_norm, applied })
    }
}
