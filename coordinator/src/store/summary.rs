//! `summary.json`: what a run came to, for people and scripts. Written once, when the job is over.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::metrics_file::MetricsLine;

/// Steps whose mean reward is given as first and last.
const STEPS_AVERAGED: usize = 10;

/// The file's fields; names are stable.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Summary {
    /// The job's name.
    pub job_id: String,
    /// `finished`, `failed` or `cancelled`.
    pub state: String,
    /// In words.
    pub detail: String,
    /// The job's seed.
    pub seed: u64,
    /// Training steps behind the weights, those before a resume included.
    pub steps: u64,
    /// Seconds from leaving the queue to the end, of this start of the run.
    pub seconds: f64,
    /// Validation accuracy of the model as loaded; null without validation.
    pub val_before: Option<f64>,
    /// Newest validation accuracy.
    pub val_after: Option<f64>,
    /// Mean reward of the first ten steps.
    pub reward_first_ten_steps: Option<f64>,
    /// Mean reward of the last ten steps.
    pub reward_last_ten_steps: Option<f64>,
    /// The newest committed checkpoint.
    pub checkpoint_path: Option<PathBuf>,
    /// Weights at the end.
    pub policy_version: u64,
    /// `trainer.project_name`.
    pub project: String,
    /// `trainer.experiment_name`.
    pub experiment: String,
    /// The run's folder.
    pub run_dir: PathBuf,
    /// The step this start of the run resumed after.
    pub resumed_after_step: Option<u64>,
    /// Crate version.
    pub version: String,
}

/// What the metrics file says about the whole run.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Course {
    /// The validation before the first step.
    pub val_before: Option<f64>,
    /// The last validation after a step.
    pub val_after: Option<f64>,
    /// Mean reward of the first ten steps.
    pub reward_first: Option<f64>,
    /// Mean reward of the last ten steps.
    pub reward_last: Option<f64>,
}

impl Course {
    /// Of these lines, in order of steps.
    #[must_use]
    pub fn of(lines: &[MetricsLine]) -> Self {
        let rewards: Vec<f64> = lines.iter().filter_map(MetricsLine::reward).collect();
        let validations = || lines.iter().filter_map(|line| Some((line.step, line.validation()?)));
        let n = rewards.len().min(STEPS_AVERAGED);
        Self {
            val_before: validations().find(|(step, _)| *step == 0).map(|(_, accuracy)| accuracy),
            val_after: validations().rfind(|(step, _)| *step > 0).map(|(_, accuracy)| accuracy),
            reward_first: mean(&rewards[..n]),
            reward_last: mean(&rewards[rewards.len() - n..]),
        }
    }
}

fn mean(values: &[f64]) -> Option<f64> {
    #[expect(clippy::cast_precision_loss, reason = "at most ten values")]
    (!values.is_empty()).then(|| values.iter().sum::<f64>() / values.len() as f64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_course_of_a_run_is_its_first_and_last_figures() {
        let line = |step: u64, name: &str, value: f64| MetricsLine {
            step,
            time: 0.0,
            metrics: [(name.to_owned(), value)].into(),
        };
        let mut lines = vec![line(0, "val-core/data/acc/mean@1", 0.25)];
        lines.extend((1..=15u32).map(|step| line(u64::from(step), "critic/score/mean", f64::from(step))));
        lines.push(line(15, "val-core/data/acc/mean@1", 0.75));
        let course = Course::of(&lines);
        assert_eq!((course.val_before, course.val_after), (Some(0.25), Some(0.75)));
        assert_eq!((course.reward_first, course.reward_last), (Some(5.5), Some(10.5)));
        let nothing = Course::of(&[]);
        assert_eq!((nothing.val_before, nothing.reward_first), (None, None));
        let stopped_early = Course::of(&lines[..3]);
        assert_eq!((stopped_early.val_before, stopped_early.val_after), (Some(0.25), None));
    }
}
