//! Tools: what the policy may call, what comes back, and what is a fault of the machinery instead.
//!
//! The chain loop calls [`ToolSet::call`]. What must stay true: whatever the policy wrote, it gets an
//! observation; [`ToolFault`] is only for machinery that failed, and never becomes an observation.

mod code_interpreter;
mod python;

use std::sync::Arc;

use agentfly_common::ids::ChainKey;
use async_trait::async_trait;
use serde_json::{Map, Value};

use crate::agents::ToolCall;
use crate::clock::Clock;

pub use code_interpreter::{CodeInterpreter, CodeOptions, MEMORY_EXCEEDED, TIMED_OUT};
pub use python::{InfraError, PythonRunner, PythonSlot, RunLimits, RunOutput, RunStatus, Snippet};

/// AgentFly's default limit of an observation, in characters.
pub const DEFAULT_MAX_LENGTH_CHARS: usize = 2048;

/// Whether a chain goes on after a tool answered: a fixed property of the tool.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ToolStatus {
    /// It goes on.
    Success,
    /// The chain is done; the observation is its final response.
    Finish,
}

/// What the policy reads.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Observation {
    /// The text, at most the tool's limit long.
    pub text: String,
    /// Whether the chain goes on.
    pub status: ToolStatus,
}

/// Who calls.
#[derive(Debug, Clone, Copy)]
pub struct ToolContext<'a> {
    /// The chain.
    pub chain: ChainKey,
    /// The turn, 0-based.
    pub turn: u32,
    /// The seed of every random choice the tool makes.
    pub seed: u64,
    /// The chain's clock: stands still while the tool only waits for its turn.
    pub clock: &'a Clock,
}

/// The machinery behind a tool failed: the chain is run again.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("tool {tool}: {cause}")]
pub struct ToolFault {
    /// The tool.
    pub tool: String,
    /// What happened.
    pub cause: String,
}

/// A tool.
#[async_trait]
pub trait Tool: Send + Sync {
    /// Its name, by which the policy calls it.
    fn name(&self) -> &str;
    /// Its OpenAI function object: `{"type": "function", "function": {"name", "description", "parameters"}}`.
    fn schema(&self) -> Value;
    /// The longest observation, in characters.
    fn max_length_chars(&self) -> usize {
        DEFAULT_MAX_LENGTH_CHARS
    }
    /// Whether a chain goes on after it.
    fn status(&self) -> ToolStatus {
        ToolStatus::Success
    }
    /// Runs it. `arguments` holds exactly parameters that the schema names, all required ones among them.
    ///
    /// # Errors
    /// Only when the machinery failed; what the policy did wrong is an observation.
    async fn call(
        &self,
        arguments: &Map<String, Value>,
        context: ToolContext<'_>,
    ) -> Result<String, ToolFault>;
    /// A chain is over, however it ended: what the tool keeps for it can go. Does not wait.
    fn chain_ended(&self, _chain: &ChainKey) {}
}

/// No tool has this name.
#[derive(Debug, thiserror::Error)]
#[error("unknown tool {name:?} (agent.tools); known: {}", known.join(", "))]
pub struct UnknownTool {
    /// The name asked for.
    pub name: String,
    /// The names there are.
    pub known: Vec<&'static str>,
}

/// Every name that [`ToolSet::by_names`] knows.
pub const TOOL_NAMES: &[&str] = &["code_interpreter"];

/// The tools of one agent, in the order the prompt lists them.
#[derive(Clone, Default)]
pub struct ToolSet {
    tools: Vec<Arc<dyn Tool>>,
}

impl ToolSet {
    /// A set of the given tools.
    #[must_use]
    pub fn new(tools: Vec<Arc<dyn Tool>>) -> Self {
        Self { tools }
    }

    /// The tools of these names (`agent.tools`), running Python with `python`.
    ///
    /// # Errors
    /// An unknown name, with the known ones.
    pub fn by_names<S: AsRef<str>>(
        names: &[S],
        python: &Arc<dyn PythonRunner>,
        code: CodeOptions,
    ) -> Result<Self, UnknownTool> {
        let tool = |name: &S| -> Result<Arc<dyn Tool>, UnknownTool> {
            match name.as_ref() {
                "code_interpreter" => Ok(Arc::new(CodeInterpreter::new(python.clone(), code))),
                other => Err(UnknownTool { name: other.to_owned(), known: TOOL_NAMES.to_vec() }),
            }
        };
        Ok(Self { tools: names.iter().map(tool).collect::<Result<_, _>>()? })
    }

    /// The schemas, for the prompt.
    #[must_use]
    pub fn schemas(&self) -> Vec<Value> {
        self.tools.iter().map(|t| t.schema()).collect()
    }

    /// A chain is over, however it ended.
    pub fn chain_ended(&self, chain: &ChainKey) {
        self.tools.iter().for_each(|tool| tool.chain_ended(chain));
    }

    /// Answers a call: by the tool, or by saying what is wrong with the call.
    ///
    /// # Errors
    /// The tool's machinery failed.
    pub async fn call(&self, call: &ToolCall, context: ToolContext<'_>) -> Result<Observation, ToolFault> {
        let said = |text: String| Ok(Observation { text, status: ToolStatus::Success });
        let Some(tool) = self.tools.iter().find(|t| t.name() == call.name) else {
            let allowed: Vec<&str> = self.tools.iter().map(|t| t.name()).collect();
            let name: String = call.name.chars().take(100).collect();
            return said(format!("Unknown tool: {name}. Available tools: {}.", allowed.join(", ")));
        };
        let arguments = match arguments_of(tool.as_ref(), &call.arguments) {
            Ok(arguments) => arguments,
            Err(problem) => return said(cut(&problem, tool.max_length_chars())),
        };
        let text = tool.call(&arguments, context).await?;
        Ok(Observation { text: cut(&text, tool.max_length_chars()), status: tool.status() })
    }
}

fn cut(text: &str, max_chars: usize) -> String {
    text.chars().take(max_chars).collect()
}

/// The arguments as the schema allows them, or what to tell the policy.
fn arguments_of(tool: &dyn Tool, given: &Value) -> Result<Map<String, Value>, String> {
    let decoded = match given {
        Value::String(text) => serde_json::from_str(text).unwrap_or(Value::Null),
        other => other.clone(),
    };
    let Value::Object(arguments) = decoded else {
        let shown = given.as_str().map_or_else(|| given.to_string(), str::to_owned);
        return Err(format!("Invalid input: {shown}, input must be a valid JSON object."));
    };
    let schema = tool.schema();
    let parameters = &schema["function"]["parameters"];
    let known = parameters["properties"].as_object();
    if let Some(extra) = arguments.keys().find(|key| !known.is_some_and(|k| k.contains_key(*key))) {
        return Err(format!("Invalid argument \"{extra}\" for tool {}.", tool.name()));
    }
    let required = parameters["required"].as_array().into_iter().flatten().filter_map(Value::as_str);
    for name in required {
        if !arguments.contains_key(name) {
            return Err(format!("Missing argument \"{name}\" for tool {}.", tool.name()));
        }
    }
    Ok(arguments)
}

#[cfg(test)]
mod tests;
