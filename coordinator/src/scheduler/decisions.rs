//! Carrying out what the core decides, one decision at a time, in order.

use std::collections::BTreeMap;

use agentfly_common::telemetry::names;
use agentfly_proto::v1 as pb;
use pb::job_event::Kind;

use super::{Scheduler, wire};
use crate::core::event::{
    CheckpointPoint, CoreFault, Decision, Device, Event, JobEnd, JobState, RankCommand, RankId,
};
use crate::journal::{JournalError, state_name};
use crate::recorder::{Record, Recorded};
use crate::sinks::LineKind;
use crate::store::trace::TracePhase;

impl Scheduler {
    /// Carries out one decision on a fact that came at `at_micros` since 1970; returns the facts that arise from it at
    /// once.
    pub(super) async fn carry_out(
        &mut self,
        decision: Decision,
        at_micros: u64,
    ) -> Result<Option<Event>, JournalError> {
        match decision {
            Decision::StartRank { node, rank, device, threads, ranks_on_node } => {
                self.start_rank(&node, &rank, device, (threads, ranks_on_node))
            }
            Decision::StopRanks { node, job, grace } => {
                let stop = pb::StopRanks { job_id: job, grace_seconds: grace.as_secs_f64() };
                self.command_node(&node, pb::node_command::Kind::StopRanks(stop));
            }
            Decision::Command { rank, command } => return Ok(self.command(rank, command)),
            Decision::State { job, state, detail } => {
                if state == JobState::Starting {
                    self.phase(&job, TracePhase { name: "start", step: 0 }, at_micros).await;
                }
                self.state_changed(&job, state, detail)?;
            }
            Decision::Progress { job, phase, step, done, total } => {
                let name = wire::phase_name(phase);
                self.phase(&job, TracePhase { name, step }, at_micros).await;
                let phase = name.to_owned();
                self.parts.feeds.progress(&job, pb::Progress { phase, step, done, total });
            }
            Decision::KeepTrajectories { job, purpose, step, rows } => {
                if let Some(open) = self.jobs.get_mut(&job) {
                    open.forget_chains(purpose, step);
                }
                self.record(&job, Record::Trajectories { purpose, step, rows }).await;
            }
            Decision::OfferShard { rank, shard } => self.parts.shelf.put(&rank, *shard),
            Decision::StepFinished { job, step, metrics } => {
                self.finished(&job, LineKind::Step, step, metrics).await?;
            }
            Decision::ValidationFinished { job, step, metrics } => {
                self.finished(&job, LineKind::Validation, step, metrics).await?;
            }
            Decision::CommitCheckpoint { job, point, files } => {
                return Ok(self.commit(job, point, files).await);
            }
            Decision::Log { job, level, text } => self.log(&job, wire::level_name(level), text)?,
            Decision::Ended { job, end } => self.end(&job, end).await?,
        }
        Ok(None)
    }

    /// Tells the job's trace of a phase, if it is another than the last one.
    async fn phase(&mut self, job: &str, phase: TracePhase, at_micros: u64) {
        if self.jobs.get_mut(job).is_some_and(|open| open.enters(&phase)) {
            self.record(job, Record::Phase(phase, at_micros)).await;
        }
    }

    fn start_rank(
        &mut self,
        node: &str,
        rank: &RankId,
        device: Device,
        (threads, ranks_on_node): (u32, u32),
    ) {
        let log_file = self.jobs.get(&rank.job).map(|job| job.rank_log(rank.rank)).unwrap_or_default();
        let (rank, device) = (Some(wire::rank_to(rank)), Some(wire::device_to(device)));
        let start = pb::StartRank { rank, device, threads, log_file, ranks_on_node };
        self.command_node(node, pb::node_command::Kind::StartRank(start));
    }

    /// Keeps and tells the figures of a step or a validation.
    async fn finished(
        &mut self,
        job: &str,
        kind: LineKind,
        step: u64,
        metrics: BTreeMap<String, f64>,
    ) -> Result<(), JournalError> {
        let told = metrics.clone().into_iter().collect();
        self.record(job, Record::Line { kind, step, metrics }).await;
        let total_steps = self.jobs.get(job).map_or(0, |open| open.total_steps);
        self.publish(
            job,
            match kind {
                LineKind::Step => Kind::Step(pb::StepReport { step, total_steps, metrics: told }),
                LineKind::Validation => Kind::Validation(pb::ValidationReport { step, metrics: told }),
            },
        )
    }

    fn command_node(&mut self, node: &str, kind: pb::node_command::Kind) {
        if !self.sessions.to_node(self.now(), node, kind) {
            tracing::debug!(node, "a command for a node without a session; its lease will end");
        }
    }

    /// Sends a command to a rank. A command that cannot be made is that rank's failure.
    fn command(&mut self, rank: RankId, command: RankCommand) -> Option<Event> {
        let job = self.jobs.get_mut(&rank.job)?;
        let kind = match job.command(command) {
            Ok(kind) => kind,
            Err(fault) => return Some(Event::RankFailed { rank, fault }),
        };
        if !self.sessions.to_rank(self.now(), &rank, kind) {
            tracing::debug!(?rank, "a command for a rank without a session; its lease will end");
        }
        None
    }

    fn state_changed(&mut self, job: &str, state: JobState, detail: String) -> Result<(), JournalError> {
        let now = self.now();
        if let Some(open) = self.jobs.get_mut(job) {
            open.state_changed(state, now);
        }
        // The job is over only when everything is on disk: `ended` says so.
        if matches!(state, JobState::Finished | JobState::Failed | JobState::Cancelled) {
            return Ok(());
        }
        tracing::info!(job, state = state_name(state), "{detail}");
        self.publish(job, Kind::State(pb::StateChanged { state: state_name(state).to_owned(), detail }))
    }

    async fn commit(
        &mut self,
        job: String,
        point: CheckpointPoint,
        files: Vec<Vec<String>>,
    ) -> Option<Event> {
        let step = point.step;
        if self.record(&job, Record::Commit(point, files)).await {
            return None;
        }
        let whose = agentfly_common::error::Whose::Us;
        let message = format!("checkpoint of step {step}: the job's recorder has ended; please report this");
        Some(Event::CheckpointCommitted { job, step, result: Err(CoreFault { whose, message }) })
    }

    /// The job is over: its recorder hears it, and says when everything is on disk.
    async fn end(&mut self, job: &str, end: JobEnd) -> Result<(), JournalError> {
        self.parts.shelf.clear(job);
        let seconds = self.jobs.get(job).map_or(0.0, |open| open.seconds(self.now()));
        if self.record(job, Record::End { end: end.clone(), seconds }).await {
            if let Some(open) = self.jobs.get_mut(job) {
                open.end = Some(end);
            }
            return Ok(());
        }
        self.ended_unrecorded(job, end)
    }

    /// The end of a job whose recorder has died: its watchers must hear it all the same.
    pub(super) fn ended_unrecorded(&mut self, job: &str, end: JobEnd) -> Result<(), JournalError> {
        let text = "the job's recorder has ended before the job: summary.json and reward_curve.svg are missing, and \
                    newer metrics and chains may be; please report this";
        tracing::error!(job, "{text}");
        self.log(job, "error", text.to_owned())?;
        self.ended(job, end, String::new())
    }

    /// Hands a record to the job's recorder; false when there is none.
    pub(super) async fn record(&mut self, job: &str, record: Record) -> bool {
        match self.jobs.get(job) {
            Some(open) => open.records.send(record).await.is_ok(),
            None => false,
        }
    }

    /// What a recorder answers.
    pub(super) async fn recorded(&mut self, answer: Recorded) -> Result<(), JournalError> {
        match answer {
            Recorded::Committed { job, step, result } => {
                self.apply(Event::CheckpointCommitted { job, step, result }).await
            }
            Recorded::Trouble { job, text, .. } => self.log(&job, "error", text),
            Recorded::Ended { job, end, summary_json } => self.ended(&job, end, summary_json),
        }
    }

    /// Tells the job's end to those who watch, and forgets it.
    fn ended(&mut self, job: &str, end: JobEnd, summary_json: String) -> Result<(), JournalError> {
        let state = state_name(end.state);
        metrics::counter!(names::JOBS_ENDED, "state" => state).increment(1);
        tracing::info!(job, state, "{}", end.detail);
        let fault = end.fault.as_ref().map(wire::fault_to);
        let ended = pb::Ended { state: state.to_owned(), detail: end.detail, fault, summary_json };
        self.publish(job, Kind::Ended(ended))?;
        self.parts.feeds.close(job);
        self.jobs.remove(job);
        self.check_drained();
        Ok(())
    }

    /// A line for the job's log.
    pub(super) fn log(&self, job: &str, level: &str, text: String) -> Result<(), JournalError> {
        self.publish(job, Kind::Log(pb::LogLine { level: level.to_owned(), text }))
    }

    /// First the journal, then those who watch (S2).
    fn publish(&self, job: &str, kind: Kind) -> Result<(), JournalError> {
        if self.jobs.contains_key(job) {
            let event = self.parts.journal.append(job, kind)?;
            self.parts.feeds.appended(job, event.sequence);
        }
        Ok(())
    }
}
