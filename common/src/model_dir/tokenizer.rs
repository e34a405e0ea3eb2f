//! What can be said of a tokenizer's files without the tokenizers library.
//!
//! Called by the coordinator; the agent crate, which loads the tokenizer in every rank, finds the model's chat
//! template with the same [`chat_template`].

use std::collections::BTreeSet;
use std::path::Path;

use serde_json::Value;

use super::error::ModelDirError;
use super::json::{read_object, read_text};

/// Holds `tokenizer.json` against the embedding: every id must have a row.
///
/// # Errors
/// A file that is no tokenizer's, or the token with the largest id.
pub(super) fn check(dir: &Path, vocab: i64) -> Result<(), ModelDirError> {
    let path = dir.join("tokenizer.json");
    let map = read_object(&path)?;
    let tokens = map.get("model").and_then(|model| model.get("vocab"));
    // A map from token to id, or (Unigram) a list of [token, score] in the order of the ids.
    let largest = match tokens {
        Some(Value::Object(ids)) => {
            ids.iter().filter_map(|(token, id)| Some((id.as_u64()?, token.as_str()))).max()
        }
        Some(Value::Array(pieces)) => {
            let last = pieces.last().and_then(|piece| piece.get(0)?.as_str());
            last.map(|token| (pieces.len() as u64 - 1, token))
        }
        _ => return Err(ModelDirError::malformed(&path, "is no tokenizer: it has no `model.vocab`")),
    };
    let added = map.get("added_tokens").and_then(Value::as_array).into_iter().flatten();
    let added = added.filter_map(|token| Some((token.get("id")?.as_u64()?, token.get("content")?.as_str()?)));
    match added.chain(largest).max() {
        None => Err(ModelDirError::malformed(&path, "is no tokenizer: it has no tokens")),
        Some((id, _)) if i64::try_from(id).is_ok_and(|id| id < vocab) => Ok(()),
        Some((id, token)) => {
            Err(ModelDirError::TokenOutsideVocabulary { path, token: token.to_owned(), id, vocab })
        }
    }
}

/// The special tokens: the `added_tokens` of `tokenizer.json` that say so. Each is one id, whatever stands around it.
///
/// # Errors
/// A file that cannot be read, or is not JSON.
pub fn special_tokens(dir: &Path) -> Result<BTreeSet<String>, ModelDirError> {
    let map = read_object(&dir.join("tokenizer.json"))?;
    let added = map.get("added_tokens").and_then(Value::as_array).into_iter().flatten();
    let special = added.filter(|token| token.get("special").and_then(Value::as_bool) == Some(true));
    Ok(special.filter_map(|token| Some(token.get("content")?.as_str()?.to_owned())).collect())
}

/// The model's own chat template: `chat_template.jinja`, else `chat_template` in `tokenizer_config.json`.
///
/// # Errors
/// A file that is there and cannot be read.
pub fn chat_template(dir: &Path) -> Result<Option<String>, ModelDirError> {
    let own_file = dir.join("chat_template.jinja");
    if own_file.exists() {
        return read_text(&own_file).map(Some);
    }
    let config = dir.join("tokenizer_config.json");
    if !config.exists() {
        return Ok(None);
    }
    Ok(read_object(&config)?.get("chat_template").and_then(configured_template).map(str::to_owned))
}

/// A string, or a list of named templates of which `default` is the chat one.
fn configured_template(value: &Value) -> Option<&str> {
    if let Some(text) = value.as_str() {
        return Some(text);
    }
    let is_default = |t: &&Value| t.get("name").and_then(Value::as_str) == Some("default");
    value.as_array()?.iter().find(is_default)?.get("template")?.as_str()
}
