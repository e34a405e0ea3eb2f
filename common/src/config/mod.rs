//! Settings: AgentFly's and verl's keys, typed, checked whole before anything starts.
//!
//! ```text
//! key=value ─┐ overrides      aliases            figment            schema
//! AGENTFLY_… ┼─► layers ──► canonical keys ──► defaults < file < ──► Config ──► checks ──► Resolved
//! --config ──┘               accepted keys      env < command line
//! ```
//!
//! The coordinator calls [`resolve`] once and hands parts of the [`Config`] down; the head and the ranks get it
//! as JSON. What must stay true: figment sees canonical keys alone; defaults live in deploy/default.toml alone;
//! an unknown key, a value that cannot be, or a feature that is not here is an error, never ignored; all errors
//! come at once.

mod accepted;
mod aliases;
mod batch_plan;
mod checks;
mod choices;
mod compare;
mod error;
mod explain;
mod known;
mod layers;
mod overrides;
mod preflight;
mod registry;
mod schema;
#[cfg(test)]
mod tests;
mod value;

use std::collections::BTreeMap;
use std::path::Path;

use serde::{Deserialize, Serialize};

pub use accepted::Notice;
pub use aliases::ALIASES;
pub use batch_plan::{BatchPlan, MicroBatch, batch_plan, micro_batch};
pub use choices::{
    AdvEstimator, AgentBackend, AgentType, Dtype, KlLossType, Logger, LossAggMode, LrSchedule,
    PolicyLossMode, ResumeMode, SandboxTier,
};
pub use compare::{Difference, differences};
pub use error::{ConfigError, ConfigErrors};
pub use explain::explain;
pub use layers::Source;
pub use preflight::preflight;
pub use registry::{REWARDS, TEMPLATES, TOOLS, reward_reference, template_tokens};
pub use schema::{
    Actor, ActorRolloutRef, Agent, Algorithm, Config, Data, Model, Optim, PolicyLoss, Rollout, Sandbox,
    Trainer, ValKwargs,
};

use checks::Checks;
use layers::{Layer, Setting};

/// A configuration that passed every check, and where its values came from.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Resolved {
    /// The settings.
    pub config: Config,
    /// Canonical key → source, of every key that was set.
    pub provenance: BTreeMap<String, Source>,
    /// What was accepted and has no effect.
    pub notices: Vec<Notice>,
}

/// Resolves defaults < `file` < `env` < `overrides` into one checked configuration.
///
/// `env` is every environment variable of the process; those that are settings are picked out.
///
/// # Errors
/// Everything that is wrong, at once: syntax, unknown keys, types, ranges, settings that exclude each other.
pub fn resolve(
    overrides: &[String],
    file: Option<&Path>,
    env: impl IntoIterator<Item = (String, String)>,
) -> Result<Resolved, ConfigErrors> {
    known::defaults().map_err(|error| ConfigErrors(vec![error]))?;
    let mut layers = vec![
        file.map(Layer::from_file).unwrap_or_default(),
        overrides::from_environment(env),
        overrides::from_command_line(overrides),
    ];
    layers::apply_removals(&mut layers);
    let mut errors: Vec<_> = layers.iter_mut().flat_map(|layer| std::mem::take(&mut layer.errors)).collect();
    let config = extract(&mut layers, &mut errors).map_err(|error| ConfigErrors(vec![error]))?;
    let settings = layers::winning(&layers);

    let mut checks = Checks::new(&settings);
    config.check(&mut checks);
    errors.extend(checks.into_errors());
    if errors.is_empty() {
        errors.extend(batch_plan(&config, None).err());
    }
    if !errors.is_empty() {
        return Err(ConfigErrors(errors));
    }
    let mut notices: Vec<Notice> = layers.into_iter().flat_map(|layer| layer.notices).collect();
    notices.extend(accepted::without_effect(&config, &settings));
    let provenance = settings.into_iter().map(|(key, Setting { source, .. })| (key, source)).collect();
    Ok(Resolved { config, provenance, notices })
}

/// Merges and types the layers. serde stops at the first value of a wrong type, so that value is reported,
/// taken out, and the rest tried again: once per wrong setting at most.
fn extract(layers: &mut [Layer], errors: &mut Vec<ConfigError>) -> Result<Config, ConfigError> {
    loop {
        let error = match layers::merge(layers).extract::<Config>() {
            Ok(config) => return Ok(config),
            Err(error) => error,
        };
        let path = error.path.join(".");
        let within =
            |key: &str| path == key || path.strip_prefix(key).is_some_and(|rest| rest.starts_with('.'));
        let found = layers.iter_mut().rev().find_map(|layer| {
            let key = layer.settings.keys().find(|key| within(key))?.clone();
            Some((layer, key))
        });
        let Some((layer, key)) = found else {
            return Err(ConfigError::Defaults(error.to_string()));
        };
        let Some(mut setting) = layer.settings.remove(&key) else {
            continue;
        };
        let wants_text = matches!(&error.kind, figment::error::Kind::InvalidType(_, expected)
            if expected == "a string" || expected == "path string");
        match setting.raw.take() {
            Some(raw) if wants_text && (setting.value.is_number() || setting.value.is_boolean()) => {
                layer.settings.insert(key, Setting { value: raw.into(), ..setting });
            }
            _ => errors.push(ConfigError::Value {
                key: setting.spelled,
                value: value::render(&setting.value),
                source_of: setting.source,
                problem: expectation(error.kind),
            }),
        }
    }
}

/// serde's complaint in the words of the person who typed the value.
fn expectation(kind: figment::error::Kind) -> String {
    use figment::error::Kind;
    let expected = match kind {
        Kind::Message(text) => return text,
        Kind::InvalidType(_, expected) | Kind::InvalidValue(_, expected) => expected,
        Kind::InvalidLength(found, expected) => return format!("expected {expected}, found {found} items"),
        other => return other.to_string(),
    };
    let plain = match expected.as_str() {
        "u16" => "a whole number, 0 to 65535",
        "u32" => "a whole number, 0 to 4294967295",
        "u64" => "a whole number, 0 to 18446744073709551615",
        "i32" | "i64" => "a whole number",
        "f32" | "f64" => "a number",
        "a boolean" => "True or False",
        "path string" => "a path",
        other => other,
    };
    format!("expected {plain}")
}
