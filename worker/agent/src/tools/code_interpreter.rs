//! `code_interpreter`: runs Python and shows what it printed.
//!
//! AgentFly's tool of this name, with one mend: output printed before an error is shown, not lost, unless that is not wanted.

use std::sync::Arc;

use agentfly_common::ids::ChainKey;
use async_trait::async_trait;
use serde_json::{Map, Value, json};

use super::{InfraError, PythonRunner, RunOutput, RunStatus, Snippet, Tool, ToolContext, ToolFault};

/// The observation of a run that used up its time: AgentFly's.
pub const TIMED_OUT: &str = "Execution timed out";
/// The observation of a run that used up its memory: AgentFly's.
pub const MEMORY_EXCEEDED: &str = "Memory limit exceeded";
/// What precedes the observation of a run whose session had lost its state.
const RESTARTED: &str = "The interpreter was restarted: variables of earlier calls are gone.\n";

/// How calls run, and what is shown of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CodeOptions {
    /// A chain's calls share their variables and files (`sandbox.stateful`).
    pub stateful: bool,
    /// What was printed is shown also where a call failed (`sandbox.partial_output`); without it as AgentFly does.
    pub partial_output: bool,
}

impl Default for CodeOptions {
    fn default() -> Self {
        Self { stateful: false, partial_output: true }
    }
}

/// The tool.
pub struct CodeInterpreter {
    python: Arc<dyn PythonRunner>,
    options: CodeOptions,
}

impl CodeInterpreter {
    /// Runs code with `python`.
    #[must_use]
    pub fn new(python: Arc<dyn PythonRunner>, options: CodeOptions) -> Self {
        Self { python, options }
    }
}

#[async_trait]
impl Tool for CodeInterpreter {
    fn name(&self) -> &'static str {
        "code_interpreter"
    }

    fn schema(&self) -> Value {
        let description = if self.options.stateful {
            "Run Python code and return what it prints. Variables and files of earlier calls are still there; a call that \
             fails leaves the variables as they were."
        } else {
            "Run Python code in a fresh interpreter and return what it prints."
        };
        json!({"type": "function", "function": {
            "name": "code_interpreter",
            "description": description,
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
        let session = self.options.stateful.then_some(context.chain);
        let snippet = Snippet { code, seed: context.seed, limits: None, session };
        let output = slot.run(snippet).await.map_err(fault)?;
        Ok(observation(&output, self.options.partial_output, self.max_length_chars()))
    }

    fn chain_ended(&self, chain: &ChainKey) {
        if self.options.stateful {
            self.python.end_session(chain);
        }
    }
}

/// The text of a run: that its variables are gone, if they are, its standard output, and after that what went wrong. The
/// latter is kept whole where all together are too long.
fn observation(output: &RunOutput, partial_output: bool, max_chars: usize) -> String {
    let max_chars = max_chars.saturating_sub(if output.restarted { RESTARTED.len() } else { 0 });
    let text = what_happened(output, partial_output, max_chars);
    if output.restarted { RESTARTED.to_owned() + &text } else { text }
}

fn what_happened(output: &RunOutput, partial_output: bool, max_chars: usize) -> String {
    let problem = match &output.status {
        RunStatus::Success => return output.stdout.clone(),
        RunStatus::Error { message } => message.as_str(),
        RunStatus::TimedOut => TIMED_OUT,
        RunStatus::MemoryExceeded => MEMORY_EXCEEDED,
    };
    if !partial_output {
        return problem.to_owned();
    }
    let room = max_chars.saturating_sub(problem.chars().count() + 1);
    let mut text: String = output.stdout.chars().take(room).collect();
    if !text.is_empty() && !text.ends_with('\n') {
        text.push('\n');
    }
    text + problem
}
