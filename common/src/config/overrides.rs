//! `key=value`, `+key=value`, `++key=value` and `~key` of the command line, and `AGENTFLY_A__B=value` of the
//! environment: each becomes a layer.
//!
//! Hydra's `+` adds a key outside of its schema and `++` sets either; here every key is known, so both mean
//! what the plain form means. `~key` takes the key out of the layers below: its default holds again.

use crate::config::error::ConfigError;
use crate::config::known::{self, Known};
use crate::config::layers::{Layer, Setting, Source};
use crate::config::value;

/// Environment variables that are settings start so; `__` stands for the dot.
const ENV_PREFIX: &str = "AGENTFLY_";

/// The layer of the command line.
pub(crate) fn from_command_line(overrides: &[String]) -> Layer {
    let mut layer = Layer::default();
    for text in overrides {
        if let Some(removal) = text.strip_prefix('~') {
            remove(&mut layer, removal);
            continue;
        }
        match text.split_once('=') {
            Some((key, value)) if !key.trim_start_matches('+').trim().is_empty() => {
                let key = key.strip_prefix("++").or(key.strip_prefix('+')).unwrap_or(key);
                assign(&mut layer, key.trim(), value, Source::CommandLine, text);
            }
            _ => layer.errors.push(syntax(text, Source::CommandLine, "expected key=value")),
        }
    }
    layer
}

/// The layer of the environment. A name with the prefix but without `__` is some set-up variable, unless it is a
/// key but for the number of underscores: that is an error, for it would be passed over silently.
pub(crate) fn from_environment(variables: impl IntoIterator<Item = (String, String)>) -> Layer {
    let mut layer = Layer::default();
    let mut ours: Vec<_> = variables.into_iter().filter(|(name, _)| name.starts_with(ENV_PREFIX)).collect();
    ours.sort();
    for (name, value) in ours {
        let key = name[ENV_PREFIX.len()..].to_ascii_lowercase().replace("__", ".");
        if key.contains('.') {
            let text = format!("{name}={value}");
            assign(&mut layer, &key, &value, Source::Environment(name), &text);
        } else if let Some(meant) = known::but_for_dots(&key) {
            let problem = format!(
                "`__` stands for the dot: {ENV_PREFIX}{} is {meant}",
                meant.replace('.', "__").to_ascii_uppercase()
            );
            layer.errors.push(syntax(&format!("{name}={value}"), Source::Environment(name), &problem));
        }
    }
    layer
}

fn assign(layer: &mut Layer, key: &str, text: &str, source: Source, whole: &str) {
    match value::parse(text) {
        Ok(value) => {
            let raw = Some(text.trim().to_owned());
            layer.add(Setting { spelled: key.to_owned(), value, raw, source });
        }
        Err(problem) => layer.errors.push(syntax(whole, source, &problem)),
    }
}

fn remove(layer: &mut Layer, text: &str) {
    let key = text.split_once('=').map_or(text, |(key, _)| key).trim();
    match known::lookup(key) {
        Some(Known::Setting(canonical)) => {
            layer.settings.remove(&canonical);
            layer.removed.push(canonical);
        }
        Some(Known::Accepted(_)) => {}
        None => layer.errors.push(ConfigError::UnknownKey {
            key: key.to_owned(),
            source_of: Source::CommandLine,
            nearest: known::nearest(key),
        }),
    }
}

fn syntax(text: &str, source_of: Source, problem: &str) -> ConfigError {
    ConfigError::Syntax { text: text.to_owned(), source_of, problem: problem.to_owned() }
}
