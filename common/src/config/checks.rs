//! The collector that range checks report to: it knows where each value came from, the schema does not.

use std::collections::BTreeMap;

use serde_json::Value;

use crate::config::error::ConfigError;
use crate::config::layers::{Setting, Source};
use crate::config::value;

/// Collects what the schema's `check` functions find.
pub(crate) struct Checks<'a> {
    /// The winning setting of every key that was set.
    settings: &'a BTreeMap<String, Setting>,
    errors: Vec<ConfigError>,
}

impl<'a> Checks<'a> {
    pub(crate) fn new(settings: &'a BTreeMap<String, Setting>) -> Self {
        Self { settings, errors: Vec::new() }
    }

    pub(crate) fn into_errors(self) -> Vec<ConfigError> {
        self.errors
    }

    /// Reports `problem` with the value of `key` unless `holds`.
    pub(crate) fn that(&mut self, key: &str, holds: bool, problem: impl Into<String>) {
        if holds {
            return;
        }
        let (key, value, source_of) = match self.settings.get(key) {
            Some(set) => (set.spelled.clone(), value::render(&set.value), set.source.clone()),
            None => (key.to_owned(), value::render(&Value::Null), Source::Default),
        };
        self.errors.push(ConfigError::Value { key, value, source_of, problem: problem.into() });
    }

    pub(crate) fn at_least_one(&mut self, key: &str, number: impl Into<u64>) {
        self.that(key, number.into() >= 1, "expected at least 1");
    }

    pub(crate) fn finite(&mut self, key: &str, number: f64) {
        self.that(key, number.is_finite(), "expected a finite number");
    }

    pub(crate) fn at_least(&mut self, key: &str, number: f64, least: f64) {
        self.that(key, number.is_finite() && number >= least, format!("expected at least {least}"));
    }

    pub(crate) fn above(&mut self, key: &str, number: f64, bound: f64) {
        self.that(key, number.is_finite() && number > bound, format!("expected more than {bound}"));
    }

    pub(crate) fn within(&mut self, key: &str, number: f64, least: f64, most: f64) {
        self.that(key, (least..=most).contains(&number), format!("expected {least} to {most}"));
    }

    /// A probability mass to keep: in (0, 1].
    pub(crate) fn mass(&mut self, key: &str, number: f64) {
        self.that(key, number > 0.0 && number <= 1.0, "expected more than 0 and at most 1");
    }

    /// vLLM's top-k: −1 for all, else 1 or more.
    pub(crate) fn top_k(&mut self, key: &str, k: i64) {
        let fits = k == -1 || (k >= 1 && u32::try_from(k).is_ok());
        self.that(key, fits, "expected -1 (all tokens) or a number ≥ 1");
    }

    /// Reports settings that exclude each other.
    pub(crate) fn impossible(&mut self, problem: String, way_out: &str) {
        self.errors.push(ConfigError::Impossible { problem, way_out: way_out.to_owned() });
    }
}
