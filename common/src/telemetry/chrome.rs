//! Spans in the trace-event format, which <https://ui.perfetto.dev> and `chrome://tracing` open.
//!
//! The coordinator writes a job's steps so, the benchmark its GRPO steps. What must stay true: spans of one lane (`tid`)
//! of one process (`pid`) nest or follow one another, as [`Spans`](super::spans::Spans) gathered them.

use std::collections::BTreeMap;

use serde_json::{Map, Value, json};

use super::spans::{FieldValue, Span};

/// The lane of a step and its phases.
pub const JOB: &str = "job";
/// The lane of what the recorder does.
pub const RECORDER: &str = "recorder";
/// The lane of what the scheduler does.
pub const SCHEDULER: &str = "scheduler";

/// The events of one process: its name, its lanes' names, and its spans, in microseconds since `began_micros`.
#[must_use]
pub fn process_events(pid: u64, name: &str, spans: &[Span], began_micros: u64) -> Vec<Value> {
    let mut events = vec![
        meta("process_name", pid, 0, json!({ "name": name })),
        meta("process_sort_index", pid, 0, json!({ "sort_index": pid })),
    ];
    let lanes = lanes(spans);
    for (lane, tid) in &lanes {
        events.push(meta("thread_name", pid, *tid, json!({ "name": lane })));
        events.push(meta("thread_sort_index", pid, *tid, json!({ "sort_index": tid })));
    }
    for span in spans {
        let tid = lanes.get(span.lane.as_str()).copied().unwrap_or(0);
        let args: Map<String, Value> = span.fields.iter().map(|(k, v)| (k.clone(), value(v))).collect();
        let ts = span.start_micros.saturating_sub(began_micros);
        events.push(json!({
            "name": span.name, "ph": "X", "ts": ts, "dur": span.micros, "pid": pid, "tid": tid, "args": args,
        }));
    }
    events
}

fn meta(name: &str, pid: u64, tid: u64, args: Value) -> Value {
    json!({ "name": name, "ph": "M", "pid": pid, "tid": tid, "args": args })
}

fn value(field: &FieldValue) -> Value {
    match field {
        FieldValue::Number(number) => json!(number),
        FieldValue::Text(text) => json!(text),
    }
}

/// Numbers for the lanes: those with the story of the whole first, then the others, `chain 2` before `chain 10`.
fn lanes(spans: &[Span]) -> BTreeMap<&str, u64> {
    let order = |lane: &str| {
        let (kind, number) = lane.rsplit_once(' ').unwrap_or((lane, ""));
        let first = [JOB, SCHEDULER, RECORDER, "rank", "device"].iter().position(|known| *known == kind);
        (first.unwrap_or(usize::MAX), kind.to_owned(), number.parse::<u64>().unwrap_or(0))
    };
    let mut names: Vec<&str> = spans.iter().map(|span| span.lane.as_str()).collect();
    names.sort_by_key(|name| order(name));
    names.dedup();
    names.into_iter().zip(1..).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn span(lane: &str, name: &str, start_micros: u64, micros: u64) -> Span {
        Span { name: name.to_owned(), lane: lane.to_owned(), start_micros, micros, fields: BTreeMap::new() }
    }

    #[test]
    fn lanes_are_in_the_order_that_people_read() {
        let spans: Vec<Span> =
            ["chain 10", "device", "chain 2", "chain", "rank"].map(|lane| span(lane, "x", 0, 1)).into();
        let mut lanes: Vec<(u64, &str)> = lanes(&spans).into_iter().map(|(lane, tid)| (tid, lane)).collect();
        lanes.sort_unstable();
        assert_eq!(lanes, [(1, "rank"), (2, "device"), (3, "chain"), (4, "chain 2"), (5, "chain 10")]);
    }

    #[test]
    fn a_process_names_itself_its_lanes_and_its_spans() {
        let mut spans = [span("device", "decode", 1_000_250, 40)];
        spans[0].fields.insert("tokens".to_owned(), FieldValue::Number(7.0));
        let events = process_events(3, "rank 2", &spans, 1_000_000);
        let names: Vec<&Value> = events.iter().map(|event| &event["name"]).collect();
        assert_eq!(
            names,
            ["process_name", "process_sort_index", "thread_name", "thread_sort_index", "decode"]
        );
        assert_eq!(
            (&events[0]["args"]["name"], &events[2]["args"]["name"]),
            (&json!("rank 2"), &json!("device"))
        );
        let shown = &events[4];
        assert_eq!(
            (&shown["ph"], &shown["ts"], &shown["dur"], &shown["pid"], &shown["tid"]),
            (&json!("X"), &json!(250), &json!(40), &json!(3), &events[2]["tid"])
        );
        assert_eq!(shown["args"], json!({ "tokens": 7.0 }));
    }
}
