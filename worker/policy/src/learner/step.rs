//! One training step in order: check and agree, reference and old log-probs, then an update per mini-batch.

use std::time::Instant;

use agentfly_c10d::upload;
use agentfly_common::batch::{MiniBatch, TrainRow, TrainShard};
use agentfly_common::telemetry::TRACE;
use tch::{Kind, Tensor};
use tracing::info_span;

use super::Learner;
use super::aggregate::Denominators;
use super::error::{LearnerError, NonFinite, RowName};
use super::forward::{self, slice};
use super::log_probs::log_probs;
use super::loss::ppo_clip;
use super::microbatch::{Row, TokenBatch};
use super::plan::{places, plan};
use super::stats::{StepStats, StepSums, UpdateSums};
use crate::model::{Decoder, EMBEDDING, ModelError, host};

/// The rows of one mini-batch, checked, beside their batch.
pub(super) struct Prepared<'a> {
    batch: &'a MiniBatch,
    rows: Vec<Row<'a>>,
}

/// Log-probs of each row's targets, row by row.
type LogProbs = Vec<Vec<f32>>;

/// Per-token tensors of a micro-batch, `[N]` f32.
struct Columns {
    advantages: Tensor,
    weights: Tensor,
    old: Option<Tensor>,
    reference: Option<Tensor>,
}

/// What an update's micro-batches leave beside their gradients.
#[derive(Default)]
struct Left {
    sums: UpdateSums,
    /// Current log-probs of the last one's targets, where the update needs them.
    log_probs: Vec<f32>,
    /// The first value that is not finite.
    wrong: Option<NonFinite>,
}

impl Learner {
    /// Checks this rank's shard, and that the ranks' shards belong together. Nothing has changed when it fails,
    /// and when one rank's does, all fail.
    pub(super) fn prepare<'a>(
        &self,
        decoder: &Decoder,
        shard: &'a TrainShard,
    ) -> Result<Vec<Prepared<'a>>, LearnerError> {
        let checked = self.check(decoder, shard);
        let count = shard.mini_batches.len();
        let mut agreed = [f64::from(u8::from(checked.is_err())), count as f64, -(count as f64)];
        self.ranks.maxima(&mut agreed)?;
        let prepared = checked?;
        let step = shard.step;
        if agreed[0] > 0.0 {
            return Err(LearnerError::PeerRefused { step });
        }
        if agreed[1] + agreed[2] != 0.0 {
            let there = if agreed[1] as usize == count { -agreed[2] } else { agreed[1] } as usize;
            return Err(LearnerError::MiniBatches { step, here: count, there });
        }
        let targets = |p: &Prepared<'_>| p.rows.iter().map(|row| row.targets.len()).sum::<usize>();
        let with_loss = |p: &Prepared<'_>| p.rows.iter().filter(|row| !row.targets.is_empty()).count();
        let mut counts: Vec<f64> =
            prepared.iter().flat_map(|p| [targets(p) as f64, with_loss(p) as f64]).collect();
        self.ranks.sums(&mut counts)?;
        // One that alone sees other counts would leave the others waiting in the update.
        let verdict = check_counts(shard, &counts);
        let mut differs = [f64::from(u8::from(verdict.is_err()))];
        self.ranks.maxima(&mut differs)?;
        verdict?;
        if differs[0] > 0.0 {
            return Err(LearnerError::PeerRefused { step });
        }
        Ok(prepared)
    }

    fn check<'a>(&self, decoder: &Decoder, shard: &'a TrainShard) -> Result<Vec<Prepared<'a>>, LearnerError> {
        if shard.policy_version != self.version {
            let (step, learner) = (shard.step, self.version);
            return Err(LearnerError::PolicyVersion { step, shard: shard.policy_version, learner });
        }
        if shard.mini_batches.is_empty() {
            return Err(LearnerError::NoLossTokens { step: shard.step, mini_batch: 0 });
        }
        let vocab = decoder.config().vocab;
        let rows = |batch: &'a MiniBatch| {
            batch.rows.iter().map(|row| check_row(row, vocab)).collect::<Result<Vec<_>, LearnerError>>()
        };
        shard.mini_batches.iter().map(|batch| Ok(Prepared { batch, rows: rows(batch)? })).collect()
    }

    /// All updates of a step.
    pub(super) fn update_all(
        &mut self,
        decoder: &Decoder,
        shard: &TrainShard,
        prepared: &[Prepared<'_>],
    ) -> Result<StepStats, LearnerError> {
        let rows = shard.mini_batches.iter().flat_map(|batch| &batch.rows);
        let tokens = rows.map(|row| row.token_ids.len() as u64).sum();
        let mut sums = StepSums { tokens, ..StepSums::default() };
        let started = Instant::now();
        let reference: Vec<Option<LogProbs>> = match &self.reference {
            Some(reference) if self.config.use_kl_loss => {
                info_span!(target: TRACE, "reference").in_scope(|| {
                    prepared
                        .iter()
                        .map(|p| self.log_probs(reference, &p.rows).map(Some))
                        .collect::<Result<_, _>>()
                })?
            }
            _ => prepared.iter().map(|_| None).collect(),
        };
        sums.phases.reference = started.elapsed().as_secs_f64();
        let started = Instant::now();
        // With a single update the old policy is the current one: its log-probs are those of the update's own
        // forward pass (verl's on-policy case), and the ratio is 1 exactly.
        let single = prepared.len() == 1 && self.config.ppo_epochs == 1;
        let old: Vec<Option<LogProbs>> = match single {
            true => vec![None],
            false => info_span!(target: TRACE, "old log-probs").in_scope(|| {
                prepared.iter().map(|p| self.log_probs(decoder, &p.rows).map(Some)).collect::<Result<_, _>>()
            })?,
        };
        sums.phases.old_log_prob = started.elapsed().as_secs_f64();
        for (p, old) in prepared.iter().zip(&old) {
            if let Some(old) = old {
                compare(p, old, &mut sums);
            }
        }
        let lr = self.schedule.rate(self.steps);
        for _epoch in 0..self.config.ppo_epochs {
            for ((p, old), reference) in prepared.iter().zip(&old).zip(&reference) {
                self.update(decoder, p, old.as_ref(), reference.as_ref(), lr, &mut sums)?;
            }
        }
        let kl_coef = self.config.use_kl_loss.then_some(self.config.kl_loss_coef);
        let loss_tokens = shard.mini_batches.iter().map(|b| b.global_loss_tokens).sum();
        sums.finish(&self.ranks, lr, kl_coef, loss_tokens)
    }

    fn log_probs(&self, decoder: &Decoder, rows: &[Row<'_>]) -> Result<LogProbs, LearnerError> {
        log_probs(decoder, rows, &self.config)
    }

    /// One optimizer update.
    fn update(
        &mut self,
        decoder: &Decoder,
        prepared: &Prepared<'_>,
        old: Option<&LogProbs>,
        reference: Option<&LogProbs>,
        lr: f64,
        sums: &mut StepSums,
    ) -> Result<(), LearnerError> {
        let started = Instant::now();
        let mut left = Left::default();
        let traced = info_span!(target: TRACE, "forward and backward").entered();
        self.optimizer.zero_grad()?;
        let mut current: LogProbs = vec![Vec::new(); prepared.rows.len()];
        for planned in plan(&prepared.rows, self.config.micro_batch, decoder.is_batch_invariant()) {
            let indices = places(&planned);
            let rows: Vec<&Row<'_>> = indices.iter().map(|&i| &prepared.rows[i]).collect();
            let batch = TokenBatch::new(&prepared.rows, &planned, decoder.device())?;
            let columns = self.columns(prepared, &indices, old, reference, decoder)?;
            left.log_probs.clear();
            self.micro_batch(decoder, &batch, &columns, &rows, &mut left)?;
            let mut rest = left.log_probs.as_slice();
            for &index in indices.iter().filter(|_| old.is_none()) {
                let (own, others) = rest.split_at(prepared.rows[index].targets.len());
                current[index] = own.to_vec();
                rest = others;
            }
        }
        drop(traced);
        sums.phases.forward_backward += started.elapsed().as_secs_f64();
        if old.is_none() {
            compare(prepared, &current, sums);
        }
        let update = self.apply(decoder, lr, left.wrong, &mut sums.phases)?;
        sums.add_update(update, &left.sums, prepared.batch.global_loss_tokens);
        Ok(())
    }

    /// The per-token inputs of a micro-batch's loss, in the order of its targets.
    fn columns(
        &self,
        prepared: &Prepared<'_>,
        indices: &[usize],
        old: Option<&LogProbs>,
        reference: Option<&LogProbs>,
        decoder: &Decoder,
    ) -> Result<Columns, LearnerError> {
        let denominators = Denominators {
            loss_tokens: prepared.batch.global_loss_tokens,
            rows: prepared.batch.global_rows,
            scale_factor: self.config.loss_scale_factor.unwrap_or(1.0),
        };
        let (mut advantages, mut weights) = (Vec::new(), Vec::new());
        for &index in indices {
            let (row, targets) = (&prepared.batch.rows[index], &prepared.rows[index].targets);
            advantages.extend(targets.iter().map(|&j| row.advantages[j]));
            let weight = self.config.loss_agg_mode.token_weight(targets.len(), &denominators) as f32;
            weights.extend(std::iter::repeat_n(weight, targets.len()));
        }
        let column = |values: &[f32]| -> Result<Tensor, LearnerError> {
            Ok(upload(values, decoder.device()).map_err(ModelError::from)?)
        };
        let gather = |by_row: &LogProbs| {
            column(&indices.iter().flat_map(|&i| by_row[i].iter().copied()).collect::<Vec<_>>())
        };
        Ok(Columns {
            advantages: column(&advantages)?,
            weights: column(&weights)?,
            old: old.map(gather).transpose()?,
            reference: reference.map(gather).transpose()?,
        })
    }

    /// Forward and backward of one micro-batch: loss = pg − entropy_coeff · H + kl_coef · KL, each aggregated
    /// with the same weights. Adds to `left`.
    fn micro_batch(
        &self,
        decoder: &Decoder,
        batch: &TokenBatch,
        columns: &Columns,
        rows: &[&Row<'_>],
        left: &mut Left,
    ) -> Result<(), LearnerError> {
        let config = &self.config;
        let with_entropy = config.entropy_coeff != 0.0;
        let embedding = self.optimizer.gradient_of(EMBEDDING)?;
        let recompute = config.recomputes(batch);
        forward::backward(decoder, batch, config.temperature, recompute, &embedding, |range, terms| {
            let weights = slice(&columns.weights, range)?;
            let advantages = slice(&columns.advantages, range)?;
            let old = match &columns.old {
                Some(old) => slice(old, range)?,
                None => {
                    left.log_probs.extend(host(terms.log_prob)?);
                    terms.log_prob.f_detach()?
                }
            };
            let policy = ppo_clip(terms.log_prob, &old, &advantages, config.clip());
            let pg_loss = (&policy.loss * &weights).sum(Kind::Float);
            let entropy = (terms.entropy * &weights).sum(Kind::Float);
            let mut loss = pg_loss.shallow_clone();
            if with_entropy {
                loss = &loss - &entropy * config.entropy_coeff;
            }
            let mut kl_loss = pg_loss.zeros_like();
            if let Some(reference) = &columns.reference {
                let kl = config.kl_loss_type.estimate(terms.log_prob, &slice(reference, range)?);
                kl_loss = (kl * &weights).sum(Kind::Float);
                loss = &loss + &kl_loss * config.kl_loss_coef;
            }
            let plain = |t: &Tensor| t.sum(Kind::Float);
            let sums = Tensor::f_stack(
                &[
                    pg_loss,
                    kl_loss,
                    entropy,
                    plain(&policy.clipped),
                    plain(&policy.clipped_lower),
                    plain(&policy.kl),
                ],
                0,
            )?;
            let values = host(&sums)?;
            for (what, value) in ["policy loss", "KL loss", "entropy"].into_iter().zip(&values) {
                if !value.is_finite() {
                    let (value, rows, first) = (f64::from(*value), rows.len(), rows[0].name);
                    left.wrong.get_or_insert(NonFinite::Loss { what, value, rows, first });
                }
            }
            for (sum, value) in left.sums.iter_mut().zip(values) {
                *sum += f64::from(value);
            }
            Ok(loss)
        })
    }
}

/// Whether the counts that the coordinator gave for each mini-batch are those of all ranks together: `held` has the tokens
/// with loss and the rows that have any, one pair a mini-batch.
fn check_counts(shard: &TrainShard, held: &[f64]) -> Result<(), LearnerError> {
    let step = shard.step;
    for (mini_batch, (held, batch)) in held.chunks_exact(2).zip(&shard.mini_batches).enumerate() {
        let (tokens, rows) = (held[0] as u64, held[1] as u64);
        let (global_loss_tokens, global_rows) = (batch.global_loss_tokens, batch.global_rows);
        if tokens == 0 {
            return Err(LearnerError::NoLossTokens { step, mini_batch });
        }
        if (tokens, rows) != (global_loss_tokens, global_rows) {
            return Err(LearnerError::Denominators {
                step,
                mini_batch,
                tokens,
                rows,
                global_loss_tokens,
                global_rows,
            });
        }
    }
    Ok(())
}

/// Lengths, ids, mask and numbers of one row.
fn check_row(row: &TrainRow, vocab: i64) -> Result<Row<'_>, LearnerError> {
    let name = RowName::Chain(row.key);
    let refuse = |problem: String| Err(LearnerError::Row { row: name, problem });
    let length = row.token_ids.len();
    if row.rollout_log_probs.len() != length || row.advantages.len() != length {
        let (log_probs, advantages) = (row.rollout_log_probs.len(), row.advantages.len());
        return refuse(format!("{length} token ids but {log_probs} log-probs and {advantages} advantages"));
    }
    let checked = Row::new(name, &row.token_ids, &row.loss_mask, vocab)?;
    for &at in &checked.targets {
        let (advantage, log_prob) = (row.advantages[at], row.rollout_log_probs[at]);
        if !advantage.is_finite() || !log_prob.is_finite() {
            return refuse(format!("token {at} has advantage {advantage} and rollout log-prob {log_prob}"));
        }
    }
    Ok(checked)
}

/// Adds what the learner's log-probs of the sampling weights say about the rollout's.
fn compare(prepared: &Prepared<'_>, old: &LogProbs, sums: &mut StepSums) {
    for ((row, checked), old) in prepared.batch.rows.iter().zip(&prepared.rows).zip(old) {
        let rollout: Vec<f32> = checked.targets.iter().map(|&j| row.rollout_log_probs[j]).collect();
        sums.off_policy.add_row(old, &rollout);
    }
}
