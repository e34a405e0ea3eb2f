//! A data row as both sides read it: where the question is, and what a reward compares a reply with.
//!
//! The coordinator checks files by this before anything starts; chains and rewards of the worker read rows by the
//! same names. What must stay true: a row that passes here is one that the reward can score.

use serde_json::Value;

/// The fields that may hold the question; the first one present is it (AgentFly's order).
pub const QUESTION_FIELDS: [&str; 4] = ["prompt", "question", "instruction", "problem"];

/// The field of a row that a reward compares a reply with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reference {
    /// `answer`: one right answer.
    Answer,
    /// `golden_answers`: one right answer or several, of which the best match counts.
    GoldenAnswers,
}

impl Reference {
    /// The field's name.
    #[must_use]
    pub fn field(self) -> &'static str {
        match self {
            Self::Answer => "answer",
            Self::GoldenAnswers => "golden_answers",
        }
    }

    /// What the field must hold, in words.
    #[must_use]
    pub fn expected(self) -> &'static str {
        match self {
            Self::Answer => "a string or a number",
            Self::GoldenAnswers => "a list of strings that is not empty, a string or a number",
        }
    }

    /// Whether the field may hold `value`.
    #[must_use]
    pub fn accepts(self, value: &Value) -> bool {
        match (self, value) {
            (_, Value::String(_) | Value::Number(_)) => true,
            (Self::GoldenAnswers, Value::Array(all)) => !all.is_empty() && all.iter().all(Value::is_string),
            _ => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn several_right_answers_are_a_list_of_texts_and_one_is_never_a_list() {
        for (value, answer, golden) in [
            (json!("Paris"), true, true),
            (json!(5), true, true),
            (json!(["Paris", "paris"]), false, true),
            (json!([]), false, false),
            (json!(["Paris", 5]), false, false),
            (json!(null), false, false),
            (json!({"a": 1}), false, false),
            (json!(true), false, false),
        ] {
            let accepted = (Reference::Answer.accepts(&value), Reference::GoldenAnswers.accepts(&value));
            assert_eq!(accepted, (answer, golden), "{value}");
        }
    }
}
