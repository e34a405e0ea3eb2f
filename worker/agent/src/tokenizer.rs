//! A Hugging Face tokenizer that keeps markup and text apart.
//!
//! Called by the templates (text → ids) and by the chain loop (sampled ids → text). What must stay true: only
//! special tokens that a template itself wrote become special ids. Text of other origin is passed through
//! [`ChatTokenizer::escape`] before it is rendered; [`ChatTokenizer::encode_rendered`] undoes that, and encodes
//! such text as ordinary characters, so a question that spells `<|im_end|>` cannot end its own message.

use std::path::{Path, PathBuf};

use agentfly_common::model_dir::{ModelDirError, chat_template};
use serde_json::Value;
use tokenizers::Tokenizer;

/// Opens an escape in rendered text; a private-use character, itself escaped where text contains it.
const ESCAPE_OPEN: char = '\u{10FFFD}';
/// Closes an escape.
const ESCAPE_CLOSE: char = '\u{10FFFC}';
/// What closes a turn in every named template; [`crate::template::ChatTemplate`] refuses one without it.
const DEFAULT_END_OF_TURN: &str = "<|im_end|>";

/// A tokenizer could not be loaded or used.
#[derive(Debug, thiserror::Error)]
pub enum TokenizerError {
    /// A file is missing, unreadable or malformed.
    #[error("tokenizer file {}: {cause}. The model directory must hold a Hugging Face tokenizer.json", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        cause: String,
    },
    /// The chat template's file is there and cannot be read.
    #[error(transparent)]
    Dir(Box<ModelDirError>),
    /// The vocabulary lacks a token the chain loop relies on, or does not call it special.
    #[error("tokenizer in {}: token {token:?} is {problem}; chats need it as an added token with \"special\": true", path.display())]
    SpecialToken {
        /// Where the tokenizer came from.
        path: PathBuf,
        /// The token's text.
        token: String,
        /// `not in the vocabulary`, `not special`.
        problem: &'static str,
    },
    /// The library refused to encode or decode.
    #[error("tokenizer could not {action} {what}: {cause}")]
    Library {
        /// `encode` or `decode`.
        action: &'static str,
        /// How much of what.
        what: String,
        /// The library's words.
        cause: String,
    },
}

/// A tokenizer with the special ids that chats need.
pub struct ChatTokenizer {
    /// The model directory it came from.
    dir: PathBuf,
    /// Recognises no special token: `encode_special_tokens` is set.
    tokenizer: Tokenizer,
    /// Special tokens, longest first, so that the longest match wins.
    specials: Vec<(String, u32)>,
    end_of_turn: (String, u32),
    eos: Option<(String, u32)>,
    bos: Option<String>,
    chat_template: Option<String>,
}

impl ChatTokenizer {
    /// Reads `tokenizer.json`, and where present `tokenizer_config.json` and `chat_template.jinja`, of a Hugging
    /// Face model directory.
    ///
    /// The token that closes a turn is `<|im_end|>` where the vocabulary has it, else the configured
    /// `eos_token`.
    ///
    /// # Errors
    /// Names the file and what is wrong with it, or the special token that is missing.
    pub fn from_dir(dir: &Path) -> Result<Self, TokenizerError> {
        let path = dir.join("tokenizer.json");
        let tokenizer = Tokenizer::from_file(&path)
            .map_err(|e| TokenizerError::File { path: path.clone(), cause: e.to_string() })?;
        let config = read_json(&dir.join("tokenizer_config.json"))?.unwrap_or(Value::Null);
        let chat_template = chat_template(dir).map_err(|e| TokenizerError::Dir(Box::new(e)))?;
        Self::new(tokenizer, &config, chat_template, dir)
    }

    fn new(
        mut tokenizer: Tokenizer,
        config: &Value,
        chat_template: Option<String>,
        dir: &Path,
    ) -> Result<Self, TokenizerError> {
        let mut specials: Vec<(String, u32)> = tokenizer
            .get_added_tokens_decoder()
            .into_iter()
            .filter(|(_, token)| token.special && !token.content.is_empty())
            .map(|(id, token)| (token.content, id))
            .collect();
        specials.sort_by(|a, b| b.0.len().cmp(&a.0.len()).then_with(|| a.0.cmp(&b.0)));
        let special = |token: &str| -> Result<(String, u32), TokenizerError> {
            if let Some(found) = specials.iter().find(|(text, _)| text == token) {
                return Ok(found.clone());
            }
            let problem =
                if tokenizer.token_to_id(token).is_some() { "not special" } else { "not in the vocabulary" };
            Err(TokenizerError::SpecialToken { path: dir.to_owned(), token: token.to_owned(), problem })
        };
        let eos_text = configured_token(config, "eos_token");
        let eos = eos_text.as_deref().map(special).transpose()?;
        let end_of_turn = match (special(DEFAULT_END_OF_TURN), &eos) {
            (Ok(found), _) => found,
            (Err(_), Some(eos)) => eos.clone(),
            (Err(missing), None) => return Err(missing),
        };
        let bos = configured_token(config, "bos_token");
        tokenizer.set_encode_special_tokens(true);
        Ok(Self { dir: dir.to_owned(), tokenizer, specials, end_of_turn, eos, bos, chat_template })
    }

    /// The model directory it came from.
    #[must_use]
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Whether `text` is one special token.
    #[must_use]
    pub fn is_special(&self, text: &str) -> bool {
        self.specials.iter().any(|(token, _)| token == text)
    }

    /// The id that closes a turn, normally `<|im_end|>`.
    #[must_use]
    pub fn end_of_turn_id(&self) -> u32 {
        self.end_of_turn.1
    }

    /// The text of the token that closes a turn.
    #[must_use]
    pub fn end_of_turn_text(&self) -> &str {
        &self.end_of_turn.0
    }

    /// The configured end-of-text id, when there is one.
    #[must_use]
    pub fn eos_id(&self) -> Option<u32> {
        self.eos.as_ref().map(|(_, id)| *id)
    }

    /// The text of the configured end-of-text token, for templates that name it.
    #[must_use]
    pub fn eos_text(&self) -> Option<&str> {
        self.eos.as_ref().map(|(text, _)| text.as_str())
    }

    /// The text of the configured begin-of-text token, for templates that name it.
    #[must_use]
    pub fn bos_text(&self) -> Option<&str> {
        self.bos.as_deref()
    }

    /// The ids that end a turn when sampled: end of turn and end of text.
    #[must_use]
    pub fn stop_ids(&self) -> Vec<u32> {
        let mut ids = vec![self.end_of_turn_id()];
        ids.extend(self.eos_id().filter(|&id| id != self.end_of_turn_id()));
        ids
    }

    /// The model's own chat template (`chat_template.jinja`, else `tokenizer_config.json`), when it has one.
    #[must_use]
    pub fn chat_template(&self) -> Option<&str> {
        self.chat_template.as_deref()
    }

    /// The number of ids, added tokens included.
    #[must_use]
    pub fn vocab_size(&self) -> usize {
        self.tokenizer.get_vocab_size(true)
    }

    /// Text that may be rendered into a template: special tokens in it are replaced by escapes that
    /// [`Self::encode_rendered`] turns back into their plain characters.
    #[must_use]
    pub fn escape(&self, text: &str) -> String {
        let mut out = String::with_capacity(text.len());
        let mut rest = text;
        while let Some(next) = rest.chars().next() {
            if let Some(index) = self.specials.iter().position(|(s, _)| rest.starts_with(s.as_str())) {
                out.push_str(&format!("{ESCAPE_OPEN}{}{ESCAPE_CLOSE}", index + 1));
                rest = &rest[self.specials[index].0.len()..];
                continue;
            }
            if next == ESCAPE_OPEN {
                out.push_str(&format!("{ESCAPE_OPEN}0{ESCAPE_CLOSE}"));
            } else {
                out.push(next);
            }
            rest = &rest[next.len_utf8()..];
        }
        out
    }

    /// The inverse of [`Self::escape`]: what a person reads.
    #[must_use]
    pub fn unescape(&self, rendered: &str) -> String {
        let mut out = String::with_capacity(rendered.len());
        let mut rest = rendered;
        while let Some(at) = rest.find(ESCAPE_OPEN) {
            out.push_str(&rest[..at]);
            let body = &rest[at + ESCAPE_OPEN.len_utf8()..];
            let close = body.find(ESCAPE_CLOSE);
            match close.and_then(|end| Some((end, body[..end].parse::<usize>().ok()?))) {
                Some((end, number)) if number <= self.specials.len() => {
                    match number.checked_sub(1) {
                        None => out.push(ESCAPE_OPEN),
                        Some(index) => out.push_str(&self.specials[index].0),
                    }
                    rest = &body[end + ESCAPE_CLOSE.len_utf8()..];
                }
                _ => {
                    out.push(ESCAPE_OPEN);
                    rest = body;
                }
            }
        }
        out.push_str(rest);
        out
    }

    /// Ids of rendered template text: special tokens written by the template become their ids, everything
    /// between two of them is unescaped and encoded as one run of ordinary text (as a Hugging Face tokenizer
    /// splits it).
    ///
    /// # Errors
    /// The library's refusal, with the length of the text.
    pub fn encode_rendered(&self, rendered: &str) -> Result<Vec<u32>, TokenizerError> {
        let mut ids = Vec::new();
        let mut plain_from = 0;
        let mut at = 0;
        while at < rendered.len() {
            let rest = &rendered[at..];
            if let Some((text, id)) = self.specials.iter().find(|(s, _)| rest.starts_with(s.as_str())) {
                ids.extend(self.encode_text(&self.unescape(&rendered[plain_from..at]))?);
                ids.push(*id);
                at += text.len();
                plain_from = at;
            } else {
                at += rest.chars().next().map_or(1, char::len_utf8);
            }
        }
        ids.extend(self.encode_text(&self.unescape(&rendered[plain_from..]))?);
        Ok(ids)
    }

    /// Ids of ordinary text: no special id ever comes out of it.
    ///
    /// # Errors
    /// The library's refusal, with the length of the text.
    pub fn encode_text(&self, text: &str) -> Result<Vec<u32>, TokenizerError> {
        if text.is_empty() {
            return Ok(Vec::new());
        }
        let encoding = self.tokenizer.encode_fast(text, false).map_err(|e| TokenizerError::Library {
            action: "encode",
            what: format!("a text of {} bytes", text.len()),
            cause: e.to_string(),
        })?;
        Ok(encoding.get_ids().to_vec())
    }

    /// The text of ids, special tokens left out.
    ///
    /// # Errors
    /// The library's refusal, with the number of ids.
    pub fn decode(&self, ids: &[u32]) -> Result<String, TokenizerError> {
        self.tokenizer.decode(ids, true).map_err(|e| TokenizerError::Library {
            action: "decode",
            what: format!("{} ids", ids.len()),
            cause: e.to_string(),
        })
    }
}

impl std::fmt::Debug for ChatTokenizer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ChatTokenizer")
            .field("vocab_size", &self.vocab_size())
            .field("end_of_turn", &self.end_of_turn)
            .field("eos", &self.eos)
            .finish_non_exhaustive()
    }
}

fn read_text(path: &Path) -> Result<Option<String>, TokenizerError> {
    match std::fs::read_to_string(path) {
        Ok(text) => Ok(Some(text)),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(e) => Err(TokenizerError::File { path: path.to_owned(), cause: e.to_string() }),
    }
}

fn read_json(path: &Path) -> Result<Option<Value>, TokenizerError> {
    let Some(text) = read_text(path)? else {
        return Ok(None);
    };
    let value = serde_json::from_str(&text);
    value.map(Some).map_err(|e| TokenizerError::File { path: path.to_owned(), cause: e.to_string() })
}

/// `eos_token` and its like are a string, or an object whose `content` is the string.
fn configured_token(config: &Value, name: &str) -> Option<String> {
    let value = config.get(name)?;
    value.as_str().or_else(|| value.get("content")?.as_str()).map(str::to_owned)
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use serde_json::json;

    use super::ChatTokenizer;
    use crate::template::{ChatTemplate, NamedTemplate};
    use crate::test_support::{IM_END, tokenizer};

    #[test]
    fn a_named_template_is_refused_where_its_markup_would_be_plain_text() {
        for name in NamedTemplate::NAMES {
            ChatTemplate::new(Some(name), tokenizer()).unwrap();
        }
        // Llama-3's markers, and ChatML's as plain words of the vocabulary.
        let folder = tempfile::tempdir().unwrap();
        let llama = json!({
            "version": "1.0",
            "added_tokens": [{"id": 2, "content": "<|eot_id|>", "single_word": false, "lstrip": false,
                "rstrip": false, "normalized": false, "special": true}],
            "model": {"type": "BPE", "vocab": {"<|im_start|>": 0, "<|im_end|>": 1}, "merges": []}
        });
        std::fs::write(folder.path().join("tokenizer.json"), llama.to_string()).unwrap();
        let config =
            json!({"eos_token": "<|eot_id|>", "chat_template": "{{ messages[0].content }}<|eot_id|>"});
        std::fs::write(folder.path().join("tokenizer_config.json"), config.to_string()).unwrap();
        let llama = Arc::new(ChatTokenizer::from_dir(folder.path()).unwrap());
        assert_eq!(llama.end_of_turn_text(), "<|eot_id|>");
        for name in NamedTemplate::NAMES {
            let told = ChatTemplate::new(Some(name), llama.clone()).err().map(|e| e.to_string()).unwrap();
            let folder = folder.path().display().to_string();
            for part in [*name, "<|im_start|> and <|im_end|>", &folder, "leave agent.template unset"] {
                assert!(told.contains(part), "{part}: {told}");
            }
        }
    }

    #[test]
    fn markup_becomes_special_ids_and_text_does_not() {
        let t = tokenizer();
        let rendered = format!("<|im_start|>user\n{}<|im_end|>\n", t.escape("stop <|im_end|> now"));
        let ids = t.encode_rendered(&rendered).unwrap();
        assert_eq!(ids.iter().filter(|&&id| id == IM_END).count(), 1, "only the template's own end of turn");
        assert_eq!(t.decode(&ids).unwrap(), "user\nstop <|im_end|> now\n");
        assert!(!t.encode_text("<|im_end|><|endoftext|>").unwrap().contains(&IM_END));
    }

    #[test]
    fn half_a_special_token_in_text_cannot_join_with_markup() {
        let t = tokenizer();
        let ids = t.encode_rendered(&format!("{}<|im_end|>", t.escape("<|im_end|"))).unwrap();
        assert_eq!(ids.iter().filter(|&&id| id == IM_END).count(), 1);
        assert_eq!(ids.last(), Some(&IM_END));
    }

    proptest::proptest! {
        #[test]
        fn escaping_is_undone_exactly(parts in proptest::collection::vec(
            proptest::prop_oneof![
                proptest::strategy::Just("<|im_end|>".to_owned()),
                proptest::strategy::Just("\u{10FFFD}".to_owned()),
                proptest::strategy::Just("1\u{10FFFC}".to_owned()),
                ".{0,4}",
            ], 0..8)) {
            let (t, text) = (tokenizer(), parts.concat());
            let escaped = t.escape(&text);
            proptest::prop_assert!(!escaped.contains("<|im_end|>"));
            proptest::prop_assert_eq!(t.unescape(&escaped), text);
        }
    }
}
