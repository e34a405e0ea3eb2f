//! Layers of settings: file, environment, command line. Each is brought to canonical keys before figment merges
//! them, so that two spellings of a key cannot slip past each other in two layers.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use figment::Figment;
use figment::providers::{Format, Serialized, Toml};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::config::accepted::Notice;
use crate::config::error::ConfigError;
use crate::config::known::{self, Known};
use crate::config::value;

/// Where a value came from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Source {
    /// deploy/default.toml.
    Default,
    /// A configuration file.
    File(PathBuf),
    /// An environment variable, by name.
    Environment(String),
    /// `key=value`.
    CommandLine,
}

impl std::fmt::Display for Source {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Default => write!(f, "default"),
            Self::File(path) => write!(f, "in {}", path.display()),
            Self::Environment(name) => write!(f, "environment variable {name}"),
            Self::CommandLine => write!(f, "on the command line"),
        }
    }
}

/// One value given for one key.
#[derive(Debug, Clone)]
pub(crate) struct Setting {
    /// The key as given.
    pub(crate) spelled: String,
    pub(crate) value: Value,
    /// The value's text before it was parsed: `007` is a fine name, though it parses as a number.
    pub(crate) raw: Option<String>,
    pub(crate) source: Source,
}

impl Setting {
    /// `key=value`, as given.
    fn text(&self) -> String {
        format!("{}={}", self.spelled, value::render(&self.value))
    }
}

/// The settings of one source by canonical key, and what was wrong or idle in it.
#[derive(Debug, Default)]
pub(crate) struct Layer {
    pub(crate) settings: BTreeMap<String, Setting>,
    /// Canonical keys that `~key` sets back to their defaults in the layers below.
    pub(crate) removed: Vec<String>,
    pub(crate) notices: Vec<Notice>,
    pub(crate) errors: Vec<ConfigError>,
}

impl Layer {
    /// Reads a TOML or JSON file, by its extension.
    pub(crate) fn from_file(path: &Path) -> Self {
        let mut layer = Self::default();
        let read =
            std::fs::read_to_string(path).map_err(|error| error.to_string()).and_then(|text| {
                match path.extension().and_then(|e| e.to_str()) {
                    Some("toml") => toml::from_str::<Value>(&text).map_err(|error| error.to_string()),
                    Some("json") => serde_json::from_str(&text).map_err(|error| error.to_string()),
                    _ => Err("expected a name that ends in .toml or .json".to_owned()),
                }
            });
        match read {
            Ok(Value::Object(fields)) => {
                for (key, value) in fields {
                    layer.add(Setting {
                        spelled: key,
                        value,
                        raw: None,
                        source: Source::File(path.to_owned()),
                    });
                }
            }
            Ok(_) => layer.errors.push(ConfigError::File {
                path: path.to_owned(),
                problem: "expected a map of sections".to_owned(),
            }),
            Err(problem) => layer.errors.push(ConfigError::File { path: path.to_owned(), problem }),
        }
        layer
    }

    /// Adds a setting. A map given for a group of keys is taken apart.
    pub(crate) fn add(&mut self, setting: Setting) {
        let known = known::lookup(&setting.spelled);
        match (known, setting.value) {
            (Some(Known::Setting(key)), value) => self.set(key, Setting { value, ..setting }),
            (Some(Known::Accepted(rule)), value) => match rule.judge(&value) {
                Ok(()) => self.notices.push(Notice::of(&Setting { value, ..setting }, rule.why)),
                Err(problem) => self.errors.push(ConfigError::Value {
                    key: setting.spelled,
                    value: value::render(&value),
                    source_of: setting.source,
                    problem,
                }),
            },
            (None, Value::Object(fields)) if known::is_group(&setting.spelled) => {
                for (name, value) in fields {
                    let spelled = format!("{}.{name}", setting.spelled);
                    self.add(Setting { spelled, value, raw: None, source: setting.source.clone() });
                }
            }
            (None, value) if known::is_group(&setting.spelled) => self.errors.push(ConfigError::Value {
                key: setting.spelled,
                value: value::render(&value),
                source_of: setting.source,
                problem: "this is a group of keys: set one of them, or give a map".to_owned(),
            }),
            (None, _) => self.errors.push(ConfigError::UnknownKey {
                nearest: known::nearest(&setting.spelled),
                key: setting.spelled,
                source_of: setting.source,
            }),
        }
    }

    /// The last of two values in one spelling wins; two spellings must agree.
    fn set(&mut self, canonical: String, setting: Setting) {
        match self.settings.get(&canonical) {
            Some(first) if first.spelled != setting.spelled && first.value != setting.value => {
                self.errors.push(ConfigError::TwoSpellings {
                    first: first.text(),
                    second: setting.text(),
                    source_of: setting.source,
                    canonical,
                });
            }
            _ => {
                self.settings.insert(canonical, setting);
            }
        }
    }

    /// The layer as a tree, for figment.
    fn tree(&self) -> Value {
        let mut root = Map::new();
        for (key, setting) in &self.settings {
            insert(&mut root, key, setting.value.clone());
        }
        Value::Object(root)
    }
}

/// Puts `value` at the dotted `key`. Canonical keys are leaves of one tree, so none lies below another.
fn insert(group: &mut Map<String, Value>, key: &str, value: Value) {
    match key.split_once('.') {
        None => {
            group.insert(key.to_owned(), value);
        }
        Some((first, rest)) => {
            let below = group.entry(first).or_insert_with(|| Value::Object(Map::new()));
            if let Value::Object(below) = below {
                insert(below, rest, value);
            }
        }
    }
}

/// Applies `~key`: removes it from every layer below.
pub(crate) fn apply_removals(layers: &mut [Layer]) {
    for upper in (1..layers.len()).rev() {
        let (below, above) = layers.split_at_mut(upper);
        for key in above.iter().take(1).flat_map(|layer| &layer.removed) {
            for layer in below.iter_mut() {
                layer.settings.remove(key);
            }
        }
    }
}

/// Defaults with every layer merged over them, lowest first.
pub(crate) fn merge(layers: &[Layer]) -> Figment {
    layers.iter().fold(Figment::from(Toml::string(known::DEFAULTS)), |figment, layer| {
        figment.merge(Serialized::defaults(layer.tree()))
    })
}

/// The setting that wins for every key that is set.
pub(crate) fn winning(layers: &[Layer]) -> BTreeMap<String, Setting> {
    let all = layers.iter().flat_map(|layer| layer.settings.iter());
    all.map(|(key, setting)| (key.clone(), setting.clone())).collect()
}
