//! Gathered spans ⇄ their message.

use std::collections::BTreeMap;
use std::time::{SystemTime, UNIX_EPOCH};

use agentfly_proto::v1 as pb;

use crate::telemetry::spans::{FieldValue, Gathered, Span};

/// Clocks of two machines that differ by more than this are aligned by when the message came; a smaller difference
/// may be the way's.
const CLOCKS_AGREE_MICROS: i64 = 250_000;

/// Now, in microseconds since 1970.
#[must_use]
pub fn unix_micros() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_micros()).unwrap_or(u64::MAX)
}

impl From<Gathered> for pb::Spans {
    fn from(gathered: Gathered) -> Self {
        let spans = gathered.spans.into_iter().map(pb::Span::from).collect();
        Self { spans, dropped: gathered.dropped, sent_micros: unix_micros() }
    }
}

impl From<Span> for pb::Span {
    fn from(span: Span) -> Self {
        let (mut numbers, mut texts) = (BTreeMap::new(), BTreeMap::new());
        for (name, value) in span.fields {
            match value {
                FieldValue::Number(number) => drop(numbers.insert(name, number)),
                FieldValue::Text(text) => drop(texts.insert(name, text)),
            }
        }
        Self {
            name: span.name,
            lane: span.lane,
            start_micros: span.start_micros,
            micros: span.micros,
            numbers: numbers.into_iter().collect(),
            texts: texts.into_iter().collect(),
        }
    }
}

/// The spans of a message that came at `now_micros` by this machine's clock, in this machine's time.
#[must_use]
pub fn gathered_from(message: pb::Spans, now_micros: u64) -> Gathered {
    let signed = |micros| i64::try_from(micros).unwrap_or(i64::MAX);
    let behind = signed(now_micros).saturating_sub(signed(message.sent_micros));
    let shift = if behind.abs() > CLOCKS_AGREE_MICROS { behind } else { 0 };
    let span = |span: pb::Span| {
        let numbers = span.numbers.into_iter().map(|(name, number)| (name, FieldValue::Number(number)));
        let texts = span.texts.into_iter().map(|(name, text)| (name, FieldValue::Text(text)));
        Span {
            name: span.name,
            lane: span.lane,
            start_micros: span.start_micros.saturating_add_signed(shift),
            micros: span.micros,
            fields: numbers.chain(texts).collect(),
        }
    };
    Gathered { spans: message.spans.into_iter().map(span).collect(), dropped: message.dropped }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spans_come_through_and_a_clock_that_is_off_is_put_right() {
        let fields = [
            ("tokens".to_owned(), FieldValue::Number(3.0)),
            ("tool".to_owned(), FieldValue::Text("calculator".to_owned())),
        ];
        let span = Span {
            name: "tool".to_owned(),
            lane: "chain 2".to_owned(),
            start_micros: 10_000_000,
            micros: 7,
            fields: fields.into(),
        };
        let sent = Gathered { spans: vec![span], dropped: 1 };
        let message = pb::Spans { sent_micros: 11_000_000, ..pb::Spans::from(sent.clone()) };
        assert_eq!(gathered_from(message.clone(), 11_200_000), sent, "the way takes a while");
        for (now, start) in [(71_000_000, 70_000_000), (4_000_000, 3_000_000)] {
            let found = gathered_from(message.clone(), now);
            assert_eq!((found.spans[0].start_micros, found.dropped), (start, 1));
        }
    }
}
