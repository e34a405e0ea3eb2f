//! What can go wrong with a model's files or a forward pass.

use std::path::{Path, PathBuf};

use agentfly_c10d::libtorch_reason;
use agentfly_common::model_dir::ModelDirError;

/// A model that cannot be read, written or run.
#[derive(Debug, thiserror::Error)]
pub enum ModelError {
    /// Reading or writing a file failed.
    #[error("{action} {}", path.display())]
    Io {
        /// What was tried: `cannot read`, `cannot write`, ….
        action: &'static str,
        /// On which file.
        path: PathBuf,
        /// The system's reason.
        source: std::io::Error,
    },
    /// The model directory is not what it should be, or the weights to write are not the model's.
    #[error(transparent)]
    Dir(#[from] ModelDirError),
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
}

impl From<tch::TchError> for ModelError {
    fn from(error: tch::TchError) -> Self {
        Self::Torch(libtorch_reason(&error))
    }
}

impl From<agentfly_c10d::Error> for ModelError {
    fn from(error: agentfly_c10d::Error) -> Self {
        Self::Torch(error.to_string())
    }
}
