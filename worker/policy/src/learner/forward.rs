//! Through the model and back with the head in pieces: the `[tokens, vocab]` logits, by far the largest tensor
//! of training, never exist whole.
//!
//! Backward runs in two parts that meet at the hidden states. Each piece of the head runs its own loss back to
//! a detached copy of its hidden states; what has gathered there then runs back through the blocks at once.

use std::ops::Range;

use tch::{Device, Tensor};

use super::config::MicroBatchLimit;
use super::error::LearnerError;
use super::microbatch::{Row, TokenBatch, plan};
use super::token;
use crate::model::{Attention, Decoder};

/// Logits that exist at a time. 4 Mi f32 are 16 MiB, below the size from which glibc maps and unmaps every
/// allocation afresh, whose page faults cost more than the arithmetic.
const HEAD_ELEMENTS: i64 = 4 << 20;

/// Hidden states `[N, hidden]` that predict the batch's targets.
fn predicting(decoder: &Decoder, batch: &TokenBatch) -> Result<Tensor, LearnerError> {
    let hidden = decoder.hidden(&batch.ids, &batch.positions, Attention::Causal)?;
    Ok(hidden.f_flatten(0, 1)?.f_index_select(0, &batch.predicting)?)
}

/// The batch's tokens in runs whose logits may exist together.
fn pieces(decoder: &Decoder, tokens: usize) -> impl Iterator<Item = Range<usize>> {
    let rows = (HEAD_ELEMENTS / decoder.config().vocab.max(1)).max(16) as usize;
    (0..tokens).step_by(rows).map(move |start| start..(start + rows).min(tokens))
}

/// Part `range` of a per-token tensor.
pub(super) fn slice(tensor: &Tensor, range: &Range<usize>) -> Result<Tensor, LearnerError> {
    Ok(tensor.f_narrow(0, range.start as i64, range.len() as i64)?)
}

/// Tempered logits `[n, vocab]` f32.
fn logits(decoder: &Decoder, hidden: &Tensor, temperature: f64) -> Result<Tensor, LearnerError> {
    let logits = decoder.logits(hidden)?;
    Ok(if temperature == 1.0 { logits } else { logits.f_div_scalar(temperature)? })
}

/// Forward and backward of one micro-batch. `loss` gets each piece's token range, logits and targets, and gives
/// the scalar whose gradient is added to the parameters'.
pub(super) fn backward(
    decoder: &Decoder,
    batch: &TokenBatch,
    temperature: f64,
    mut loss: impl FnMut(&Range<usize>, &Tensor, &Tensor) -> Result<Tensor, LearnerError>,
) -> Result<(), LearnerError> {
    let hidden = predicting(decoder, batch)?;
    let meeting = hidden.f_detach()?.f_set_requires_grad(true)?;
    for range in pieces(decoder, batch.tokens) {
        let logits = logits(decoder, &slice(&meeting, &range)?, temperature)?;
        loss(&range, &logits, &slice(&batch.targets, &range)?)?.f_backward()?;
    }
    hidden.f_mul(&meeting.f_grad()?)?.f_sum(None)?.f_backward()?;
    Ok(())
}

/// Log-probs of every row's targets, without gradient; empty for rows without targets.
pub(super) fn log_probs(
    decoder: &Decoder,
    rows: &[Row<'_>],
    limit: MicroBatchLimit,
    temperature: f64,
) -> Result<Vec<Vec<f32>>, LearnerError> {
    let _no_grad = tch::no_grad_guard();
    let spans: Vec<usize> = rows.iter().map(Row::span).collect();
    let mut by_row = vec![Vec::new(); rows.len()];
    for indices in plan(&spans, limit) {
        let chosen: Vec<&Row<'_>> = indices.iter().map(|&i| &rows[i]).collect();
        let batch = TokenBatch::new(&chosen, decoder.device())?;
        let hidden = predicting(decoder, &batch)?;
        let mut values = Vec::with_capacity(batch.tokens);
        for range in pieces(decoder, batch.tokens) {
            let logits = logits(decoder, &slice(&hidden, &range)?, temperature)?;
            values.extend(host(&token::log_probs(&logits, &slice(&batch.targets, &range)?)?)?);
        }
        let mut rest = values.as_slice();
        for &index in &indices {
            let (own, others) = rest.split_at(rows[index].targets.len());
            by_row[index] = own.to_vec();
            rest = others;
        }
    }
    Ok(by_row)
}

/// A vector's values, f32.
pub(super) fn host(tensor: &Tensor) -> Result<Vec<f32>, LearnerError> {
    let tensor = tensor.f_detach()?.f_to_device(Device::Cpu)?;
    let mut values = vec![0_f32; tensor.numel()];
    let count = values.len();
    tensor.f_contiguous()?.f_copy_data(&mut values, count)?;
    Ok(values)
}
