//! Draws a token for every row of a batch of logits.
//!
//! Called by the decode pass. What must stay true: a row's draw depends on its logits, its parameters and its
//! own uniform number alone; log-probs are those of the tempered distribution before top-k and top-p (at
//! temperature 0 of the untempered one). Top-k cuts first and top-p counts mass within what it left, as vLLM
//! does.

use agentfly_c10d::ops::{self, Draw};
use agentfly_common::sampling::SamplingParams;
use tch::Tensor;

use crate::model::ModelError;

/// How a row of logits is drawn.
#[derive(Debug)]
pub(crate) struct Row {
    pub(crate) sampling: SamplingParams,
    /// In (0, 1].
    pub(crate) uniform: f64,
}

/// A token and its log-prob for each row of logits `[B, vocab]` f32.
pub(crate) fn sample(logits: &Tensor, rows: &[Row]) -> Result<Vec<(u32, f32)>, ModelError> {
    let vocab = logits.size()[1];
    let draw = |row: &Row| Draw {
        temperature: row.sampling.temperature,
        top_p: row.sampling.top_p,
        top_k: row.sampling.top_k.map_or(vocab, |k| i64::from(k).min(vocab)),
        uniform: row.uniform,
    };
    let (tokens, log_probs) = ops::sample(logits, &rows.iter().map(draw).collect::<Vec<_>>())?;
    Ok(tokens.into_iter().map(|id| id as u32).zip(log_probs).collect())
}
