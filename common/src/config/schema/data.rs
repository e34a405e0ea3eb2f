//! `data.*`: which questions, in which order. Read by the coordinator's `data` module.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::config::checks::Checks;

/// `data.*`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Data {
    /// Training questions, read in this order.
    #[serde(deserialize_with = "super::paths")]
    pub train_files: Vec<PathBuf>,
    /// Validation questions; may be empty.
    #[serde(deserialize_with = "super::paths")]
    pub val_files: Vec<PathBuf>,
    /// Prompts a step.
    pub train_batch_size: u32,
    /// Size of the random subset to train on; −1 is all.
    pub train_max_samples: i64,
    /// Questions to validate on; −1 is all.
    pub val_max_samples: i64,
    /// New order every epoch.
    pub shuffle: bool,
    /// Seed of the order; see `Config::data_seed`.
    pub seed: Option<u64>,
}

impl Data {
    pub(crate) fn check(&self, checks: &mut Checks) {
        let no_empty_path = |files: &[PathBuf]| files.iter().all(|path| !path.as_os_str().is_empty());
        checks.that("data.train_files", !self.train_files.is_empty(), "expected at least one file");
        checks.that("data.train_files", no_empty_path(&self.train_files), "a path is empty");
        checks.that("data.val_files", no_empty_path(&self.val_files), "a path is empty");
        checks.at_least_one("data.train_batch_size", self.train_batch_size);
        for (key, samples) in [
            ("data.train_max_samples", self.train_max_samples),
            ("data.val_max_samples", self.val_max_samples),
        ] {
            checks.that(key, samples == -1 || samples >= 1, "expected -1 (all) or a number ≥ 1");
        }
    }

    /// Size of the training subset, if there is one.
    #[must_use]
    pub fn train_limit(&self) -> Option<usize> {
        usize::try_from(self.train_max_samples).ok()
    }

    /// How many validation questions are taken, if not all.
    #[must_use]
    pub fn val_limit(&self) -> Option<usize> {
        usize::try_from(self.val_max_samples).ok()
    }
}
