//! The model's own chat template, rendered by minijinja the way Hugging Face renders it with Jinja2.
//!
//! Called by [`super::ChatTemplate`] with escaped text. The delta of tool messages is the difference between
//! two renderings of a model conversation, with and without them.

use minijinja::value::{Kwargs, Value as JinjaValue};
use minijinja::{Environment, Error, ErrorKind};
use serde_json::{Value, json};

use super::json::{to_python_json, to_python_json_indented};
use super::{Next, TemplateError, ToolReply};
use crate::tokenizer::ChatTokenizer;

/// Stands for a sampled turn in the two renderings that are compared.
const ASSISTANT_MARKER: &str = "ASSISTANT-TURN-AS-SAMPLED";
const NAME: &str = "chat";

/// A compiled chat template.
pub(super) struct OwnTemplate {
    environment: Environment<'static>,
    bos: String,
    eos: String,
}

impl OwnTemplate {
    /// Compiles `source`.
    pub(super) fn new(source: &str, tokenizer: &ChatTokenizer) -> Result<Self, TemplateError> {
        let mut environment = Environment::new();
        environment.set_trim_blocks(true);
        environment.set_lstrip_blocks(true);
        environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        environment.add_function("raise_exception", |message: String| -> Result<String, Error> {
            Err(Error::new(ErrorKind::InvalidOperation, message))
        });
        environment.add_function("strftime_now", |format: String| strftime_now(&format));
        environment.add_filter("tojson", tojson);
        environment
            .add_template_owned(NAME, source.to_owned())
            .map_err(|e| TemplateError::Jinja { action: "being compiled", cause: format!("{e:#}") })?;
        let text = |token: Option<&str>| token.unwrap_or_default().to_owned();
        Ok(Self { environment, bos: text(tokenizer.bos_text()), eos: text(tokenizer.eos_text()) })
    }

    /// The prompt's text, generation prompt included.
    pub(super) fn prompt(
        &self,
        system: Option<&str>,
        user: &str,
        tools: &[Value],
    ) -> Result<String, TemplateError> {
        let mut messages = Vec::new();
        messages.extend(system.map(|s| json!({"role": "system", "content": s})));
        messages.push(json!({"role": "user", "content": user}));
        self.render(&messages, tools, true, "rendering the prompt")
    }

    /// The text after an assistant's content, observations and what comes next included.
    pub(super) fn after_assistant(
        &self,
        observations: &[ToolReply],
        next: Next,
    ) -> Result<String, TemplateError> {
        let mut messages = vec![
            json!({"role": "user", "content": "question"}),
            json!({"role": "assistant", "content": ASSISTANT_MARKER}),
        ];
        let without = self.render(&messages, &[], false, "rendering an assistant turn")?;
        messages
            .extend(observations.iter().map(|o| json!({"role": "tool", "name": o.tool, "content": o.text})));
        let with = self.render(&messages, &[], next == Next::Generate, "rendering tool messages")?;
        let (without, with) = (after_marker(&without)?, after_marker(&with)?);
        if !with.starts_with(without) {
            return Err(TemplateError::PrefixChanged { without: without.to_owned(), with: with.to_owned() });
        }
        Ok(with.to_owned())
    }

    fn render(
        &self,
        messages: &[Value],
        tools: &[Value],
        add_generation_prompt: bool,
        action: &'static str,
    ) -> Result<String, TemplateError> {
        let tools = if tools.is_empty() { Value::Null } else { Value::Array(tools.to_vec()) };
        let context = minijinja::context! {
            messages => JinjaValue::from_serialize(messages),
            tools => JinjaValue::from_serialize(&tools),
            add_generation_prompt => add_generation_prompt,
            bos_token => self.bos,
            eos_token => self.eos,
        };
        let rendered = self.environment.get_template(NAME).and_then(|t| t.render(context));
        rendered.map_err(|e| TemplateError::Jinja { action, cause: format!("{e:#}") })
    }
}

/// The text after the only assistant turn of a rendering. The marker precedes every observation.
fn after_marker(rendered: &str) -> Result<&str, TemplateError> {
    rendered.split_once(ASSISTANT_MARKER).map(|(_, after)| after).ok_or_else(|| TemplateError::Jinja {
        action: "rendering an assistant turn",
        cause: format!("it left out the assistant's content, giving {rendered:?}"),
    })
}

/// `json.dumps(value, ensure_ascii=False, indent=indent)`, as Hugging Face defines the filter.
fn tojson(value: &JinjaValue, kwargs: Kwargs) -> Result<JinjaValue, Error> {
    let indent: Option<usize> = kwargs.get("indent")?;
    for other in ["ensure_ascii", "separators", "sort_keys"] {
        let _: Option<JinjaValue> = kwargs.get(other)?; // accepted for compatibility; the defaults are used
    }
    kwargs.assert_all_used()?;
    let value = serde_json::to_value(value)
        .map_err(|e| Error::new(ErrorKind::BadSerialization, format!("not JSON: {e}")))?;
    let text = indent.map_or_else(|| to_python_json(&value, false), |i| to_python_json_indented(&value, i));
    Ok(JinjaValue::from_safe_string(text))
}

/// Today's UTC date by `%Y`, `%m`, `%d`, `%b`, `%B` (what chat templates ask for); other codes are an error.
fn strftime_now(format: &str) -> Result<String, Error> {
    const MONTHS: [&str; 12] = [
        "January",
        "February",
        "March",
        "April",
        "May",
        "June",
        "July",
        "August",
        "September",
        "October",
        "November",
        "December",
    ];
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    let (year, month, day) = civil_date(now.as_secs() / 86_400);
    let name = MONTHS[month as usize - 1];
    let mut out = String::new();
    let mut chars = format.chars();
    while let Some(c) = chars.next() {
        if c != '%' {
            out.push(c);
            continue;
        }
        match chars.next() {
            Some('Y') => out.push_str(&year.to_string()),
            Some('m') => out.push_str(&format!("{month:02}")),
            Some('d') => out.push_str(&format!("{day:02}")),
            Some('B') => out.push_str(name),
            Some('b') => out.push_str(&name[..3]),
            Some('%') => out.push('%'),
            other => {
                let code = other.map(String::from).unwrap_or_default();
                let message = format!("strftime_now: %{code} is not supported; use %Y %m %d %b %B %%");
                return Err(Error::new(ErrorKind::InvalidOperation, message));
            }
        }
    }
    Ok(out)
}

/// Year, month and day of a number of days since 1970-01-01 (Howard Hinnant's `civil_from_days`).
fn civil_date(days: u64) -> (u64, u64, u64) {
    let days = days + 719_468;
    let era = days / 146_097;
    let of_era = days % 146_097;
    let year_of_era = (of_era - of_era / 1460 + of_era / 36_524 - of_era / 146_096) / 365;
    let of_year = of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted = (5 * of_year + 2) / 153; // March is 0
    let day = of_year - (153 * shifted + 2) / 5 + 1;
    let month = if shifted < 10 { shifted + 3 } else { shifted - 9 };
    (year_of_era + era * 400 + u64::from(month <= 2), month, day)
}

#[cfg(test)]
mod tests {
    use super::{civil_date, strftime_now};

    #[test]
    fn days_become_dates() {
        assert_eq!(civil_date(0), (1970, 1, 1));
        assert_eq!(civil_date(11_016), (2000, 2, 29));
        assert_eq!(civil_date(20_089), (2025, 1, 1));
    }

    #[test]
    fn every_day_of_five_centuries_follows_the_one_before() {
        let (mut year, mut month, mut day) = (1970, 1, 1);
        for days in 0..182_622 {
            assert_eq!(civil_date(days), (year, month, day), "day {days}");
            let leap = year % 4 == 0 && (year % 100 != 0 || year % 400 == 0);
            let length = match month {
                2 => 28 + u64::from(leap),
                4 | 6 | 9 | 11 => 30,
                _ => 31,
            };
            (year, month, day) = match (month, day) {
                (12, 31) => (year + 1, 1, 1),
                (_, last) if last == length => (year, month + 1, 1),
                _ => (year, month, day + 1),
            };
        }
    }

    #[test]
    fn today_is_written_by_its_codes_and_others_are_refused() {
        let today = || std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_secs();
        let (before, said) = (today() / 86_400, strftime_now("%d.%m.%Y %B %b 100%%").unwrap());
        let written = |(year, month, day)| {
            let names =
                "January February March April May June July August September October November December";
            let name = names.split(' ').nth(usize::try_from(month).unwrap() - 1).unwrap();
            format!("{day:02}.{month:02}.{year} {name} {} 100%", &name[..3])
        };
        let days = before..=today() / 86_400; // midnight may pass between the two
        assert!(days.clone().any(|day| written(civil_date(day)) == said), "{said} is not of {days:?}");
        assert!(strftime_now("%H").unwrap_err().to_string().contains("%H is not supported"));
    }
}
