//! Which keys there are: settings of the schema, other spellings, accepted keys; and the nearest to a wrong one.

use std::collections::BTreeMap;
use std::sync::LazyLock;

use figment::Figment;
use figment::providers::{Format, Toml};
use serde_json::Value;

use crate::config::accepted::{self, Rule};
use crate::config::aliases;
use crate::config::error::ConfigError;
use crate::config::schema::Config;

/// deploy/default.toml.
pub(crate) const DEFAULTS: &str = include_str!("../../../deploy/default.toml");

/// How similar a key must be to be suggested, 0 to 1.
const SIMILAR: f64 = 0.6;

/// What a key is.
pub(crate) enum Known {
    /// A setting, by its canonical key.
    Setting(String),
    /// Known, without effect.
    Accepted(&'static Rule),
}

/// The configuration when nothing is set.
///
/// # Errors
/// deploy/default.toml does not fit the schema.
pub(crate) fn defaults() -> Result<Config, ConfigError> {
    Figment::from(Toml::string(DEFAULTS)).extract().map_err(|error| ConfigError::Defaults(error.to_string()))
}

/// Every canonical key with its default.
pub(crate) fn schema_keys() -> &'static BTreeMap<String, Value> {
    static KEYS: LazyLock<BTreeMap<String, Value>> = LazyLock::new(|| {
        // A broken default.toml is reported by `resolve`, which reads it too.
        defaults().map(|config| flatten(&config)).unwrap_or_default()
    });
    &KEYS
}

/// The leaves of a configuration by dotted key.
pub(crate) fn flatten(config: &Config) -> BTreeMap<String, Value> {
    fn walk(prefix: &str, value: Value, leaves: &mut BTreeMap<String, Value>) {
        match value {
            Value::Object(fields) => {
                for (name, value) in fields {
                    let key = if prefix.is_empty() { name } else { format!("{prefix}.{name}") };
                    walk(&key, value, leaves);
                }
            }
            leaf => {
                leaves.insert(prefix.to_owned(), leaf);
            }
        }
    }
    let mut leaves = BTreeMap::new();
    let tree = serde_json::to_value(config).expect("strings, numbers and lists always serialize");
    walk("", tree, &mut leaves);
    leaves
}

/// What `spelled` is, if it is known.
pub(crate) fn lookup(spelled: &str) -> Option<Known> {
    let canonical = aliases::canonical(spelled);
    if schema_keys().contains_key(canonical) {
        return Some(Known::Setting(canonical.to_owned()));
    }
    accepted::rule(spelled).map(Known::Accepted)
}

/// The key that is `text` when dots are written as underscores.
pub(crate) fn but_for_dots(text: &str) -> Option<String> {
    spellings().find(|key| key.replace('.', "_") == text)
}

/// Whether keys below `group` exist, so that a map may be given for it.
pub(crate) fn is_group(group: &str) -> bool {
    let below = |key: &str| key.strip_prefix(group).is_some_and(|rest| rest.starts_with('.'));
    spellings().any(|key| below(&key))
}

/// Every key that can be written.
fn spellings() -> impl Iterator<Item = String> {
    let others = aliases::ALIASES.iter().flat_map(|(_, others)| others.iter().map(|key| (*key).to_owned()));
    schema_keys().keys().cloned().chain(others).chain(accepted::keys())
}

/// Up to three known keys most similar to `wrong`, best first. A right last part under a wrong group counts
/// most: `optim.lr` is `actor_rollout_ref.actor.optim.lr`.
pub(crate) fn nearest(wrong: &str) -> Vec<String> {
    let last = |key: &str| key.rsplit('.').next().unwrap_or_default().to_owned();
    let score = |key: &str| {
        let whole = strsim::normalized_damerau_levenshtein(wrong, key);
        let tail = strsim::normalized_damerau_levenshtein(&last(wrong), &last(key));
        let suffix = if key.ends_with(&format!(".{wrong}")) { 1.0 } else { 0.0 };
        f64::max(suffix, whole.max(0.4 * whole + 0.6 * tail))
    };
    let mut scored: Vec<_> = spellings()
        .filter(|key| !key.ends_with('*'))
        .map(|key| (score(&key), key))
        .filter(|(s, _)| *s >= SIMILAR)
        .collect();
    scored.sort_by(|a, b| b.0.total_cmp(&a.0).then_with(|| a.1.cmp(&b.1)));
    let best = scored.first().map_or(0.0, |(score, _)| *score);
    scored.into_iter().filter(|(score, _)| *score >= best - 0.15).take(3).map(|(_, key)| key).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn default_toml_fits_the_schema_and_explains_every_key() {
        let defaults = defaults().expect("deploy/default.toml fits");
        let mut section = String::new();
        let mut explained = std::collections::BTreeSet::new();
        let mut comment_above = false;
        for line in DEFAULTS.lines() {
            let text = line.trim_start_matches("# ");
            if let Some(name) = line.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')) {
                section = name.to_owned();
            } else if let Some((name, _)) =
                text.split_once(" =").filter(|(name, _)| !name.contains([' ', '`']))
            {
                assert!(comment_above, "{section}.{name} has no comment");
                explained.insert(format!("{section}.{name}"));
            }
            comment_above = line.starts_with("# ");
        }
        let keys: std::collections::BTreeSet<_> = flatten(&defaults).into_keys().collect();
        assert_eq!(explained, keys);
    }

    #[test]
    fn a_misspelt_key_finds_the_one_that_was_meant() {
        assert_eq!(nearest("agent.num_chain")[0], "agent.num_chains");
        assert_eq!(nearest("optim.lr"), ["actor_rollout_ref.actor.optim.lr", "critic.optim.lr"]);
        assert_eq!(nearest("data.train_batchsize")[0], "data.train_batch_size");
        assert_eq!(nearest("zzz"), Vec::<String>::new());
    }
}
