//! JSON as Python's `json.dumps` writes it: `", "` and `": "` between things, keys in their given order.
//!
//! Used by the templates, whose tool schemas the models saw in exactly this spacing when they were trained.

use std::fmt::Write as _;

use serde_json::Value;

/// `json.dumps(value, ensure_ascii=ascii)`.
#[must_use]
pub fn to_python_json(value: &Value, ascii: bool) -> String {
    let mut out = String::new();
    write_value(&mut out, value, ascii, None, 0);
    out
}

/// `json.dumps(value, indent=indent, ensure_ascii=False)`.
#[must_use]
pub fn to_python_json_indented(value: &Value, indent: usize) -> String {
    let mut out = String::new();
    write_value(&mut out, value, false, Some(indent), 0);
    out
}

fn write_value(out: &mut String, value: &Value, ascii: bool, indent: Option<usize>, depth: usize) {
    match value {
        Value::String(text) => write_string(out, text, ascii),
        Value::Array(items) if !items.is_empty() => {
            out.push('[');
            for (i, item) in items.iter().enumerate() {
                separate(out, i, indent, depth + 1);
                write_value(out, item, ascii, indent, depth + 1);
            }
            close(out, ']', indent, depth);
        }
        Value::Object(fields) if !fields.is_empty() => {
            out.push('{');
            for (i, (key, item)) in fields.iter().enumerate() {
                separate(out, i, indent, depth + 1);
                write_string(out, key, ascii);
                out.push_str(": ");
                write_value(out, item, ascii, indent, depth + 1);
            }
            close(out, '}', indent, depth);
        }
        other => out.push_str(&other.to_string()),
    }
}

fn separate(out: &mut String, index: usize, indent: Option<usize>, depth: usize) {
    match indent {
        None if index > 0 => out.push_str(", "),
        None => {}
        Some(width) => {
            out.push_str(if index > 0 { ",\n" } else { "\n" });
            out.extend(std::iter::repeat_n(' ', width * depth));
        }
    }
}

fn close(out: &mut String, bracket: char, indent: Option<usize>, depth: usize) {
    if let Some(width) = indent {
        out.push('\n');
        out.extend(std::iter::repeat_n(' ', width * depth));
    }
    out.push(bracket);
}

fn write_string(out: &mut String, text: &str, ascii: bool) {
    let quoted = Value::String(text.to_owned()).to_string();
    if !ascii {
        out.push_str(&quoted);
        return;
    }
    for c in quoted.chars() {
        if c.is_ascii() {
            out.push(c);
        } else {
            for unit in c.encode_utf16(&mut [0; 2]) {
                // Writing to a String cannot fail.
                let _ = write!(out, "\\u{unit:04x}");
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn spacing_order_and_escapes_are_pythons() {
        let value = json!({"b": [1, 2.5, "é😀\n"], "a": {}, "c": [], "d": null});
        assert_eq!(
            to_python_json(&value, true),
            r#"{"b": [1, 2.5, "\u00e9\ud83d\ude00\n"], "a": {}, "c": [], "d": null}"#
        );
        assert_eq!(to_python_json(&value["b"], false), r#"[1, 2.5, "é😀\n"]"#);
        assert_eq!(to_python_json_indented(&json!({"a": [1]}), 4), "{\n    \"a\": [\n        1\n    ]\n}");
    }
    #[test]
    fn indented_lists_are_pythons_at_every_depth() {
        let value = json!([{"a": ["é", 1], "b": {"c": [[], {}]}}, 2]);
        let pythons = "[\n  {\n    \"a\": [\n      \"é\",\n      1\n    ],\n    \"b\": {\n      \"c\": [\n        [],\n        \
                       {}\n      ]\n    }\n  },\n  2\n]";
        assert_eq!(
            to_python_json_indented(&value, 2),
            pythons,
            "json.dumps(value, indent=2, ensure_ascii=False)"
        );
    }
}
