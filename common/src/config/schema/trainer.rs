//! `trainer.*`: ranks, steps, files, deadlines. Read by the coordinator.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::config::checks::Checks;
use crate::config::choices::{Logger, ResumeMode};

/// `trainer.*`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Trainer {
    /// Ranks a node, GPU or CPU.
    pub n_gpus_per_node: u32,
    /// Nodes.
    pub nnodes: u32,
    /// Steps at most; `None` follows `total_epochs`.
    pub total_training_steps: Option<u64>,
    /// Passes over the questions at most; they end a job of more steps too (verl).
    pub total_epochs: u64,
    /// First part of the run folder's name.
    pub project_name: String,
    /// Second part.
    pub experiment_name: String,
    /// Where metrics go.
    #[serde(deserialize_with = "loggers")]
    pub logger: Vec<Logger>,
    /// Steps between checkpoints; −1 is only the last.
    pub save_freq: i64,
    /// Steps between validations; −1 is only first and last.
    pub test_freq: i64,
    /// Validate before training.
    pub val_before_train: bool,
    /// And stop there.
    pub val_only: bool,
    /// Where to continue.
    pub resume_mode: ResumeMode,
    /// For `resume_mode=resume_path`.
    pub resume_from_path: Option<PathBuf>,
    /// Checkpoints' folder; see `checkpoint_dir`.
    pub default_local_dir: Option<PathBuf>,
    /// Newest checkpoints to keep; `None` is all.
    pub max_actor_ckpt_to_keep: Option<u32>,
    /// Steps between traces; −1 writes none.
    pub trace_freq: i64,
    /// Newest traces of steps to keep; `None` is all.
    pub max_traces_to_keep: Option<u32>,
    /// The job's seed.
    pub seed: u64,
    /// The run's folder; see `run_dir`.
    pub run_dir: Option<PathBuf>,
    /// A chain's own time, without its wait for the engine.
    pub chain_timeout_seconds: u64,
    /// Deadline of a step's chains, waits and repeats included.
    pub rollout_timeout_seconds: u64,
    /// Deadline of the ranks' start, and of a queued job's wait for nodes that could hold it.
    pub startup_timeout_seconds: u64,
    /// Deadline of a step's training on all ranks, after its rollout.
    pub train_timeout_seconds: u64,
    /// Deadline of writing a checkpoint, and again of committing it.
    pub checkpoint_timeout_seconds: u64,
}

impl Trainer {
    pub(crate) fn check(&self, checks: &mut Checks) {
        checks.at_least_one("trainer.n_gpus_per_node", self.n_gpus_per_node);
        checks.at_least_one("trainer.nnodes", self.nnodes);
        let countable = self.n_gpus_per_node.checked_mul(self.nnodes).is_some_and(|ranks| ranks <= 1 << 16);
        let (key, problem) = match self.nnodes {
            1 => ("trainer.n_gpus_per_node", "more than 65536 ranks"),
            _ => ("trainer.nnodes", "more than 65536 ranks, with trainer.n_gpus_per_node on each"),
        };
        checks.that(key, countable, problem);
        checks.that(
            "trainer.total_training_steps",
            self.total_training_steps != Some(0),
            "expected at least 1",
        );
        checks.at_least_one("trainer.total_epochs", self.total_epochs);
        let freqs = [
            ("trainer.save_freq", self.save_freq),
            ("trainer.test_freq", self.test_freq),
            ("trainer.trace_freq", self.trace_freq),
        ];
        for (key, freq) in freqs {
            checks.that(key, freq >= -1, "expected a number of steps, or -1");
        }
        for (key, name) in
            [("trainer.project_name", &self.project_name), ("trainer.experiment_name", &self.experiment_name)]
        {
            let plain = !name.is_empty() && !name.contains(['/', '\\', '\0']) && name != "." && name != "..";
            checks.that(key, plain, "expected a folder's name, without slashes");
        }
        checks.that(
            "trainer.max_actor_ckpt_to_keep",
            self.max_actor_ckpt_to_keep != Some(0),
            "expected at least 1",
        );
        checks.that("trainer.max_traces_to_keep", self.max_traces_to_keep != Some(0), "expected at least 1");
        checks.at_least_one("trainer.chain_timeout_seconds", self.chain_timeout_seconds);
        checks.at_least_one("trainer.rollout_timeout_seconds", self.rollout_timeout_seconds);
        checks.at_least_one("trainer.startup_timeout_seconds", self.startup_timeout_seconds);
        checks.at_least_one("trainer.train_timeout_seconds", self.train_timeout_seconds);
        checks.at_least_one("trainer.checkpoint_timeout_seconds", self.checkpoint_timeout_seconds);
        if self.val_only && !self.val_before_train {
            checks.impossible(
                "trainer.val_only=True with trainer.val_before_train=False does nothing".to_owned(),
                "set trainer.val_before_train=True",
            );
        }
        self.check_resume(checks);
    }

    fn check_resume(&self, checks: &mut Checks) {
        match (self.resume_mode, &self.resume_from_path) {
            (ResumeMode::ResumePath, None) => checks.impossible(
                "trainer.resume_mode=resume_path names no checkpoint".to_owned(),
                "give trainer.resume_from_path=…/global_step_N",
            ),
            (ResumeMode::ResumePath, Some(path)) => checks.that(
                "trainer.resume_from_path",
                path.to_string_lossy().contains("global_step_"),
                "expected a checkpoint folder, …/global_step_N",
            ),
            (mode, Some(path)) => checks.impossible(
                format!(
                    "trainer.resume_from_path={} is not read with trainer.resume_mode={mode}",
                    path.display()
                ),
                "set trainer.resume_mode=resume_path, or leave the path out",
            ),
            (_, None) => {}
        }
    }

    /// The run's folder.
    #[must_use]
    pub fn run_dir(&self) -> PathBuf {
        let named = || PathBuf::from("runs").join(&self.project_name).join(&self.experiment_name);
        self.run_dir.clone().unwrap_or_else(named)
    }

    /// Where checkpoints go.
    #[must_use]
    pub fn checkpoint_dir(&self) -> PathBuf {
        self.default_local_dir.clone().unwrap_or_else(|| self.run_dir().join("checkpoints"))
    }
}

/// Logger names; those of services that get nothing from us are left out here and listed as notices.
fn loggers<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<Vec<Logger>, D::Error> {
    let mut loggers = Vec::new();
    for name in super::names(deserializer)? {
        let elsewhere = Logger::UNSUPPORTED.iter().any(|(other, _)| name.eq_ignore_ascii_case(other));
        if !elsewhere {
            loggers.push(name.parse().map_err(serde::de::Error::custom)?);
        }
    }
    Ok(loggers)
}
