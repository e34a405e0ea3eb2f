//! Checkpoints: begun in `global_step_N.tmp`, filled by the ranks, committed by a rename.
//!
//! Commit order: `coordinator.json` (where training stands), then `manifest.json` (SHA-256 and size of every
//! other file), sync, rename, then `latest_checkpointed_iteration.txt` (verl's tracker file).
//!
//! # Invariants
//! - **K1** A folder named `global_step_N` is complete; whatever is incomplete is named `….tmp`.
//! - **K3** A folder of a later step than the one a run resumed from is of an abandoned course: it lies below
//!   `abandoned/` and is never picked.
//! - **K2** Nothing is resumed whose manifest does not match, byte for byte; the error names the file.

use std::fs::{self, File};
use std::io::Read;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::{StoreError, on, sync_folder, write_whole};
use crate::core::event::CheckpointPoint;

const MANIFEST: &str = "manifest.json";
const COORDINATOR: &str = "coordinator.json";
const TRACKER: &str = "latest_checkpointed_iteration.txt";
const PREFIX: &str = "global_step_";
const ABANDONED: &str = "abandoned";
/// What a step that is written anew displaces, until the new one stands.
const DISPLACED: &str = ".old.tmp";

/// The coordinator's part of a checkpoint.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct CoordinatorPart {
    /// Where training stands.
    pub point: CheckpointPoint,
    /// Length of `metrics.jsonl` when this was written.
    pub metrics_bytes: u64,
    /// The job's settings, as JSON; a run resumes only with settings that train the same.
    #[serde(default)]
    pub config: serde_json::Value,
}

#[derive(Debug, Serialize, Deserialize)]
struct Manifest {
    format: u32,
    files: Vec<ManifestFile>,
}

#[derive(Debug, Serialize, Deserialize)]
struct ManifestFile {
    path: PathBuf,
    bytes: u64,
    sha256: String,
}

/// Why a checkpoint cannot be written or used.
#[derive(Debug, thiserror::Error)]
pub enum CheckpointError {
    /// Reading or writing failed.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// A file of the manifest is gone.
    #[error(
        "checkpoint {}: {} is missing; restore it, or start from an older one with \
         trainer.resume_mode=resume_path trainer.resume_from_path=…", checkpoint.display(), file.display()
    )]
    Missing {
        /// The checkpoint.
        checkpoint: PathBuf,
        /// Path within it.
        file: PathBuf,
    },
    /// A file differs from what was written.
    #[error(
        "checkpoint {}: {} is damaged ({found}, written was {expected}); restore it, or start from an older one \
         with trainer.resume_mode=resume_path trainer.resume_from_path=…", checkpoint.display(), file.display()
    )]
    Damaged {
        /// The checkpoint.
        checkpoint: PathBuf,
        /// Path within it.
        file: PathBuf,
        /// What is there.
        found: String,
        /// What should be.
        expected: String,
    },
    /// A rank's file is not where it was told to write it.
    #[error(
        "checkpoint of step {step}: rank {rank} wrote {file}, but it is not in {} as this machine sees it; the run \
         folder must lie on a file system that all machines share: set trainer.default_local_dir to one",
        dir.display()
    )]
    Elsewhere {
        /// The checkpoint's step.
        step: u64,
        /// Who wrote it.
        rank: usize,
        /// The file.
        file: String,
        /// Where it should be.
        dir: PathBuf,
    },
    /// The ranks wrote nothing.
    #[error("checkpoint of step {step}: the ranks wrote no file into {}; please report this", dir.display())]
    Empty {
        /// Its step.
        step: u64,
        /// Where the files should be.
        dir: PathBuf,
    },
}

/// The checkpoints of one run.
#[derive(Debug, Clone)]
pub struct Checkpoints {
    dir: PathBuf,
    keep: Option<usize>,
}

impl Checkpoints {
    /// Opens the folder, making it when absent, and removes what an interrupted run left half-written.
    ///
    /// # Errors
    /// When the folder cannot be made or read.
    pub fn open(dir: &Path, keep: Option<u32>) -> Result<Self, CheckpointError> {
        fs::create_dir_all(dir).map_err(on("make the checkpoint folder", dir))?;
        restore_displaced(dir)?;
        for entry in fs::read_dir(dir).map_err(on("list", dir))? {
            let path = entry.map_err(on("list", dir))?.path();
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            if name.starts_with(PREFIX) && name.ends_with(".tmp") {
                tracing::warn!(path = %path.display(), "removing a checkpoint that was never completed");
                fs::remove_dir_all(&path).map_err(on("remove", &path))?;
            }
        }
        Ok(Self { dir: dir.to_owned(), keep: keep.map(|n| n as usize) })
    }

    /// The folder of all of them.
    #[must_use]
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Where the committed checkpoint of `step` lies.
    #[must_use]
    pub fn path(&self, step: u64) -> PathBuf {
        self.dir.join(format!("{PREFIX}{step}"))
    }

    /// Where the checkpoint of `step` is written before it is committed.
    #[must_use]
    pub fn beside(&self, step: u64) -> PathBuf {
        self.dir.join(format!("{PREFIX}{step}.tmp"))
    }

    /// Makes an empty folder for the ranks to write `step` into.
    ///
    /// # Errors
    /// When it cannot be made.
    pub fn begin(&self, step: u64) -> Result<PathBuf, CheckpointError> {
        let path = self.beside(step);
        if path.exists() {
            fs::remove_dir_all(&path).map_err(on("remove", &path))?;
        }
        fs::create_dir_all(&path).map_err(on("make", &path))?;
        Ok(path)
    }

    /// Completes a checkpoint that the ranks have written, each the files it names: adds our part and the manifest,
    /// syncs, renames, and removes the oldest beyond `max_actor_ckpt_to_keep`.
    ///
    /// # Errors
    /// When a file cannot be read or written, one that a rank names is not there, or the ranks wrote none. Nothing
    /// that was committed is lost.
    pub fn commit(
        &self,
        part: &CoordinatorPart,
        written: &[Vec<String>],
    ) -> Result<PathBuf, CheckpointError> {
        let (step, from) = (part.point.step, self.beside(part.point.step));
        let there = if from.is_dir() { files_below(&from)? } else { Vec::new() };
        for (rank, files) in written.iter().enumerate() {
            if let Some(file) = files.iter().find(|file| !there.iter().any(|path| path == Path::new(file))) {
                return Err(CheckpointError::Elsewhere { step, rank, file: file.clone(), dir: from });
            }
        }
        if there.is_empty() {
            return Err(CheckpointError::Empty { step, dir: from });
        }
        write_json(&from.join(COORDINATOR), part)?;
        let files = files_below(&from)?;
        let files = files.into_iter().map(|file| entry(&from, file)).collect::<Result<_, _>>()?;
        write_json(&from.join(MANIFEST), &Manifest { format: 1, files })?;
        let (to, old) = (self.path(step), self.dir.join(format!("{PREFIX}{step}{DISPLACED}")));
        if to.exists() {
            // A step that is written anew: the old one is out of the way, but whole, until the new one stands.
            if old.exists() {
                fs::remove_dir_all(&old).map_err(on("remove", &old))?;
            }
            fs::rename(&to, &old).map_err(on("move aside", &to))?;
        }
        fs::rename(&from, &to).map_err(on("rename into place", &from))?;
        sync_folder(&self.dir).map_err(on("sync", &self.dir))?;
        write_whole(&self.dir.join(TRACKER), step.to_string().as_bytes())?;
        // The new checkpoint stands: what cannot be cleaned up is no reason to lose the job.
        let cleaned = match old.exists() {
            true => fs::remove_dir_all(&old).map_err(on("remove", &old)).map_err(CheckpointError::from),
            false => Ok(()),
        };
        if let Err(error) = cleaned.and_then(|()| self.prune()) {
            let error = format!("{:#}", anyhow::Error::from(error));
            tracing::warn!(step, error, "the checkpoint is committed, but an older one could not be removed");
        }
        Ok(to)
    }

    /// Moves the checkpoints after `step` below `abandoned/`, for a run that goes on from `step` (K3); says
    /// which steps.
    ///
    /// # Errors
    /// When one cannot be moved.
    pub fn abandon_after(&self, step: u64) -> Result<Vec<u64>, CheckpointError> {
        let later: Vec<u64> = self.steps()?.into_iter().filter(|&later| later > step).collect();
        if later.is_empty() {
            return Ok(later);
        }
        let abandoned = self.dir.join(ABANDONED);
        fs::create_dir_all(&abandoned).map_err(on("make", &abandoned))?;
        for &step in &later {
            let name = format!("{PREFIX}{step}");
            let names = std::iter::once(name.clone()).chain((1u32..).map(|n| format!("{name}.{n}")));
            if let Some(free) = names.map(|name| abandoned.join(name)).find(|path| !path.exists()) {
                let path = self.path(step);
                fs::rename(&path, &free).map_err(on("move aside", &path))?;
            }
        }
        sync_folder(&self.dir).map_err(on("sync", &self.dir))?;
        write_whole(&self.dir.join(TRACKER), step.to_string().as_bytes())?;
        Ok(later)
    }

    fn prune(&self) -> Result<(), CheckpointError> {
        let Some(keep) = self.keep else { return Ok(()) };
        let steps = self.steps()?;
        for &step in &steps[..steps.len().saturating_sub(keep)] {
            // Renamed first, so that an interrupted removal never looks like a checkpoint (K1).
            let (path, dying) = (self.path(step), self.beside(step));
            fs::rename(&path, &dying).map_err(on("remove", &path))?;
            fs::remove_dir_all(&dying).map_err(on("remove", &dying))?;
        }
        Ok(())
    }

    /// Steps that have a checkpoint, oldest first.
    ///
    /// # Errors
    /// When the folder cannot be read.
    pub fn steps(&self) -> Result<Vec<u64>, CheckpointError> {
        Ok(steps_in(&self.dir)?)
    }

    /// The newest checkpoint, unverified.
    ///
    /// # Errors
    /// When the folder cannot be read.
    pub fn newest(&self) -> Result<Option<PathBuf>, CheckpointError> {
        Ok(self.steps()?.last().map(|&step| self.path(step)))
    }
}

/// Puts back a checkpoint that was to be replaced by one that never came, because the head died between the two
/// renames.
///
/// # Errors
/// When the folder cannot be read or the checkpoint not be renamed.
pub fn restore_displaced(dir: &Path) -> Result<(), StoreError> {
    let entries = match fs::read_dir(dir) {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(()),
        entries => entries.map_err(on("list", dir))?,
    };
    for entry in entries {
        let path = entry.map_err(on("list", dir))?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        let Some(name) = name.strip_suffix(DISPLACED).filter(|name| name.starts_with(PREFIX)) else {
            continue;
        };
        let to = dir.join(name);
        if !to.exists() {
            fs::rename(&path, &to).map_err(on("put back", &path))?;
        }
    }
    Ok(())
}

/// Steps with a committed checkpoint in `dir`, oldest first; none when the folder is absent.
///
/// # Errors
/// When the folder cannot be read.
pub fn steps_in(dir: &Path) -> Result<Vec<u64>, StoreError> {
    let mut steps = Vec::new();
    let entries = match fs::read_dir(dir) {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(steps),
        entries => entries.map_err(on("list", dir))?,
    };
    for entry in entries {
        let name = entry.map_err(on("list", dir))?.file_name();
        let step = name.to_str().and_then(|name| name.strip_prefix(PREFIX));
        steps.extend(step.and_then(|number| number.parse::<u64>().ok()));
    }
    steps.sort_unstable();
    Ok(steps)
}

/// Checks every file of a checkpoint against its manifest and reads the coordinator's part (K2).
///
/// # Errors
/// Names the first file that is missing or differs.
pub fn verify(checkpoint: &Path) -> Result<CoordinatorPart, CheckpointError> {
    let manifest: Manifest = read_json(checkpoint, MANIFEST)?;
    for listed in &manifest.files {
        let file = checkpoint.join(&listed.path);
        if !file.is_file() {
            return Err(CheckpointError::Missing {
                checkpoint: checkpoint.to_owned(),
                file: listed.path.clone(),
            });
        }
        let (bytes, sha256) = digest(&file)?;
        if bytes != listed.bytes || sha256 != listed.sha256 {
            let say =
                |bytes: u64, sha: &str| format!("{bytes} bytes, sha256 {}…", sha.get(..12).unwrap_or(sha));
            return Err(CheckpointError::Damaged {
                checkpoint: checkpoint.to_owned(),
                file: listed.path.clone(),
                found: say(bytes, &sha256),
                expected: say(listed.bytes, &listed.sha256),
            });
        }
    }
    read_json(checkpoint, COORDINATOR)
}

fn read_json<T: for<'de> Deserialize<'de>>(checkpoint: &Path, name: &str) -> Result<T, CheckpointError> {
    let path = checkpoint.join(name);
    let bytes = match fs::read(&path) {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
            return Err(CheckpointError::Missing { checkpoint: checkpoint.to_owned(), file: name.into() });
        }
        bytes => bytes.map_err(on("read", &path))?,
    };
    serde_json::from_slice(&bytes).map_err(|e| CheckpointError::Damaged {
        checkpoint: checkpoint.to_owned(),
        file: name.into(),
        found: e.to_string(),
        expected: "valid JSON".to_owned(),
    })
}

fn write_json(path: &Path, value: &impl Serialize) -> Result<(), StoreError> {
    let json = serde_json::to_vec_pretty(value).map_err(|e| on("write", path)(e.into()))?;
    write_whole(path, &json)
}

/// All files below `root`, as paths relative to it, sorted.
fn files_below(root: &Path) -> Result<Vec<PathBuf>, StoreError> {
    let (mut files, mut folders) = (Vec::new(), vec![root.to_owned()]);
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder).map_err(on("list", &folder))? {
            let path = entry.map_err(on("list", &folder))?.path();
            if path.is_dir() {
                folders.push(path);
            } else if let Ok(relative) = path.strip_prefix(root) {
                files.push(relative.to_owned());
            }
        }
    }
    files.sort();
    Ok(files)
}

fn entry(root: &Path, path: PathBuf) -> Result<ManifestFile, StoreError> {
    let (bytes, sha256) = digest(&root.join(&path))?;
    Ok(ManifestFile { path, bytes, sha256 })
}

/// Size and SHA-256 of a file, synced to disk on the way.
fn digest(path: &Path) -> Result<(u64, String), StoreError> {
    let mut file = File::open(path).map_err(on("read", path))?;
    let (mut hasher, mut bytes, mut buffer) = (Sha256::new(), 0, vec![0; 1 << 20]);
    loop {
        let n = file.read(&mut buffer).map_err(on("read", path))?;
        if n == 0 {
            break;
        }
        hasher.update(&buffer[..n]);
        bytes += n as u64;
    }
    file.sync_all().map_err(on("sync", path))?;
    Ok((bytes, hex::encode(hasher.finalize())))
}

#[cfg(test)]
mod tests {
    use agentfly_common::ids::PolicyVersion;

    use super::*;

    fn part(step: u64) -> CoordinatorPart {
        let point = CheckpointPoint {
            step,
            policy_version: PolicyVersion(step),
            weights_hash: "abc".into(),
            cursor: crate::data::Cursor { epoch: 1, position: 16 },
            seed: 7,
            total_steps: 40,
        };
        CoordinatorPart { point, metrics_bytes: 123, config: serde_json::json!({"seed": 7}) }
    }

    fn written(checkpoints: &Checkpoints, step: u64) -> PathBuf {
        let dir = checkpoints.begin(step).unwrap();
        fs::create_dir_all(dir.join("actor/huggingface")).unwrap();
        fs::write(dir.join("actor/huggingface/model.safetensors"), [7; 1000]).unwrap();
        fs::write(dir.join("optimizer.safetensors"), [8; 500]).unwrap();
        let files = ["actor/huggingface/model.safetensors", "optimizer.safetensors"];
        checkpoints.commit(&part(step), &files.map(|file| vec![file.to_owned()])).unwrap()
    }

    #[test]
    fn what_is_committed_is_found_verified_and_tracked() {
        let root = tempfile::tempdir().unwrap();
        let checkpoints = Checkpoints::open(root.path(), None).unwrap();
        assert_eq!(checkpoints.newest().unwrap(), None);
        written(&checkpoints, 9);
        let newest = written(&checkpoints, 20);
        assert_eq!(checkpoints.newest().unwrap(), Some(newest.clone()));
        assert_eq!(verify(&newest).unwrap(), part(20));
        assert_eq!(fs::read_to_string(root.path().join(TRACKER)).unwrap(), "20");
        let listed: serde_json::Value =
            serde_json::from_slice(&fs::read(newest.join(MANIFEST)).unwrap()).unwrap();
        assert_eq!(listed["files"].as_array().unwrap().len(), 3);
        assert_eq!(listed["files"][0]["path"], "actor/huggingface/model.safetensors");
    }

    #[test]
    fn a_flipped_byte_or_a_missing_file_is_named() {
        let root = tempfile::tempdir().unwrap();
        let checkpoints = Checkpoints::open(root.path(), None).unwrap();
        let dir = written(&checkpoints, 1);
        let model = dir.join("actor/huggingface/model.safetensors");
        let mut bytes = fs::read(&model).unwrap();
        bytes[500] ^= 1;
        fs::write(&model, bytes).unwrap();
        let error = verify(&dir).unwrap_err();
        assert!(matches!(error, CheckpointError::Damaged { .. }));
        assert!(error.to_string().contains("actor/huggingface/model.safetensors is damaged"), "{error}");
        fs::remove_file(&model).unwrap();
        let error = verify(&dir).unwrap_err().to_string();
        assert!(error.contains("model.safetensors is missing"), "{error}");
        fs::remove_file(dir.join(MANIFEST)).unwrap();
        assert!(verify(&dir).unwrap_err().to_string().contains("manifest.json is missing"));
    }

    #[test]
    fn what_was_never_completed_goes_and_the_oldest_go_beyond_those_to_keep() {
        let root = tempfile::tempdir().unwrap();
        let checkpoints = Checkpoints::open(root.path(), Some(2)).unwrap();
        let begun = checkpoints.begin(5).unwrap();
        fs::write(begun.join("half"), "x").unwrap();
        let checkpoints = Checkpoints::open(root.path(), Some(2)).unwrap();
        assert!(!begun.exists());
        assert!(checkpoints.steps().unwrap().is_empty());
        for step in [2, 10, 30] {
            written(&checkpoints, step);
        }
        assert_eq!(checkpoints.steps().unwrap(), [10, 30]);
        assert_eq!(fs::read_dir(root.path()).unwrap().count(), 3, "two checkpoints and the tracker");
    }

    #[test]
    fn a_step_written_anew_replaces_the_old_one_and_later_ones_are_abandoned() {
        let root = tempfile::tempdir().unwrap();
        let checkpoints = Checkpoints::open(root.path(), None).unwrap();
        for step in [1, 2, 2, 3] {
            verify(&written(&checkpoints, step)).unwrap();
        }
        assert_eq!(fs::read_dir(root.path()).unwrap().count(), 4, "three checkpoints and the tracker");
        assert_eq!(checkpoints.abandon_after(1).unwrap(), [2, 3]);
        assert_eq!(checkpoints.steps().unwrap(), [1]);
        assert_eq!(fs::read_to_string(root.path().join(TRACKER)).unwrap(), "1");
        written(&checkpoints, 2);
        assert_eq!(checkpoints.abandon_after(1).unwrap(), [2]);
        for kept in ["global_step_2", "global_step_2.1", "global_step_3"] {
            verify(&root.path().join(ABANDONED).join(kept)).unwrap();
        }
        assert!(checkpoints.abandon_after(1).unwrap().is_empty());
    }

    #[test]
    fn a_checkpoint_whose_replacement_never_came_is_put_back() {
        let root = tempfile::tempdir().unwrap();
        let checkpoints = Checkpoints::open(root.path(), None).unwrap();
        let path = written(&checkpoints, 5);
        fs::rename(&path, root.path().join(format!("{PREFIX}5{DISPLACED}"))).unwrap();
        let checkpoints = Checkpoints::open(root.path(), None).unwrap();
        assert_eq!(checkpoints.steps().unwrap(), [5]);
        verify(&path).unwrap();
    }

    #[test]
    fn a_rank_that_wrote_nothing_is_a_fault_of_ours() {
        let root = tempfile::tempdir().unwrap();
        let checkpoints = Checkpoints::open(root.path(), None).unwrap();
        checkpoints.begin(3).unwrap();
        let nothing = checkpoints.commit(&part(3), &[Vec::new(), Vec::new()]).unwrap_err();
        assert!(matches!(nothing, CheckpointError::Empty { step: 3, .. }));
    }

    #[test]
    fn a_file_that_a_rank_wrote_on_a_disk_of_its_own_is_missed_before_anything_is_committed() {
        let root = tempfile::tempdir().unwrap();
        let checkpoints = Checkpoints::open(root.path(), None).unwrap();
        let dir = checkpoints.begin(4).unwrap();
        fs::write(dir.join("one"), "x").unwrap();
        let files = [vec!["one".to_owned()], vec!["two".to_owned()]];
        let error = checkpoints.commit(&part(4), &files).unwrap_err().to_string();
        assert!(error.contains("rank 1 wrote two, but it is not in"), "{error}");
        assert!(checkpoints.steps().unwrap().is_empty());
    }
}
