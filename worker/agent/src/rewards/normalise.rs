//! Strings of numbers and short formulas, made comparable: the native steps of AgentFly's equality cascade.
//!
//! Called by the math rewards before anything is sent to Python. Pure.

use std::sync::LazyLock;

use regex::Regex;

/// What happens to commas.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Commas {
    /// All go: AgentFly's rule, under which (1,2) equals (12).
    Drop,
    /// Only those between groups of three digits go, and only when the text is one such number.
    Thousands,
}

/// AgentFly's normal form of an answer; `None` where its rule gives up: two units, or a `\sqrt` or `\frac` with
/// nothing after it.
#[must_use]
pub fn normalise(text: &str) -> Option<String> {
    normalise_with(text, Commas::Drop)
}

/// AgentFly's `is_equiv`: equal as numbers, else as normalised strings; as raw strings where the rule gives up.
#[must_use]
pub fn is_equiv(a: &str, b: &str) -> bool {
    let (Some(x), Some(y)) = (normalise(a), normalise(b)) else {
        return a == b;
    };
    match (python_float(&x), python_float(&y)) {
        (Some(p), Some(q)) => p == q,
        _ => x == y,
    }
}

pub(super) fn normalise_with(text: &str, commas: Commas) -> Option<String> {
    let mut s = text.replace('\n', "").replace("\\!", "").replace("\\\\", "\\");
    s = s.replace("tfrac", "frac").replace("dfrac", "frac").replace("\\left", "").replace("\\right", "");
    s = s.replace("^{\\circ}", "").replace("^\\circ", "").replace("\\$", "").replace('$', "");
    match commas {
        Commas::Drop => s = s.replace(',', ""),
        Commas::Thousands if is_grouped_number(s.trim()) => s = s.replace("{,}", "").replace(',', ""),
        Commas::Thousands => {}
    }
    match s.matches("\\text{ ").count() {
        0 => {}
        1 => s.truncate(s.find("\\text{ ")?),
        _ => return None,
    }
    s = s.replace("\\%", "").replace(" .", " 0.").replace("{.", "{0.");
    if s.starts_with('.') {
        s.insert(0, '0');
    }
    if let Some((left, right)) = s.split_once('=')
        && !right.contains('=')
        && left.chars().count() <= 2
    {
        s = right.to_owned();
    }
    s = brace_roots(&s)?.replace(' ', "");
    s = brace_fractions(&s)?;
    if s == "0.5" {
        s = "\\frac{1}{2}".to_owned();
    }
    Some(slash_to_fraction(&s).unwrap_or(s))
}

/// `1,234,567.8`, also with LaTeX's `{,}`.
fn is_grouped_number(text: &str) -> bool {
    let text = text.replace("{,}", ",");
    let (whole, fraction) = text.split_once('.').unwrap_or((&text, ""));
    let digits = |s: &str| s.chars().all(|c| c.is_ascii_digit());
    let mut groups = whole.strip_prefix('-').unwrap_or(whole).split(',');
    let first = groups.next().unwrap_or("");
    let rest: Vec<&str> = groups.collect();
    (1..=3).contains(&first.len())
        && digits(first)
        && !rest.is_empty()
        && rest.iter().all(|g| g.len() == 3 && digits(g))
        && digits(fraction)
}

/// `\sqrt3` → `\sqrt{3}`; `None` where nothing follows a root.
fn brace_roots(text: &str) -> Option<String> {
    let mut parts = text.split("\\sqrt");
    let mut out = parts.next().unwrap_or("").to_owned();
    for part in parts {
        out.push_str("\\sqrt");
        match part.chars().next()? {
            '{' => out.push_str(part),
            first => {
                out.extend(['{', first, '}']);
                out.push_str(&part[first.len_utf8()..]);
            }
        }
    }
    Some(out)
}

/// `\frac12` → `\frac{1}{2}`, `\frac1{72}` → `\frac{1}{72}`; where a fraction ends after one character the
/// whole text is left alone; `None` where nothing follows one.
fn brace_fractions(text: &str) -> Option<String> {
    let mut parts = text.split("\\frac");
    let mut out = parts.next().unwrap_or("").to_owned();
    for part in parts {
        out.push_str("\\frac");
        let mut chars = part.chars();
        match (chars.next()?, chars.next()) {
            ('{', _) => out.push_str(part),
            (_, None) => return Some(text.to_owned()),
            (a, Some('{')) => {
                out.extend(['{', a, '}', '{']);
                out.push_str(chars.as_str());
            }
            (a, Some(b)) => {
                out.extend(['{', a, '}', '{', b, '}']);
                out.push_str(chars.as_str());
            }
        }
    }
    Some(out)
}

/// What Python's `float` reads: beside what Rust does, white space around the number, `_` between digits, and the
/// decimal digits of every script.
fn python_float(text: &str) -> Option<f64> {
    let digits: Vec<char> = text.trim().chars().map(|c| ascii_digit(c).unwrap_or(c)).collect();
    let is_digit = |at: Option<usize>| at.and_then(|at| digits.get(at)).is_some_and(char::is_ascii_digit);
    let joins = |at: usize| is_digit(at.checked_sub(1)) && is_digit(Some(at + 1));
    if digits.iter().enumerate().any(|(at, &c)| c == '_' && !joins(at)) {
        return None;
    }
    digits.iter().filter(|c| **c != '_').collect::<String>().parse().ok()
}

/// The ASCII digit of a decimal digit of another script. Unicode has these in runs of ten from 0 to 9, some of them
/// side by side.
fn ascii_digit(c: char) -> Option<char> {
    static DECIMAL: LazyLock<Regex> =
        LazyLock::new(|| Regex::new(r"^\d$").expect("a constant pattern that a test runs"));
    let is_decimal = |c: char| DECIMAL.is_match(c.encode_utf8(&mut [0; 4]));
    if c.is_ascii() || !is_decimal(c) {
        return None;
    }
    let before = (1_u32..).take_while(|n| char::from_u32(c as u32 - n).is_some_and(is_decimal)).count();
    char::from_digit(u32::try_from(before % 10).ok()?, 10)
}

/// `a/b` of two integers as Python writes them → `\frac{a}{b}`.
fn slash_to_fraction(text: &str) -> Option<String> {
    let (a, b) = text.split_once('/')?;
    let integer = |s: &str| {
        let digits = s.strip_prefix('-').unwrap_or(s);
        !digits.is_empty()
            && digits.chars().all(|c| c.is_ascii_digit())
            && (s == "0" || !digits.starts_with('0'))
    };
    (integer(a) && integer(b)).then(|| format!("\\frac{{{a}}}{{{b}}}"))
}

/// A number as an exact fraction, denominator above 0.
#[derive(Debug, Clone, Copy)]
pub(super) struct Rational {
    numerator: i128,
    denominator: i128,
}

impl Rational {
    /// Reads a normalised decimal or `\frac{a}{b}`, either with a sign; `None` for anything else, and for
    /// numbers of more than 18 digits.
    pub(super) fn read(text: &str) -> Option<Self> {
        let (sign, body) = text.strip_prefix('-').map_or((1, text), |rest| (-1, rest));
        if let Some(fraction) = body.strip_prefix("\\frac{") {
            let (a, b) = fraction.strip_suffix('}')?.split_once("}{")?;
            let (a, b) = (Self::decimal(a)?, Self::decimal(b)?);
            let (numerator, denominator) =
                (a.numerator.checked_mul(b.denominator)?, a.denominator.checked_mul(b.numerator)?);
            let sign = sign * denominator.signum();
            return (denominator != 0)
                .then(|| Self { numerator: sign * numerator, denominator: denominator.abs() });
        }
        let value = Self::decimal(body)?;
        Some(Self { numerator: sign * value.numerator, ..value })
    }

    fn decimal(text: &str) -> Option<Self> {
        let (sign, body) = text.strip_prefix('-').map_or((1, text), |rest| (-1, rest));
        let (whole, fraction) = body.split_once('.').unwrap_or((body, ""));
        let digits = format!("{whole}{fraction}");
        if digits.is_empty() || digits.len() > 18 || !digits.chars().all(|c| c.is_ascii_digit()) {
            return None;
        }
        let denominator = 10_i128.pow(u32::try_from(fraction.len()).ok()?);
        Some(Self { numerator: sign * digits.parse::<i128>().ok()?, denominator })
    }

    /// Whether the two are the same number; `None` where the products do not fit.
    pub(super) fn equals(self, other: Self) -> Option<bool> {
        let left = self.numerator.checked_mul(other.denominator)?;
        Some(left == other.numerator.checked_mul(self.denominator)?)
    }

    /// Whether no rounding to 12 digits could make the two equal.
    pub(super) fn is_far_from(self, other: Self) -> bool {
        let (a, b) = (self.approximate(), other.approximate());
        (a - b).abs() > 1e-12 * a.abs().max(b.abs())
    }

    fn approximate(self) -> f64 {
        self.numerator as f64 / self.denominator as f64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fractions_and_decimals_are_read_exactly() {
        let same = |a: &str, b: &str| Rational::read(a).unwrap().equals(Rational::read(b).unwrap());
        assert_eq!(same("-\\frac{1}{4}", "-0.25"), Some(true));
        assert_eq!(same("\\frac{-2}{-8}", "0.250"), Some(true));
        assert_eq!(same("\\frac{1}{3}", "0.333"), Some(false));
        for bad in ["", "-", "x", "\\frac{1}{0}", "1e3", "1.2.3", "\\frac{1}{2}x", "1234567890123456789"] {
            assert!(Rational::read(bad).is_none(), "{bad:?}");
        }
    }

    #[test]
    fn only_grouped_numbers_lose_their_commas_in_the_strict_form() {
        let strict = |s: &str| normalise_with(s, Commas::Thousands).unwrap();
        assert_eq!(strict("-1,234,567.8"), "-1234567.8");
        assert_eq!(strict("1{,}000"), "1000");
        assert_eq!(strict("(1, 2)"), "(1,2)");
        assert_eq!(strict("1,2"), "1,2");
    }

    #[test]
    fn two_units_are_compared_as_they_stand() {
        let units = "1\\text{ m} 2\\text{ cm}";
        assert!(normalise(units).is_none());
        assert!(is_equiv(units, units) && !is_equiv(units, "1"));
    }

    #[test]
    fn numbers_are_what_pythons_float_reads() {
        // Each value is what Python 3.11's float() gives.
        for (text, value) in [
            ("1_000", 1000.0),
            ("1_0.5_0", 10.5),
            ("1e1_0", 1e10),
            ("\t12\u{a0}", 12.0),
            ("１２", 12.0),
            ("१.५", 1.5),
            ("𝟗𝟘𝟙", 901.0),
            ("+.5", 0.5),
            ("5.", 5.0),
            ("1.e3", 1000.0),
            ("-Infinity", f64::NEG_INFINITY),
        ] {
            assert_eq!(python_float(text), Some(value), "{text:?}");
        }
        assert!(python_float("+nan").is_some_and(f64::is_nan));
        // ValueError, each of them.
        for text in
            ["", "_1", "1_", "1__0", "1_.5", "1_e5", "1e_1", "in_f", "infinit", ".", "1 2", "0x10", "−1", "²"]
        {
            assert_eq!(python_float(text), None, "{text:?}");
        }
    }

    #[test]
    fn equality_agrees_with_python_at_the_edges() {
        for (a, b, equal) in [
            ("1_000", "1000", true),  // float() takes underscores
            ("\t7\u{a0}", "7", true), // … and white space that the rule does not remove
            ("٣", "3", true),         // … and other scripts' digits
            ("inf", "Infinity", true),
            ("nan", "nan", false), // nan != nan
            ("1__000", "1000", false),
            // IndexError in the reference, so the strings are compared as they stand:
            ("1 \\frac", "1\\frac", false),
            ("\\sqrt", "\\sqrt ", false),
            ("\\sqrt{2}\\sqrt", "\\sqrt2\\sqrt", false),
            ("1\\frac", "1\\frac", true),
            // no IndexError: one character follows
            ("1 \\frac3", "1\\frac3", true),
            ("\\sqrt 2", "\\sqrt{}2", true), // the space is put in braces, then removed
            ("1{,}000", "1000", false),      // only the comma goes; Python's LaTeX step calls them equal
        ] {
            assert_eq!(is_equiv(a, b), equal, "{a:?} and {b:?}");
        }
    }

    proptest::proptest! {
        #[test]
        fn normalising_never_panics(text in "[\\\\{}a-z0-9,./= $%-]{0,40}") {
            let forms = [normalise(&text), normalise_with(&text, Commas::Thousands)];
            for form in forms.into_iter().flatten() {
                let number = Rational::read(&form);
                proptest::prop_assert!(number.is_none_or(|n| n.equals(n) != Some(false)));
            }
        }
    }
}
