//! `agent.*`: how a chain runs. Read by the agent loop of the worker.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::config::checks::Checks;
use crate::config::choices::{AgentBackend, AgentType, refuse};
use crate::config::registry::{REWARDS, TEMPLATES, TOOLS, UNSUPPORTED_REWARDS, UNSUPPORTED_TOOLS};

/// `agent.*`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Agent {
    /// How replies are parsed.
    pub agent_type: AgentType,
    /// Tools of a chain, by name, in the order they are shown to the model.
    #[serde(deserialize_with = "super::names")]
    pub tools: Vec<String>,
    /// Chat template by name; `None` is the model's own.
    pub template: Option<String>,
    /// The trained model again, as AgentFly's scripts give it.
    pub model_name_or_path: Option<PathBuf>,
    /// Model turns of a chain at most.
    pub max_turns: u32,
    /// Where replies come from.
    pub backend: AgentBackend,
    /// Reward by name, compared without case.
    #[serde(deserialize_with = "reward_name")]
    pub reward_name: String,
    /// Chains a prompt (the group).
    pub num_chains: u32,
    /// Text of the system message.
    #[serde(default, deserialize_with = "system_prompt")]
    pub system_prompt: Option<String>,
    /// Chains at the same time on a worker; `None` leaves it to the engine.
    pub max_concurrent_chains: Option<u32>,
}

impl Agent {
    pub(crate) fn check(&self, checks: &mut Checks) {
        checks.at_least_one("agent.max_turns", self.max_turns);
        checks.at_least_one("agent.num_chains", self.num_chains);
        checks.that(
            "agent.max_concurrent_chains",
            self.max_concurrent_chains != Some(0),
            "expected at least 1",
        );
        if let Some(name) = self.template.as_ref().filter(|name| !TEMPLATES.contains(&name.as_str())) {
            let why = refuse(name, TEMPLATES, &[]);
            checks.that("agent.template", false, format!("{name}: {why}; null takes the model's own"));
        }
        for tool in &self.tools {
            if !TOOLS.contains(&tool.as_str()) {
                let why = refuse(tool, TOOLS, UNSUPPORTED_TOOLS);
                checks.that("agent.tools", false, format!("{tool}: {why}"));
            }
        }
        let reward = self.reward_name.to_ascii_lowercase();
        if !REWARDS.contains(&reward.as_str()) {
            checks.that("agent.reward_name", false, refuse(&reward, REWARDS, UNSUPPORTED_REWARDS));
        }
    }
}

/// AgentFly runs chains without a reward; training needs one.
fn reward_name<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<String, D::Error> {
    Option::<String>::deserialize(deserializer)?.ok_or_else(|| {
        let names = REWARDS.join(", ");
        serde::de::Error::custom(format!("training needs a reward for every chain: name one of: {names}"))
    })
}

/// AgentFly's scripts write line breaks of the system prompt as `\n`. Reading the result again changes nothing.
fn system_prompt<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<Option<String>, D::Error> {
    Ok(Option::<String>::deserialize(deserializer)?.map(|text| text.replace("\\n", "\n")))
}
