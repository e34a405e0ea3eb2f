//! AgentFly's math rewards, with its equality cascade.
//!
//! `math_equal_reward`: 1 when equal, else 0. `math_equal_reward_tool`: 0 without a tool, 0.1 for a wrong answer
//! after a tool, 1 for a right one; `acc` ignores the tool. Kept as published, so that results compare; the
//! strict variants mend what is known to be wrong with them.

use std::sync::Arc;

use agentfly_common::trajectory::Reward;
use async_trait::async_trait;

use super::latex::{self, Rule};
use super::normalise::{Rational, is_equiv, normalise};
use super::{RewardFault, RewardFunction, RewardInput, extract_answer, text_field, used_tool};
use crate::tools::PythonRunner;

/// What a tool call alone earns under AgentFly's rule.
const TOOL_BONUS: f64 = 0.1;

/// `math_equal_reward` and `math_equal_reward_tool`.
pub struct MathReward {
    python: Arc<dyn PythonRunner>,
    wants_tool: bool,
}

impl MathReward {
    /// `math_equal_reward`.
    #[must_use]
    pub fn plain(python: Arc<dyn PythonRunner>) -> Self {
        Self { python, wants_tool: false }
    }

    /// `math_equal_reward_tool`.
    #[must_use]
    pub fn tool(python: Arc<dyn PythonRunner>) -> Self {
        Self { python, wants_tool: true }
    }
}

#[async_trait]
impl RewardFunction for MathReward {
    fn name(&self) -> &'static str {
        if self.wants_tool { "math_equal_reward_tool" } else { "math_equal_reward" }
    }

    async fn score(&self, input: RewardInput<'_>) -> Result<Reward, RewardFault> {
        let answer = text_field(self.name(), &input, "answer")?;
        let python = self.python.as_ref();
        let equal =
            symbolic_math_equal(python, input.final_response, &answer, input.seed, self.name()).await?;
        let acc = f64::from(u8::from(equal));
        if !self.wants_tool {
            return Ok(Reward { value: acc, parts: [].into() });
        }
        let value = match (used_tool(input.messages), equal) {
            (false, _) => 0.0,
            (true, false) => TOOL_BONUS,
            (true, true) => 1.0,
        };
        Ok(Reward { value, parts: [("acc".to_owned(), acc)].into() })
    }
}

/// AgentFly's `symbolic_math_equal`: the boxed answers as normalised strings and numbers, then, only where that
/// does not decide, as LaTeX in Python. Answers of more than 256 characters are never parsed. `reward` names
/// the caller in faults.
///
/// # Errors
/// The sandbox failed.
pub async fn symbolic_math_equal(
    python: &dyn PythonRunner,
    response: &str,
    answer: &str,
    seed: u64,
    reward: &'static str,
) -> Result<bool, RewardFault> {
    let (response, answer) = (extract_answer(response), extract_answer(answer));
    match decided(response, answer) {
        Some(equal) => Ok(equal),
        None => latex::equal(python, Rule::Parity, response, answer, seed, reward).await,
    }
}

/// What strings and numbers alone say, where they say anything.
fn decided(response: &str, answer: &str) -> Option<bool> {
    if is_equiv(response, answer) {
        return Some(true);
    }
    if response.trim().is_empty() || answer.trim().is_empty() {
        return Some(false);
    }
    let (x, y) = (Rational::read(&normalise(response)?)?, Rational::read(&normalise(answer)?)?);
    match x.equals(y)? {
        true => Some(true),
        false => x.is_far_from(y).then_some(false),
    }
}
