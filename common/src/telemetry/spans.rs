//! Where the time went: `tracing` spans of one target, gathered with their times for a step's trace.
//!
//! Code that takes time opens a span with `target: TRACE`; spans open one another as the calls do, across `.await`
//! too. A span that no other opens says in its field `lane` where it belongs (`rank`, `device`, `chain`), and those
//! below it follow; of a lane there are as many as spans of it are open at once. A rank sends what has gathered with
//! each report; where nobody gathers, a span costs next to nothing. A field `title` replaces a span's name.
//!
//! What must stay true: the spans of one lane nest or follow one another, a parent ends last, and no more than
//! [`MOST`] wait: beyond that they are counted and forgotten. Spans with a field `steps` are rounds of one work: where
//! one follows another of its name at once, both become one whose numbers are summed.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use tracing::field::{Field, Visit};
use tracing::span::{Attributes, Id};
use tracing::{Metadata, Subscriber};
use tracing_subscriber::Layer;
use tracing_subscriber::layer::Context;
use tracing_subscriber::registry::LookupSpan;

/// The target of the spans that are gathered.
pub const TRACE: &str = "agentfly_trace";
/// Finished spans that may wait to be taken.
pub const MOST: usize = 8192;
/// Rounds this far apart are one piece of work.
const ROUND_GAP: Duration = Duration::from_millis(5);
/// Rounds become no longer piece than this, so that changes over time still show.
const LONGEST_PIECE: Duration = Duration::from_secs(1);

/// A finished span.
#[derive(Debug, Clone, PartialEq)]
pub struct Span {
    /// What was done.
    pub name: String,
    /// Where: spans of one lane nest or follow one another.
    pub lane: String,
    /// When it began, in microseconds since 1970 by this machine's clock.
    pub start_micros: u64,
    /// How long it took.
    pub micros: u64,
    /// Further numbers and words.
    pub fields: BTreeMap<String, FieldValue>,
}

/// A number or a word about a span.
#[derive(Debug, Clone, PartialEq)]
pub enum FieldValue {
    /// A count or a measure; those of rounds add up.
    Number(f64),
    /// A name.
    Text(String),
}

/// What has gathered, and how many spans were forgotten because too many waited.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Gathered {
    /// In the order in which they ended.
    pub spans: Vec<Span>,
    /// Forgotten.
    pub dropped: u64,
}

/// The place where spans gather; clones share it.
#[derive(Debug, Clone)]
pub struct Spans {
    began: Instant,
    began_micros: u64,
    state: Arc<Mutex<State>>,
}

#[derive(Debug, Default)]
struct State {
    gathered: Gathered,
    /// Nobody will take any more.
    unwanted: bool,
    /// By lane: its last span among those.
    last: BTreeMap<String, usize>,
    /// By kind of lane: which of its lanes a span is open in.
    taken: BTreeMap<String, Vec<bool>>,
}

/// What is kept of an open span.
struct Open {
    began: Instant,
    lane: String,
    /// Its lane, if it opened it: the kind and the number among its like.
    holds: Option<(String, usize)>,
    fields: BTreeMap<String, FieldValue>,
}

impl Default for Spans {
    fn default() -> Self {
        let began_micros = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_micros();
        let began_micros = u64::try_from(began_micros).unwrap_or(u64::MAX);
        Self { began: Instant::now(), began_micros, state: Arc::default() }
    }
}

impl Spans {
    /// Whether a span or event is one that is gathered.
    #[must_use]
    pub fn wants(metadata: &Metadata<'_>) -> bool {
        metadata.is_span() && metadata.target() == TRACE
    }

    /// What has gathered since the last call. Open spans come when they have ended.
    #[must_use]
    pub fn take(&self) -> Gathered {
        let mut state = self.lock();
        state.last.clear();
        std::mem::take(&mut state.gathered)
    }

    /// Gathers nothing any more.
    pub fn stop(&self) {
        let mut state = self.lock();
        (state.unwanted, state.gathered) = (true, Gathered::default());
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn ended(&self, name: &str, mut open: Open) {
        // Both ends are rounded alike, so that what nests does so in whole microseconds too.
        let at = |time: Instant| {
            u64::try_from(time.saturating_duration_since(self.began).as_micros()).unwrap_or(u64::MAX)
        };
        let name = match open.fields.remove("title") {
            Some(FieldValue::Text(title)) => title,
            _ => name.to_owned(),
        };
        let span = Span {
            name,
            start_micros: self.began_micros.saturating_add(at(open.began)),
            micros: at(Instant::now()).saturating_sub(at(open.began)),
            lane: open.lane,
            fields: open.fields,
        };
        self.lock().end(span, open.holds);
    }
}

impl State {
    /// The first lane of a kind in which no span is open.
    fn open_lane(&mut self, kind: &str) -> usize {
        let taken = self.taken.entry(kind.to_owned()).or_default();
        match taken.iter().position(|taken| !taken) {
            Some(free) => {
                taken[free] = true;
                free
            }
            None => {
                taken.push(true);
                taken.len() - 1
            }
        }
    }

    fn end(&mut self, span: Span, holds: Option<(String, usize)>) {
        if let Some((kind, number)) = holds
            && let Some(taken) = self.taken.get_mut(&kind).and_then(|lanes| lanes.get_mut(number))
        {
            *taken = false;
        }
        if self.unwanted {
            return;
        }
        let spans = &mut self.gathered.spans;
        let last = self.last.get(&span.lane).and_then(|&last| spans.get_mut(last));
        if let Some(last) = last.filter(|last| last.is_followed_by(&span)) {
            last.append(span);
        } else if spans.len() < MOST {
            self.last.insert(span.lane.clone(), spans.len());
            spans.push(span);
        } else {
            self.gathered.dropped += 1;
        }
    }
}

impl Span {
    fn end_micros(&self) -> u64 {
        self.start_micros.saturating_add(self.micros)
    }

    fn is_followed_by(&self, next: &Self) -> bool {
        let gap = next.start_micros.checked_sub(self.end_micros());
        let whole = next.end_micros().saturating_sub(self.start_micros);
        next.fields.contains_key("steps")
            && (&self.name, &self.lane) == (&next.name, &next.lane)
            && gap.is_some_and(|gap| u128::from(gap) <= ROUND_GAP.as_micros())
            && u128::from(whole) <= LONGEST_PIECE.as_micros()
    }

    fn append(&mut self, next: Self) {
        self.micros = next.end_micros().saturating_sub(self.start_micros);
        for (name, value) in next.fields {
            match (self.fields.get_mut(&name), value) {
                (Some(FieldValue::Number(sum)), FieldValue::Number(more)) => *sum += more,
                (_, value) => drop(self.fields.insert(name, value)),
            }
        }
    }
}

impl<S: Subscriber + for<'a> LookupSpan<'a>> Layer<S> for Spans {
    fn on_new_span(&self, attributes: &Attributes<'_>, id: &Id, context: Context<'_, S>) {
        let Some(span) = context.span(id) else { return };
        let mut visitor = FieldVisitor::default();
        attributes.record(&mut visitor);
        let of_parent =
            span.parent().and_then(|parent| parent.extensions().get::<Open>().map(|open| open.lane.clone()));
        let (lane, holds) = match of_parent {
            Some(lane) => (lane, None),
            None => {
                let kind = visitor.lane.unwrap_or_else(|| "other".to_owned());
                let number = self.lock().open_lane(&kind);
                let lane = if number == 0 { kind.clone() } else { format!("{kind} {}", number + 1) };
                (lane, Some((kind, number)))
            }
        };
        let open = Open { began: Instant::now(), lane, holds, fields: visitor.fields };
        span.extensions_mut().insert(open);
    }

    fn on_record(&self, id: &Id, values: &tracing::span::Record<'_>, context: Context<'_, S>) {
        let mut visitor = FieldVisitor::default();
        values.record(&mut visitor);
        if let Some(span) = context.span(id)
            && let Some(open) = span.extensions_mut().get_mut::<Open>()
        {
            open.fields.extend(visitor.fields);
        }
    }

    fn on_close(&self, id: Id, context: Context<'_, S>) {
        if let Some(span) = context.span(&id)
            && let Some(open) = span.extensions_mut().remove::<Open>()
        {
            self.ended(span.name(), open);
        }
    }
}

#[derive(Default)]
struct FieldVisitor {
    lane: Option<String>,
    fields: BTreeMap<String, FieldValue>,
}

impl FieldVisitor {
    fn number(&mut self, field: &Field, value: f64) {
        self.fields.insert(field.name().to_owned(), FieldValue::Number(value));
    }

    fn text(&mut self, field: &Field, value: String) {
        match field.name() {
            "lane" => self.lane = Some(value),
            name => drop(self.fields.insert(name.to_owned(), FieldValue::Text(value))),
        }
    }
}

#[allow(clippy::cast_precision_loss, reason = "what is shown to people needs no more than 53 bits")]
impl Visit for FieldVisitor {
    fn record_f64(&mut self, field: &Field, value: f64) {
        self.number(field, value);
    }

    fn record_i64(&mut self, field: &Field, value: i64) {
        self.number(field, value as f64);
    }

    fn record_u64(&mut self, field: &Field, value: u64) {
        self.number(field, value as f64);
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        self.text(field, value.to_owned());
    }

    fn record_debug(&mut self, field: &Field, value: &dyn std::fmt::Debug) {
        self.text(field, format!("{value:?}"));
    }
}

#[cfg(test)]
mod tests {
    use tracing::{Instrument as _, info_span, subscriber};
    use tracing_subscriber::layer::SubscriberExt as _;

    use super::*;

    fn gathering<T>(work: impl FnOnce() -> T) -> (Gathered, T) {
        let spans = Spans::default();
        let filter = tracing_subscriber::filter::filter_fn(Spans::wants);
        let subscriber = tracing_subscriber::registry().with(spans.clone().with_filter(filter));
        let done = subscriber::with_default(subscriber, work);
        (spans.take(), done)
    }

    fn names(gathered: &Gathered) -> Vec<(&str, &str)> {
        gathered.spans.iter().map(|span| (span.name.as_str(), span.lane.as_str())).collect()
    }

    #[test]
    fn spans_follow_their_parents_lane_and_lanes_are_used_again() {
        let (gathered, ()) = gathering(|| {
            let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
            runtime.block_on(async {
                let chain = |i: u32| {
                    async move {
                        async { tokio::task::yield_now().await }
                            .instrument(info_span!(target: TRACE, "generate", turn = i))
                            .await;
                    }
                    .instrument(info_span!(target: TRACE, "chain", lane = "chain", chain = i))
                };
                tokio::join!(biased; chain(0), chain(1));
                chain(2).await;
            });
            info_span!(target: "elsewhere", "not ours").in_scope(|| {
                tracing::info!(target: TRACE, "an event is no span");
            });
        });
        let expected = [
            ("generate", "chain"),
            ("chain", "chain"),
            ("generate", "chain 2"),
            ("chain", "chain 2"),
            ("generate", "chain"),
            ("chain", "chain"),
        ];
        assert_eq!(names(&gathered), expected);
        assert_eq!(gathered.spans[2].fields["turn"], FieldValue::Number(1.0));
        let inside = |child: &Span, parent: &Span| {
            child.start_micros >= parent.start_micros && child.end_micros() <= parent.end_micros()
        };
        for pair in gathered.spans.chunks(2) {
            assert!(inside(&pair[0], &pair[1]), "{pair:?}");
        }
        assert!(!gathered.spans[1].fields.contains_key("lane"));
    }

    #[test]
    fn rounds_of_one_work_become_one_span_with_their_sums() {
        let round = |name: &'static str, tokens: u32| match name {
            "decode" => {
                let span = info_span!(target: TRACE, "decode", lane = "device", steps = 1, tokens);
                span.in_scope(|| ());
            }
            _ => info_span!(target: TRACE, "prefill", lane = "device", steps = 1, tokens).in_scope(|| ()),
        };
        let (gathered, ()) = gathering(|| {
            for tokens in [8, 8, 7] {
                round("decode", tokens);
            }
            round("prefill", 100);
            round("decode", 5);
            // Without `steps` alike spans stay apart.
            (0..2).for_each(|_| info_span!(target: TRACE, "decode", lane = "device").in_scope(|| ()));
        });
        let summed: Vec<_> = gathered
            .spans
            .iter()
            .map(|span| {
                (span.name.as_str(), span.fields.get("steps").cloned(), span.fields.get("tokens").cloned())
            })
            .collect();
        let number = |x: f64| Some(FieldValue::Number(x));
        assert_eq!(summed[0], ("decode", number(3.0), number(23.0)));
        assert_eq!(summed[1], ("prefill", number(1.0), number(100.0)));
        assert_eq!(summed[2], ("decode", number(1.0), number(5.0)));
        assert_eq!(summed.len(), 5, "{summed:?}");
    }

    /// How many spans rounds of the device become that last so long each and begin so far after another.
    fn pieces(rounds: u64, micros: u64, every: u64) -> usize {
        let mut state = State::default();
        for round in 0..rounds {
            let fields = [("steps".to_owned(), FieldValue::Number(1.0))].into();
            let (name, lane) = ("decode".to_owned(), "device".to_owned());
            state.end(Span { name, lane, start_micros: round * every, micros, fields }, None);
        }
        let steps = |span: &Span| match span.fields["steps"] {
            FieldValue::Number(steps) => steps as u64,
            FieldValue::Text(_) => 0,
        };
        assert_eq!(state.gathered.spans.iter().map(steps).sum::<u64>(), rounds, "none is lost");
        state.gathered.spans.len()
    }

    #[test]
    fn a_pause_or_a_second_ends_a_piece_of_rounds() {
        assert_eq!(pieces(8, 20_000, 25_000), 1, "5 ms are no pause");
        assert_eq!(pieces(8, 20_000, 25_001), 8, "more are");
        assert_eq!(pieces(12, 250_000, 250_000), 3, "and no piece is longer than a second");
    }

    #[test]
    fn nothing_gathers_once_nobody_will_take_it() {
        let spans = Spans::default();
        let filter = tracing_subscriber::filter::filter_fn(Spans::wants);
        let subscriber = tracing_subscriber::registry().with(spans.clone().with_filter(filter));
        subscriber::with_default(subscriber, || {
            let work = || info_span!(target: TRACE, "x", lane = "rank").in_scope(|| ());
            work();
            spans.stop();
            work();
        });
        assert_eq!(spans.take(), Gathered::default());
    }

    #[test]
    fn what_is_too_much_is_counted() {
        let (gathered, ()) = gathering(|| {
            (0..MOST + 3).for_each(|_| info_span!(target: TRACE, "x", lane = "rank").in_scope(|| ()));
        });
        assert_eq!((gathered.spans.len(), gathered.dropped), (MOST, 3));
    }
}
