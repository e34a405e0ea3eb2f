//! The typed tree of settings: one file per part, in AgentFly's and verl's names.
//!
//! Filled by `config::resolve` and nothing else, checked whole, then handed down in parts: a function takes
//! `&Rollout`, not `&Config`. Travels as JSON to the head and the ranks. Defaults are in deploy/default.toml
//! alone; the key of a field is its path in this tree.

mod actor;
mod agent;
mod algorithm;
mod data;
mod rollout;
mod runtime;
mod trainer;

use serde::{Deserialize, Serialize};

pub use actor::{Actor, ActorRolloutRef, Model, Optim, PolicyLoss};
pub use agent::Agent;
pub use algorithm::Algorithm;
pub use data::Data;
pub use rollout::{Rollout, ValKwargs};
pub use runtime::Sandbox;
pub use trainer::Trainer;

use crate::config::checks::Checks;
use crate::config::choices::AdvEstimator;

/// Everything a job is told.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// Questions.
    pub data: Data,
    /// Chains.
    pub agent: Agent,
    /// Advantages.
    pub algorithm: Algorithm,
    /// Model, optimization and sampling.
    pub actor_rollout_ref: ActorRolloutRef,
    /// Steps, ranks, files.
    pub trainer: Trainer,
    /// Limits of tool calls.
    pub sandbox: Sandbox,
}

impl Config {
    /// Ranges of every value, and rules between values.
    pub(crate) fn check(&self, checks: &mut Checks) {
        self.data.check(checks);
        self.agent.check(checks);
        self.algorithm.check(checks);
        self.actor_rollout_ref.check(checks);
        self.trainer.check(checks);
        self.sandbox.check(checks);
        // A number of ranks that is no number is reported by the trainer.
        let ranks = self.trainer.n_gpus_per_node.saturating_mul(self.trainer.nnodes);
        self.actor_rollout_ref.actor.fsdp_config.check(ranks, checks);
        if self.algorithm.adv_estimator == AdvEstimator::GrpoPassK && self.agent.num_chains == 1 {
            checks.impossible(
                "algorithm.adv_estimator=grpo_passk sets the best chain of a group against the second best, and \
                 agent.num_chains=1 gives it one"
                    .to_owned(),
                "set agent.num_chains to 2 or more",
            );
        }
        let model = &self.actor_rollout_ref.model.path;
        if let Some(agent_model) = self.agent.model_name_or_path.as_ref().filter(|given| *given != model) {
            checks.impossible(
                format!(
                    "agent.model_name_or_path={} and actor_rollout_ref.model.path={} are two models, but the agent \
                     speaks with the model that is trained",
                    agent_model.display(),
                    model.display()
                ),
                "give both the same path, or leave agent.model_name_or_path out",
            );
        }
    }

    /// Ranks of the job: `trainer.n_gpus_per_node` × `trainer.nnodes`.
    #[must_use]
    pub fn world_size(&self) -> u32 {
        self.trainer.n_gpus_per_node * self.trainer.nnodes
    }

    /// Whether a frozen copy of the first model is needed.
    #[must_use]
    pub fn needs_reference(&self) -> bool {
        self.actor_rollout_ref.actor.use_kl_loss
    }

    /// Seed of the order of the questions: `data.seed`, else `trainer.seed`.
    #[must_use]
    pub fn data_seed(&self) -> u64 {
        self.data.seed.unwrap_or(self.trainer.seed)
    }
}

/// Reads one path or a list of paths; null is the empty list.
pub(crate) fn paths<'de, D: serde::Deserializer<'de>>(
    deserializer: D,
) -> Result<Vec<std::path::PathBuf>, D::Error> {
    struct Paths;

    impl<'de> serde::de::Visitor<'de> for Paths {
        type Value = Vec<std::path::PathBuf>;

        fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
            f.write_str("a path or a list of paths")
        }

        fn visit_str<E: serde::de::Error>(self, path: &str) -> Result<Self::Value, E> {
            Ok(vec![path.into()])
        }

        fn visit_unit<E: serde::de::Error>(self) -> Result<Self::Value, E> {
            Ok(Vec::new())
        }

        fn visit_none<E: serde::de::Error>(self) -> Result<Self::Value, E> {
            Ok(Vec::new())
        }

        fn visit_seq<A: serde::de::SeqAccess<'de>>(self, mut list: A) -> Result<Self::Value, A::Error> {
            let mut paths = Vec::new();
            while let Some(path) = list.next_element()? {
                paths.push(path);
            }
            Ok(paths)
        }
    }

    deserializer.deserialize_any(Paths)
}

/// Reads one string or a list of strings.
pub(crate) fn names<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<Vec<String>, D::Error> {
    struct Names;

    impl<'de> serde::de::Visitor<'de> for Names {
        type Value = Vec<String>;

        fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
            f.write_str("a name or a list of names")
        }

        fn visit_str<E: serde::de::Error>(self, name: &str) -> Result<Self::Value, E> {
            Ok(vec![name.to_owned()])
        }

        fn visit_seq<A: serde::de::SeqAccess<'de>>(self, mut list: A) -> Result<Self::Value, A::Error> {
            let mut names = Vec::new();
            while let Some(name) = list.next_element()? {
                names.push(name);
            }
            Ok(names)
        }
    }

    deserializer.deserialize_any(Names)
}
