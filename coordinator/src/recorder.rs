//! The recorder: one thread a job that does everything slow on disk, in order.
//!
//! ```text
//!  scheduler ──Record, mpsc(64)──▶ recorder: trajectory files, sinks, checkpoint commits, summary
//!            ◀──Recorded, mpsc(128)──
//! ```
//! A full channel slows the scheduler: a disk that cannot keep up slows training instead of losing chains. The
//! answers never wait, or the two would wait for each other: each open job owes at most two, a commit and
//! its end, and their places are theirs alone; troubles have places of their own, and are dropped when those are
//! taken ([`Answers`]).

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;

use agentfly_common::config::{Config, Logger};
use agentfly_common::error::Whose;
use agentfly_common::ids::Purpose;
use agentfly_common::telemetry::names;
use agentfly_common::telemetry::spans::{Gathered, Span};
use agentfly_common::wire::unix_micros;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};

use crate::clock::unix_seconds;
use crate::core::event::{CheckpointPoint, CoreFault, JobEnd, JudgedTrajectory};
use crate::journal::{Journal, TrajectoryEntry, state_name};
use crate::sinks::console::{Console, Gauges};
use crate::sinks::jsonl::Jsonl;
use crate::sinks::{LineKind, Sink, Sinks};
use crate::store::checkpoints::{CheckpointError, CoordinatorPart};
use crate::store::metrics_file::{self, MetricsLine};
use crate::store::run_dir::RunDir;
use crate::store::summary::{Course, Summary};
use crate::store::trace::{Process, RECORDER, TraceBook, TracePhase};
use crate::store::trajectories::{self, TrajectoryLine};
use crate::store::{StoreError, curve, free_bytes, write_whole};

/// Records that may wait for the disk.
pub const RECORDS: usize = 64;

/// Answers of kinds other than [`Recorded::Trouble`] that a job owes at the same time.
const OWED: usize = 2;
/// Troubles that may wait for the scheduler, of all jobs together.
const TROUBLES: usize = 64;

/// The recorders' end of the channel to the scheduler. Clones share it.
#[derive(Debug, Clone)]
pub struct Answers {
    to: mpsc::Sender<Recorded>,
    /// Free places for troubles.
    places: Arc<Semaphore>,
}

impl Answers {
    /// A channel for at most `jobs` open jobs.
    #[must_use]
    pub fn channel(jobs: usize) -> (Self, mpsc::Receiver<Recorded>) {
        let (to, answers) = mpsc::channel(OWED * jobs + TROUBLES);
        (Self { to, places: Arc::new(Semaphore::new(TROUBLES)) }, answers)
    }

    /// Sends what the scheduler waits for; there is a place.
    fn owed(&self, job: &str, answer: Recorded) {
        if self.to.blocking_send(answer).is_err() {
            tracing::warn!(job, "the scheduler ended before its recorder");
        }
    }

    /// Sends a trouble, or drops it when the scheduler is behind.
    fn trouble(&self, job: &str, text: String) {
        if let Ok(place) = Arc::clone(&self.places).try_acquire_owned() {
            let trouble = Recorded::Trouble { job: job.to_owned(), text, place };
            // Only a scheduler that has ended takes nothing.
            let _ = self.to.try_send(trouble);
        }
    }
}

/// Something to keep.
#[derive(Debug)]
pub enum Record {
    /// A step's chains.
    Trajectories {
        /// Training or validation.
        purpose: Purpose,
        /// Their step.
        step: u64,
        /// All of them.
        rows: Vec<JudgedTrajectory>,
    },
    /// Figures.
    Line {
        /// Of a training step or a validation.
        kind: LineKind,
        /// Its step.
        step: u64,
        /// In verl's names.
        metrics: BTreeMap<String, f64>,
    },
    /// A phase of the job begins, at this time in microseconds since 1970.
    Phase(TracePhase, u64),
    /// What a process did.
    Spans(Process, Gathered),
    /// The ranks have written their files of a checkpoint: whose are which.
    Commit(CheckpointPoint, Vec<Vec<String>>),
    /// The job is over: the last record.
    End {
        /// How it ended.
        end: JobEnd,
        /// Since it left the queue.
        seconds: f64,
    },
}

/// What became of it.
#[derive(Debug)]
pub enum Recorded {
    /// A checkpoint was committed, or not.
    Committed {
        /// The job.
        job: String,
        /// The checkpoint's step.
        step: u64,
        /// Where it lies, or why it does not.
        result: Result<PathBuf, CoreFault>,
    },
    /// Something could not be kept; training goes on.
    Trouble {
        /// The job.
        job: String,
        /// What.
        text: String,
        /// Its place in the channel, free once this is dropped.
        place: OwnedSemaphorePermit,
    },
    /// Everything is on disk.
    Ended {
        /// The job.
        job: String,
        /// How it ended.
        end: JobEnd,
        /// The text of `summary.json`.
        summary_json: String,
    },
}

/// What a recorder knows of its job.
pub struct Recorder {
    job: String,
    seed: u64,
    project: String,
    experiment: String,
    resumed_after: Option<u64>,
    /// The job's settings, as JSON: every checkpoint holds them.
    config: serde_json::Value,
    /// The checkpoint it resumes is its last: the run's files stay as they are.
    is_done: bool,
    run_dir: RunDir,
    journal: Journal,
    sinks: Sinks,
    trace: TraceBook,
    answers: Answers,
}

impl Recorder {
    /// Opens the sinks of a job of `total_steps` that resumes after the step `resumed_after`.
    ///
    /// # Errors
    /// When `metrics.jsonl` cannot be opened.
    pub fn new(
        job: String,
        config: &Config,
        (resumed_after, total_steps): (Option<u64>, u64),
        run_dir: RunDir,
        journal: Journal,
        answers: Answers,
    ) -> Result<Self, StoreError> {
        let mut sinks: Vec<Box<dyn Sink>> =
            vec![Box::new(Jsonl::open(&run_dir.metrics())?), Box::new(Gauges)];
        if config.trainer.logger.contains(&Logger::Console) {
            sinks.push(Box::new(Console));
        }
        let trainer = &config.trainer;
        let trace = TraceBook::new(run_dir.path(), job.clone(), trainer);
        Ok(Self {
            job,
            trace,
            seed: trainer.seed,
            project: trainer.project_name.clone(),
            experiment: trainer.experiment_name.clone(),
            resumed_after,
            config: serde_json::to_value(config).unwrap_or_default(),
            is_done: resumed_after.is_some_and(|step| step >= total_steps),
            run_dir,
            journal,
            sinks: Sinks::new(sinks),
            answers,
        })
    }

    /// Keeps records until the last; blocks, so it runs on a thread of its own.
    ///
    /// # Errors
    /// None: what cannot be kept is reported and the rest goes on.
    pub fn run(mut self, mut records: mpsc::Receiver<Record>) -> anyhow::Result<()> {
        while let Some(record) = records.blocking_recv() {
            let began = unix_micros();
            match record {
                Record::Trajectories { purpose, step, rows } => {
                    self.keep(purpose, step, rows);
                    self.traced("keep the chains", began);
                }
                Record::Line { kind, step, metrics } => {
                    self.sinks.write(kind, &MetricsLine { step, time: unix_seconds(), metrics });
                    self.traced("write the figures", began);
                }
                Record::Phase(phase, at_micros) => {
                    if let Err(error) = self.trace.phase(&phase, at_micros) {
                        self.trouble(error);
                    }
                }
                Record::Spans(process, gathered) => self.trace.add(process, gathered),
                Record::Commit(point, files) => {
                    let (job, step, result) = (self.job.clone(), point.step, self.commit(point, &files));
                    // Before the answer: it begins the next step.
                    self.traced("commit the checkpoint", began);
                    self.answer(Recorded::Committed { job, step, result });
                }
                Record::End { end, seconds } => {
                    let summary_json = self.end(&end, seconds);
                    let (job, answers) = (self.job.clone(), self.answers.clone());
                    // The run's folder is free before anyone hears of the end: the next job may ask for it at once.
                    drop(self);
                    answers.owed(&job, Recorded::Ended { job: job.clone(), end, summary_json });
                    return Ok(());
                }
            }
        }
        Ok(())
    }

    /// Adds what the recorder has done since `began`.
    fn traced(&mut self, name: &str, began: u64) {
        let span = Span {
            name: name.to_owned(),
            lane: RECORDER.to_owned(),
            start_micros: began,
            micros: unix_micros().saturating_sub(began),
            fields: BTreeMap::new(),
        };
        self.trace.add(Process::Coordinator, Gathered { spans: vec![span], dropped: 0 });
    }

    fn answer(&self, answer: Recorded) {
        self.answers.owed(&self.job, answer);
    }

    fn trouble(&self, error: impl std::error::Error + Send + Sync + 'static) {
        let text = format!("{:#}; training goes on", anyhow::Error::from(error));
        tracing::error!(job = self.job, "{text}");
        // The log has it, if it is dropped there.
        self.answers.trouble(&self.job, text);
    }

    fn keep(&mut self, purpose: Purpose, step: u64, rows: Vec<JudgedTrajectory>) {
        let entry = |row: &JudgedTrajectory| TrajectoryEntry {
            key: row.trajectory.key,
            reward: row.trajectory.reward.value,
        };
        let entries: Vec<_> = rows.iter().map(entry).collect();
        let lines: Vec<_> = rows.into_iter().map(TrajectoryLine::from).collect();
        match trajectories::write(&self.run_dir.trajectories(), purpose, step, &lines) {
            Ok(file) => {
                if let Err(error) = self.journal.index(&self.job, &entries, &file) {
                    self.trouble(error);
                }
            }
            Err(error) => self.trouble(error),
        }
    }

    fn commit(&self, point: CheckpointPoint, files: &[Vec<String>]) -> Result<PathBuf, CoreFault> {
        let began = tokio::time::Instant::now();
        let metrics_bytes = std::fs::metadata(self.run_dir.metrics()).map_or(0, |found| found.len());
        let part = CoordinatorPart { point, metrics_bytes, config: self.config.clone() };
        let committed = self.run_dir.checkpoints().commit(&part, files);
        if committed.is_ok() {
            metrics::counter!(names::CHECKPOINTS).increment(1);
            metrics::histogram!(names::COMMIT_SECONDS).record(began.elapsed().as_secs_f64());
        }
        committed.map_err(|error| checkpoint_fault(error, self.run_dir.checkpoints().dir()))
    }

    /// Writes what is left to write; the summary, as it was written, or nothing where the run was over before.
    fn end(&mut self, end: &JobEnd, seconds: f64) -> String {
        if let Err(error) = self.trace.end(unix_micros()) {
            self.trouble(error);
        }
        if self.is_done {
            return String::new();
        }
        let lines = metrics_file::read(&self.run_dir.metrics()).unwrap_or_else(|error| {
            self.trouble(error);
            Vec::new()
        });
        let course = Course::of(&lines);
        let newest = self.run_dir.checkpoints().newest().unwrap_or_else(|error| {
            self.trouble(error);
            None
        });
        let summary = Summary {
            job_id: self.job.clone(),
            state: state_name(end.state).to_owned(),
            detail: end.detail.clone(),
            seed: self.seed,
            steps: end.steps_done,
            seconds,
            val_before: course.val_before,
            val_after: course.val_after,
            reward_first_ten_steps: course.reward_first,
            reward_last_ten_steps: course.reward_last,
            checkpoint_path: newest,
            policy_version: end.policy_version.0,
            project: self.project.clone(),
            experiment: self.experiment.clone(),
            run_dir: self.run_dir.path().to_owned(),
            resumed_after_step: self.resumed_after,
            version: crate::VERSION.to_owned(),
        };
        let json = serde_json::to_string_pretty(&summary).expect("strings and numbers are JSON");
        if let Err(error) = write_whole(&self.run_dir.path().join("summary.json"), json.as_bytes()) {
            self.trouble(error);
        }
        let title = format!("{}/{}, seed {}", self.project, self.experiment, self.seed);
        if let Err(error) = curve::write(&self.run_dir.path().join("reward_curve.svg"), &title, &lines) {
            self.trouble(error);
        }
        json
    }
}

/// A failed commit as the core sees it: a full disk is the operator's, missing files are ours.
#[must_use]
pub fn checkpoint_fault(error: CheckpointError, dir: &std::path::Path) -> CoreFault {
    let whose = match &error {
        CheckpointError::Store(_) => Whose::Operator,
        CheckpointError::Empty { .. } => Whose::Us,
        CheckpointError::Missing { .. }
        | CheckpointError::Damaged { .. }
        | CheckpointError::Elsewhere { .. } => Whose::Operator,
    };
    let free =
        free_bytes(dir).map_or_else(|_| String::new(), |bytes| format!(" ({} MiB free there)", bytes >> 20));
    CoreFault { whose, message: format!("{:#}{free}", anyhow::Error::from(error)) }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A disk that is full troubles every record of every job, while the scheduler waits for one of the recorders.
    #[test]
    fn an_owed_answer_finds_its_place_however_many_troubles_wait() {
        let (answers, mut received) = Answers::channel(1);
        let end = || Recorded::Committed { job: "job-1".to_owned(), step: 1, result: Ok(PathBuf::new()) };
        for number in 0..10 * TROUBLES {
            answers.trouble("job-2", format!("trouble {number}"));
        }
        for _ in 0..OWED {
            assert!(answers.to.try_reserve().is_ok(), "a recorder would wait for the scheduler here");
            answers.owed("job-1", end());
        }
        for number in 0..TROUBLES {
            let Ok(Recorded::Trouble { text, .. }) = received.try_recv() else { panic!("trouble {number}") };
            assert_eq!(text, format!("trouble {number}"));
        }
        for _ in 0..OWED {
            assert!(matches!(received.try_recv(), Ok(Recorded::Committed { .. })));
        }
        answers.trouble("job-2", "one more".to_owned());
        assert!(matches!(received.try_recv(), Ok(Recorded::Trouble { .. })), "places become free again");
    }
}
