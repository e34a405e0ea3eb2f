//! How far a download is: a bar with rate and ETA on a terminal, a line now and then elsewhere.

use std::time::{Duration, Instant};

use indicatif::{BinaryBytes, ProgressBar, ProgressDrawTarget, ProgressStyle};

/// Between two lines where there is no terminal.
const LINE_EVERY: Duration = Duration::from_secs(20);

/// Counts the bytes of one model.
pub(crate) struct Meter {
    bar: ProgressBar,
    name: String,
    said: Instant,
}

impl Meter {
    /// On standard error: standard output belongs to the command.
    pub(crate) fn new(name: &str, total: u64, have: u64) -> Self {
        let bar = ProgressBar::with_draw_target(Some(total), ProgressDrawTarget::stderr_with_hz(8));
        let template =
            "{msg} [{bar:30}] {binary_bytes}/{binary_total_bytes}  {binary_bytes_per_sec}  ETA {eta}";
        if let Ok(style) = ProgressStyle::with_template(template) {
            bar.set_style(style.progress_chars("=> "));
        }
        bar.set_position(have);
        bar.reset_eta();
        let meter = Self { bar, name: name.to_owned(), said: Instant::now() };
        if meter.bar.is_hidden() && total > 0 {
            let already =
                if have > 0 { format!(", {} are there already", BinaryBytes(have)) } else { String::new() };
            eprintln!("fetching {}: {}{already}", meter.name, BinaryBytes(total));
        }
        meter
    }

    pub(crate) fn file(&self, file: &str) {
        self.bar.set_message(format!("{} {file}", self.name));
    }

    pub(crate) fn add(&mut self, bytes: u64) {
        self.bar.inc(bytes);
        if self.bar.is_hidden() && self.said.elapsed() >= LINE_EVERY {
            self.said = Instant::now();
            let (done, total) = (self.bar.position(), self.bar.length().unwrap_or_default());
            let percent = done * 100 / total.max(1);
            eprintln!(
                "fetching {}: {} of {} ({percent} %)",
                self.name,
                BinaryBytes(done),
                BinaryBytes(total)
            );
        }
    }

    /// A file begins again: what came of it does not count.
    pub(crate) fn take_back(&self, bytes: u64) {
        self.bar.set_position(self.bar.position().saturating_sub(bytes));
    }
}

impl Drop for Meter {
    fn drop(&mut self) {
        self.bar.finish_and_clear();
    }
}
