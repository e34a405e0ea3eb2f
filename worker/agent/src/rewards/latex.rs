//! Asks Python whether two LaTeX expressions are equal: the last, dearest step of the equality cascades.
//!
//! Called by the math rewards only when the native steps do not decide. What must stay true: the two texts reach
//! Python as string literals, never as code; Python that fails means "not equal"; Python that takes too long twice is
//! told apart from both; a sandbox that fails is a fault, a queue in front of it is none.

use std::time::Duration;

use serde_json::Value;

use super::RewardFault;
use super::repetition::is_repetitive;
use crate::clock::Clock;
use crate::tools::{InfraError, PythonRunner, RunLimits, RunOutput, RunStatus, Snippet};

/// What one comparison may use, whatever `sandbox.*` gives the policy's code: a verdict must not depend on that. An
/// ordinary comparison takes well under a second of CPU, importing included. The wall is twice the CPU time, so that
/// a loaded node costs no reward; the memory holds sympy's largest ordinary expressions twenty times over.
pub const JUDGE_LIMITS: RunLimits =
    RunLimits { wall: Duration::from_secs(20), cpu: Duration::from_secs(10), memory_bytes: 1 << 30 };
/// Under AgentFly's rule longer answers are not parsed if they are repetitive.
const MAX_REPETITIVE_CHARS: usize = 128;
/// Under the strict rule longer answers are never parsed: they are prose, or made to be slow.
pub(super) const MAX_STRICT_CHARS: usize = 256;

/// Which rule of equality.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Rule {
    /// AgentFly's: structurally equal or numerically equal; no simplification.
    Parity,
    /// Equal as mathematics.
    Strict,
}

impl Rule {
    /// Whether a text is worth parsing.
    fn parses(self, text: &str) -> bool {
        let chars = text.chars().count();
        match self {
            Self::Parity => chars <= MAX_REPETITIVE_CHARS || !is_repetitive(text),
            Self::Strict => chars <= MAX_STRICT_CHARS,
        }
    }
}

/// What a comparison came to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// The two are equal.
    Equal,
    /// They are not, or cannot be compared.
    Different,
    /// Python reached [`JUDGE_LIMITS`] twice. Not a fault: the policy can write an expression that takes forever, and
    /// must not be able to fail a job with it. It counts as different, and is counted.
    TimedOut,
}

impl From<bool> for Verdict {
    fn from(equal: bool) -> Self {
        if equal { Self::Equal } else { Self::Different }
    }
}

/// Python as a judge, for one reward of one chain.
#[derive(Clone, Copy)]
pub struct Judge<'a> {
    /// Where Python runs.
    pub python: &'a dyn PythonRunner,
    /// Stands still while the sandboxes are taken.
    pub clock: &'a Clock,
    /// Seeds Python's random generators.
    pub seed: u64,
    /// The reward's name, for faults.
    pub reward: &'static str,
    /// The data row's id, for people.
    pub row_id: &'a str,
}

impl Judge<'_> {
    /// Whether `response` equals `answer` by `rule`.
    pub(super) async fn compare(
        &self,
        rule: Rule,
        response: &str,
        answer: &str,
    ) -> Result<Verdict, RewardFault> {
        if !rule.parses(response) || !rule.parses(answer) {
            return Ok(Verdict::Different);
        }
        let code = program(rule, response, answer);
        let mut output = self.run(&code).await?;
        if output.status == RunStatus::TimedOut {
            // A busy machine is no reason for a reward of 0; an expression that takes forever is.
            output = self.run(&code).await?;
        }
        if output.status == RunStatus::TimedOut {
            tracing::warn!(reward = self.reward, row = self.row_id, wall = ?JUDGE_LIMITS.wall, cpu = ?JUDGE_LIMITS.cpu,
                response = response.chars().take(100).collect::<String>(),
                "comparing an answer took too long twice: it counts as wrong");
            return Ok(Verdict::TimedOut);
        }
        if let RunStatus::Error { message } = &output.status
            && (message.starts_with("ModuleNotFoundError") || message.starts_with("ImportError"))
        {
            let cause = format!("{message}: the sandbox's Python lacks a package; run `make setup`");
            return Err(RewardFault::Infrastructure { reward: self.reward, cause });
        }
        Ok(Verdict::from(
            output.status == RunStatus::Success && output.stdout.lines().last() == Some("EQUAL"),
        ))
    }

    /// One run of the comparing program.
    async fn run(&self, code: &str) -> Result<RunOutput, RewardFault> {
        let reward = self.reward;
        let fault = |error: InfraError| RewardFault::Infrastructure { reward, cause: error.to_string() };
        let slot = self.clock.stand_still(self.python.admit()).await.map_err(fault)?;
        slot.run(Snippet { code, seed: self.seed, limits: Some(JUDGE_LIMITS), session: None })
            .await
            .map_err(fault)
    }
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
