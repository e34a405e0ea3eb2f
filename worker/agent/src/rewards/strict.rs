//! The strict rule of the math rewards: right answers earn 1, everything else 0.
//!
//! Used by [`super::MathReward`]. It differs from AgentFly's on purpose: a tuple is not a number, equal expressions
//! are equal (x²+2x+1 = (x+1)²), and calling a tool without being right earns nothing. An answer outside a
//! `\boxed{…}` counts only when it alone is the reply and is equal as a string or number. Answers of more than 256 characters are never
//! parsed.

use super::RewardFault;
use super::extract::{boxed, extract_answer};
use super::latex::{Judge, Rule, Verdict};
use super::normalise::{Commas, Rational, normalise_with};

/// Whether the reply's answer is the same mathematical object as `answer`.
///
/// # Errors
/// The sandbox failed.
pub async fn strict_math_equal(
    judge: &Judge<'_>,
    response: &str,
    answer: &str,
) -> Result<Verdict, RewardFault> {
    let answer = extract_answer(answer).trim();
    let given = boxed(response);
    let response = given.unwrap_or(response).trim();
    match (decided(response, answer), given) {
        (Some(equal), _) => Ok(equal.into()),
        (None, None) => Ok(Verdict::Different),
        (None, Some(_)) => judge.compare(Rule::Strict, response, answer).await,
    }
}

fn decided(response: &str, answer: &str) -> Option<bool> {
    if response == answer || response.is_empty() || answer.is_empty() {
        return Some(response == answer);
    }
    let normal = |text| normalise_with(text, Commas::Thousands);
    let (x, y) = (normal(response)?, normal(answer)?);
    if x == y {
        return Some(true);
    }
    Rational::read(&x)?.equals(Rational::read(&y)?)
}
