//! The code agent: one Python block a turn, run by `code_interpreter`.
//!
//! AgentFly's rule: find every shortest "```python … ```" block; exactly one is a call, none or several end the
//! chain.

use std::sync::LazyLock;

use regex::Regex;
use serde_json::json;

use super::{Agent, Parsed, Status, ToolCall};

/// The tool the blocks go to.
const TOOL: &str = "code_interpreter";

static FENCE: LazyLock<Regex> =
    LazyLock::new(|| Regex::new(r"(?s)```python(.*?)```").expect("a constant pattern that a test compiles"));

/// AgentFly's `code` agent.
#[derive(Debug, Clone, Copy, Default)]
pub struct CodeAgent;

impl Agent for CodeAgent {
    fn name(&self) -> &'static str {
        "code"
    }

    fn system_prompt(&self) -> Option<&str> {
        Some(include_str!("code_prompt.txt").trim_end())
    }

    fn lists_tools(&self) -> bool {
        false // its prompt asks for Python blocks; the template's own text would ask for JSON calls
    }

    fn parse(&self, text: &str) -> Parsed {
        let mut blocks = FENCE.captures_iter(text).filter_map(|found| found.get(1));
        match (blocks.next(), blocks.next()) {
            (Some(block), None) => {
                let arguments = json!({"code": block.as_str().trim()});
                let call = ToolCall { name: TOOL.to_owned(), arguments };
                Parsed { tool_calls: vec![call], status: Status::Continue }
            }
            _ => Parsed { tool_calls: Vec::new(), status: Status::Terminal },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn code(text: &str) -> Option<String> {
        let parsed = CodeAgent.parse(text);
        assert_eq!(parsed.status == Status::Terminal, parsed.tool_calls.is_empty());
        let call = parsed.tool_calls.first()?;
        assert_eq!((call.name.as_str(), parsed.tool_calls.len()), (TOOL, 1));
        Some(call.arguments["code"].as_str().unwrap().to_owned())
    }

    #[test]
    fn exactly_one_closed_python_block_is_a_call() {
        assert_eq!(code("So:\n```python\nx = 1\nprint(x)\n```\n").unwrap(), "x = 1\nprint(x)");
        assert_eq!(code("```python print(1)```").unwrap(), "print(1)");
        for none in ["", "\\boxed{4}", "```\nprint(1)\n```", "```python\nprint(1)", "```Python\n1\n```"] {
            assert_eq!(code(none), None, "{none:?}");
        }
        assert_eq!(code("```python\n1\n```\n```python\n2\n```"), None, "two blocks");
    }

    #[test]
    fn the_shortest_block_is_taken() {
        assert_eq!(code("```python\nprint('```')\n```").unwrap(), "print('");
    }

    proptest::proptest! {
        #[test]
        fn parsing_never_panics(parts in proptest::collection::vec(
            proptest::prop_oneof![proptest::strategy::Just("```python".to_owned()),
                proptest::strategy::Just("```".to_owned()), ".{0,6}"], 0..10)) {
            let parsed = CodeAgent.parse(&parts.concat());
            proptest::prop_assert!(parsed.tool_calls.len() <= 1);
        }
    }
}
