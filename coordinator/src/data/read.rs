//! From a file's bytes to rows. Called by `Dataset::load` for each file; every complaint names file, row, field.

use std::collections::HashMap;
use std::fs::File;
use std::io::Read;
use std::path::Path;

use agentfly_common::row::QUESTION_FIELDS;
use serde_json::{Map, Value};

use super::{DataError, Limits, Need, Place, Row, question_fields};

/// The ids so far, with the row of each, over all files of a data set.
#[derive(Default)]
pub(super) struct SeenIds(HashMap<String, Place>);

/// Characters of a wrong value that an error shows.
const SHOWN_CHARS: usize = 40;

/// Bytes looked at before the rest is read.
const HEAD_BYTES: u64 = 4096;

/// Reads one file and appends its rows.
pub(super) fn file(
    path: &Path,
    need: &Need<'_>,
    limits: Limits,
    seen: &mut SeenIds,
    rows: &mut Vec<Row>,
) -> Result<(), DataError> {
    let text = text(path, limits)?;
    let before = rows.len();
    let lines = path.extension().is_some_and(|e| e.eq_ignore_ascii_case("jsonl"));
    let values = if lines { parse_lines(path, &text)? } else { parse_list(path, &text)? };
    for (number, value) in values {
        rows.push(row(Place::new(path, number), value, rows.len(), need, seen)?);
    }
    if rows.len() == before {
        return Err(DataError::Empty { path: path.to_owned(), needed: need.reference.field() });
    }
    Ok(())
}

/// The file's text, if its name, size and first bytes say that it can be questions.
fn text(path: &Path, limits: Limits) -> Result<String, DataError> {
    let io = |source| DataError::Io { path: path.to_owned(), source };
    let extension = path.extension().and_then(|e| e.to_str()).unwrap_or_default().to_ascii_lowercase();
    let foreign = match extension.as_str() {
        "json" | "jsonl" => None,
        "parquet" => Some(("Parquet", "pandas.read_parquet(f).to_json(g, orient='records', lines=True)")),
        "csv" | "tsv" => Some(("CSV", "pandas.read_csv(f).to_json(g, orient='records', lines=True)")),
        _ => Some(("a file that ends neither in .json nor in .jsonl", "rename it if it is one of them")),
    };
    if let Some((found, how)) = foreign {
        return Err(DataError::Format { path: path.to_owned(), found, how });
    }
    let mut file = File::open(path).map_err(io)?;
    let bytes = file.metadata().map_err(io)?.len();
    if bytes > limits.file_bytes {
        return Err(DataError::TooLarge { path: path.to_owned(), bytes, limit: limits.file_bytes });
    }
    let mut content = Vec::new();
    Read::by_ref(&mut file).take(HEAD_BYTES).read_to_end(&mut content).map_err(io)?;
    refuse_foreign_head(path, &content)?;
    // A pipe or a growing file has no honest size: the limit holds while reading too.
    Read::by_ref(&mut file).take(limits.file_bytes).read_to_end(&mut content).map_err(io)?;
    if content.len() as u64 > limits.file_bytes {
        let bytes = content.len() as u64;
        return Err(DataError::TooLarge { path: path.to_owned(), bytes, limit: limits.file_bytes });
    }
    let mut text = String::from_utf8(content).map_err(|error| DataError::NotUtf8 {
        path: path.to_owned(),
        offset: error.utf8_error().valid_up_to(),
    })?;
    if text.starts_with('\u{feff}') {
        text.drain(..'\u{feff}'.len_utf8());
    }
    Ok(text)
}

/// Looks at the first bytes: JSON that can hold rows starts with `[` or `{`.
fn refuse_foreign_head(path: &Path, head: &[u8]) -> Result<(), DataError> {
    if head.starts_with(b"PAR1") {
        let how = "pandas.read_parquet(f).to_json(g, orient='records', lines=True)";
        return Err(DataError::Format { path: path.to_owned(), found: "Parquet", how });
    }
    // A character may be cut at the end of the head: only a byte that can never be UTF-8 counts.
    if let Err(error) = std::str::from_utf8(head)
        && error.error_len().is_some()
    {
        return Err(DataError::NotUtf8 { path: path.to_owned(), offset: error.valid_up_to() });
    }
    let start = head.strip_prefix(b"\xef\xbb\xbf").unwrap_or(head).trim_ascii_start();
    match start.first() {
        None | Some(b'[' | b'{') => Ok(()),
        Some(_) => {
            let found = shorten(&String::from_utf8_lossy(start));
            Err(DataError::NotAList {
                path: path.to_owned(),
                found: format!("text that starts with {found}"),
            })
        }
    }
}

/// The objects of a .json file with their row numbers.
fn parse_list(path: &Path, text: &str) -> Result<Vec<(usize, Value)>, DataError> {
    if text.trim_ascii_start().is_empty() {
        return Ok(Vec::new());
    }
    match serde_json::from_str(text) {
        Ok(Value::Array(items)) => {
            Ok(items.into_iter().enumerate().map(|(i, value)| (i + 1, value)).collect())
        }
        Ok(other) => Err(DataError::NotAList { path: path.to_owned(), found: describe(&other) }),
        Err(error) => Err(not_json(path, error.line(), &error)),
    }
}

/// The objects of a .jsonl file with their line numbers; empty lines are skipped.
fn parse_lines(path: &Path, text: &str) -> Result<Vec<(usize, Value)>, DataError> {
    let lines = text.split('\n').enumerate().filter(|(_, line)| !line.trim().is_empty());
    lines
        .map(|(i, line)| match serde_json::from_str(line) {
            Ok(value) => Ok((i + 1, value)),
            Err(error) => Err(not_json(path, i + 1, &error)),
        })
        .collect()
}

fn not_json(path: &Path, line: usize, error: &serde_json::Error) -> DataError {
    let problem = error.to_string();
    let problem = problem.split(" at line ").next().unwrap_or_default().to_owned();
    DataError::NotJson { path: path.to_owned(), line, column: error.column(), problem }
}

/// Checks one value and takes it apart. `index` is its number in the data set, from 0.
fn row(
    place: Place,
    value: Value,
    index: usize,
    need: &Need<'_>,
    seen: &mut SeenIds,
) -> Result<Row, DataError> {
    let Value::Object(mut fields) = value else {
        return Err(DataError::NotAnObject { place, found: describe(&value) });
    };
    let id = match fields.shift_remove("id") {
        None | Some(Value::Null) => index.to_string(),
        Some(Value::String(id)) => id,
        Some(Value::Number(id)) if id.is_i64() || id.is_u64() => id.to_string(),
        Some(other) => return Err(wrong_type(place, "id", &other, "a string or a whole number")),
    };
    let Some(text_field) = QUESTION_FIELDS.into_iter().find(|name| fields.contains_key(*name)) else {
        return Err(missing(place, question_fields(), &fields));
    };
    check_reference(&place, need, &fields)?;
    let text = match fields.shift_remove(text_field) {
        Some(Value::String(text)) if !text.trim().is_empty() => text,
        other => {
            return Err(wrong_type(place, text_field, &other.unwrap_or_default(), "text that is not empty"));
        }
    };
    let data_source = match fields.get("data_source") {
        None | Some(Value::Null) => file_stem(&place.path),
        Some(Value::String(source)) => source.clone(),
        Some(other) => return Err(wrong_type(place, "data_source", other, "a string")),
    };
    if let Some(first) = seen.0.get(&id) {
        return Err(DataError::DuplicateId { id, first: first.clone(), second: place });
    }
    seen.0.insert(id.clone(), place);
    Ok(Row { id, text, extra: fields, data_source })
}

/// The field that the reward compares with; those of other rewards may be absent, or anything.
fn check_reference(place: &Place, need: &Need<'_>, fields: &Map<String, Value>) -> Result<(), DataError> {
    let (field, expected) = (need.reference.field(), need.reference.expected());
    match fields.get(field) {
        None => {
            let field = format!("\"{field}\", which agent.reward_name={} compares with", need.reward);
            Err(missing(place.clone(), field, fields))
        }
        Some(value) if need.reference.accepts(value) => Ok(()),
        Some(other) => {
            let expected = format!("{expected}, for agent.reward_name={}", need.reward);
            Err(wrong_type(place.clone(), field, other, expected))
        }
    }
}

fn file_stem(path: &Path) -> String {
    path.file_stem().unwrap_or_default().to_string_lossy().into_owned()
}

fn missing(place: Place, field: String, fields: &Map<String, Value>) -> DataError {
    let names: Vec<_> = fields.keys().map(|name| format!("\"{name}\"")).collect();
    let found = if names.is_empty() { "none".to_owned() } else { names.join(", ") };
    DataError::MissingField { place, field, found }
}

fn wrong_type(place: Place, field: &str, found: &Value, expected: impl Into<String>) -> DataError {
    let (field, found) = (field.to_owned(), describe(found));
    DataError::WrongType { place, field, found, expected: expected.into() }
}

/// A value in a few words.
fn describe(value: &Value) -> String {
    match value {
        Value::Null => "null".to_owned(),
        Value::Bool(flag) => format!("the boolean {flag}"),
        Value::Number(number) => format!("the number {number}"),
        Value::String(text) if text.trim().is_empty() => "an empty string".to_owned(),
        Value::String(text) => format!("the string {}", shorten(text)),
        Value::Array(items) => format!("a list of {}", items.len()),
        Value::Object(fields) if fields.is_empty() => "an empty object".to_owned(),
        Value::Object(fields) => {
            let names: Vec<_> = fields.keys().take(4).map(|name| format!("\"{name}\"")).collect();
            format!("an object with {}", names.join(", "))
        }
    }
}

fn shorten(text: &str) -> String {
    let mut start: String = text.chars().take(SHOWN_CHARS).collect();
    if start.len() < text.len() {
        start.push('…');
    }
    format!("{start:?}")
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use agentfly_common::row::Reference;

    use super::super::Dataset;
    use super::*;

    const MATH: Need<'_> = Need { reward: "math_equal_reward", reference: Reference::Answer };
    const QA: Need<'_> = Need { reward: "qa_em_reward", reference: Reference::GoldenAnswers };

    /// Loads files with these names and contents; errors are text with the folder left out.
    fn load(files: &[(&str, &[u8])]) -> Result<Dataset, String> {
        load_for(&MATH, files, Limits::default())
    }

    fn load_for(need: &Need<'_>, files: &[(&str, &[u8])], limits: Limits) -> Result<Dataset, String> {
        let folder = tempfile::tempdir().unwrap();
        let paths: Vec<PathBuf> = files.iter().map(|(name, _)| folder.path().join(name)).collect();
        for (path, (_, content)) in paths.iter().zip(files) {
            std::fs::write(path, content).unwrap();
        }
        let prefix = format!("{}/", folder.path().display());
        Dataset::load(&paths, need, limits).map_err(|error| error.to_string().replace(&prefix, ""))
    }

    #[test]
    fn the_guides_list_keeps_latex_line_breaks_and_further_fields() {
        let list = br#"[
            {"id": 7, "question": "Find $\\frac{1}{2}$ of\n4.", "answer": "2", "level": 3, "tags": ["a"]},
            {"question": "q", "prompt": "first of four", "answer": 5, "data_source": "extra"}
        ]"#;
        let data = load(&[("train.json", list)]).unwrap();
        let row = &data.rows()[0];
        assert_eq!((row.id.as_str(), row.data_source.as_str()), ("7", "train"));
        assert_eq!(row.text, "Find $\\frac{1}{2}$ of\n4.");
        assert_eq!(serde_json::to_string(&row.extra).unwrap(), r#"{"answer":"2","level":3,"tags":["a"]}"#);
        let second = &data.rows()[1];
        assert_eq!((second.id.as_str(), second.text.as_str()), ("1", "first of four"));
        assert_eq!(second.extra["question"], "q", "only the field that was taken is gone");
        assert_eq!(second.data_source, "extra");
    }

    #[test]
    fn json_lines_and_several_files_make_one_data_set() {
        let lines = b"\xef\xbb\xbf{\"problem\": \"a\", \"answer\": \"1\"}\r\n\n{\"instruction\": \"b\", \"answer\": \"2\"}";
        let more = br#"[{"question": "c", "answer": "3"}]"#;
        let data = load(&[("a.jsonl", lines), ("b.json", more)]).unwrap();
        let seen: Vec<_> = data.rows().iter().map(|row| (row.id.as_str(), row.text.as_str())).collect();
        assert_eq!(seen, [("0", "a"), ("1", "b"), ("2", "c")]);
        assert_eq!(data.first(Some(2)).len(), 2);
    }

    #[test]
    fn a_wrong_file_is_told_by_file_row_and_field() {
        let cases: [(&str, &[u8], &str); 17] = [
            ("a.json", br#"[{"question":"q","answer":"1"},{"question":"q","level":2}]"#, r#"a.json, row 2: no "answer", which agent.reward_name=math_equal_reward compares with; the fields are: "question", "level""#),
            ("a.json", br#"[{"text":"q","answer":"1"}]"#, r#"a.json, row 1: no "prompt" or "question" or "instruction" or "problem"; the fields are: "text", "answer""#),
            ("a.json", br#"[{"question":["q"],"answer":"1"}]"#, r#"a.json, row 1: field "question" is a list of 1; expected text that is not empty"#),
            ("a.json", br#"[{"question":" ","answer":"1"}]"#, r#"a.json, row 1: field "question" is an empty string; expected text that is not empty"#),
            ("a.json", br#"[{"question":"q","answer":null}]"#, r#"a.json, row 1: field "answer" is null; expected a string or a number, for agent.reward_name=math_equal_reward"#),
            ("a.json", br#"[{"id":1.5,"question":"q","answer":"1"}]"#, r#"a.json, row 1: field "id" is the number 1.5; expected a string or a whole number"#),
            ("a.json", br#"{"question":"q","answer":"1"}"#, r#"a.json: expected a list of objects, found an object with "question", "answer""#),
            ("a.json", b"[1]", "a.json, row 1: expected an object, found the number 1"),
            ("a.json", b"", r#"a.json: no questions in it; expected objects with "prompt" or "question" or "instruction" or "problem" and "answer""#),
            ("a.json", b"[]", r#"a.json: no questions in it; expected objects with "prompt" or "question" or "instruction" or "problem" and "answer""#),
            ("a.json", b"[{\"question\":\n x}]", "a.json: not JSON at line 2, column 2: expected value"),
            ("a.jsonl", b"{\"question\":\"q\",\"answer\":\"1\"}\n{\"question\":", "a.jsonl: not JSON at line 2, column 12: EOF while parsing a value"),
            ("a.json", b"[\"caf\xe9 au lait\"]", "a.json: byte 5 is not UTF-8; save the file as UTF-8"),
            ("a.json", b"hello", r#"a.json: expected a list of objects, found text that starts with "hello""#),
            ("a.json", b"PAR1\x15", "a.json: Parquet is not supported; convert it to .jsonl, an object a line (pandas.read_parquet(f).to_json(g, orient='records', lines=True))"),
            ("a.parquet", b"", "a.parquet: Parquet is not supported; convert it to .jsonl, an object a line (pandas.read_parquet(f).to_json(g, orient='records', lines=True))"),
            ("a.json", br#"[{"id":"1","question":"q","answer":"1"},{"id":"x","question":"q","answer":"1"},{"id":1,"question":"q","answer":"1"}]"#, r#"a.json, row 3: field "id" is 1, which a.json, row 1 has already; ids must differ"#),
        ];
        for (name, content, told) in cases {
            assert_eq!(load(&[(name, content)]).unwrap_err(), told);
        }
    }

    #[test]
    fn a_row_needs_what_its_reward_compares_with_and_nothing_of_other_rewards() {
        let load = |need, row: &str| {
            let rows = load_for(need, &[("a.jsonl", row.as_bytes())], Limits::default())?;
            Ok::<_, String>(rows.rows()[0].extra.clone())
        };
        for golden in [r#"["Paris","the city of Paris"]"#, r#""Paris""#, "1789"] {
            let extra = load(&QA, &format!(r#"{{"question":"q","golden_answers":{golden}}}"#)).unwrap();
            assert_eq!(
                extra["golden_answers"].to_string(),
                golden,
                "as in the file, and no answer beside it"
            );
            assert!(!extra.contains_key("answer"));
        }
        load(&MATH, r#"{"question":"q","answer":"1","golden_answers":null}"#).unwrap();
        load(&QA, r#"{"question":"q","answer":null,"golden_answers":"1"}"#).unwrap();
        assert_eq!(
            load(&QA, r#"{"question":"q","answer":"1"}"#).unwrap_err(),
            r#"a.jsonl, row 1: no "golden_answers", which agent.reward_name=qa_em_reward compares with; the fields are: "question", "answer""#
        );
        assert_eq!(
            load(&QA, r#"{"question":"q","golden_answers":[]}"#).unwrap_err(),
            r#"a.jsonl, row 1: field "golden_answers" is a list of 0; expected a list of strings that is not empty, a string or a number, for agent.reward_name=qa_em_reward"#
        );
        assert!(
            load_for(&QA, &[("a.json", b"[]")], Limits::default())
                .unwrap_err()
                .ends_with("and \"golden_answers\"")
        );
    }

    #[test]
    fn gigabytes_of_something_else_are_not_read() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("image.json");
        File::create(&path).unwrap().set_len(3 << 30).unwrap(); // sparse: takes no room
        let error = Dataset::load(&[path], &MATH, Limits::default()).unwrap_err();
        assert!(
            matches!(error, DataError::TooLarge { bytes: 3_221_225_472, limit: 2_147_483_648, .. }),
            "{error}"
        );
        let small = load_for(&MATH, &[("a.json", b"[    ]")], Limits { file_bytes: 5 }).unwrap_err();
        assert_eq!(small, "a.json: 6 bytes, more than the 5 that are read as questions; split it");
    }

    #[test]
    fn a_missing_file_is_named() {
        let told = Dataset::load(&[PathBuf::from("no/such.json")], &MATH, Limits::default())
            .unwrap_err()
            .to_string();
        assert!(told.starts_with("no/such.json: No such file"), "{told}");
    }
}
