//! `metrics.jsonl`: one JSON object a line, `{"step":N,"time":…,"critic/score/mean":…}`. The truth about a run.
//!
//! Written by the JSONL sink; read here for the summary and the reward curve, and cut back when a run resumes.
//! A training step and the validation after it are two lines with the same `step`.

use std::collections::BTreeMap;
use std::fs::OpenOptions;
use std::io::{BufRead, BufReader};
use std::path::Path;

use serde::{Deserialize, Serialize};

use super::{StoreError, on};

/// Mean reward of a step's chains, verl's name.
pub const REWARD_MEAN: &str = "critic/score/mean";

/// One line.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct MetricsLine {
    /// Training steps behind it.
    pub step: u64,
    /// When, seconds since 1970.
    pub time: f64,
    /// verl's names.
    #[serde(flatten)]
    pub metrics: BTreeMap<String, f64>,
}

impl MetricsLine {
    /// Mean reward, if this is a training step.
    #[must_use]
    pub fn reward(&self) -> Option<f64> {
        self.metrics.get(REWARD_MEAN).copied()
    }

    /// Validation accuracy, if this is a validation.
    #[must_use]
    pub fn validation(&self) -> Option<f64> {
        validation_accuracy(&self.metrics)
    }
}

/// Mean over data sources of `val-core/<source>/acc/mean@1`, or of `…/reward/mean@1` where rewards have no `acc`.
#[must_use]
pub fn validation_accuracy(metrics: &BTreeMap<String, f64>) -> Option<f64> {
    ["/acc/mean@1", "/reward/mean@1"].iter().find_map(|end| {
        let core = metrics.iter().filter(|(name, _)| name.starts_with("val-core/") && name.ends_with(end));
        let values: Vec<f64> = core.map(|(_, &value)| value).collect();
        #[expect(clippy::cast_precision_loss, reason = "a handful of data sources")]
        (!values.is_empty()).then(|| values.iter().sum::<f64>() / values.len() as f64)
    })
}

/// All whole lines; a torn last line (a crash while writing) and lines that do not parse are left out.
///
/// # Errors
/// When the file is there and cannot be read.
pub fn read(path: &Path) -> Result<Vec<MetricsLine>, StoreError> {
    let file = match std::fs::File::open(path) {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        file => file.map_err(on("read", path))?,
    };
    let mut lines = Vec::new();
    for line in BufReader::new(file).lines() {
        lines.extend(serde_json::from_str::<MetricsLine>(&line.map_err(on("read", path))?).ok());
    }
    Ok(lines)
}

/// Cuts the file back to a checkpoint: the first `bytes` stay as they are, and of the lines after them only
/// those up to `step` (a line of that very step may have been written after the checkpoint was).
/// Returns the length now.
///
/// # Errors
/// When the file cannot be read or cut.
pub fn cut_back(path: &Path, bytes: u64, step: u64) -> Result<u64, StoreError> {
    let file = match OpenOptions::new().read(true).write(true).open(path) {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(0),
        file => file.map_err(on("open", path))?,
    };
    let (mut keep, mut reader) = (0, BufReader::new(&file));
    loop {
        let mut line = Vec::new();
        let n = reader.read_until(b'\n', &mut line).map_err(on("read", path))? as u64;
        let within = keep + n <= bytes;
        let earlier = || serde_json::from_slice::<MetricsLine>(&line).is_ok_and(|line| line.step <= step);
        if n == 0 || line.last() != Some(&b'\n') || !(within || earlier()) {
            break;
        }
        keep += n;
    }
    drop(reader);
    file.set_len(keep).and_then(|()| file.sync_all()).map_err(on("cut back", path))?;
    Ok(keep)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(steps: &[u64]) -> String {
        let line = |&step: &u64| format!("{{\"step\":{step},\"time\":1.5,\"critic/score/mean\":0.{step}}}\n");
        steps.iter().map(line).collect()
    }

    #[test]
    fn a_resumed_run_keeps_what_its_checkpoint_knew_and_the_rest_of_its_step() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("metrics.jsonl");
        let before = text(&[1, 2]).len() as u64;
        for (steps, torn, expected) in [
            (&[1, 2, 3, 4][..], "", &[1, 2][..]),
            (&[1, 2, 2, 3], "{\"step\":4,", &[1, 2, 2]),
            (&[1, 2], "{\"step\":2", &[1, 2]),
            (&[1], "", &[1]),
        ] {
            std::fs::write(&path, text(steps) + torn).unwrap();
            let length = cut_back(&path, before, 2).unwrap();
            assert_eq!(read(&path).unwrap().iter().map(|l| l.step).collect::<Vec<_>>(), expected);
            assert_eq!(length, std::fs::metadata(&path).unwrap().len());
        }
        assert_eq!(cut_back(&dir.path().join("none"), 10, 2).unwrap(), 0);
    }

    #[test]
    fn accuracy_is_the_mean_over_sources_and_falls_back_to_the_reward() {
        let metrics = |pairs: &[(&str, f64)]| pairs.iter().map(|(k, v)| ((*k).to_owned(), *v)).collect();
        let two = metrics(&[
            ("val-core/a/acc/mean@1", 0.5),
            ("val-core/b/acc/mean@1", 1.0),
            ("val-core/a/reward/mean@1", 0.1),
        ]);
        assert_eq!(validation_accuracy(&two), Some(0.75));
        assert_eq!(validation_accuracy(&metrics(&[("val-core/a/reward/mean@1", 0.1)])), Some(0.1));
        assert_eq!(validation_accuracy(&metrics(&[(REWARD_MEAN, 0.1)])), None);
    }
}
