//! Log-probs of given texts.
//!
//! Called by evaluation and by tests that hold the engine to its own log-probs. What must stay true: the
//! `[tokens, vocab]` logits never exist whole, only some rows at a time.

use agentfly_c10d::ops::token_terms;
use tch::{Kind, Tensor};

use super::attention::Attention;
use super::decoder::Decoder;
use super::error::ModelError;

/// Tokens whose logits exist at a time.
const HEAD_ROWS: i64 = 256;

/// Log-prob (natural, temperature 1) of each id given those before it; `None` for the first.
///
/// # Errors
/// When there is no id, one is not in the vocabulary, there are more than the model was trained for, or memory
/// is out.
pub fn score(decoder: &Decoder, ids: &[u32]) -> Result<Vec<Option<f32>>, ModelError> {
    let (vocab, trained) = (decoder.config().vocab, decoder.config().max_position_embeddings);
    if let Some(id) = ids.iter().find(|&&id| i64::from(id) >= vocab) {
        return Err(ModelError::Input {
            what: "token ids",
            got: format!("id {id}"),
            needed: format!("ids below the vocabulary's {vocab}"),
        });
    }
    if ids.is_empty() {
        return Err(ModelError::Input {
            what: "token ids",
            got: "none".to_owned(),
            needed: "at least one".to_owned(),
        });
    }
    if i64::try_from(ids.len()).is_ok_and(|length| length > trained) {
        return Err(ModelError::Input {
            what: "token ids",
            got: format!("{} ids", ids.len()),
            needed: format!("at most the {trained} the model was trained for (max_position_embeddings)"),
        });
    }
    let _no_grad = tch::no_grad_guard();
    let host: Vec<i64> = ids.iter().map(|&id| i64::from(id)).collect();
    let ids = Tensor::f_from_slice(&host)?.f_to_device(decoder.device())?;
    let positions = Tensor::f_arange(host.len() as i64, (Kind::Int64, decoder.device()))?;
    let starts = Tensor::from_slice(&[0, host.len() as i64]);
    let hidden = decoder.hidden(&ids, &positions, Attention::Packed(&starts))?;
    let mut values = vec![None];
    let predicted = host.len() as i64 - 1;
    for start in (0..predicted).step_by(HEAD_ROWS as usize) {
        let count = HEAD_ROWS.min(predicted - start);
        let logits = decoder.logits(&hidden.f_narrow(0, start, count)?)?;
        let terms = token_terms(&logits, &ids.f_narrow(0, start + 1, count)?, 1.0)?;
        let mut log_probs = vec![0_f32; count as usize];
        terms.log_prob.f_to_device(tch::Device::Cpu)?.f_copy_data(&mut log_probs, count as usize)?;
        values.extend(log_probs.into_iter().map(Some));
    }
    Ok(values)
}
