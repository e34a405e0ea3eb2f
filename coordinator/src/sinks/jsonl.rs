//! The JSONL sink: appends to `metrics.jsonl`, a whole line at a time.

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::path::Path;

use super::{LineKind, Sink};
use crate::store::metrics_file::MetricsLine;
use crate::store::{StoreError, on};

/// An open `metrics.jsonl`.
#[derive(Debug)]
pub struct Jsonl {
    file: File,
}

impl Jsonl {
    /// Opens the file for appending, making it when absent.
    ///
    /// # Errors
    /// When it cannot be opened.
    pub fn open(path: &Path) -> Result<Self, StoreError> {
        let file = OpenOptions::new().create(true).append(true).open(path).map_err(on("open", path))?;
        Ok(Self { file })
    }
}

impl Sink for Jsonl {
    fn name(&self) -> &'static str {
        "metrics.jsonl"
    }

    fn write(&mut self, _: LineKind, line: &MetricsLine) -> anyhow::Result<()> {
        // JSON has no NaN: serde_json writes null, which no reader of numbers expects, so such figures are left out.
        let finite = line.metrics.iter().filter(|(_, value)| value.is_finite());
        let metrics = finite.map(|(name, value)| (name.clone(), *value)).collect();
        let mut bytes = serde_json::to_vec(&MetricsLine { step: line.step, time: line.time, metrics })?;
        bytes.push(b'\n');
        self.file.write_all(&bytes)?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::metrics_file;

    #[test]
    fn lines_are_appended_and_read_back_without_what_is_no_number() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("metrics.jsonl");
        let metrics = [("a/mean".to_owned(), 0.1), ("b".to_owned(), f64::NAN)].into();
        for step in 1..=2 {
            let line = MetricsLine { step, time: 0.5, metrics: std::collections::BTreeMap::clone(&metrics) };
            Jsonl::open(&path).unwrap().write(LineKind::Step, &line).unwrap();
        }
        let text = std::fs::read_to_string(&path).unwrap();
        assert_eq!(
            text,
            "{\"step\":1,\"time\":0.5,\"a/mean\":0.1}\n{\"step\":2,\"time\":0.5,\"a/mean\":0.1}\n"
        );
        assert_eq!(metrics_file::read(&path).unwrap().len(), 2);
    }
}
