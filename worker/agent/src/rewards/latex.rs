//! Asks Python whether two LaTeX expressions are equal: the last, dearest step of the equality cascades.
//!
//! Called by the math rewards only when the native steps do not decide. What must stay true: the two texts reach
//! Python as string literals, never as code; Python that fails or takes too long means "not equal"; a sandbox
//! that fails is a fault.

use std::time::Duration;

use serde_json::Value;

use super::RewardFault;
use crate::tools::{PythonRunner, RunOutput, RunStatus};

/// How long an answer may take, waiting for a free sandbox included.
const DEADLINE: Duration = Duration::from_secs(60);
/// Longer answers are not compared symbolically: they are prose, or made to be slow.
pub(super) const MAX_CHARS: usize = 256;

/// Which rule of equality.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Rule {
    /// AgentFly's: structurally equal or numerically equal; no simplification.
    Parity,
    /// Equal as mathematics.
    Strict,
}

/// Whether `response` equals `answer` by `rule`.
pub(super) async fn equal(
    python: &dyn PythonRunner,
    rule: Rule,
    response: &str,
    answer: &str,
    seed: u64,
    reward: &'static str,
) -> Result<bool, RewardFault> {
    if response.chars().count() > MAX_CHARS || answer.chars().count() > MAX_CHARS {
        return Ok(false);
    }
    let code = program(rule, response, answer);
    let mut output = judge(python, &code, seed, reward).await?;
    if output.status == RunStatus::TimedOut {
        // A busy machine is no reason for a reward of 0; an expression that takes forever is.
        output = judge(python, &code, seed, reward).await?;
    }
    if let RunStatus::Error { message } = &output.status
        && (message.starts_with("ModuleNotFoundError") || message.starts_with("ImportError"))
    {
        let cause = format!("{message}: the sandbox's Python lacks a package; run `make setup`");
        return Err(RewardFault::Infrastructure { reward, cause });
    }
    Ok(output.status == RunStatus::Success && output.stdout.lines().last() == Some("EQUAL"))
}

/// One run of the comparing program.
async fn judge(
    python: &dyn PythonRunner,
    code: &str,
    seed: u64,
    reward: &'static str,
) -> Result<RunOutput, RewardFault> {
    let run = tokio::time::timeout(DEADLINE, python.run(code, seed)).await;
    run.map_err(|_| format!("no answer from the Python sandbox within {} s", DEADLINE.as_secs()))
        .and_then(|ran| ran.map_err(|e| e.to_string()))
        .map_err(|cause| RewardFault::Infrastructure { reward, cause })
}

/// The functions, and one call with both texts as literals (a JSON string is a Python string literal).
fn program(rule: Rule, response: &str, answer: &str) -> String {
    let function = match rule {
        Rule::Parity => "parity",
        Rule::Strict => "strict",
    };
    let literal = |text: &str| Value::from(text).to_string();
    let source = include_str!("math_equal.py");
    format!("{source}\n\nprint({function}({}, {}))\n", literal(response), literal(answer))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hostile_text_stays_inside_its_literal() {
        let code = program(Rule::Parity, "\"); import os #\n\\", "'''");
        assert!(code.ends_with("print(parity(\"\\\"); import os #\\n\\\\\", \"'''\"))\n"), "{code}");
    }
}
