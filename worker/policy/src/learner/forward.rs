//! Through the model and back: rows packed without padding, the head in pieces. The `[tokens, vocab]` logits, by far
//! the largest tensor of training, never exist whole.
//!
//! Backward meets itself at the hidden states: each piece of the head goes forward and, by its own formula, back to
//! them at once; what has gathered there then runs back through the blocks. Blocks are kept for that, or computed a
//! second time one by one (`recompute`): a block's activations instead of all.

use std::ops::Range;

use agentfly_c10d::ops;
use tch::{Kind, Tensor};

use super::error::LearnerError;
use super::microbatch::TokenBatch;
use crate::model::{Attention, Decoder, ModelError, Rotation, head_pieces};

/// Log-prob and entropy of some of a micro-batch's targets, `[n]` f32 each, leaves of autograd.
pub(super) struct Targets<'a> {
    pub(super) log_prob: &'a Tensor,
    pub(super) entropy: &'a Tensor,
}

/// Part `range` of a per-token tensor.
pub(super) fn slice(tensor: &Tensor, range: &Range<usize>) -> Result<Tensor, LearnerError> {
    Ok(tensor.f_narrow(0, range.start as i64, range.len() as i64)?)
}

/// Forward and backward of one micro-batch. `loss` gets each piece's token range and terms, and gives the scalar
/// whose gradient is added to the sums of the decoder's parameters; `embedding` is that of its embedding.
pub(super) fn backward(
    decoder: &Decoder,
    batch: &TokenBatch,
    temperature: f64,
    recompute: bool,
    embedding: &Tensor,
    mut loss: impl FnMut(&Range<usize>, &Targets<'_>) -> Result<Tensor, LearnerError>,
) -> Result<(), LearnerError> {
    let rotation = decoder.rotation(&batch.ids, &batch.positions)?;
    let reach = Attention::Packed(&batch.packed);
    let passed = Passed::forward(decoder, batch, &rotation, reach, recompute)?;
    let predicting = passed.hidden.f_index_select(0, &batch.predicting)?;
    let at_head = predicting.f_detach()?;
    let mut gradients = Vec::new();
    for range in head_pieces(decoder, batch.tokens) {
        let hidden = slice(&at_head, &range)?.f_contiguous()?;
        gradients.push(head(decoder, &hidden, &slice(&batch.targets, &range)?, temperature, |terms| {
            loss(&range, terms)
        })?);
    }
    ops::backward(&predicting, &Tensor::f_cat(&gradients, 0)?).map_err(ModelError::from)?;
    let gradient = passed.backward(decoder, &rotation, reach)?;
    let _no_grad = tch::no_grad_guard();
    let _same = embedding.shallow_clone().f_index_add_(0, &batch.ids, &gradient.f_to_kind(Kind::Float)?)?;
    Ok(())
}

/// One piece of the head, forward and back: the gradient of its hidden states `[n, hidden]`.
fn head(
    decoder: &Decoder,
    hidden: &Tensor,
    targets: &Tensor,
    temperature: f64,
    loss: impl FnOnce(&Targets<'_>) -> Result<Tensor, LearnerError>,
) -> Result<Tensor, LearnerError> {
    let logits = decoder.logits(hidden)?;
    let terms = ops::token_terms(&logits, targets, temperature).map_err(ModelError::from)?;
    let leaf = |t: &Tensor| -> Result<Tensor, LearnerError> { Ok(t.f_detach()?.f_set_requires_grad(true)?) };
    let (log_prob, entropy) = (leaf(&terms.log_prob)?, leaf(&terms.entropy)?);
    loss(&Targets { log_prob: &log_prob, entropy: &entropy })?.f_backward()?;
    let gradient = |leaf: &Tensor| -> Result<Tensor, LearnerError> {
        let gradient = leaf.f_grad()?;
        Ok(if gradient.defined() { gradient.f_contiguous()? } else { leaf.f_detach()?.f_zeros_like()? })
    };
    let (of_log_prob, of_entropy) = (gradient(&log_prob)?, gradient(&entropy)?);
    let of_logits = terms
        .backward(&logits, targets, &of_log_prob, &of_entropy, decoder.kind())
        .map_err(ModelError::from)?;
    Ok(decoder.logits_backward(hidden, &of_logits)?)
}

/// A forward pass to go back through.
struct Passed {
    /// After the final norm, `[T, hidden]`.
    hidden: Tensor,
    /// What the recorded part began with: the embeddings or, when blocks are computed again, the last one's output.
    leaf: Tensor,
    /// Each block's input, first to last, when they are computed again.
    inputs: Vec<Tensor>,
}

impl Passed {
    fn forward(
        decoder: &Decoder,
        batch: &TokenBatch,
        rotation: &Rotation,
        reach: Attention<'_>,
        recompute: bool,
    ) -> Result<Self, ModelError> {
        let mut x = decoder.embed(&batch.ids)?;
        let mut inputs = Vec::new();
        if recompute {
            let _no_grad = tch::no_grad_guard();
            for layer in 0..decoder.layers() {
                let y = decoder.block(layer, &x, rotation, reach)?;
                inputs.push(std::mem::replace(&mut x, y));
            }
        }
        let leaf = x.f_set_requires_grad(true)?;
        let mut x = leaf.shallow_clone();
        for layer in inputs.len()..decoder.layers() {
            x = decoder.block(layer, &x, rotation, reach)?;
        }
        Ok(Self { hidden: decoder.final_norm(&x)?, leaf, inputs })
    }

    /// The gradient of the embeddings, once that of `hidden` has run back to the leaf.
    fn backward(
        self,
        decoder: &Decoder,
        rotation: &Rotation,
        reach: Attention<'_>,
    ) -> Result<Tensor, LearnerError> {
        let Self { hidden, leaf, inputs } = self;
        drop(hidden);
        let mut gradient = leaf.f_grad()?;
        drop(leaf);
        for (layer, input) in inputs.into_iter().enumerate().rev() {
            let leaf = input.f_set_requires_grad(true)?;
            let output = decoder.block(layer, &leaf, rotation, reach)?;
            ops::backward(&output, &gradient).map_err(ModelError::from)?;
            gradient = leaf.f_grad()?;
        }
        Ok(gradient)
    }
}
