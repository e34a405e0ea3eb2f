//! Why a training step did not happen, with the values that say so. Returned by everything in the learner.

use agentfly_c10d::libtorch_reason;
use agentfly_common::ids::{ChainKey, PolicyVersion};

use crate::model::ModelError;

/// A refused or failed training step.
///
/// Errors of the first group are found before any weight changes. After one of the others the weights may be
/// half-way between two versions: the learner refuses to go on ([`LearnerError::Broken`]) until a checkpoint
/// is loaded. A rank of several leaves its group when a collective or an update fails, and then it takes a new learner
/// in a new group to go on ([`LearnerError::LeftGroup`]).
#[derive(Debug, thiserror::Error)]
pub enum LearnerError {
    /// A setting that cannot be trained with.
    #[error("learner setting {field} = {value}: {needed}")]
    Config {
        /// The field of [`super::LearnerConfig`].
        field: &'static str,
        /// Its value.
        value: String,
        /// What it has to be.
        needed: &'static str,
    },
    /// The shard was sampled by other weights than the learner holds.
    #[error("step {step}: the batch was sampled by policy version {shard}, but the learner holds {learner}")]
    PolicyVersion {
        /// Training step.
        step: u64,
        /// The batch's version.
        shard: PolicyVersion,
        /// The learner's.
        learner: PolicyVersion,
    },
    /// The learner was made from another decoder, which it would go on updating.
    #[error(
        "this decoder is not the one that the learner was made from and whose weights it updates: pass that one, or \
         make a learner from this"
    )]
    OtherDecoder,
    /// The gradients of the last update were asked for, and each rank has summed a share of them alone.
    #[error(
        "this rank holds the last update's gradient of share {index} of {count} alone: train on one rank, or with \
         shard_optimizer = false, to read it back"
    )]
    SharedGradients {
        /// Its share, 0-based.
        index: usize,
        /// Of how many.
        count: usize,
    },
    /// Nothing to learn from.
    #[error("step {step}, mini-batch {mini_batch}: no token has loss on any rank")]
    NoLossTokens {
        /// Training step.
        step: u64,
        /// Number of the mini-batch, 0-based.
        mini_batch: usize,
    },
    /// A row whose arrays or values are wrong.
    #[error("{row}: {problem}")]
    Row {
        /// Which chain, or which row of a supervised batch.
        row: RowName,
        /// What is wrong, with the values.
        problem: String,
    },
    /// The shard's global counts are not the sum of what the ranks hold.
    #[error(
        "step {step}, mini-batch {mini_batch}: the ranks hold {tokens} tokens with loss in {rows} rows, but the \
         batch says {global_loss_tokens} and {global_rows}"
    )]
    Denominators {
        /// Training step.
        step: u64,
        /// Number of the mini-batch, 0-based.
        mini_batch: usize,
        /// Tokens counted.
        tokens: u64,
        /// Rows counted.
        rows: u64,
        /// Tokens declared.
        global_loss_tokens: u64,
        /// Rows declared.
        global_rows: u64,
    },
    /// Ranks were given different numbers of mini-batches.
    #[error(
        "step {step}: this rank has {here} mini-batches, another has {there}; every rank needs equally many"
    )]
    MiniBatches {
        /// Training step.
        step: u64,
        /// Here.
        here: usize,
        /// The most that some rank has, or the fewest.
        there: usize,
    },
    /// This rank's part was right, another's was not.
    #[error("step {step}: another rank refused its part of the batch; its error says why")]
    PeerRefused {
        /// Training step.
        step: u64,
    },
    /// Too many updates in a row were skipped.
    #[error(
        "{skipped} updates in a row had values that are not finite, and at most {allowed} may be skipped; the last: {last}"
    )]
    TooManySkips {
        /// Updates in a row.
        skipped: u32,
        /// `max_grad_skips`.
        allowed: u32,
        /// Why the last was.
        last: NonFinite,
    },
    /// An earlier step, or the reading of a checkpoint, failed half-way.
    #[error(
        "an earlier training step or load failed half-way, so these weights are of no version: load a checkpoint \
         before the next step or save"
    )]
    Broken,
    /// It has left its group after a failure, and does not go on alone.
    #[error(
        "this learner, rank {index} of {count}, left its group after a failure: make a new one in a new group, and \
         load the checkpoint there"
    )]
    LeftGroup {
        /// Its rank.
        index: usize,
        /// Of how many.
        count: usize,
    },
    /// This rank found its part of a checkpoint, another did not.
    #[error("checkpoint {path}: another rank cannot read its part; its error says why")]
    PeerCannotRead {
        /// The folder.
        path: String,
    },
    /// A checkpoint that does not belong to this model, or cannot be read or written.
    #[error("checkpoint {path}: {problem}")]
    Checkpoint {
        /// The file.
        path: String,
        /// What differs or failed.
        problem: String,
    },
    /// The model, or a kernel of this rank's, failed.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// A collective failed: another rank is gone, late or elsewhere.
    #[error(transparent)]
    Collective(agentfly_c10d::Error),
    /// libtorch failed.
    #[error("libtorch: {0}")]
    Torch(String),
}

impl From<tch::TchError> for LearnerError {
    fn from(error: tch::TchError) -> Self {
        Self::Torch(libtorch_reason(&error))
    }
}

impl From<agentfly_c10d::Error> for LearnerError {
    /// A kernel's failure, which is nobody else's: collectives are called by [`super::ranks`] alone.
    fn from(error: agentfly_c10d::Error) -> Self {
        Self::Model(error.into())
    }
}

/// Why an update was skipped: the first of its values that was NaN or infinite.
#[derive(Debug, Clone, Copy, PartialEq, thiserror::Error)]
pub enum NonFinite {
    /// A part of the loss, of this rank's rows.
    #[error("the {what} is {value} in a micro-batch of {rows} rows that starts with {first}")]
    Loss {
        /// Which part.
        what: &'static str,
        /// NaN or an infinity.
        value: f64,
        /// Rows of the micro-batch.
        rows: usize,
        /// Its first row.
        first: RowName,
    },
    /// A part of the loss, of another rank's rows.
    #[error("a part of the loss on another rank, which says more")]
    Elsewhere,
    /// No part of the loss on any rank, but the gradient.
    #[error("the gradient norm is {0}")]
    GradNorm(f64),
}

/// How a row is called in errors.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RowName {
    /// A chain.
    Chain(ChainKey),
    /// A row of a supervised batch, by position.
    Supervised(usize),
}

impl std::fmt::Display for RowName {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Chain(key) => key.fmt(f),
            Self::Supervised(index) => write!(f, "supervised row {index}"),
        }
    }
}
