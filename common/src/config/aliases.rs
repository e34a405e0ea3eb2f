//! Old and new spellings of one setting: the one table of them.
//!
//! Early AgentFly wrote `agent.max_steps`, today's writes `agent.run_config.max_turns`, and its documentation
//! `agent.max_turns`. Spellings are resolved before any layer is merged, so everything behind `resolve` sees the
//! canonical key alone: the path of a field in `schema`.

/// (canonical key, other spellings of it).
pub const ALIASES: &[(&str, &[&str])] = &[
    ("agent.agent_type", &["agent.init_config.agent_type"]),
    ("agent.tools", &["agent.init_config.tools"]),
    ("agent.template", &["agent.init_config.template"]),
    ("agent.model_name_or_path", &["agent.init_config.model_name_or_path"]),
    ("agent.max_turns", &["agent.max_steps", "agent.run_config.max_turns"]),
    ("agent.backend", &["agent.init_config.backend_config.backend", "agent.init_config.backend"]),
    ("agent.reward_name", &["agent.init_config.reward_name"]),
    ("agent.num_chains", &["agent.run_config.num_chains"]),
    ("agent.system_prompt", &["agent.init_config.system_prompt"]),
    ("agent.max_concurrent_chains", &["agent.run_config.max_concurrent_chains"]),
    (
        "actor_rollout_ref.rollout.max_tokens",
        &[
            "agent.generation_config.max_tokens",
            "agent.run_config.generation_config.max_tokens",
            "actor_rollout_ref.rollout.response_length",
        ],
    ),
    (
        "actor_rollout_ref.rollout.temperature",
        &["agent.generation_config.temperature", "agent.run_config.generation_config.temperature"],
    ),
    (
        "actor_rollout_ref.rollout.top_p",
        &["agent.generation_config.top_p", "agent.run_config.generation_config.top_p"],
    ),
    (
        "actor_rollout_ref.rollout.top_k",
        &["agent.generation_config.top_k", "agent.run_config.generation_config.top_k"],
    ),
    ("actor_rollout_ref.rollout.max_model_len", &["agent.init_config.max_model_len", "agent.max_model_len"]),
    ("actor_rollout_ref.actor.optim.lr_scheduler_type", &["actor_rollout_ref.actor.optim.warmup_style"]),
];

/// The canonical key of `spelled`; a key without other spellings is its own.
#[must_use]
pub(crate) fn canonical(spelled: &str) -> &str {
    ALIASES.iter().find(|(_, others)| others.contains(&spelled)).map_or(spelled, |(key, _)| key)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;
    use crate::config::known;

    #[test]
    fn every_alias_leads_to_a_setting_and_no_spelling_means_two() {
        let mut seen = BTreeSet::new();
        for (key, others) in ALIASES {
            assert!(known::schema_keys().contains_key(*key), "{key} is no setting");
            for other in *others {
                assert!(seen.insert(other), "{other} is listed twice");
                assert!(!known::schema_keys().contains_key(*other), "{other} is a setting of its own");
            }
        }
    }
}
