//! How many tokens a chain may have: what the settings ask for, held against what the model was trained for.
//!
//! The coordinator refuses a job by this before anything starts; each rank takes its window from it.

use super::config::ModelConfig;
use crate::config::Rollout;

/// Chains set longer than the model knows.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "actor_rollout_ref.rollout.max_model_len={asked}, but the model was trained for {trained} tokens (max_position_embeddings in its config.json); set at most {trained}, or leave it out"
)]
pub struct WindowError {
    /// Tokens a chain, as set.
    pub asked: u32,
    /// Tokens the model knows.
    pub trained: u32,
}

impl ModelConfig {
    /// The most tokens a chain of this model may have, its prompt included.
    ///
    /// # Errors
    /// When chains are set longer than `max_position_embeddings`. A turn may be: `max_tokens` is a cap, and a turn ends
    /// with its chain's window in any case (vLLM).
    pub fn window(&self, rollout: &Rollout) -> Result<u32, WindowError> {
        let trained = u32::try_from(self.max_position_embeddings).unwrap_or(u32::MAX);
        match rollout.max_model_len {
            Some(asked) if asked > trained => Err(WindowError { asked, trained }),
            Some(asked) => Ok(asked),
            None => Ok(trained),
        }
    }
}
