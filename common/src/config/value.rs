//! The values of `key=value`: Hydra's notation, read into JSON.
//!
//! Called by `overrides` for the command line and the environment. `null`, `True`, numbers, quoted and bare
//! strings, `[a, b]` and `{a: 1}`; whatever is none of these is a string, so paths need no quotes.

use serde_json::{Map, Value};

/// Reads one value. The text outside of lists and maps may hold commas and colons: `path=a,b` is a string.
///
/// # Errors
/// What is wrong with the text: an unclosed bracket or quote, text after the end, a `${…}` interpolation.
pub(crate) fn parse(text: &str) -> Result<Value, String> {
    let text = text.trim();
    if text.contains("${") {
        return Err("interpolation (`${…}`) is not read here: write the value itself".to_owned());
    }
    if !text.starts_with(['[', '{', '"', '\'']) {
        return Ok(scalar(text));
    }
    let mut reader = Reader { text, at: 0 };
    let value = reader.value()?;
    reader.skip_space();
    match reader.rest() {
        "" => Ok(value),
        rest => Err(format!("`{rest}` after the end of the value")),
    }
}

/// A value as one would write it on the command line.
#[must_use]
pub(crate) fn render(value: &Value) -> String {
    match value {
        Value::Null => "null".to_owned(),
        Value::Bool(true) => "True".to_owned(),
        Value::Bool(false) => "False".to_owned(),
        Value::Number(number) => number.to_string(),
        Value::String(text) if needs_quotes(text) => {
            format!("\"{}\"", text.replace('\\', "\\\\").replace('"', "\\\""))
        }
        Value::String(text) => text.clone(),
        Value::Array(items) => format!("[{}]", items.iter().map(render).collect::<Vec<_>>().join(",")),
        Value::Object(map) => {
            let fields: Vec<_> = map.iter().map(|(key, value)| format!("{key}:{}", render(value))).collect();
            format!("{{{}}}", fields.join(","))
        }
    }
}

fn needs_quotes(text: &str) -> bool {
    text.is_empty()
        || text.trim() != text
        || text.contains(['[', ']', '{', '}', ',', '"', '\''])
        || !scalar(text).is_string()
}

fn scalar(text: &str) -> Value {
    match text.to_ascii_lowercase().as_str() {
        "null" => return Value::Null,
        "true" => return Value::Bool(true),
        "false" => return Value::Bool(false),
        _ => {}
    }
    if let Ok(whole) = text.parse::<i64>() {
        return whole.into();
    }
    if let Ok(whole) = text.parse::<u64>() {
        return whole.into();
    }
    // Rust also reads `inf` and `nan`, which no setting can be: they stay text and fail as such.
    let numeric = text.starts_with(|c: char| c.is_ascii_digit() || "+-.".contains(c));
    match text.parse::<f64>() {
        Ok(number) if numeric && number.is_finite() => number.into(),
        _ => Value::String(text.to_owned()),
    }
}

struct Reader<'a> {
    text: &'a str,
    at: usize,
}

impl<'a> Reader<'a> {
    fn rest(&self) -> &'a str {
        &self.text[self.at..]
    }

    fn skip_space(&mut self) {
        self.at += self.rest().len() - self.rest().trim_start().len();
    }

    /// Takes `wanted` if it comes next, after spaces.
    fn eat(&mut self, wanted: char) -> bool {
        self.skip_space();
        let found = self.rest().starts_with(wanted);
        if found {
            self.at += wanted.len_utf8();
        }
        found
    }

    fn value(&mut self) -> Result<Value, String> {
        self.skip_space();
        match self.rest().chars().next() {
            Some('[') => self.list(),
            Some('{') => self.map(),
            Some(quote @ ('"' | '\'')) => self.quoted(quote).map(Value::String),
            _ => match self.bare(&[',', ']', '}'])? {
                "" => Err(format!("a value is missing before `{}`", self.rest())),
                text => Ok(scalar(text)),
            },
        }
    }

    fn bare(&mut self, ends: &[char]) -> Result<&'a str, String> {
        let rest = self.rest();
        let end = rest.find(ends).ok_or_else(|| format!("`{}` is not closed", self.text))?;
        self.at += end;
        Ok(rest[..end].trim())
    }

    fn list(&mut self) -> Result<Value, String> {
        self.at += 1;
        let mut items = Vec::new();
        if self.eat(']') {
            return Ok(items.into());
        }
        loop {
            items.push(self.value()?);
            if self.eat(']') {
                return Ok(items.into());
            }
            if !self.eat(',') {
                return Err(self.wanted("`,` or `]`"));
            }
        }
    }

    fn map(&mut self) -> Result<Value, String> {
        self.at += 1;
        let mut fields = Map::new();
        if self.eat('}') {
            return Ok(fields.into());
        }
        loop {
            self.skip_space();
            let key = match self.rest().chars().next() {
                Some(quote @ ('"' | '\'')) => self.quoted(quote)?,
                _ => self.bare(&[':', ',', '}'])?.to_owned(),
            };
            if !self.eat(':') {
                return Err(self.wanted("`:`"));
            }
            let value = self.value()?;
            if fields.insert(key.clone(), value).is_some() {
                return Err(format!("`{key}` is given twice"));
            }
            if self.eat('}') {
                return Ok(fields.into());
            }
            if !self.eat(',') {
                return Err(self.wanted("`,` or `}`"));
            }
        }
    }

    /// A string in quotes; a backslash keeps the quote or backslash after it.
    fn quoted(&mut self, quote: char) -> Result<String, String> {
        let mut text = String::new();
        let mut chars = self.rest().char_indices().skip(1).peekable();
        while let Some((offset, c)) = chars.next() {
            match c {
                '\\' if chars.peek().is_some_and(|(_, next)| *next == quote || *next == '\\') => {
                    text.extend(chars.next().map(|(_, next)| next));
                }
                c if c == quote => {
                    self.at += offset + quote.len_utf8();
                    return Ok(text);
                }
                c => text.push(c),
            }
        }
        Err(format!("`{}` is not closed", self.rest()))
    }

    fn wanted(&self, what: &str) -> String {
        match self.rest() {
            "" => format!("`{}` is not closed", self.text),
            rest => format!("{what} is missing before `{rest}`"),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;

    #[test]
    fn scalars_are_read_as_hydra_reads_them() {
        for (text, expected) in [
            ("null", json!(null)),
            ("True", json!(true)),
            ("false", json!(false)),
            ("5e-7", json!(5e-7)),
            ("-1", json!(-1)),
            ("0.001", json!(0.001)),
            ("18446744073709551615", json!(u64::MAX)),
            ("'5'", json!("5")),
            ("./data/train.json", json!("./data/train.json")),
            ("a,b", json!("a,b")),
            ("", json!("")),
            ("nan", json!("nan")),
            ("1.5b", json!("1.5b")),
            (r#""say \"hi\" \n""#, json!(r#"say "hi" \n"#)),
        ] {
            assert_eq!(parse(text), Ok(expected), "{text}");
        }
    }

    #[test]
    fn lists_and_maps_nest_with_or_without_quotes() {
        assert_eq!(parse("[code_interpreter, 'answer']"), Ok(json!(["code_interpreter", "answer"])));
        assert_eq!(parse("[0.9,0.999]"), Ok(json!([0.9, 0.999])));
        assert_eq!(parse("[]"), Ok(json!([])));
        assert_eq!(parse("{}"), Ok(json!({})));
        assert_eq!(parse("{a: 1, 'b c': [x, {y: null}]}"), Ok(json!({"a": 1, "b c": ["x", {"y": null}]})));
    }

    #[test]
    fn broken_values_say_what_is_missing() {
        for (text, problem) in [
            ("[a,b", "`[a,b` is not closed"),
            ("[a b] c", "`c` after the end of the value"),
            ("[a,,b]", "a value is missing before `,b]`"),
            ("'open", "`'open` is not closed"),
            ("{a 1}", "`:` is missing before `}`"),
            ("{a:1,a:2}", "`a` is given twice"),
            ("['a' 'b']", "`,` or `]` is missing before `'b']`"),
            ("${trainer.seed}", "interpolation (`${…}`) is not read here: write the value itself"),
        ] {
            assert_eq!(parse(text), Err(problem.to_owned()), "{text}");
        }
    }

    proptest! {
        #[test]
        fn nothing_that_is_typed_panics(text in "[\\[\\]{}'\"\\\\,: a0ü.$]{0,16}") {
            parse(&text).ok();
        }

        #[test]
        fn what_is_rendered_reads_back(words in proptest::collection::vec("[a-z/_.]{1,8}|-?[0-9]{1,6}|true|null|[a,'\" \\\\\\]]{0,5}", 0..5)) {
            let value = json!(words);
            prop_assert_eq!(parse(&render(&value)), Ok(value));
        }
    }
}
