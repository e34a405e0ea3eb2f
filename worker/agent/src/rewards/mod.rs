//! Rewards: what a finished chain earned.
//!
//! The chain loop calls one [`RewardFunction`] at a chain's end. What must stay true: a wrong or malformed
//! answer is a reward, a row that lacks the reference answer is an error that names it, and machinery that
//! failed is a fault, never a 0.

mod extract;
mod latex;
mod math;
mod normalise;
mod qa;
mod repetition;
mod strict;

use std::sync::Arc;

use agentfly_common::trajectory::{Message, Reward, Role};
use async_trait::async_trait;
use serde_json::{Map, Value};

use crate::clock::Clock;
use crate::tools::PythonRunner;

use latex::Rule;

pub use extract::extract_answer;
pub use latex::{JUDGE_LIMITS, Judge, Verdict};
pub use math::{MathReward, symbolic_math_equal};
pub use normalise::{is_equiv, normalise};
pub use qa::{QaMetric, QaReward, QaScores, qa_scores};
pub use strict::strict_math_equal;

/// What a reward may look at.
#[derive(Debug, Clone, Copy)]
pub struct RewardInput<'a> {
    /// The text of the last assistant or tool message.
    pub final_response: &'a str,
    /// The data row's id, for errors.
    pub row_id: &'a str,
    /// The data row.
    pub row: &'a Map<String, Value>,
    /// The whole chain.
    pub messages: &'a [Message],
    /// The seed of every random choice the reward makes.
    pub seed: u64,
    /// The chain's clock: stands still while the reward only waits for its turn.
    pub clock: &'a Clock,
}

/// A reward that could not be computed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RewardFault {
    /// The row lacks what the reward compares with.
    #[error("reward {reward}: data row {row_id:?} has no field {field:?}; it has: {}. Add it to the data set or choose another agent.reward_name", present.join(", "))]
    MissingField {
        /// The reward.
        reward: &'static str,
        /// The row.
        row_id: String,
        /// The field.
        field: &'static str,
        /// The fields it has.
        present: Vec<String>,
    },
    /// The row's field is of a kind that the reward cannot compare with.
    #[error("reward {reward}: field {field:?} of data row {row_id:?} is {value}, not {wanted}")]
    BadField {
        /// The reward.
        reward: &'static str,
        /// The row.
        row_id: String,
        /// The field.
        field: &'static str,
        /// What it holds, shortened.
        value: String,
        /// What it should hold.
        wanted: &'static str,
    },
    /// The machinery failed: the chain is run again.
    #[error("reward {reward}: {cause}")]
    Infrastructure {
        /// The reward.
        reward: &'static str,
        /// What happened.
        cause: String,
    },
}

/// A reward.
#[async_trait]
pub trait RewardFunction: Send + Sync {
    /// AgentFly's name of it.
    fn name(&self) -> &'static str;
    /// The reward of one chain.
    ///
    /// # Errors
    /// A row that lacks a field, or machinery that failed.
    async fn score(&self, input: RewardInput<'_>) -> Result<Reward, RewardFault>;
}

/// No reward has this name.
#[derive(Debug, thiserror::Error)]
#[error("unknown reward {name:?} (agent.reward_name); known: {}", known.join(", "))]
pub struct UnknownReward {
    /// The name asked for.
    pub name: String,
    /// The names there are.
    pub known: Vec<&'static str>,
}

/// Every name that [`reward`] knows, aliases included.
pub const REWARD_NAMES: &[&str] = &[
    "math_equal_reward",
    "math_reward",
    "math_equal_reward_tool",
    "math_reward_tool",
    "math_reward_format",
    "math_equal_reward_strict",
    "math_equal_reward_tool_strict",
    "math_reward_format_strict",
    "qa_f1_reward",
    "qa_em_reward",
];

/// The reward of this name, in any case, comparing LaTeX with `python` where it must.
///
/// # Errors
/// An unknown name, with the known ones.
pub fn reward(name: &str, python: &Arc<dyn PythonRunner>) -> Result<Arc<dyn RewardFunction>, UnknownReward> {
    let python = python.clone();
    match name.to_lowercase().as_str() {
        "math_equal_reward" | "math_reward" => Ok(Arc::new(MathReward::plain(Rule::Parity, python))),
        "math_equal_reward_tool" | "math_reward_tool" | "math_reward_format" => {
            Ok(Arc::new(MathReward::tool(Rule::Parity, python)))
        }
        "math_equal_reward_strict" => Ok(Arc::new(MathReward::plain(Rule::Strict, python))),
        "math_equal_reward_tool_strict" | "math_reward_format_strict" => {
            Ok(Arc::new(MathReward::tool(Rule::Strict, python)))
        }
        "qa_f1_reward" => Ok(Arc::new(QaReward::new(QaMetric::F1))),
        "qa_em_reward" => Ok(Arc::new(QaReward::new(QaMetric::ExactMatch))),
        _ => Err(UnknownReward { name: name.to_owned(), known: REWARD_NAMES.to_vec() }),
    }
}

/// Whether any tool answered in the chain.
fn used_tool(messages: &[Message]) -> bool {
    messages.iter().any(|m| m.role == Role::Tool)
}

/// One field of the row as text: a string as it is, a number as JSON writes it.
fn text_field(
    reward: &'static str,
    input: &RewardInput<'_>,
    field: &'static str,
) -> Result<String, RewardFault> {
    match input.row.get(field) {
        Some(Value::String(text)) => Ok(text.clone()),
        Some(Value::Number(number)) => Ok(number.to_string()),
        None | Some(Value::Null) => Err(RewardFault::MissingField {
            reward,
            row_id: input.row_id.to_owned(),
            field,
            present: input.row.keys().cloned().collect(),
        }),
        Some(other) => Err(RewardFault::BadField {
            reward,
            row_id: input.row_id.to_owned(),
            field,
            value: other.to_string().chars().take(100).collect(),
            wanted: "text or a number",
        }),
    }
}

#[cfg(test)]
mod tests;
