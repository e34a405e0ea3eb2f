//! The named templates, by their published text (semantics: Qwen2.5's and ChatML's chat formats).
//!
//! Called by [`super::ChatTemplate`] with escaped text; pure string functions.

use serde_json::Value;

use super::json::to_python_json;
use super::{Next, ToolReply};

const QWEN_DEFAULT_SYSTEM: &str = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant.";
const TOOLS_BEFORE: &str = "\n\n# Tools\n\nYou may call one or more functions to assist with the user query.\n\n\
    You are provided with function signatures within <tools></tools> XML tags:\n<tools>";
const TOOLS_AFTER: &str = "\n</tools>\n\nFor each function call, return a json object with function name and arguments \
    within <tool_call></tool_call> XML tags:\n<tool_call>\n\
    {\"name\": <function-name>, \"arguments\": <args-json-object>}\n</tool_call>";
const GENERATION_PROMPT: &str = "<|im_start|>assistant\n";

/// A template known by name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NamedTemplate {
    /// Qwen2.5: default system prompt, tools listed in the system block.
    Qwen25,
    /// Qwen2.5 whose system block never lists tools.
    Qwen25NoSystemTool,
    /// ChatML: no default system prompt, tools never listed (SmolLM2 and others).
    ChatMl,
}

impl NamedTemplate {
    /// Every name that [`Self::from_name`] knows.
    pub const NAMES: &[&str] = &["qwen2.5", "qwen-chat", "qwen2.5-no-system-tool", "chatml"];

    /// The template of this name; `qwen-chat` is an alias of `qwen2.5`.
    #[must_use]
    pub fn from_name(name: &str) -> Option<Self> {
        match name {
            "qwen2.5" | "qwen-chat" => Some(Self::Qwen25),
            "qwen2.5-no-system-tool" => Some(Self::Qwen25NoSystemTool),
            "chatml" => Some(Self::ChatMl),
            _ => None,
        }
    }

    /// The prompt's text, generation prompt included.
    pub(super) fn prompt(self, system: Option<&str>, user: &str, tools: &[Value]) -> String {
        let mut text = self.system(system, tools);
        text.push_str("<|im_start|>user\n");
        text.push_str(user);
        text.push_str("<|im_end|>\n");
        text.push_str(GENERATION_PROMPT);
        text
    }

    fn system(self, system: Option<&str>, tools: &[Value]) -> String {
        let default = (self != Self::ChatMl).then_some(QWEN_DEFAULT_SYSTEM);
        let Some(system) = system.or(default) else {
            return String::new();
        };
        let mut text = format!("<|im_start|>system\n{system}");
        if self == Self::Qwen25 && !tools.is_empty() {
            text.push_str(TOOLS_BEFORE);
            for tool in tools {
                text.push('\n');
                text.push_str(&to_python_json(tool, true));
            }
            text.push_str(TOOLS_AFTER);
        }
        text.push_str("<|im_end|>\n");
        text
    }

    /// The text after an assistant's content: end of turn, one user block with every observation, and what
    /// comes next.
    pub(super) fn after_assistant(self, observations: &[ToolReply], next: Next) -> String {
        let mut text = String::from("<|im_end|>\n");
        if !observations.is_empty() {
            text.push_str("<|im_start|>user");
            for o in observations {
                text.push_str("\n<tool_response>\n");
                text.push_str(&o.text);
                text.push_str("\n</tool_response>");
            }
            text.push_str("<|im_end|>\n");
        }
        if next == Next::Generate {
            text.push_str(GENERATION_PROMPT);
        }
        text
    }
}
