//! Where a run's figures go, a sink each. Sinks never stop training.
//!
//! The recorder, a thread behind a bounded channel, hands over each line; a sink that fails is logged once and counted, and the line is tried on
//! the others. `metrics.jsonl` is always written: it is the truth that summary and curve are made from.

pub mod console;
pub mod jsonl;

use agentfly_common::telemetry::names;

use crate::store::metrics_file::MetricsLine;

/// What a line is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LineKind {
    /// A training step.
    Step,
    /// A validation.
    Validation,
}

/// One place that figures go to.
pub trait Sink: Send {
    /// For messages.
    fn name(&self) -> &'static str;

    /// Takes one line.
    ///
    /// # Errors
    /// Whatever kept it from being written.
    fn write(&mut self, kind: LineKind, line: &MetricsLine) -> anyhow::Result<()>;
}

/// All sinks of one run.
pub struct Sinks {
    sinks: Vec<(Box<dyn Sink>, Health)>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Health {
    Well,
    Failing,
}

impl Sinks {
    /// These sinks, in order.
    #[must_use]
    pub fn new(sinks: Vec<Box<dyn Sink>>) -> Self {
        Self { sinks: sinks.into_iter().map(|sink| (sink, Health::Well)).collect() }
    }

    /// Hands a line to every sink. The first failure of each, and its recovery, are logged.
    pub fn write(&mut self, kind: LineKind, line: &MetricsLine) {
        for (sink, health) in &mut self.sinks {
            let (name, before) = (sink.name(), *health);
            match sink.write(kind, line) {
                Ok(()) if before == Health::Failing => tracing::info!(sink = name, "the sink writes again"),
                Ok(()) => {}
                Err(error) => {
                    metrics::counter!(names::SINK_FAILURES).increment(1);
                    if before == Health::Well {
                        let error = format!("{error:#}");
                        tracing::error!(
                            sink = name,
                            error,
                            step = line.step,
                            "a sink fails; training goes on"
                        );
                    }
                    *health = Health::Failing;
                    continue;
                }
            }
            *health = Health::Well;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use super::*;

    struct Fragile {
        seen: Arc<Mutex<Vec<u64>>>,
        fails_at: u64,
    }

    impl Sink for Fragile {
        fn name(&self) -> &'static str {
            "fragile"
        }

        fn write(&mut self, _: LineKind, line: &MetricsLine) -> anyhow::Result<()> {
            anyhow::ensure!(line.step != self.fails_at, "disk full");
            self.seen.lock().unwrap().push(line.step);
            Ok(())
        }
    }

    #[test]
    fn a_failing_sink_loses_its_line_and_nobody_elses() {
        let seen: [Arc<Mutex<Vec<u64>>>; 2] = Default::default();
        let sink =
            |i: usize, fails_at| -> Box<dyn Sink> { Box::new(Fragile { seen: seen[i].clone(), fails_at }) };
        let mut sinks = Sinks::new(vec![sink(0, 2), sink(1, 99)]);
        for step in 1..=3 {
            sinks.write(LineKind::Step, &MetricsLine { step, time: 0.0, metrics: [].into() });
        }
        assert_eq!(*seen[0].lock().unwrap(), [1, 3]);
        assert_eq!(*seen[1].lock().unwrap(), [1, 2, 3]);
    }
}
