//! A run's folder: one job at a time, never overwritten silently, resumed where its checkpoint says.
//!
//! Opened when a job is submitted; the lock is held until the job is over. Whether a job resumes is decided
//! here, once, and handed to the core as a [`ResumePoint`].

use std::fs::{self, File, OpenOptions};
use std::io::{Read, Seek, Write};
use std::path::{Path, PathBuf};

use agentfly_common::config::{Config, ResumeMode, differences};
use rustix::fs::FlockOperation;

use super::checkpoints::{self, CheckpointError, Checkpoints, CoordinatorPart};
use super::{StoreError, metrics_file, on, trajectories, write_whole};
use crate::core::event::ResumePoint;

/// Why a run's folder cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum RunDirError {
    /// Reading or writing failed.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The checkpoint to resume from cannot be used, or the checkpoint folder not be opened.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// The checkpoint to resume from is of another training.
    #[error(
        "{} cannot be resumed with these settings: {differences}; give the settings it was trained with, or start \
         anew with trainer.resume_mode=disable", checkpoint.display()
    )]
    Differs {
        /// The checkpoint.
        checkpoint: PathBuf,
        /// What differs, with both values.
        differences: String,
    },
    /// The checkpoint to resume from lies where earlier results are moved aside.
    #[error(
        "{} lies in {}, whose earlier results would be moved aside, and the checkpoint with them; give another \
         trainer.experiment_name, or copy the checkpoint elsewhere", checkpoint.display(), folder.display()
    )]
    InTheWay {
        /// The checkpoint.
        checkpoint: PathBuf,
        /// The run's folder, or its folder of checkpoints.
        folder: PathBuf,
    },
    /// Another job writes it.
    #[error(
        "{} is being written by {holder}; wait for it, cancel it, or give another trainer.experiment_name",
        path.display()
    )]
    Busy {
        /// The folder.
        path: PathBuf,
        /// The job and its process.
        holder: String,
    },
}

/// One run's folder, locked.
#[derive(Debug)]
pub struct RunDir {
    path: PathBuf,
    checkpoints: Checkpoints,
    _lock: File,
}

/// A folder ready for its job.
#[derive(Debug)]
pub struct Opened {
    /// The folder.
    pub run_dir: RunDir,
    /// Where to go on, if the run resumes.
    pub resume: Option<ResumePoint>,
    /// What was decided, for the job's log.
    pub notes: Vec<String>,
}

/// A checkpoint that is to be resumed.
struct Found {
    dir: PathBuf,
    part: CoordinatorPart,
}

impl RunDir {
    /// Locks the run's folder, decides whether to resume, moves earlier results aside when the run starts anew,
    /// and writes `config.json`. Nothing is touched when the checkpoint is at step `total_steps` already.
    ///
    /// # Errors
    /// When another job holds it, the checkpoint to resume from is damaged or of another training, or the disk
    /// refuses.
    pub fn open(config: &Config, total_steps: u64, holder: &str) -> Result<Opened, RunDirError> {
        let path = config.trainer.run_dir();
        let checkpoint_dir = config.trainer.checkpoint_dir();
        let lock = lock(&path, holder)?;
        let mut notes = Vec::new();
        let found = find_checkpoint(config, &checkpoint_dir, &mut notes)?;
        let continues = match &found {
            Some(found) => is_directly_in(&found.dir, &checkpoint_dir)?,
            None => false,
        };
        let is_done = found.as_ref().is_some_and(|found| found.part.point.step >= total_steps);
        if !continues && !is_done {
            for folder in [&path, &checkpoint_dir] {
                if let Some(found) = &found
                    && resolved(&found.dir)?.starts_with(resolved(folder)?)
                {
                    let (checkpoint, folder) = (found.dir.clone(), folder.clone());
                    return Err(RunDirError::InTheWay { checkpoint, folder });
                }
                if let Some(aside) = move_aside(folder)? {
                    notes.push(format!("earlier results were moved to {}", aside.display()));
                }
            }
        }
        for folder in [path.clone(), path.join("trajectories"), path.join("logs")] {
            fs::create_dir_all(&folder).map_err(on("make", &folder))?;
        }
        let checkpoints = Checkpoints::open(&checkpoint_dir, config.trainer.max_actor_ckpt_to_keep)?;
        let run_dir = Self { path, checkpoints, _lock: lock };
        if !is_done {
            if let Some(found) = &found {
                run_dir.go_on(found, continues, &mut notes)?;
            }
            let json = serde_json::to_vec_pretty(config).map_err(|e| on("write", &run_dir.path)(e.into()))?;
            write_whole(&run_dir.path.join("config.json"), &json)?;
        }
        let resume = found.map(|Found { dir, part: CoordinatorPart { point, .. } }| ResumePoint {
            dir,
            step: point.step,
            policy_version: point.policy_version,
            weights_hash: point.weights_hash,
            cursor: point.cursor,
        });
        Ok(Opened { run_dir, resume, notes })
    }

    /// Takes the folder back to where the checkpoint stands; what came later is abandoned.
    fn go_on(&self, found: &Found, continues: bool, notes: &mut Vec<String>) -> Result<(), RunDirError> {
        let step = found.part.point.step;
        notes.push(format!("resumes after step {step} from {}", found.dir.display()));
        if !continues {
            return Ok(());
        }
        self.cut_back(&found.part)?;
        let abandoned = self.checkpoints.abandon_after(step)?;
        if !abandoned.is_empty() {
            let steps: Vec<_> = abandoned.iter().map(ToString::to_string).collect();
            notes.push(format!(
                "the checkpoints of steps {} are of an abandoned course and were moved to {}",
                steps.join(", "),
                self.checkpoints.dir().join("abandoned").display()
            ));
        }
        Ok(())
    }

    fn cut_back(&self, part: &CoordinatorPart) -> Result<(), RunDirError> {
        metrics_file::cut_back(&self.metrics(), part.metrics_bytes, part.point.step)?;
        trajectories::remove_after(&self.trajectories(), part.point.step)?;
        for name in ["summary.json", "reward_curve.svg"] {
            let path = self.path.join(name);
            match fs::remove_file(&path) {
                Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
                    return Err(on("remove", &path)(e).into());
                }
                _ => {}
            }
        }
        Ok(())
    }

    /// The folder.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Its checkpoints.
    #[must_use]
    pub fn checkpoints(&self) -> &Checkpoints {
        &self.checkpoints
    }

    /// `metrics.jsonl`.
    #[must_use]
    pub fn metrics(&self) -> PathBuf {
        self.path.join("metrics.jsonl")
    }

    /// The folder of trajectory files.
    #[must_use]
    pub fn trajectories(&self) -> PathBuf {
        self.path.join("trajectories")
    }
}

/// The checkpoint that `trainer.resume_mode` asks for, verified. One of another training is an error if it was
/// named, and passed over with a note if it only lay there.
fn find_checkpoint(
    config: &Config,
    dir: &Path,
    notes: &mut Vec<String>,
) -> Result<Option<Found>, RunDirError> {
    let checkpoint = match config.trainer.resume_mode {
        ResumeMode::Disable => None,
        ResumeMode::ResumePath => config.trainer.resume_from_path.clone(),
        ResumeMode::Auto => {
            checkpoints::restore_displaced(dir)?;
            checkpoints::steps_in(dir)?.last().map(|step| dir.join(format!("global_step_{step}")))
        }
    };
    let Some(checkpoint) = checkpoint else {
        return Ok(None);
    };
    let part = checkpoints::verify(&checkpoint)?;
    let Some(differences) = what_differs(&part, config, &checkpoint)? else {
        return Ok(Some(Found { dir: checkpoint, part }));
    };
    if config.trainer.resume_mode == ResumeMode::ResumePath {
        return Err(RunDirError::Differs { checkpoint, differences });
    }
    notes.push(format!(
        "starts anew: the run in {} has other settings ({differences})",
        config.trainer.run_dir().display()
    ));
    Ok(None)
}

/// Whether a checkpoint is one of those in `folder`, by whatever name: what was abandoned below it is not.
fn is_directly_in(checkpoint: &Path, folder: &Path) -> Result<bool, StoreError> {
    Ok(resolved(checkpoint)?.parent() == Some(&resolved(folder)?))
}

/// A path without links and dots; as it is where nothing is.
fn resolved(path: &Path) -> Result<PathBuf, StoreError> {
    match fs::canonicalize(path) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(path.to_owned()),
        found => found.map_err(on("resolve", path)),
    }
}

/// Which settings of the checkpoint differ in a way that changes what is trained, in words.
fn what_differs(
    part: &CoordinatorPart,
    config: &Config,
    checkpoint: &Path,
) -> Result<Option<String>, StoreError> {
    if !part.config.is_object() {
        return Ok(Some("its checkpoint does not say which settings it was trained with".to_owned()));
    }
    let found =
        differences(&part.config, config).map_err(|e| on("compare settings with", checkpoint)(e.into()))?;
    let words: Vec<_> = found.iter().map(ToString::to_string).collect();
    Ok((!words.is_empty()).then(|| words.join("; ")))
}

/// Takes the lock beside the folder (the folder itself may be moved aside); it is freed with the file, and by
/// the kernel when the process dies.
fn lock(path: &Path, holder: &str) -> Result<File, RunDirError> {
    let parent = path.parent().unwrap_or(Path::new("."));
    fs::create_dir_all(parent).map_err(on("make", parent))?;
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let lock_path = parent.join(format!(".{name}.lock"));
    let opened = OpenOptions::new().create(true).truncate(false).read(true).write(true).open(&lock_path);
    let mut file = opened.map_err(on("open the lock", &lock_path))?;
    if rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive).is_err() {
        let mut holder = String::new();
        file.read_to_string(&mut holder).map_err(on("read the lock", &lock_path))?;
        return Err(RunDirError::Busy { path: path.to_owned(), holder: holder.trim().to_owned() });
    }
    let mut write = || -> std::io::Result<()> {
        file.set_len(0)?;
        file.rewind()?;
        writeln!(file, "{holder} (process {})", std::process::id())
    };
    write().map_err(on("write the lock", &lock_path))?;
    Ok(file)
}

/// Renames a folder that holds results to `<name>.1`, `.2`, …; says to what.
fn move_aside(path: &Path) -> Result<Option<PathBuf>, StoreError> {
    let holds = |name: &str| fs::metadata(path.join(name)).is_ok_and(|found| found.len() > 0);
    let has_results = holds("metrics.jsonl")
        || holds("summary.json")
        || !checkpoints::steps_in(path)?.is_empty()
        || !checkpoints::steps_in(&path.join("checkpoints"))?.is_empty();
    if !has_results {
        return Ok(None);
    }
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let free = (1u32..).map(|n| path.with_file_name(format!("{name}.{n}"))).find(|aside| !aside.exists());
    let Some(aside) = free else { return Ok(None) };
    fs::rename(path, &aside).map_err(on("move aside", path))?;
    Ok(Some(aside))
}

#[cfg(test)]
mod tests {
    use agentfly_common::config::resolve;

    use super::*;

    fn config(root: &Path, more: &[&str]) -> Config {
        let mut overrides = vec![format!("trainer.run_dir={}/runs/p/e", root.display())];
        overrides.extend(more.iter().map(|&setting| setting.to_owned()));
        resolve(&overrides, None, []).unwrap().config
    }

    fn checkpointed(opened: &Opened, config: &Config, step: u64) {
        let dir = opened.run_dir.checkpoints().begin(step).unwrap();
        fs::write(dir.join("model.safetensors"), "weights").unwrap();
        let point = crate::core::event::CheckpointPoint {
            step,
            policy_version: agentfly_common::ids::PolicyVersion(step),
            weights_hash: "h".into(),
            cursor: crate::data::Cursor { epoch: 0, position: 8 },
            seed: 1,
            total_steps: 4,
        };
        let config = serde_json::to_value(config).unwrap();
        let metrics_bytes = fs::metadata(opened.run_dir.metrics()).unwrap().len();
        opened.run_dir.checkpoints().commit(&CoordinatorPart { point, metrics_bytes, config }, &[]).unwrap();
    }

    #[test]
    fn a_run_resumes_where_its_checkpoint_stands_and_forgets_what_came_after() {
        let root = tempfile::tempdir().unwrap();
        let config = config(root.path(), &[]);
        let first = RunDir::open(&config, 4, "job-1").unwrap();
        assert!(first.resume.is_none() && first.notes.is_empty());
        let metrics = first.run_dir.metrics();
        fs::write(&metrics, "{\"step\":1,\"time\":0.0}\n{\"step\":2,\"time\":0.0}\n").unwrap();
        checkpointed(&first, &config, 2);
        fs::write(&metrics, fs::read_to_string(&metrics).unwrap() + "{\"step\":3,\"time\":0.0}\n").unwrap();
        drop(first);

        let again = RunDir::open(&config, 4, "job-2").unwrap();
        let resume = again.resume.unwrap();
        assert_eq!((resume.step, resume.cursor.position), (2, 8));
        assert_eq!(metrics_file::read(&metrics).unwrap().len(), 2);
        assert!(again.notes[0].starts_with("resumes after step 2 from "), "{:?}", again.notes);
    }

    #[test]
    fn results_are_moved_aside_and_never_overwritten() {
        let root = tempfile::tempdir().unwrap();
        let anew = config(root.path(), &["trainer.resume_mode=disable"]);
        for aside in [None, Some("e.1"), Some("e.2")] {
            let opened = RunDir::open(&anew, 4, "job").unwrap();
            assert!(opened.resume.is_none());
            match aside {
                None => assert!(opened.notes.is_empty()),
                Some(name) => {
                    assert!(opened.notes[0].ends_with(name), "{:?}", opened.notes);
                    let kept = root.path().join("runs/p").join(name);
                    assert!(kept.join("checkpoints/global_step_1/manifest.json").is_file());
                }
            }
            fs::write(opened.run_dir.metrics(), "{\"step\":1,\"time\":0.0}\n").unwrap();
            checkpointed(&opened, &anew, 1);
        }
    }

    /// A finished run of four steps with checkpoints of steps 2 and 4.
    fn finished_run(config: &Config) -> PathBuf {
        let opened = RunDir::open(config, 4, "job-1").unwrap();
        for step in [2, 4] {
            fs::write(opened.run_dir.metrics(), "{\"step\":1,\"time\":0.0}\n".repeat(step)).unwrap();
            checkpointed(&opened, config, step as u64);
        }
        fs::write(opened.run_dir.path().join("summary.json"), "{}").unwrap();
        opened.run_dir.path().to_owned()
    }

    #[test]
    fn another_training_in_the_same_folder_starts_anew_and_the_old_one_is_kept() {
        let root = tempfile::tempdir().unwrap();
        finished_run(&config(root.path(), &[]));
        let other = config(root.path(), &["trainer.seed=2", "actor_rollout_ref.actor.optim.lr=0.5"]);
        let opened = RunDir::open(&other, 4, "job-2").unwrap();
        assert!(opened.resume.is_none());
        assert!(opened.notes[0].contains("trainer.seed was 1 and is 2"), "{:?}", opened.notes);
        assert!(opened.notes[0].contains("actor_rollout_ref.actor.optim.lr was "), "{:?}", opened.notes);
        assert!(opened.notes[1].ends_with("/e.1"), "{:?}", opened.notes);
        let kept = fs::read_to_string(root.path().join("runs/p/e.1/config.json")).unwrap();
        let kept: serde_json::Value = serde_json::from_str(&kept).unwrap();
        assert_eq!(kept["trainer"]["seed"], 1);
        assert!(!opened.run_dir.metrics().exists());
    }

    #[test]
    fn a_finished_run_is_left_as_it_is_and_goes_on_when_it_gets_more_steps() {
        let root = tempfile::tempdir().unwrap();
        let path = finished_run(&config(root.path(), &["trainer.total_training_steps=4"]));
        let before = fs::read(path.join("config.json")).unwrap();
        let again = config(root.path(), &["trainer.total_training_steps=4", "trainer.save_freq=3"]);
        assert_eq!(RunDir::open(&again, 4, "job-2").unwrap().resume.unwrap().step, 4);
        assert_eq!(fs::read(path.join("config.json")).unwrap(), before);
        assert!(path.join("summary.json").is_file());

        let more = config(root.path(), &["trainer.total_training_steps=9"]);
        assert_eq!(RunDir::open(&more, 9, "job-3").unwrap().resume.unwrap().weights_hash, "h");
        assert_ne!(fs::read(path.join("config.json")).unwrap(), before);
    }

    #[test]
    fn a_named_checkpoint_abandons_what_came_after_it_and_refuses_other_settings() {
        let root = tempfile::tempdir().unwrap();
        let path = finished_run(&config(root.path(), &[]));
        let from = format!("trainer.resume_from_path={}/checkpoints/global_step_2", path.display());
        let named = ["trainer.resume_mode=resume_path", &from];
        let other = config(root.path(), &[&named[..], &["trainer.seed=2"]].concat());
        let refused = RunDir::open(&other, 4, "job-2").unwrap_err();
        assert!(matches!(refused, RunDirError::Differs { .. }));
        assert!(refused.to_string().contains("trainer.seed was 1 and is 2"), "{refused}");

        let opened = RunDir::open(&config(root.path(), &named), 4, "job-3").unwrap();
        assert_eq!(opened.resume.unwrap().step, 2);
        assert_eq!(opened.run_dir.checkpoints().steps().unwrap(), [2]);
        assert!(path.join("checkpoints/abandoned/global_step_4/manifest.json").is_file());
        assert!(opened.notes[1].contains("steps 4 are of an abandoned course"), "{:?}", opened.notes);
    }

    #[test]
    fn a_checkpoint_is_known_by_any_name_and_never_moved_aside() {
        let root = tempfile::tempdir().unwrap();
        let path = finished_run(&config(root.path(), &[]));
        let named = |dir: &Path, more: &str| {
            let from = format!("trainer.resume_from_path={}", dir.display());
            config(root.path(), &["trainer.resume_mode=resume_path", &from, more])
        };
        let same = "trainer.save_freq=7";

        // Other checkpoints are to be written elsewhere: the run's folder would be moved, with what is resumed.
        let step_4 = path.join("checkpoints/global_step_4");
        let elsewhere = format!("trainer.default_local_dir={}/big", root.path().display());
        let refused = RunDir::open(&named(&step_4, &elsewhere), 9, "job-2").unwrap_err();
        assert!(matches!(&refused, RunDirError::InTheWay { .. }), "{refused}");
        assert!(step_4.join("manifest.json").is_file());

        // Through a link it is the same checkpoint: the run goes on where it was.
        let link = root.path().join("link");
        std::os::unix::fs::symlink(path.join("checkpoints"), &link).unwrap();
        let opened = RunDir::open(&named(&link.join("global_step_2"), same), 9, "job-3").unwrap();
        assert_eq!((opened.resume.unwrap().step, path.exists()), (2, true));
        drop(opened.run_dir);

        // What was abandoned is of another course than this folder's metrics.
        let abandoned = path.join("checkpoints/abandoned/global_step_4");
        let refused = RunDir::open(&named(&abandoned, same), 9, "job-4").unwrap_err();
        assert!(matches!(refused, RunDirError::InTheWay { .. }));
        assert!(abandoned.join("manifest.json").is_file());
    }

    #[test]
    fn two_jobs_cannot_write_one_run_and_the_error_names_the_first() {
        let root = tempfile::tempdir().unwrap();
        let config = config(root.path(), &[]);
        let first = RunDir::open(&config, 4, "job-1 of a test").unwrap();
        let error = RunDir::open(&config, 4, "job-2").unwrap_err().to_string();
        let holder = format!("job-1 of a test (process {})", std::process::id());
        assert!(error.contains(&holder), "{error}");
        drop(first);
        assert!(RunDir::open(&config, 4, "job-2").is_ok());
    }

    #[test]
    fn a_damaged_checkpoint_is_not_resumed_silently() {
        let root = tempfile::tempdir().unwrap();
        let config = config(root.path(), &[]);
        let first = RunDir::open(&config, 4, "job-1").unwrap();
        fs::write(first.run_dir.metrics(), "{\"step\":1,\"time\":0.0}\n").unwrap();
        checkpointed(&first, &config, 1);
        fs::write(first.run_dir.checkpoints().path(1).join("model.safetensors"), "Weights").unwrap();
        drop(first);
        let error = RunDir::open(&config, 4, "job-2").unwrap_err().to_string();
        assert!(error.contains("model.safetensors is damaged"), "{error}");
    }
}
