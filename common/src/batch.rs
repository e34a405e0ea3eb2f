//! What a rank trains on: its slice of a step's batch, with every number that must be global.

use serde::{Deserialize, Serialize};

use crate::ids::{ChainKey, PolicyVersion};

/// One rank's share of one training step.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct TrainShard {
    /// Training step, 1-based.
    pub step: u64,
    /// The weights that sampled the batch and that this step starts from.
    pub policy_version: PolicyVersion,
    /// One optimizer step each, in order; every rank holds equally many (some may be empty here).
    pub mini_batches: Vec<MiniBatch>,
}

/// One rank's share of one optimizer step.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct MiniBatch {
    /// This rank's rows.
    pub rows: Vec<TrainRow>,
    /// Tokens with loss over all ranks: the denominator of `token-mean`.
    pub global_loss_tokens: u64,
    /// Rows with at least one token of loss over all ranks: the denominator of the `seq-mean-*` modes.
    pub global_rows: u64,
}

/// A trajectory as the loss sees it. T tokens.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct TrainRow {
    /// Which chain this is.
    pub key: ChainKey,
    /// Length T.
    pub token_ids: Vec<u32>,
    /// True where the policy sampled; length T.
    pub loss_mask: Vec<bool>,
    /// The rollout's log-probs, 0 where the mask is false; length T.
    pub rollout_log_probs: Vec<f32>,
    /// Advantage of each token, 0 where the mask is false; length T.
    pub advantages: Vec<f32>,
}
