//! A step's trace as a viewer shows it: spans in lanes of processes.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::Context as _;
use serde_json::Value;

use crate::job::json;

/// One bar of the picture; times in microseconds since the trace's start.
#[derive(Debug, Clone, PartialEq)]
pub struct Shown {
    /// `coordinator`, `rank 0`, …
    pub process: String,
    /// `job`, `device`, `chain 2`, …
    pub lane: String,
    /// What was done.
    pub name: String,
    /// When it began.
    pub start: u64,
    /// When it ended.
    pub end: u64,
}

/// All spans of a file.
#[derive(Debug)]
pub struct Trace {
    /// In the order of the file.
    pub spans: Vec<Shown>,
}

impl Trace {
    /// Reads a Chrome trace of complete (`X`) events and names (`M`).
    ///
    /// # Errors
    /// When the file cannot be read or an event lacks what its kind needs.
    pub fn read(path: &Path) -> anyhow::Result<Self> {
        let trace = json(path)?;
        let events = trace["traceEvents"].as_array().context("no traceEvents")?;
        let number = |event: &Value, field: &str| {
            event[field].as_u64().with_context(|| format!("no number {field} in {event}"))
        };
        let mut names: BTreeMap<(u64, Option<u64>), String> = BTreeMap::new();
        for event in events.iter().filter(|event| event["ph"] == "M") {
            let (pid, tid) = (number(event, "pid")?, number(event, "tid")?);
            let name = event["args"]["name"].as_str().unwrap_or_default().to_owned();
            match event["name"].as_str() {
                Some("process_name") => drop(names.insert((pid, None), name)),
                Some("thread_name") => drop(names.insert((pid, Some(tid)), name)),
                _ => {}
            }
        }
        let mut spans = Vec::new();
        for event in events.iter().filter(|event| event["ph"] == "X") {
            let (pid, tid) = (number(event, "pid")?, number(event, "tid")?);
            let named = |key| names.get(&key).cloned().with_context(|| format!("{key:?} has no name"));
            let start = number(event, "ts")?;
            spans.push(Shown {
                process: named((pid, None))?,
                lane: named((pid, Some(tid)))?,
                name: event["name"].as_str().context("no name")?.to_owned(),
                start,
                end: start + number(event, "dur")?,
            });
        }
        Ok(Self { spans })
    }

    /// The first span of that name.
    #[must_use]
    pub fn find(&self, process: &str, name: &str) -> Option<&Shown> {
        self.spans.iter().find(|span| span.process == process && span.name == name)
    }

    /// Two spans of one lane of which neither holds the other and that are open at the same time.
    #[must_use]
    pub fn overlap(&self) -> Option<(Shown, Shown)> {
        let mut sorted: Vec<&Shown> = self.spans.iter().collect();
        sorted.sort_by_key(|&span| (&span.process, &span.lane, span.start, u64::MAX - span.end));
        let mut open: Vec<&Shown> = Vec::new();
        for span in sorted {
            open.retain(|outer| {
                (&outer.process, &outer.lane) == (&span.process, &span.lane) && outer.end > span.start
            });
            if let Some(outer) = open.last().filter(|outer| outer.end < span.end) {
                return Some(((*outer).clone(), span.clone()));
            }
            open.push(span);
        }
        None
    }

    /// The part of `whole` in which a span of those that `counts` is open.
    #[must_use]
    pub fn covered(&self, whole: &Shown, counts: impl Fn(&Shown) -> bool) -> f64 {
        let mut sorted: Vec<&Shown> = self.spans.iter().filter(|span| counts(span)).collect();
        sorted.sort_by_key(|span| span.start);
        let (mut covered, mut until) = (0, whole.start);
        for span in sorted {
            let (start, end) = (span.start.max(until), span.end.min(whole.end));
            if start < end {
                covered += end - start;
                until = end;
            }
        }
        covered as f64 / (whole.end - whole.start).max(1) as f64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shown(lane: &str, start: u64, end: u64) -> Shown {
        let text = |text: &str| text.to_owned();
        Shown { process: text("p"), lane: text(lane), name: format!("{start}"), start, end }
    }

    #[test]
    fn overlaps_are_found_and_nesting_is_none() {
        let nested =
            [shown("a", 0, 10), shown("a", 0, 4), shown("a", 4, 10), shown("b", 3, 12), shown("a", 10, 11)];
        assert_eq!(Trace { spans: nested.to_vec() }.overlap(), None);
        let crossed = [shown("a", 0, 10), shown("a", 5, 11)];
        assert_eq!(
            Trace { spans: crossed.to_vec() }.overlap(),
            Some((crossed[0].clone(), crossed[1].clone()))
        );
    }

    #[test]
    fn time_is_covered_once() {
        let trace = Trace { spans: vec![shown("a", 0, 30), shown("b", 20, 50), shown("a", 90, 200)] };
        assert!((trace.covered(&shown("x", 0, 100), |_| true) - 0.6).abs() < 1e-9);
        assert!((trace.covered(&shown("x", 0, 100), |span| span.lane == "b") - 0.3).abs() < 1e-9);
    }
}
