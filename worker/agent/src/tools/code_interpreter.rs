//! `code_interpreter`: runs Python and shows what it printed.
//!
//! AgentFly's tool of this name, with one mend: output printed before an error is shown, not lost.

use std::sync::Arc;

use async_trait::async_trait;
use serde_json::{Map, Value, json};

use super::{InfraError, PythonRunner, RunOutput, RunStatus, Snippet, Tool, ToolContext, ToolFault};

/// The observation of a run that used up its time.
const TIMED_OUT: &str = "Execution timed out";
/// The observation of a run that used up its memory.
const MEMORY_EXCEEDED: &str = "Memory limit exceeded";

/// The tool.
pub struct CodeInterpreter {
    python: Arc<dyn PythonRunner>,
}

impl CodeInterpreter {
    /// Runs code with `python`.
    #[must_use]
    pub fn new(python: Arc<dyn PythonRunner>) -> Self {
        Self { python }
    }
}

#[async_trait]
impl Tool for CodeInterpreter {
    fn name(&self) -> &'static str {
        "code_interpreter"
    }

    fn schema(&self) -> Value {
        json!({"type": "function", "function": {
            "name": "code_interpreter",
            "description": "Run Python code in a fresh interpreter and return what it prints.",
            "parameters": {"type": "object",
                "properties": {"code": {"type": "string", "description": "The Python code to run."}},
                "required": ["code"]}}})
    }

    async fn call(
        &self,
        arguments: &Map<String, Value>,
        context: ToolContext<'_>,
    ) -> Result<String, ToolFault> {
        let Some(code) = arguments.get("code").and_then(Value::as_str) else {
            return Ok("Invalid argument \"code\" for tool code_interpreter: it must be a string.".to_owned());
        };
        let fault = |e: InfraError| ToolFault { tool: self.name().to_owned(), cause: e.to_string() };
        let slot = context.clock.stand_still(self.python.admit()).await.map_err(fault)?;
        let output = slot.run(Snippet { code, seed: context.seed, limits: None }).await.map_err(fault)?;
        Ok(observation(&output, self.max_length_chars()))
    }
}

/// The text of a run: its standard output, and after that what went wrong. The latter is kept whole where the
/// two together are too long.
fn observation(output: &RunOutput, max_chars: usize) -> String {
    let problem = match &output.status {
        RunStatus::Success => return output.stdout.clone(),
        RunStatus::Error { message } => message.as_str(),
        RunStatus::TimedOut => TIMED_OUT,
        RunStatus::MemoryExceeded => MEMORY_EXCEEDED,
    };
    let room = max_chars.saturating_sub(problem.chars().count() + 1);
    let mut text: String = output.stdout.chars().take(room).collect();
    if !text.is_empty() && !text.ends_with('\n') {
        text.push('\n');
    }
    text + problem
}
