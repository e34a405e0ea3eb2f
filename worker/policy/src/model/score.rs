//! Log-probs of given texts.
//!
//! Called by evaluation and by tests that hold the engine to its own log-probs. What must stay true: the
//! `[tokens, vocab]` logits never exist whole, only some rows at a time.

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
    let hidden = decoder.hidden(&ids.f_unsqueeze(0)?, &positions.f_unsqueeze(0)?, Attention::Causal)?;
    let predicting = hidden.f_squeeze_dim(0)?.f_narrow(0, 0, host.len() as i64 - 1)?;
    let log_probs = token_log_probs(decoder, &predicting, &ids.f_narrow(0, 1, host.len() as i64 - 1)?)?;
    let mut values = vec![0_f32; host.len() - 1];
    log_probs.f_to_device(tch::Device::Cpu)?.f_copy_data(&mut values, host.len() - 1)?;
    Ok(std::iter::once(None).chain(values.into_iter().map(Some)).collect())
}

/// Log-probs `[N]` f32 that hidden states `[N, hidden]` give to ids `[N]`, some rows at a time.
///
/// # Errors
/// When memory is out.
pub fn token_log_probs(decoder: &Decoder, hidden: &Tensor, ids: &Tensor) -> Result<Tensor, ModelError> {
    let total = hidden.size()[0];
    let mut parts = Vec::new();
    let mut start = 0;
    while start < total {
        let count = HEAD_ROWS.min(total - start);
        let logits = decoder.logits(&hidden.f_narrow(0, start, count)?)?;
        let target = ids.f_narrow(0, start, count)?.f_unsqueeze(1)?;
        let chosen = logits.f_gather(1, &target, false)?.f_squeeze_dim(1)?;
        parts.push(chosen.f_sub(&logits.f_logsumexp([-1], false)?)?);
        start += count;
    }
    match parts.as_slice() {
        [] => Ok(Tensor::f_zeros([0], (Kind::Float, hidden.device()))?),
        parts => Ok(Tensor::f_cat(parts, 0)?),
    }
}
