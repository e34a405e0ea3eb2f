//! What the scheduler holds of a job that is not over: its data, its recorder, and when it began.

use std::collections::HashSet;
use std::sync::Arc;

use agentfly_common::ids::{ChainKey, Purpose};
use agentfly_proto::v1 as pb;
use tokio::sync::mpsc;

use super::{Parts, wire};
use crate::core::event::{CoreFault, JobEnd, JobState, Moment, RankCommand};
use crate::recorder::{Answers, RECORDS, Record, Recorder, checkpoint_fault};
use crate::store::StoreError;
use crate::store::checkpoints::Checkpoints;
use crate::store::trace::TracePhase;
use crate::submission::{Questions, Submission};

/// An open job.
pub(super) struct OpenJob {
    pub(super) total_steps: u64,
    pub(super) records: mpsc::Sender<Record>,
    config_json: String,
    questions: Arc<Questions>,
    checkpoints: Checkpoints,
    logs: std::path::PathBuf,
    state: JobState,
    /// When it left the queue.
    started: Option<Moment>,
    /// What it is in the middle of.
    phase: Option<TracePhase>,
    /// The step whose checkpoint folder was made last.
    begun: Option<u64>,
    /// Chains that arrived and are not yet kept, to tell a worker that sends one twice.
    arrived: HashSet<(u64, ChainKey)>,
    /// How it ended, while its recorder puts the rest on disk.
    pub(super) end: Option<JobEnd>,
}

impl OpenJob {
    /// Starts the job's recorder.
    pub(super) fn start(
        id: &str,
        submission: Submission,
        parts: &Parts,
        answers: Answers,
    ) -> Result<Self, StoreError> {
        let Submission { spec, new_job, questions, run_dir, .. } = submission;
        let (checkpoints, logs) = (run_dir.checkpoints().clone(), run_dir.path().join("logs"));
        let steps = (spec.resume.as_ref().map(|point| point.step), new_job.total_steps);
        let journal = parts.journal.clone();
        let recorder = Recorder::new(id.to_owned(), &spec.config, steps, run_dir, journal, answers)?;
        let (records, inbox) = mpsc::channel(RECORDS);
        parts.recorders.spawn_blocking(move || {
            if let Err(error) = recorder.run(inbox) {
                tracing::error!(error = format!("{error:#}"), "a recorder failed");
            }
        });
        Ok(Self {
            total_steps: new_job.total_steps,
            records,
            config_json: new_job.config_json,
            questions: Arc::new(questions),
            checkpoints,
            logs,
            state: JobState::Queued,
            started: None,
            phase: None,
            begun: None,
            arrived: HashSet::new(),
            end: None,
        })
    }

    pub(super) fn is_queued(&self) -> bool {
        self.state == JobState::Queued
    }

    pub(super) fn state_changed(&mut self, state: JobState, now: Moment) {
        self.state = state;
        if state != JobState::Queued {
            self.started.get_or_insert(now);
        }
    }

    /// Whether `phase` is another than the one it is in; from now on it is in that.
    pub(super) fn enters(&mut self, phase: &TracePhase) -> bool {
        self.phase.replace(phase.clone()).as_ref() != Some(phase)
    }

    /// Whether its recorder is no longer there: it takes nothing, and will answer nothing.
    pub(super) fn lost_its_recorder(&self) -> bool {
        self.records.is_closed()
    }

    /// Since it left the queue.
    pub(super) fn seconds(&self, now: Moment) -> f64 {
        self.started.map_or(0.0, |started| now.saturating_sub(started).as_secs_f64())
    }

    pub(super) fn rank_log(&self, rank: u32) -> String {
        self.logs.join(format!("rank_{rank}.log")).to_string_lossy().into_owned()
    }

    /// Whether this chain of this shard arrives for the first time.
    pub(super) fn is_first(&mut self, shard: u64, key: ChainKey) -> bool {
        self.arrived.insert((shard, key))
    }

    /// A step's chains are kept: no worker sends them again.
    pub(super) fn forget_chains(&mut self, purpose: Purpose, step: u64) {
        self.arrived.retain(|(_, key)| key.purpose != purpose || key.step > step);
    }

    /// A command with the configuration, rows and folders it needs.
    pub(super) fn command(&mut self, command: RankCommand) -> Result<pb::rank_command::Kind, CoreFault> {
        let folder = match command {
            RankCommand::WriteCheckpoint { step } => self.checkpoint_folder(step)?,
            _ => std::path::PathBuf::new(),
        };
        let with = wire::Attachments {
            config_json: &self.config_json,
            row: &|purpose, row| self.questions.row(purpose, row),
            checkpoint_dir: &folder,
        };
        wire::command_to(command, &with)
    }

    /// The folder that all ranks write `step` into; made for the first of them.
    fn checkpoint_folder(&mut self, step: u64) -> Result<std::path::PathBuf, CoreFault> {
        if self.begun == Some(step) {
            return Ok(self.checkpoints.beside(step));
        }
        let begun =
            self.checkpoints.begin(step).map_err(|error| checkpoint_fault(error, self.checkpoints.dir()))?;
        self.begun = Some(step);
        Ok(begun)
    }
}
