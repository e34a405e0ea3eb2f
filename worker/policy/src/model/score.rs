//! Logits, log-probs and entropies of given texts.
//!
//! Called by `worker score`, by `make parity` and by tests that hold the engine to its own log-probs. What must
//! stay true: the `[tokens, vocab]` logits never exist whole, only some rows at a time; log-probs and entropies
//! come from the operator the learner's loss uses.

use std::ops::Range;

use agentfly_c10d::ops::{Packed, token_terms};
use agentfly_c10d::upload;
use agentfly_common::planner::head_tokens;
use tch::{Device, Tensor};

use super::attention::Attention;
use super::decoder::Decoder;
use super::error::ModelError;

/// What a model says of a text of T tokens; each list has length T, and nothing is said of the first token.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Scores {
    /// Log-prob (natural, temperature 1) of each token given those before it.
    pub log_probs: Vec<Option<f32>>,
    /// Entropy (nats) of the distribution that token is drawn from.
    pub entropies: Vec<Option<f32>>,
}

/// Log-prob (natural, temperature 1) of each id given those before it; `None` for the first.
///
/// # Errors
/// When there is no id, one is not in the vocabulary, there are more than the model was trained for, or memory
/// is out.
pub fn score(decoder: &Decoder, ids: &[u32]) -> Result<Vec<Option<f32>>, ModelError> {
    Ok(score_rows(decoder, &[ids])?.pop().unwrap_or_default().log_probs)
}

/// [`Scores`] of several texts, which go through the model together.
///
/// # Errors
/// As [`score`], and when there is no text.
pub fn score_rows(decoder: &Decoder, rows: &[&[u32]]) -> Result<Vec<Scores>, ModelError> {
    // The token after each; after a text's last its first stands in, of which nothing is said.
    let next = rows.iter().flat_map(|row| row.iter().skip(1).chain(row.first()));
    let targets: Vec<i64> = next.map(|&id| i64::from(id)).collect();
    let (mut log_probs, mut entropies) = (Vec::new(), Vec::new());
    visit_logits(decoder, rows, |range, logits| {
        let targets = upload(&targets[range], decoder.device())?;
        let terms = token_terms(logits, &targets, 1.0)?;
        log_probs.extend(host(&terms.log_prob)?);
        entropies.extend(host(&terms.entropy)?);
        Ok(())
    })?;
    let mut start = 0;
    let mut all = Vec::with_capacity(rows.len());
    for row in rows {
        let own = start..start + row.len() - 1;
        let shifted =
            |values: &[f32]| std::iter::once(None).chain(values.iter().copied().map(Some)).collect();
        let (log_probs, entropies) = (shifted(&log_probs[own.clone()]), shifted(&entropies[own]));
        all.push(Scores { log_probs, entropies });
        start += row.len();
    }
    Ok(all)
}

/// Hands `visit` the logits `[n, vocab]` f32 that follow each token of the texts, some tokens at a time, with
/// those tokens' range; tokens count through all texts, one after another.
///
/// # Errors
/// As [`score_rows`], and what `visit` returns.
pub fn visit_logits(
    decoder: &Decoder,
    rows: &[&[u32]],
    visit: impl FnMut(Range<usize>, &Tensor) -> Result<(), ModelError>,
) -> Result<(), ModelError> {
    check(decoder, rows)?;
    let _no_grad = tch::no_grad_guard();
    visit_head(decoder, &hidden(decoder, rows)?, visit)
}

/// Hands `visit` the logits `[n, vocab]` f32 of hidden states `[N, hidden]`, as many at a time as may exist together,
/// with their range.
pub(crate) fn visit_head<E: From<ModelError>>(
    decoder: &Decoder,
    hidden: &Tensor,
    mut visit: impl FnMut(Range<usize>, &Tensor) -> Result<(), E>,
) -> Result<(), E> {
    let logits = |range: &Range<usize>| {
        let part = hidden.f_narrow(0, range.start as i64, range.len() as i64)?;
        decoder.logits(&part)
    };
    head_pieces(decoder, hidden.size()[0] as usize).try_for_each(|range| {
        let logits = logits(&range)?;
        visit(range, &logits)
    })
}

/// Tokens in runs whose logits may exist together, in order.
pub(crate) fn head_pieces(decoder: &Decoder, tokens: usize) -> impl Iterator<Item = Range<usize>> + use<> {
    let rows = head_tokens(decoder.config().vocab) as usize;
    (0..tokens).step_by(rows).map(move |start| start..(start + rows).min(tokens))
}

/// A vector's values, f32.
pub(crate) fn host(tensor: &Tensor) -> Result<Vec<f32>, ModelError> {
    let tensor = tensor.f_detach()?.f_to_device(Device::Cpu)?.f_contiguous()?;
    let mut values = vec![0_f32; tensor.numel()];
    let count = values.len();
    tensor.f_copy_data(&mut values, count)?;
    Ok(values)
}

/// Hidden states `[N, hidden]` of all texts' tokens, one text after another.
fn hidden(decoder: &Decoder, rows: &[&[u32]]) -> Result<Tensor, ModelError> {
    let ids: Vec<i64> = rows.iter().flat_map(|row| row.iter().map(|&id| i64::from(id))).collect();
    let positions: Vec<i64> = rows.iter().flat_map(|row| 0..row.len() as i64).collect();
    let mut starts = vec![0];
    for row in rows {
        starts.push(starts[starts.len() - 1] + row.len() as i64);
    }
    let on_device = |host: &[i64]| upload(host, decoder.device());
    let packed = Packed::new(&starts, decoder.device())?;
    decoder.hidden(&on_device(&ids)?, &on_device(&positions)?, Attention::Packed(&packed))
}

fn check(decoder: &Decoder, rows: &[&[u32]]) -> Result<(), ModelError> {
    let (vocab, trained) = (decoder.config().vocab, decoder.config().max_position_embeddings);
    let wrong = |got: String, needed: String| Err(ModelError::Input { what: "token ids", got, needed });
    if rows.is_empty() || rows.iter().any(|row| row.is_empty()) {
        return wrong("none".to_owned(), "at least one".to_owned());
    }
    for row in rows {
        if let Some(id) = row.iter().find(|&&id| i64::from(id) >= vocab) {
            return wrong(format!("id {id}"), format!("ids below the vocabulary's {vocab}"));
        }
        if i64::try_from(row.len()).is_ok_and(|length| length > trained) {
            let needed = format!("at most the {trained} the model was trained for (max_position_embeddings)");
            return wrong(format!("{} ids", row.len()), needed);
        }
    }
    Ok(())
}
