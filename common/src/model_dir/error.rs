//! What can be wrong with a model directory, by file, key and tensor.

use std::path::{Path, PathBuf};

/// A model directory that cannot be used as it is.
#[derive(Debug, thiserror::Error)]
pub enum ModelDirError {
    /// Reading a file failed.
    #[error("{action} {}", path.display())]
    Io {
        /// What was tried: `cannot open`, `cannot read`.
        action: &'static str,
        /// On which file.
        path: PathBuf,
        /// The system's reason.
        source: std::io::Error,
    },
    /// A file is not what its name promises.
    #[error("{}: {reason}", path.display())]
    Malformed {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// `config.json` lacks a key, or a key's value is of the wrong type.
    #[error("{}: key `{key}` {problem}; needed: {expected}", path.display())]
    Config {
        /// The file.
        path: PathBuf,
        /// The key.
        key: String,
        /// `is missing`, or what it is instead.
        problem: String,
        /// What it should be.
        expected: String,
    },
    /// The model uses something that is not computed here.
    #[error("{}: `{key}` = {value} is not supported; supported: {supported}", path.display())]
    Unsupported {
        /// The file.
        path: PathBuf,
        /// The key.
        key: String,
        /// Its value.
        value: String,
        /// What is.
        supported: &'static str,
    },
    /// A tensor that the configuration calls for is in no file.
    #[error(
        "{}: tensor `{name}` {shape:?} is missing ({found} tensors found{}); the weights and config.json do not belong together",
        path.display(),
        nearest.as_deref().map(|(other, shape)| format!(", `{other}` {shape:?} among them")).unwrap_or_default()
    )]
    MissingTensor {
        /// The file that should hold it: the weights, or the index of several.
        path: PathBuf,
        /// Its name.
        name: String,
        /// The shape config.json asks for.
        shape: Vec<i64>,
        /// How many tensors were there.
        found: usize,
        /// One of them whose name ends alike, and its shape.
        nearest: Option<Box<(String, Vec<i64>)>>,
    },
    /// A file holds a tensor that the configuration has no place for.
    #[error(
        "{}: tensor `{name}` {shape:?} has no place in the model config.json describes ({architecture})",
        path.display()
    )]
    ExtraTensor {
        /// The file.
        path: PathBuf,
        /// Its name.
        name: String,
        /// Its shape.
        shape: Vec<i64>,
        /// The model's architecture.
        architecture: String,
    },
    /// A tensor has another shape than the configuration gives it.
    #[error(
        "{}: tensor `{name}` has shape {found:?}, config.json asks for {expected:?}{}",
        path.display(),
        rows_are_tokens(name, found, expected)
    )]
    ShapeMismatch {
        /// The file.
        path: PathBuf,
        /// Its name.
        name: String,
        /// The shape in the file.
        found: Vec<i64>,
        /// The shape config.json asks for.
        expected: Vec<i64>,
    },
    /// The tokenizer makes ids that the embedding has no rows for.
    #[error(
        "{}: token {token:?} has id {id}, but `{EMBEDDING}` has {vocab} rows (vocab_size in config.json): ids must be below that; the tokenizer and the model do not belong together",
        path.display()
    )]
    TokenOutsideVocabulary {
        /// The tokenizer's file.
        path: PathBuf,
        /// The token with the largest id.
        token: String,
        /// That id.
        id: u64,
        /// Rows of the embedding.
        vocab: i64,
    },
}

/// The embedding: a row a token.
pub(super) const EMBEDDING: &str = "model.embed_tokens.weight";
/// The head, where it is not the embedding.
pub(super) const HEAD: &str = "lm_head.weight";

/// What a wrong height of the embedding or the head means.
fn rows_are_tokens(name: &str, found: &[i64], expected: &[i64]) -> String {
    match (found, expected) {
        ([rows, width], [vocab, same]) if [EMBEDDING, HEAD].contains(&name) && width == same => format!(
            ": its rows are the vocabulary, {rows} here and {vocab} in vocab_size; take both from the same model"
        ),
        _ => String::new(),
    }
}

impl ModelDirError {
    pub(super) fn io(action: &'static str, path: &Path, source: std::io::Error) -> Self {
        Self::Io { action, path: path.to_owned(), source }
    }

    pub(super) fn malformed(path: &Path, reason: impl Into<String>) -> Self {
        Self::Malformed { path: path.to_owned(), reason: reason.into() }
    }
}
