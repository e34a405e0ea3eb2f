//! Log-probs of rows without gradient: the frozen reference's, and the policy's before its updates.
//!
//! What must stay true: where the decoder is batch-invariant, a row's log-probs are the same to the bit whatever rows are
//! beside it, and those that a rollout sampled with.

use agentfly_c10d::ops;

use super::config::LearnerConfig;
use super::error::LearnerError;
use super::forward::slice;
use super::microbatch::{Row, TokenBatch};
use super::plan::{places, plan};
use crate::model::{Attention, Decoder, ModelError, host, visit_head};

/// Log-probs of every row's targets; empty for rows without targets.
pub(super) fn log_probs(
    decoder: &Decoder,
    rows: &[Row<'_>],
    config: &LearnerConfig,
) -> Result<Vec<Vec<f32>>, LearnerError> {
    let _no_grad = tch::no_grad_guard();
    let mut by_row = vec![Vec::new(); rows.len()];
    for planned in plan(rows, config.micro_batch, decoder.is_batch_invariant()) {
        let batch = TokenBatch::new(rows, &planned, decoder.device())?;
        let hidden = decoder.hidden(&batch.ids, &batch.positions, Attention::Packed(&batch.packed))?;
        let hidden = hidden.f_index_select(0, &batch.predicting)?;
        let mut values = Vec::new();
        visit_head(decoder, &hidden, |range, logits| -> Result<(), LearnerError> {
            let targets = slice(&batch.targets, &range)?;
            let terms = ops::token_terms(logits, &targets, config.temperature).map_err(ModelError::from)?;
            values.extend(host(&terms.log_prob)?);
            Ok(())
        })?;
        let mut rest = values.as_slice();
        for index in places(&planned) {
            let (own, others) = rest.split_at(rows[index].targets.len());
            by_row[index] = own.to_vec();
            rest = others;
        }
    }
    Ok(by_row)
}

#[cfg(test)]
mod tests;
