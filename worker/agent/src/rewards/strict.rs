//! Strict variants of the math rewards: right answers earn 1, everything else 0.
//!
//! They differ from AgentFly's on purpose: a tuple is not a number, equal expressions are equal
//! (x²+2x+1 = (x+1)²), and calling a tool without being right earns nothing. An answer outside a `\boxed{…}`
//! counts only when it alone is the reply and is equal as a string or number.

use std::sync::Arc;

use agentfly_common::trajectory::Reward;
use async_trait::async_trait;

use super::extract::{boxed, extract_answer};
use super::latex::{self, Rule};
use super::normalise::{Commas, Rational, normalise_with};
use super::{RewardFault, RewardFunction, RewardInput, text_field, used_tool};
use crate::tools::PythonRunner;

/// `math_equal_reward_strict` and `math_equal_reward_tool_strict`.
pub struct StrictMathReward {
    python: Arc<dyn PythonRunner>,
    wants_tool: bool,
}

impl StrictMathReward {
    /// Right: 1; wrong: 0.
    #[must_use]
    pub fn plain(python: Arc<dyn PythonRunner>) -> Self {
        Self { python, wants_tool: false }
    }

    /// Right after a tool answered: 1; else 0. `acc` ignores the tool.
    #[must_use]
    pub fn tool(python: Arc<dyn PythonRunner>) -> Self {
        Self { python, wants_tool: true }
    }
}

#[async_trait]
impl RewardFunction for StrictMathReward {
    fn name(&self) -> &'static str {
        if self.wants_tool { "math_equal_reward_tool_strict" } else { "math_equal_reward_strict" }
    }

    async fn score(&self, input: RewardInput<'_>) -> Result<Reward, RewardFault> {
        let answer = text_field(self.name(), &input, "answer")?;
        let python = self.python.as_ref();
        let equal = strict_math_equal(python, input.final_response, &answer, input.seed, self.name()).await?;
        let acc = f64::from(u8::from(equal));
        let earned = !self.wants_tool || used_tool(input.messages);
        Ok(Reward { value: if earned { acc } else { 0.0 }, parts: [("acc".to_owned(), acc)].into() })
    }
}

/// Whether the reply's answer is the same mathematical object as `answer`. `reward` names the caller in faults.
///
/// # Errors
/// The sandbox failed.
pub async fn strict_math_equal(
    python: &dyn PythonRunner,
    response: &str,
    answer: &str,
    seed: u64,
    reward: &'static str,
) -> Result<bool, RewardFault> {
    let answer = extract_answer(answer).trim();
    let given = boxed(response);
    let response = given.unwrap_or(response).trim();
    match (decided(response, answer), given) {
        (Some(equal), _) => Ok(equal),
        (None, None) => Ok(false),
        (None, Some(_)) => latex::equal(python, Rule::Strict, response, answer, seed, reward).await,
    }
}

fn decided(response: &str, answer: &str) -> Option<bool> {
    if response.is_empty() || answer.is_empty() {
        return Some(response == answer);
    }
    let normal = |text| normalise_with(text, Commas::Thousands);
    let (x, y) = (normal(response)?, normal(answer)?);
    if x == y {
        return Some(true);
    }
    Rational::read(&x)?.equals(Rational::read(&y)?)
}
