//! How per-token values become one number (verl's `agg_loss`): as a weight for each token.
//!
//! The denominators count the whole mini-batch over all ranks. A token's weight then depends on neither
//! micro-batch nor rank, and sums of weighted values, over tokens, micro-batches and ranks in any grouping, are
//! the value that one big batch would have.

use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// verl's `loss_agg_mode`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Aggregation {
    /// Every token counts the same.
    TokenMean,
    /// Rows count by their sum.
    SeqMeanTokenSum,
    /// Every row counts the same (GRPO's paper).
    SeqMeanTokenMean,
    /// Rows count by their sum over a constant (Dr. GRPO): `loss_scale_factor`.
    SeqMeanTokenSumNorm,
}

/// A name that is no aggregation.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "{0:?} is no loss_agg_mode: use token-mean, seq-mean-token-sum, seq-mean-token-mean or \
     seq-mean-token-sum-norm"
)]
pub struct UnknownAggregation(pub String);

impl FromStr for Aggregation {
    type Err = UnknownAggregation;

    fn from_str(name: &str) -> Result<Self, UnknownAggregation> {
        match name {
            "token-mean" => Ok(Self::TokenMean),
            "seq-mean-token-sum" => Ok(Self::SeqMeanTokenSum),
            "seq-mean-token-mean" => Ok(Self::SeqMeanTokenMean),
            "seq-mean-token-sum-norm" => Ok(Self::SeqMeanTokenSumNorm),
            _ => Err(UnknownAggregation(name.to_owned())),
        }
    }
}

/// What is divided by: counts of the whole mini-batch over all ranks.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Denominators {
    /// Tokens with loss.
    pub loss_tokens: u64,
    /// Rows with at least one of them.
    pub rows: u64,
    /// The constant of `seq-mean-token-sum-norm`.
    pub scale_factor: f64,
}

impl Aggregation {
    /// The weight of each token with loss in a row that has `row_tokens` of them: the aggregate of x is Σ w·x.
    #[must_use]
    pub fn token_weight(self, row_tokens: usize, denominators: &Denominators) -> f64 {
        let rows = denominators.rows as f64;
        match self {
            Self::TokenMean => 1.0 / denominators.loss_tokens as f64,
            Self::SeqMeanTokenSum => 1.0 / rows,
            Self::SeqMeanTokenMean => 1.0 / ((row_tokens as f64 + 1e-8) * rows),
            Self::SeqMeanTokenSumNorm => 1.0 / (rows * denominators.scale_factor),
        }
    }
}
