//! The console sink: one line a step in the head's own log, and the newest figures as gauges for `/metrics`.
//!
//! `step_line` is also what `coordinator train` prints: one wording for a step, wherever it is read.

use std::collections::BTreeMap;
use std::fmt::Write;

use agentfly_common::telemetry::names;

use super::{LineKind, Sink};
use crate::store::metrics_file::{MetricsLine, REWARD_MEAN, validation_accuracy};

/// Logs each line.
#[derive(Debug, Default)]
pub struct Console;

impl Sink for Console {
    fn name(&self) -> &'static str {
        "console"
    }

    fn write(&mut self, kind: LineKind, line: &MetricsLine) -> anyhow::Result<()> {
        match kind {
            LineKind::Step => tracing::info!("step {}: {}", line.step, step_line(&line.metrics)),
            LineKind::Validation => {
                tracing::info!("validation after step {}: {}", line.step, validation_line(&line.metrics));
            }
        }
        Ok(())
    }
}

/// Feeds `/metrics` with the newest step.
#[derive(Debug, Default)]
pub struct Gauges;

impl Sink for Gauges {
    fn name(&self) -> &'static str {
        "gauges"
    }

    fn write(&mut self, _: LineKind, line: &MetricsLine) -> anyhow::Result<()> {
        #[expect(clippy::cast_precision_loss, reason = "a gauge is a float")]
        metrics::gauge!(names::STEP).set(line.step as f64);
        if let Some(reward) = line.metrics.get(REWARD_MEAN) {
            metrics::gauge!(names::REWARD).set(*reward);
        }
        if let Some(accuracy) = validation_accuracy(&line.metrics) {
            metrics::gauge!(names::VALIDATION).set(accuracy);
        }
        if let Some(seconds) = line.metrics.get("timing_s/step") {
            metrics::histogram!(names::STEP_SECONDS).record(*seconds);
        }
        Ok(())
    }
}

/// Figures of a step line: label, verl's names (the first that is there counts), digits after the point.
const FIGURES: &[(&str, &[&str], usize)] = &[
    ("reward", &["critic/score/mean", "critic/rewards/mean"], 3),
    ("acc", &["reward_extra/acc/mean"], 3),
    ("tool calls", &["tool_call_counts/mean", "agent/rollout/avg_tool_calls"], 2),
    ("KL", &["actor/kl_loss"], 5),
    ("entropy", &["actor/entropy", "actor/entropy_loss"], 3),
    ("grad", &["actor/grad_norm"], 3),
    ("length", &["response_length/mean"], 1),
    ("tokens/s", &["perf/throughput"], 0),
];

/// Phases of a step with their seconds, in the order they run.
const PHASES: &[(&str, &str)] =
    &[("gen", "timing_s/gen"), ("update", "timing_s/update_actor"), ("step", "timing_s/step")];

/// A step in one line: reward, accuracy, tool calls, KL, entropy, lengths, speed, seconds by phase. Figures that
/// the step does not have are left out.
#[must_use]
pub fn step_line(metrics: &BTreeMap<String, f64>) -> String {
    let mut line = String::new();
    for (label, names, digits) in FIGURES {
        if let Some(value) = names.iter().find_map(|name| metrics.get(*name)) {
            let gap = if line.is_empty() { "" } else { "  " };
            // Writing into a String cannot fail.
            let _ = write!(line, "{gap}{label} {value:.digits$}");
        }
    }
    for (label, name) in PHASES {
        if let Some(seconds) = metrics.get(*name) {
            let _ = write!(line, "  {label} {seconds:.1}s");
        }
    }
    line
}

/// A validation in one line.
#[must_use]
pub fn validation_line(metrics: &BTreeMap<String, f64>) -> String {
    match validation_accuracy(metrics) {
        Some(accuracy) => format!("accuracy {accuracy:.3} (greedy, mean@1)"),
        None => format!("{} figures, none of them an accuracy", metrics.len()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_step_says_what_it_has_in_one_line() {
        let metrics: BTreeMap<String, f64> = [
            ("critic/score/mean", 0.4567),
            ("actor/kl_loss", 0.000_12),
            ("response_length/mean", 33.26),
            ("perf/throughput", 812.4),
            ("timing_s/gen", 3.21),
            ("timing_s/step", 4.0),
        ]
        .map(|(name, value)| (name.to_owned(), value))
        .into();
        let expected = "reward 0.457  KL 0.00012  length 33.3  tokens/s 812  gen 3.2s  step 4.0s";
        assert_eq!(step_line(&metrics), expected);
    }
}
