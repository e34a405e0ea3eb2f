//! Strings of numbers and short formulas, made comparable: the native steps of AgentFly's equality cascade.
//!
//! Called by the math rewards before anything is sent to Python. Pure.

/// What happens to commas.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Commas {
    /// All go: AgentFly's rule, under which (1,2) equals (12).
    Drop,
    /// Only those between groups of three digits go, and only when the text is one such number.
    Thousands,
}

/// AgentFly's normal form of an answer; `None` where its rule gives up (two units).
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
    match (x.parse::<f64>(), y.parse::<f64>()) {
        (Ok(p), Ok(q)) => p == q,
        _ => x == y,
    }
}

pub(super) fn normalise_with(text: &str, commas: Commas) -> Option<String> {
    let mut s = text.replace('\n', "").replace("\\!", "").replace("\\\\", "\\");
    s = s.replace("tfrac", "frac").replace("dfrac", "frac").replace("\\left", "").replace("\\right", "");
    s = s.replace("^{\\circ}", "").replace("^\\circ", "").replace("\\$", "").replace('$', "");
    if commas == Commas::Drop || is_grouped_number(s.trim()) {
        s = s.replace("{,}", "").replace(',', "");
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
    s = brace_roots(&s).replace(' ', "");
    s = brace_fractions(&s);
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

/// `\sqrt3` → `\sqrt{3}`.
fn brace_roots(text: &str) -> String {
    let mut parts = text.split("\\sqrt");
    let mut out = parts.next().unwrap_or("").to_owned();
    for part in parts {
        out.push_str("\\sqrt");
        match part.chars().next() {
            Some(first) if first != '{' => {
                out.extend(['{', first, '}']);
                out.push_str(&part[first.len_utf8()..]);
            }
            _ => out.push_str(part),
        }
    }
    out
}

/// `\frac12` → `\frac{1}{2}`, `\frac1{72}` → `\frac{1}{72}`; a fraction that ends too soon is left alone.
fn brace_fractions(text: &str) -> String {
    let mut parts = text.split("\\frac");
    let mut out = parts.next().unwrap_or("").to_owned();
    for part in parts {
        out.push_str("\\frac");
        let mut chars = part.chars();
        match (chars.next(), chars.next()) {
            (Some('{'), _) => out.push_str(part),
            (Some(_), None) => return text.to_owned(),
            (Some(a), Some('{')) => {
                out.extend(['{', a, '}', '{']);
                out.push_str(chars.as_str());
            }
            (Some(a), Some(b)) => {
                out.extend(['{', a, '}', '{', b, '}']);
                out.push_str(chars.as_str());
            }
            (None, _) => {}
        }
    }
    out
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
