//! Names of things, as types: a step is never mistaken for a rank.

use serde::{Deserialize, Serialize};

/// The number of optimizer-updated weight sets behind a set of weights: 0 is the model as loaded, and every
/// training step adds one, however many mini-batches it holds.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct PolicyVersion(pub u64);

impl PolicyVersion {
    /// The version after one more training step.
    #[must_use]
    pub fn next(self) -> Self {
        Self(self.0 + 1)
    }
}

impl std::fmt::Display for PolicyVersion {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}", self.0)
    }
}

/// Which of a job's two streams of chains a chain belongs to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Purpose {
    /// Sampled, grouped, and trained on.
    Train,
    /// Greedy, one chain a prompt, never trained on.
    Validation,
}

/// One chain of one prompt in one step: unique within a job, and the key of its random stream, so that a
/// chain that is run again on another worker samples the same way.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct ChainKey {
    /// Training or validation.
    pub purpose: Purpose,
    /// Training step (1-based); for validation the step after which it runs (0 before training).
    pub step: u64,
    /// Position of the prompt's group in the step's batch, 0-based.
    pub group: u32,
    /// Position within the group, 0-based; below `num_chains`.
    pub chain: u32,
}

impl std::fmt::Display for ChainKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let purpose = match self.purpose {
            Purpose::Train => "train",
            Purpose::Validation => "val",
        };
        write!(f, "{purpose}/step {}/group {}/chain {}", self.step, self.group, self.chain)
    }
}
