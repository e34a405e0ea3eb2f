//! What can be wrong with settings: every error says the key, the value, where it came from and the way out.
//!
//! `resolve` collects all of them, so a command is corrected once and not key by key.

use std::path::PathBuf;

use crate::config::layers::Source;
use crate::error::Whose;

/// One thing that is wrong with the settings.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum ConfigError {
    /// Text that is not `key=value`, or whose value cannot be parsed.
    #[error("{text} ({source_of}): {problem}")]
    Syntax {
        /// The text as given.
        text: String,
        /// Where it was given.
        source_of: Source,
        /// What is wrong with it.
        problem: String,
    },
    /// A key that neither this project nor verl or AgentFly has.
    #[error("{key} ({source_of}): there is no such key{}", did_you_mean(nearest))]
    UnknownKey {
        /// The key as given.
        key: String,
        /// Where it was given.
        source_of: Source,
        /// The most similar keys, best first; may be empty.
        nearest: Vec<String>,
    },
    /// A value of the wrong type, out of range, or of a feature that is not supported.
    #[error("{key}={value} ({source_of}): {problem}")]
    Value {
        /// The key as given.
        key: String,
        /// The value as text.
        value: String,
        /// Where it was given.
        source_of: Source,
        /// What was expected, or what is not supported.
        problem: String,
    },
    /// One key in two spellings with two values.
    #[error("{first} and {second} ({source_of}) are two spellings of {canonical}: give one")]
    TwoSpellings {
        /// The key both mean.
        canonical: String,
        /// `key=value` in the first spelling.
        first: String,
        /// `key=value` in the second spelling.
        second: String,
        /// Where the second was given.
        source_of: Source,
    },
    /// A configuration file that cannot be read.
    #[error("configuration file {}: {problem}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// Why.
        problem: String,
    },
    /// Settings that are each allowed but cannot be had together.
    #[error("{problem}; {way_out}")]
    Impossible {
        /// What does not fit, with the numbers.
        problem: String,
        /// What to set instead.
        way_out: String,
    },
    /// A file or folder that a setting names and that is not there.
    #[error("{key}={}: {problem}", path.display())]
    Path {
        /// The key that names it.
        key: &'static str,
        /// The path.
        path: PathBuf,
        /// What is wrong, and what to do.
        problem: String,
    },
    /// The embedded defaults do not fit the schema: a bug here.
    #[error("the embedded defaults are broken ({0}): please report this")]
    Defaults(String),
}

fn did_you_mean(nearest: &[String]) -> String {
    match nearest {
        [] => "; `coordinator explain` lists every key".to_owned(),
        names => format!("; did you mean {}?", names.join(", or ")),
    }
}

/// All that is wrong, in the order found. Never empty.
#[derive(Debug, Clone, PartialEq)]
pub struct ConfigErrors(pub Vec<ConfigError>);

impl ConfigErrors {
    /// Who must act: the operator, unless the embedded defaults are broken.
    #[must_use]
    pub fn whose(&self) -> Whose {
        if self.0.iter().any(|e| matches!(e, ConfigError::Defaults(_))) { Whose::Us } else { Whose::Operator }
    }
}

impl std::fmt::Display for ConfigErrors {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.0.as_slice() {
            [one] => write!(f, "{one}"),
            many => {
                write!(f, "{} settings are wrong:", many.len())?;
                many.iter().try_for_each(|error| write!(f, "\n  - {error}"))
            }
        }
    }
}

impl std::error::Error for ConfigErrors {}
