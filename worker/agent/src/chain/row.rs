//! Data rows: where the question is.

pub use agentfly_common::row::QUESTION_FIELDS;
use serde_json::{Map, Value};

/// A row without a question.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "data row {row_id:?} has no text in any of the fields {}; it has: {}",
    QUESTION_FIELDS.join(", "),
    present.join(", ")
)]
pub struct MissingQuestion {
    /// The row.
    pub row_id: String,
    /// The fields it has.
    pub present: Vec<String>,
}

/// The user's turn of a data row.
///
/// # Errors
/// No such field, or its value is not text; names the row and its fields.
pub fn question_of<'a>(row_id: &str, row: &'a Map<String, Value>) -> Result<&'a str, MissingQuestion> {
    let value = QUESTION_FIELDS.iter().find_map(|field| row.get(*field));
    value
        .and_then(Value::as_str)
        .ok_or_else(|| MissingQuestion { row_id: row_id.to_owned(), present: row.keys().cloned().collect() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_field_present_is_the_question() {
        let row = |json: &str| serde_json::from_str::<Map<String, Value>>(json).unwrap();
        let both = row(r#"{"problem": "b", "question": "a"}"#);
        assert_eq!(question_of("7", &both), Ok("a"));
        let error = question_of("7", &row(r#"{"text": "a"}"#)).unwrap_err().to_string();
        assert!(error.contains("\"7\"") && error.contains("problem") && error.ends_with("text"), "{error}");
    }
}
