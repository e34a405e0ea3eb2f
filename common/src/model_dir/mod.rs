//! A Hugging Face model directory, read as far as it can be without libtorch: `config.json`, the headers of the
//! safetensors files, the tokenizer's files.
//!
//! The coordinator calls [`ModelDir::inspect`] before a job is queued, so that a bad directory is refused before
//! anything starts; the worker loads the weights from where [`ModelDir::inspect`] found them. What must stay
//! true: a directory that passes describes one model, whole; whatever bytes its files hold, reading them ends in
//! an error with file, key or tensor, never in a panic, a hang, or weights read from the wrong place.

mod config;
mod error;
mod header;
mod json;
mod rope;
mod template_fit;
#[cfg(test)]
mod tests;
mod tokenizer;
mod weights;
mod window;

use std::path::{Path, PathBuf};

pub use config::{Architecture, ModelConfig};
pub use error::ModelDirError;
pub use json::read_object;
pub use rope::RopeScaling;
pub use template_fit::{TemplateMisfit, check_template, fitting_templates};
pub use tokenizer::{chat_template, special_tokens};
pub use weights::{StoredDtype, StoredTensor, announced_bytes, stored_tensors};
pub use window::WindowError;

/// A model directory whose configuration and weights belong together.
#[derive(Debug, Clone, PartialEq)]
pub struct ModelDir {
    /// Where it is.
    pub path: PathBuf,
    /// The model.
    pub config: ModelConfig,
    /// Its parameters, in the order of [`ModelConfig::tensors`].
    pub tensors: Vec<StoredTensor>,
    /// `lm_head.weight` where it is stored although `config.json` ties it to the embedding: it must hold the
    /// same numbers, which whoever reads the weights has to check.
    pub tied_copy: Option<StoredTensor>,
}

impl ModelDir {
    /// Reads the configuration and the headers of the weights, and holds them against each other.
    ///
    /// # Errors
    /// Names the file and the key or tensor that is missing, extra, misshapen or not supported.
    pub fn inspect(dir: &Path) -> Result<Self, ModelDirError> {
        let config = ModelConfig::from_dir(dir)?;
        let (tensors, tied_copy) = weights::locate(dir, &config)?;
        Ok(Self { path: dir.to_owned(), config, tensors, tied_copy })
    }

    /// Bytes of all parameters as they are stored.
    #[must_use]
    pub fn weight_bytes(&self) -> u64 {
        self.tensors.iter().map(|tensor| tensor.bytes as u64).sum()
    }
}
