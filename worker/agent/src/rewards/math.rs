//! The math rewards: one frame around two rules of equality, AgentFly's here and the strict one in
//! [`super::strict`].
//!
//! `math_equal_reward`: 1 when equal, else 0. `math_equal_reward_tool`: 0 without a tool, 0.1 for a wrong answer
//! after a tool, 1 for a right one; `acc` ignores the tool. Kept as published, so that results compare; the
//! strict variants mend what is known to be wrong with them.

use std::sync::Arc;

use agentfly_common::trajectory::Reward;
use async_trait::async_trait;

use super::latex::{Judge, Rule, Verdict};
use super::normalise::{Rational, is_equiv, normalise};
use super::strict::strict_math_equal;
use super::{RewardFault, RewardFunction, RewardInput, extract_answer, text_field, used_tool};
use crate::tools::PythonRunner;

/// What a tool call alone earns under AgentFly's rule.
const TOOL_BONUS: f64 = 0.1;
/// The part of a reward that is 1 when its answer counts as wrong because comparing it took too long, else 0: its mean
/// over chains is the share of such rewards.
const JUDGE_TIMEOUT: &str = "judge_timeout";

/// A math reward: whose rule says what is equal, and whether a tool must have answered.
pub struct MathReward {
    python: Arc<dyn PythonRunner>,
    rule: Rule,
    wants_tool: bool,
}

impl MathReward {
    /// `math_equal_reward`, or `math_equal_reward_strict`.
    #[must_use]
    pub(super) fn plain(rule: Rule, python: Arc<dyn PythonRunner>) -> Self {
        Self { python, rule, wants_tool: false }
    }

    /// `math_equal_reward_tool`, or `math_equal_reward_tool_strict`.
    #[must_use]
    pub(super) fn tool(rule: Rule, python: Arc<dyn PythonRunner>) -> Self {
        Self { python, rule, wants_tool: true }
    }

    async fn verdict(&self, input: &RewardInput<'_>) -> Result<Verdict, RewardFault> {
        let answer = text_field(self.name(), input, "answer")?;
        let judge = Judge {
            python: self.python.as_ref(),
            clock: input.clock,
            seed: input.seed,
            reward: self.name(),
            row_id: input.row_id,
        };
        match self.rule {
            Rule::Parity => symbolic_math_equal(&judge, input.final_response, &answer).await,
            Rule::Strict => strict_math_equal(&judge, input.final_response, &answer).await,
        }
    }
}

#[async_trait]
impl RewardFunction for MathReward {
    fn name(&self) -> &'static str {
        match (self.rule, self.wants_tool) {
            (Rule::Parity, false) => "math_equal_reward",
            (Rule::Parity, true) => "math_equal_reward_tool",
            (Rule::Strict, false) => "math_equal_reward_strict",
            (Rule::Strict, true) => "math_equal_reward_tool_strict",
        }
    }

    async fn score(&self, input: RewardInput<'_>) -> Result<Reward, RewardFault> {
        let verdict = self.verdict(&input).await?;
        let equal = verdict == Verdict::Equal;
        let acc = f64::from(u8::from(equal));
        let value = match (self.rule, self.wants_tool, used_tool(input.messages)) {
            (_, true, false) => 0.0,
            (Rule::Parity, true, true) if !equal => TOOL_BONUS,
            _ => acc,
        };
        // AgentFly's plain reward names no accuracy.
        let named = self.wants_tool || self.rule == Rule::Strict;
        let acc = named.then(|| ("acc".to_owned(), acc));
        let timed_out = (JUDGE_TIMEOUT.to_owned(), f64::from(u8::from(verdict == Verdict::TimedOut)));
        Ok(Reward { value, parts: acc.into_iter().chain([timed_out]).collect() })
    }
}

/// AgentFly's `symbolic_math_equal`: the boxed answers as normalised strings and numbers, then, only where that
/// does not decide, as LaTeX in Python. Answers of more than 128 characters are not parsed when they are repetitive.
///
/// # Errors
/// The sandbox failed.
pub async fn symbolic_math_equal(
    judge: &Judge<'_>,
    response: &str,
    answer: &str,
) -> Result<Verdict, RewardFault> {
    let (response, answer) = (extract_answer(response), extract_answer(answer));
    match decided(response, answer) {
        Some(equal) => Ok(equal.into()),
        None => judge.compare(Rule::Parity, response, answer).await,
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
