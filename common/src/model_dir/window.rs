//! How many tokens a chain may have: what the settings ask for, held against what the model was trained for.
//!
//! The coordinator refuses a job by this before anything starts; each rank takes its window from it.

use super::config::ModelConfig;
use crate::config::Rollout;

/// Settings that the model has no room for.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum WindowError {
    /// Chains longer than the model knows.
    #[error(
        "actor_rollout_ref.rollout.max_model_len={asked}, but the model was trained for {trained} tokens (max_position_embeddings in its config.json); set at most {trained}, or leave it out"
    )]
    Chain {
        /// Tokens a chain, as set.
        asked: u32,
        /// Tokens the model knows.
        trained: u32,
    },
    /// A single turn longer than the model knows.
    #[error(
        "actor_rollout_ref.rollout.max_tokens={asked}, but the model was trained for {trained} tokens (max_position_embeddings in its config.json), prompt included; set less than {trained}"
    )]
    Turn {
        /// Tokens a turn, as set.
        asked: u32,
        /// Tokens the model knows.
        trained: u32,
    },
}

impl ModelConfig {
    /// The most tokens a chain of this model may have, its prompt included.
    ///
    /// # Errors
    /// When chains or turns are set longer than `max_position_embeddings`.
    pub fn window(&self, rollout: &Rollout) -> Result<u32, WindowError> {
        let trained = u32::try_from(self.max_position_embeddings).unwrap_or(u32::MAX);
        match rollout.max_model_len {
            Some(asked) if asked > trained => Err(WindowError::Chain { asked, trained }),
            Some(asked) => Ok(asked),
            None if rollout.max_tokens > trained => {
                Err(WindowError::Turn { asked: rollout.max_tokens, trained })
            }
            None => Ok(trained),
        }
    }
}
