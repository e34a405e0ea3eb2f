//! Tables and words for people.

use comfy_table::presets::UTF8_HORIZONTAL_ONLY;
use comfy_table::{ContentArrangement, Table};

/// Columns a table takes at least.
const NARROWEST: u16 = 60;

/// A table with these headings.
pub(super) fn table(headings: &[&str]) -> Table {
    let mut table = Table::new();
    table.load_preset(UTF8_HORIZONTAL_ONLY).set_content_arrangement(ContentArrangement::Dynamic);
    table.set_header(headings.iter().copied());
    if table.width().is_some_and(|columns| columns < NARROWEST) {
        table.set_width(NARROWEST); // a terminal that knows no size, or one where no table fits anyway
    }
    table
}

/// `1h 2m 3s`, whole seconds.
pub(super) fn duration(seconds: f64) -> String {
    let whole = std::time::Duration::try_from_secs_f64(seconds.max(0.0)).unwrap_or_default().as_secs();
    humantime::format_duration(std::time::Duration::from_secs(whole)).to_string()
}

/// A figure, or a dash.
pub(super) fn figure(value: Option<f64>) -> String {
    value.map_or_else(|| "–".to_owned(), |value| format!("{value:.3}"))
}

/// How much `after` is above `before`.
pub(super) fn change(before: Option<f64>, after: Option<f64>) -> String {
    match (before, after) {
        (Some(before), Some(after)) => format!("{:+.3}", after - before),
        _ => "–".to_owned(),
    }
}

/// Bytes as GiB.
pub(super) fn gib(bytes: u64) -> String {
    #[expect(clippy::cast_precision_loss, reason = "one digit after the point")]
    let gib = bytes as f64 / f64::from(1u32 << 30);
    format!("{gib:.1} GiB")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_read_well() {
        assert_eq!(duration(3723.9), "1h 2m 3s");
        assert_eq!(duration(f64::NAN), "0s");
        assert_eq!(change(Some(0.4), Some(0.85)), "+0.450");
        assert_eq!((figure(None), gib(3 << 29)), ("–".to_owned(), "1.5 GiB".to_owned()));
    }
}
