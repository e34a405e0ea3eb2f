//! What the worker's registries hold, by name, and what each needs: tools, chat templates, rewards.
//!
//! The settings are checked against these lists, the coordinator checks tokenizers and data by what is needed, and a
//! test of the worker holds them against what it registers. The one place to extend when a name arrives.

use crate::row::Reference;

/// `agent.tools`.
pub const TOOLS: &[&str] = &["code_interpreter"];

/// What the named templates write around every message.
const CHATML_TOKENS: &[&str] = &["<|im_start|>", "<|im_end|>"];

/// Named template → the special tokens it writes.
const TEMPLATE_TABLE: [(&str, &[&str]); 4] = [
    ("qwen2.5", CHATML_TOKENS),
    ("qwen-chat", CHATML_TOKENS),
    ("qwen2.5-no-system-tool", CHATML_TOKENS),
    ("chatml", CHATML_TOKENS),
];

/// `agent.template`: the named chat templates.
pub const TEMPLATES: &[&str] = &names(&TEMPLATE_TABLE);

/// Reward → the field of a row that it compares with.
const REWARD_TABLE: [(&str, Reference); 10] = [
    ("math_reward_format", Reference::Answer),
    ("math_equal_reward", Reference::Answer),
    ("math_equal_reward_tool", Reference::Answer),
    ("math_reward_format_strict", Reference::Answer),
    ("math_equal_reward_strict", Reference::Answer),
    ("math_equal_reward_tool_strict", Reference::Answer),
    ("qa_f1_reward", Reference::Answer),
    ("qa_em_reward", Reference::GoldenAnswers),
    // Early AgentFly's names of the same functions.
    ("math_reward", Reference::Answer),
    ("math_reward_tool", Reference::Answer),
];

/// `agent.reward_name`, compared without case.
pub const REWARDS: &[&str] = &names(&REWARD_TABLE);

/// The special tokens that the template of this name writes; empty for a name that is none.
#[must_use]
pub fn template_tokens(name: &str) -> &'static [&'static str] {
    TEMPLATE_TABLE.iter().find(|(known, _)| *known == name).map_or(&[], |(_, tokens)| tokens)
}

/// The field of a row that the reward of this name, in any case, compares with.
#[must_use]
pub fn reward_reference(name: &str) -> Option<Reference> {
    REWARD_TABLE.iter().find(|(known, _)| known.eq_ignore_ascii_case(name)).map(|(_, reference)| *reference)
}

const fn names<T, const N: usize>(table: &[(&'static str, T); N]) -> [&'static str; N] {
    let mut names = [""; N];
    let mut i = 0;
    while i < N {
        names[i] = table[i].0;
        i += 1;
    }
    names
}

/// AgentFly's tools that are not in the registry.
pub(crate) const UNSUPPORTED_TOOLS: &[(&str, &str)] = &[
    ("answer", "ends a chain with an answer"),
    ("answer_math", "ends a chain with an answer"),
    ("answer_qa", "ends a chain with an answer"),
    ("calculator", "symbolic arithmetic"),
    ("google_search", "a web search service"),
    ("dense_retrieve", "a retriever over Wikipedia"),
    ("async_dense_retrieve", "a retriever over Wikipedia"),
    ("search", "a retriever service"),
    ("run_shell_command", "shell commands in a repository's container"),
    ("alfworld_step", "the ALFWorld environment"),
    ("scienceworld_explorer", "the ScienceWorld environment"),
    ("webshop_browser", "the WebShop environment"),
    ("summarize", "context folding"),
];

/// AgentFly's rewards that are not in the registry.
pub(crate) const UNSUPPORTED_REWARDS: &[(&str, &str)] = &[
    ("math_reward_thought", "demands the word `thought`"),
    ("math_reward_thought_with_tool", "demands the word `thought`"),
    ("math_reward_think", "demands <think> sections"),
    ("math_equal_reward_think", "demands <think> sections"),
    ("math_string_equal_reward_tool", "compares the last number as text"),
    ("qa_f1_reward_tool", "word overlap of answers"),
    ("qa_f1_reward_format", "word overlap of answers"),
    ("qa_em_format_reward", "equal words of answers"),
    ("qa_em_reward_tool_call", "equal words of answers"),
    ("ok_vqa_reward", "questions about pictures"),
    ("infoseek_reward", "questions about pictures"),
    ("code_reward_test", "runs the final text"),
    ("alfworld_episode_reward", "the ALFWorld environment"),
    ("scienceworld_reward", "the ScienceWorld environment"),
    ("webshop_reward", "the WebShop environment"),
    ("llm_as_judge_reward", "another model's judgement"),
];
