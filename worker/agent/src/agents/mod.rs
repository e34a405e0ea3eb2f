//! Agent types: a system prompt, and the rule that turns a reply into tool calls.
//!
//! The chain loop parses every turn with one of these. What must stay true: parsing never fails and never
//! panics; text that fits no rule is a turn without a call.

mod code;

use std::sync::Arc;

use serde_json::Value;

pub use code::CodeAgent;

/// A tool the policy asks for.
#[derive(Debug, Clone, PartialEq)]
pub struct ToolCall {
    /// The tool's name as the policy gave it.
    pub name: String,
    /// Its arguments: an object, or a string that should hold one.
    pub arguments: Value,
}

/// What the agent says about going on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Status {
    /// The chain goes on if there are calls.
    Continue,
    /// The chain ends with this turn.
    Terminal,
}

/// A parsed turn.
#[derive(Debug, Clone, PartialEq)]
pub struct Parsed {
    /// Calls in their order.
    pub tool_calls: Vec<ToolCall>,
    /// Whether to go on.
    pub status: Status,
}

/// An agent type.
pub trait Agent: Send + Sync {
    /// AgentFly's name of it.
    fn name(&self) -> &'static str;
    /// Its system prompt; `None` leaves the template's default.
    fn system_prompt(&self) -> Option<&str>;
    /// Whether the template lists the tools' schemas in the prompt. Not where the agent's own system prompt
    /// says how tools are called: two ways of calling contradict each other.
    fn lists_tools(&self) -> bool;
    /// Reads one turn.
    fn parse(&self, text: &str) -> Parsed;
}

/// No agent type has this name.
#[derive(Debug, thiserror::Error)]
#[error("unknown agent type {name:?} (agent.agent_type); known: {}", known.join(", "))]
pub struct UnknownAgent {
    /// The name asked for.
    pub name: String,
    /// The names there are.
    pub known: Vec<&'static str>,
}

/// Every name that [`agent`] knows.
pub const AGENT_NAMES: &[&str] = &["code"];

/// The agent type of this name, in any case.
///
/// # Errors
/// An unknown name, with the known ones.
pub fn agent(name: &str) -> Result<Arc<dyn Agent>, UnknownAgent> {
    match name.to_lowercase().as_str() {
        "code" => Ok(Arc::new(CodeAgent)),
        _ => Err(UnknownAgent { name: name.to_owned(), known: AGENT_NAMES.to_vec() }),
    }
}
