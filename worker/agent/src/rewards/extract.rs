//! Finds the answer in a reply: the last `\boxed{…}`.
//!
//! The rule of the MATH benchmark (Hendrycks et al. 2021), which AgentFly's rewards use.

/// The content of the last `\boxed{…}` with balanced braces, or the whole text when there is none. A `\fbox`, or
/// a box without braces, is not unwrapped.
#[must_use]
pub fn extract_answer(text: &str) -> &str {
    boxed(text).unwrap_or(text)
}

/// The content of the last `\boxed{…}`, if the text has one.
pub(super) fn boxed(text: &str) -> Option<&str> {
    let start = text.rfind("\\boxed")?;
    let content = text[start..].strip_prefix("\\boxed{")?;
    let mut depth = 1_usize;
    for (at, c) in content.char_indices() {
        match c {
            '{' => depth += 1,
            '}' => depth -= 1,
            _ => {}
        }
        if depth == 0 {
            return Some(&content[..at]);
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::extract_answer;

    #[test]
    fn the_last_balanced_box_counts() {
        assert_eq!(extract_answer("\\boxed{1} so \\boxed{\\frac{1}{2}}."), "\\frac{1}{2}");
        assert_eq!(extract_answer("\\boxed{1"), "\\boxed{1");
        assert_eq!(extract_answer("plain"), "plain");
    }
}
