//! `coordinator explain`: the resolved settings, the batch arithmetic in words, and what has no effect.

use std::fmt::Write as _;

use crate::config::batch_plan::batch_plan;
use crate::config::layers::Source;
use crate::config::{Resolved, known, value};

/// Renders a configuration for people. What differs from the defaults is marked with `*` and where it came
/// from; `questions` is the number of training questions, if they are counted already.
#[must_use]
pub fn explain(resolved: &Resolved, questions: Option<u64>) -> String {
    let mut text = String::from("Settings (* differs from the default)\n");
    let mut section = "";
    let leaves = known::flatten(&resolved.config);
    let mut by_section: Vec<_> = leaves.iter().map(|(key, leaf)| (split(key), key, leaf)).collect();
    by_section.sort_by_key(|(section_and_name, ..)| *section_and_name);
    for ((group, name), key, leaf) in by_section {
        if group != section {
            section = group;
            line(&mut text, format_args!("\n[{group}]"));
        }
        let changed = known::schema_keys().get(key) != Some(leaf);
        let source = resolved.provenance.get(key).filter(|_| changed).map(|source| match source {
            Source::CommandLine => String::new(),
            other => format!("  # {other}"),
        });
        let mark = if changed { '*' } else { ' ' };
        line(
            &mut text,
            format_args!("{mark} {name} = {}{}", value::render(leaf), source.unwrap_or_default()),
        );
    }
    text.push_str("\nA training step\n");
    match batch_plan(&resolved.config, questions) {
        Ok(plan) => plan.in_words().iter().for_each(|words| line(&mut text, format_args!("  {words}"))),
        Err(error) => line(&mut text, format_args!("  impossible: {error}")),
    }
    if !resolved.notices.is_empty() {
        text.push_str("\nAccepted, no effect\n");
        for notice in &resolved.notices {
            line(&mut text, format_args!("  {}={}: {}", notice.key, notice.value, notice.why));
        }
    }
    text
}

/// A key's section and its name in it.
fn split(key: &str) -> (&str, &str) {
    key.rsplit_once('.').unwrap_or(("", key))
}

fn line(text: &mut String, words: std::fmt::Arguments<'_>) {
    writeln!(text, "{words}").expect("writing to a String cannot fail");
}
