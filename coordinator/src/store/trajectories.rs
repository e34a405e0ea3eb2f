//! Trajectories of every step as zstd JSON Lines, one chain a line: `zstdcat step_000001.jsonl.zst | jq`.
//!
//! `step_N` holds training chains, `val_step_N` validation chains. A file appears whole or not at all. Called by
//! the recorder.

use std::io::Write;
use std::path::{Path, PathBuf};

use agentfly_common::ids::{ChainKey, PolicyVersion, Purpose};
use agentfly_common::trajectory::{Message, Outcome, Reward, Timings};
use serde::{Deserialize, Serialize};

use super::{StoreError, on};
use crate::core::event::JudgedTrajectory;

/// zstd's default level: token ids shrink to about a quarter at some 200 MB/s.
const LEVEL: i32 = 3;

/// One line of a trajectory file. T tokens.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct TrajectoryLine {
    /// Which chain.
    #[serde(flatten)]
    pub key: ChainKey,
    /// The data row's `id`.
    pub prompt_id: String,
    /// The data row's position in its set.
    pub row: usize,
    /// The weights that sampled it.
    pub policy_version: PolicyVersion,
    /// What it earned.
    pub reward: Reward,
    /// GRPO's number for all its tokens; null in validation.
    pub advantage: Option<f64>,
    /// How it ended.
    pub outcome: Outcome,
    /// Its text.
    pub messages: Vec<Message>,
    /// Length T.
    pub token_ids: Vec<u32>,
    /// 1 on sampled tokens; length T.
    pub loss_mask: Vec<u8>,
    /// Log-probs of the rollout, 0 where the mask is 0; length T.
    pub log_probs: Vec<f32>,
    /// Seconds by phase.
    pub timings: Timings,
}

impl From<JudgedTrajectory> for TrajectoryLine {
    fn from(judged: JudgedTrajectory) -> Self {
        let t = judged.trajectory;
        Self {
            key: t.key,
            prompt_id: t.prompt_id,
            row: judged.row,
            policy_version: t.policy_version,
            reward: t.reward,
            advantage: judged.advantage,
            outcome: t.outcome,
            messages: t.messages,
            token_ids: t.token_ids,
            loss_mask: t.loss_mask.into_iter().map(u8::from).collect(),
            log_probs: t.log_probs,
            timings: t.timings,
        }
    }
}

/// The file of one step's chains.
#[must_use]
pub fn file_name(purpose: Purpose, step: u64) -> String {
    match purpose {
        Purpose::Train => format!("step_{step:06}.jsonl.zst"),
        Purpose::Validation => format!("val_step_{step:06}.jsonl.zst"),
    }
}

/// Writes one step's chains into `dir` and returns the file's path.
///
/// # Errors
/// When the folder is not writable or the disk is full.
pub fn write(
    dir: &Path,
    purpose: Purpose,
    step: u64,
    lines: &[TrajectoryLine],
) -> Result<PathBuf, StoreError> {
    let path = dir.join(file_name(purpose, step));
    let write = || -> std::io::Result<()> {
        let beside = tempfile::Builder::new().prefix(".new-").tempfile_in(dir)?;
        let mut encoder = zstd::Encoder::new(std::io::BufWriter::new(beside.as_file()), LEVEL)?;
        for line in lines {
            serde_json::to_writer(&mut encoder, line)?;
            encoder.write_all(b"\n")?;
        }
        encoder.finish()?.flush()?;
        let mode = std::os::unix::fs::PermissionsExt::from_mode(0o644);
        beside.as_file().set_permissions(mode)?;
        beside.persist(&path).map_err(|e| e.error)?;
        Ok(())
    };
    write().map_err(on("write", &path))?;
    Ok(path)
}

/// Removes the files of steps after `step`: a resumed run makes them anew.
///
/// # Errors
/// When the folder cannot be listed or a file not removed.
pub fn remove_after(dir: &Path, step: u64) -> Result<usize, StoreError> {
    let mut removed = 0;
    for entry in std::fs::read_dir(dir).map_err(on("list", dir))? {
        let path = entry.map_err(on("list", dir))?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        let number =
            name.strip_suffix(".jsonl.zst").and_then(|n| n.rsplit('_').next()).and_then(|n| n.parse().ok());
        if number.is_some_and(|n: u64| n > step) {
            std::fs::remove_file(&path).map_err(on("remove", &path))?;
            removed += 1;
        }
    }
    Ok(removed)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(step: u64, purpose: Purpose) -> TrajectoryLine {
        TrajectoryLine {
            key: ChainKey { purpose, step, group: 0, chain: 1 },
            prompt_id: "q".into(),
            row: 3,
            policy_version: PolicyVersion(0),
            reward: Reward { value: 0.5, parts: [("acc".to_owned(), 1.0)].into() },
            advantage: Some(-1.25),
            outcome: Outcome::InfrastructureFault { cause: "gone".into() },
            messages: Vec::new(),
            token_ids: vec![1, 2, 3],
            loss_mask: vec![0, 1, 1],
            log_probs: vec![0.0, -0.5, -0.25],
            timings: Timings::default(),
        }
    }

    #[test]
    fn what_is_written_is_read_back_by_any_zstd() {
        let dir = tempfile::tempdir().unwrap();
        let lines = vec![line(7, Purpose::Train); 3];
        let path = write(dir.path(), Purpose::Train, 7, &lines).unwrap();
        assert!(path.ends_with("step_000007.jsonl.zst"));
        let text = String::from_utf8(zstd::decode_all(std::fs::File::open(path).unwrap()).unwrap()).unwrap();
        let back: Vec<TrajectoryLine> = text.lines().map(|l| serde_json::from_str(l).unwrap()).collect();
        assert_eq!(back, lines);
        assert!(
            text.starts_with(r#"{"purpose":"train","step":7,"group":0,"chain":1,"prompt_id":"q""#),
            "{text}"
        );
    }

    #[test]
    fn files_of_an_abandoned_future_go() {
        let dir = tempfile::tempdir().unwrap();
        for step in 1..=4 {
            write(dir.path(), Purpose::Train, step, &[]).unwrap();
            write(dir.path(), Purpose::Validation, step, &[]).unwrap();
        }
        assert_eq!(remove_after(dir.path(), 2).unwrap(), 4);
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 4);
    }
}
