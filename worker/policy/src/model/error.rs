//! What can go wrong with a model directory or a forward pass.

use std::path::{Path, PathBuf};

/// A model that cannot be read, written or run.
#[derive(Debug, thiserror::Error)]
pub enum ModelError {
    /// Reading or writing a file failed.
    #[error("{action} {}: {source}", path.display())]
    Io {
        /// What was tried: `cannot read`, `cannot write`, ….
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
    /// The model uses something this decoder does not compute.
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
        "{}: tensor `{name}` {shape:?} is missing ({found} tensors found); the weights and config.json do not belong together",
        path.display()
    )]
    MissingTensor {
        /// The file or directory searched.
        path: PathBuf,
        /// Its name.
        name: String,
        /// The shape config.json asks for.
        shape: Vec<i64>,
        /// How many tensors were there.
        found: usize,
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
    #[error("{}: tensor `{name}` has shape {found:?}, config.json asks for {expected:?}", path.display())]
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
    /// An argument of a forward pass is not what the model takes.
    #[error("{what}: got {got}, needed {needed}")]
    Input {
        /// The argument.
        what: &'static str,
        /// What came.
        got: String,
        /// What is needed.
        needed: String,
    },
    /// libtorch refused an operation (out of memory, mostly).
    #[error("libtorch: {0}")]
    Torch(String),
}

impl ModelError {
    pub(crate) fn io(action: &'static str, path: &Path, source: std::io::Error) -> Self {
        Self::Io { action, path: path.to_owned(), source }
    }

    pub(crate) fn malformed(path: &Path, reason: impl Into<String>) -> Self {
        Self::Malformed { path: path.to_owned(), reason: reason.into() }
    }
}

impl From<tch::TchError> for ModelError {
    /// Keeps the first line: the rest is a C++ backtrace.
    fn from(error: tch::TchError) -> Self {
        let text = error.to_string();
        let text = text.strip_prefix("Internal torch error: ").unwrap_or(&text);
        Self::Torch(text.lines().next().unwrap_or("no reason given").to_owned())
    }
}
