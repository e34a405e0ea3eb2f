//! Where the time of a step went, as Chrome-trace JSON: `trace/step_000001.json` opens in <https://ui.perfetto.dev> and
//! in `chrome://tracing`.
//!
//! The recorder keeps one [`TraceBook`] a job. A file holds what the coordinator and every rank did from the start of
//! a step's rollout to that of the next one, validation and checkpoint included; `start.json` what came before the
//! first. Times are microseconds of the coordinator's wall clock since the file's first span; those of a rank whose
//! clock differs by more than a quarter of a second are shifted by the difference, seen when its message came.
//!
//! What must stay true: spans of one lane (`tid`) of one process (`pid`) nest or follow one another; the spans of the
//! phases fill the step's; there are never more files than were to be kept.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use agentfly_common::config::Trainer;
use agentfly_common::telemetry::chrome::{JOB, process_events};
pub use agentfly_common::telemetry::chrome::{RECORDER, SCHEDULER};
use agentfly_common::telemetry::spans::{Gathered, Span};
use serde_json::{Value, json};

use super::{StoreError, on, write_whole};

const PREFIX: &str = "step_";

/// Who did something.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Process {
    /// The head.
    Coordinator,
    /// A rank, 0-based.
    Rank(u32),
}

/// A part of a step that follows the one before it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TracePhase {
    /// `start`, `rollout`, `train`, `validation`, `checkpoint`.
    pub name: &'static str,
    /// The training step it belongs to; of validation and checkpoint the one before them.
    pub step: u64,
}

/// Gathers the spans of the present step and writes the file when it is over.
#[derive(Debug)]
pub struct TraceBook {
    dir: PathBuf,
    job: String,
    /// Steps between files; none if 0.
    every: u64,
    keep: Option<usize>,
    /// The step whose spans gather; none before the first rollout.
    step: Option<u64>,
    phases: Vec<Span>,
    gathered: BTreeMap<Process, Gathered>,
}

impl TraceBook {
    /// A book for the run folder `run`.
    #[must_use]
    pub fn new(run: &Path, job: String, trainer: &Trainer) -> Self {
        Self {
            dir: run.join("trace"),
            job,
            every: u64::try_from(trainer.trace_freq).unwrap_or(0),
            keep: trainer.max_traces_to_keep.map(|n| n as usize),
            step: None,
            phases: Vec::new(),
            gathered: BTreeMap::new(),
        }
    }

    /// A phase begins, and the one before it is over. The rollout of another step writes what has gathered.
    ///
    /// # Errors
    /// When the file cannot be written; its spans are lost.
    pub fn phase(&mut self, phase: &TracePhase, at_micros: u64) -> Result<(), StoreError> {
        self.close(at_micros);
        let begins = phase.name == "rollout" && self.step != Some(phase.step);
        let written = if begins { self.write() } else { Ok(()) };
        if begins {
            self.step = Some(phase.step);
        }
        self.phases.push(Span {
            name: phase.name.to_owned(),
            lane: JOB.to_owned(),
            start_micros: at_micros,
            micros: 0,
            fields: BTreeMap::new(),
        });
        written
    }

    /// Adds what a process did.
    pub fn add(&mut self, process: Process, more: Gathered) {
        let own = self.gathered.entry(process).or_default();
        own.spans.extend(more.spans);
        own.dropped += more.dropped;
    }

    /// The job is over: writes what has gathered.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn end(&mut self, at_micros: u64) -> Result<(), StoreError> {
        self.close(at_micros);
        self.write()
    }

    fn close(&mut self, at_micros: u64) {
        if let Some(open) = self.phases.last_mut() {
            open.micros = at_micros.saturating_sub(open.start_micros);
        }
    }

    /// Writes the file of what has gathered, if there is to be one, and forgets it.
    fn write(&mut self) -> Result<(), StoreError> {
        let (phases, mut gathered) = (std::mem::take(&mut self.phases), std::mem::take(&mut self.gathered));
        let wanted = self.every > 0 && self.step.is_none_or(|step| step.is_multiple_of(self.every));
        let (Some(first), Some(last)) = (phases.first(), phases.last()) else { return Ok(()) };
        if !wanted {
            return Ok(());
        }
        let name = self.step.map_or("start".to_owned(), |step| format!("step {step}"));
        let whole = Span {
            name,
            micros: (last.start_micros + last.micros).saturating_sub(first.start_micros),
            ..first.clone()
        };
        let own = gathered.entry(Process::Coordinator).or_default();
        own.spans.push(whole);
        own.spans.extend(phases);
        let file = match self.step {
            None => "start.json".to_owned(),
            Some(step) => format!("{PREFIX}{step:06}.json"),
        };
        std::fs::create_dir_all(&self.dir).map_err(on("make", &self.dir))?;
        let trace = chrome_trace(&self.job, self.step, &gathered);
        write_whole(&self.dir.join(file), trace.to_string().as_bytes())?;
        self.prune()
    }

    /// Removes the oldest files beyond those to keep.
    fn prune(&self) -> Result<(), StoreError> {
        let Some(keep) = self.keep else { return Ok(()) };
        let mut steps = Vec::new();
        for entry in std::fs::read_dir(&self.dir).map_err(on("list", &self.dir))? {
            let name = entry.map_err(on("list", &self.dir))?.file_name();
            let number = name.to_str().and_then(|name| name.strip_prefix(PREFIX)?.strip_suffix(".json"));
            steps.extend(
                number.and_then(|number| number.parse::<u64>().ok()).map(|step| (step, name.clone())),
            );
        }
        steps.sort();
        for (_, name) in &steps[..steps.len().saturating_sub(keep)] {
            let path = self.dir.join(name);
            std::fs::remove_file(&path).map_err(on("remove", &path))?;
        }
        Ok(())
    }
}

/// The trace-event format: <https://docs.google.com/document/d/1CvAClvFfyA5R-PhYUmn5OOQtYMH4h6I0nSsKchNAySU>.
fn chrome_trace(job: &str, step: Option<u64>, gathered: &BTreeMap<Process, Gathered>) -> Value {
    let began = gathered.values().flat_map(|of| &of.spans).map(|span| span.start_micros).min().unwrap_or(0);
    let mut events = Vec::new();
    for (process, of) in gathered {
        let (pid, name) = match process {
            Process::Coordinator => (1, "coordinator".to_owned()),
            Process::Rank(rank) => (u64::from(*rank) + 2, format!("rank {rank}")),
        };
        events.extend(process_events(pid, &name, &of.spans, began));
    }
    let dropped: u64 = gathered.values().map(|of| of.dropped).sum();
    json!({
        "traceEvents": events,
        "displayTimeUnit": "ms",
        "otherData": {
            "job": job, "step": step, "began_unix_micros": began, "dropped_spans": dropped,
            "clock": "the coordinator's wall clock", "version": crate::VERSION,
        },
    })
}

#[cfg(test)]
mod tests {
    use agentfly_common::telemetry::spans::FieldValue;

    use super::*;

    fn book(dir: &Path, settings: &[&str]) -> TraceBook {
        let settings: Vec<String> = settings.iter().map(|&setting| setting.to_owned()).collect();
        let config = agentfly_common::config::resolve(&settings, None, []).unwrap().config;
        TraceBook::new(dir, "job-1".to_owned(), &config.trainer)
    }

    fn span(lane: &str, name: &str, start_micros: u64, micros: u64) -> Span {
        let fields = [("tokens".to_owned(), FieldValue::Number(7.0))].into();
        Span { name: name.to_owned(), lane: lane.to_owned(), start_micros, micros, fields }
    }

    fn files(dir: &Path) -> Vec<String> {
        let entries = std::fs::read_dir(dir.join("trace")).map(|entries| entries.collect::<Vec<_>>());
        let name =
            |entry: std::io::Result<std::fs::DirEntry>| entry.unwrap().file_name().into_string().unwrap();
        let mut names: Vec<String> = entries.unwrap_or_default().into_iter().map(name).collect();
        names.sort();
        names
    }

    /// Two steps with all their phases, and a rank's spans in each.
    fn two_steps(book: &mut TraceBook) {
        let mut at = 1_000_000;
        let mut phase = |book: &mut TraceBook, name, step| {
            book.phase(&TracePhase { name, step }, at).unwrap();
            let spans = vec![span("rank", name, at + 10, 80), span("device", "x", at + 20, 10)];
            book.add(Process::Rank(0), Gathered { spans, dropped: 1 });
            at += 100;
        };
        for (name, step) in [
            ("start", 0),
            ("validation", 0),
            ("rollout", 1),
            ("train", 1),
            ("rollout", 2),
            ("train", 2),
            ("validation", 2),
            ("checkpoint", 2),
        ] {
            phase(book, name, step);
        }
        book.end(at).unwrap();
    }

    #[test]
    fn each_step_is_a_file_that_its_phases_fill() {
        let dir = tempfile::tempdir().unwrap();
        two_steps(&mut book(dir.path(), &[]));
        assert_eq!(files(dir.path()), ["start.json", "step_000001.json", "step_000002.json"]);
        let text = std::fs::read_to_string(dir.path().join("trace/step_000002.json")).unwrap();
        let trace: Value = serde_json::from_str(&text).unwrap();
        assert_eq!(
            (&trace["otherData"]["step"], &trace["otherData"]["dropped_spans"]),
            (&json!(2), &json!(4))
        );
        let events = trace["traceEvents"].as_array().unwrap();
        let of = |pid: u64, ph: &str| -> Vec<&Value> {
            events.iter().filter(|event| event["pid"] == json!(pid) && event["ph"] == json!(ph)).collect()
        };
        let shown: Vec<_> =
            of(1, "X").iter().map(|e| format!("{} {}+{}", e["name"], e["ts"], e["dur"])).collect();
        let expected =
            ["step 2 0+400", "rollout 0+100", "train 100+100", "validation 200+100", "checkpoint 300+100"];
        assert_eq!(
            shown,
            expected.map(|text| {
                let (name, times) = text.rsplit_once(' ').unwrap();
                format!("{:?} {times}", name)
            })
        );
        let named: Vec<_> =
            of(2, "M").iter().map(|e| e["args"]["name"].clone()).filter(|n| !n.is_null()).collect();
        assert_eq!(named, ["rank 0", "device", "rank"]);
        assert_eq!(of(2, "X").len(), 8);
        assert_eq!(of(2, "X")[0]["args"], json!({ "tokens": 7.0 }));
    }

    #[test]
    fn files_are_written_and_kept_as_the_settings_say() {
        for (settings, expected) in [
            (vec!["trainer.trace_freq=-1"], vec![]),
            (vec!["trainer.trace_freq=2"], vec!["start.json", "step_000002.json"]),
            (vec!["trainer.max_traces_to_keep=1"], vec!["start.json", "step_000002.json"]),
        ] {
            let dir = tempfile::tempdir().unwrap();
            two_steps(&mut book(dir.path(), &settings));
            assert_eq!(files(dir.path()), expected, "{settings:?}");
        }
    }
}
