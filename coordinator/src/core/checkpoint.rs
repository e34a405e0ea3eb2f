//! Saving a job: every rank writes its files, then the shell commits them together with the job's position.

use std::collections::BTreeMap;
use std::path::PathBuf;

use super::event::{CheckpointPoint, CoreFault, Decision, Level, Moment, Phase, RankCommand};
use super::job::{Desk, Job, Life};

/// A checkpoint is being written.
#[derive(Debug)]
pub(crate) struct Saving {
    pub(crate) step: u64,
    began: Moment,
    /// Start of the present wait: for the ranks, then for the commit.
    since: Moment,
    /// The files of each rank that has written.
    written: BTreeMap<usize, Vec<String>>,
    committing: bool,
}

impl Job {
    pub(super) fn save(&mut self, desk: &mut Desk<'_>) {
        let step = self.steps_done;
        let written = BTreeMap::new();
        let saving = Saving { step, began: desk.now, since: desk.now, written, committing: false };
        self.life = Life::Saving(saving);
        self.progress(Phase::Checkpoint, step, 0, self.ranks.len() as u64, desk);
        self.command_all(&RankCommand::WriteCheckpoint { step }, desk);
    }

    pub(crate) fn checkpoint_written(
        &mut self,
        rank: usize,
        step: u64,
        files: Vec<String>,
        desk: &mut Desk<'_>,
    ) {
        let (id, ranks) = (self.ranks[rank].id.clone(), self.ranks.len());
        match &mut self.life {
            Life::Saving(saving) if saving.step == step && !saving.written.contains_key(&rank) => {
                saving.written.insert(rank, files);
                let done = saving.written.len();
                if done < ranks {
                    return self.progress(Phase::Checkpoint, step, done as u64, ranks as u64, desk);
                }
                saving.committing = true;
                saving.since = desk.now;
                let files = saving.written.values().cloned().collect();
                let point = CheckpointPoint {
                    step,
                    policy_version: self.policy_version,
                    weights_hash: self.weights_hash.clone(),
                    cursor: self.cursor,
                    seed: self.plan.seed,
                    total_steps: self.plan.total_steps,
                };
                desk.out.push(Decision::CommitCheckpoint { job: self.id.clone(), point, files });
            }
            Life::Stopping(_) => {}
            _ => self.ignore(&format!("the checkpoint of step {step}"), &id, desk),
        }
    }

    pub(crate) fn checkpoint_committed(
        &mut self,
        step: u64,
        result: Result<PathBuf, CoreFault>,
        desk: &mut Desk<'_>,
    ) {
        let began = match &self.life {
            Life::Saving(saving) if self.pending.is_none() && saving.committing && saving.step == step => {
                saving.began
            }
            _ => return,
        };
        match result {
            Err(fault) => {
                let message =
                    format!("step {step}: the checkpoint could not be committed: {}", fault.message);
                self.fail(CoreFault { message, ..fault }, desk);
            }
            Ok(dir) => {
                let seconds = desk.now.saturating_sub(began).as_secs_f64();
                let ranks = self.ranks.len() as u64;
                self.progress(Phase::Checkpoint, step, ranks, ranks, desk);
                self.log(
                    Level::Info,
                    format!("checkpoint of step {step} in {seconds:.1} s: {}", dir.display()),
                    desk,
                );
                self.next_step(desk);
            }
        }
    }

    pub(super) fn late_saving(&self, saving: &Saving, now: Moment) -> Option<String> {
        let limit = self.plan.checkpoint_deadline;
        if now.saturating_sub(saving.since) <= limit {
            return None;
        }
        let late = (0..self.ranks.len()).filter(|rank| !saving.written.contains_key(rank));
        let waiting = match saving.committing {
            false => self.waiting(late, "write its part of the checkpoint", now),
            true => "waiting for the coordinator to commit the checkpoint".to_owned(),
        };
        Some(format!(
            "step {}: {waiting}; trainer.checkpoint_timeout_seconds={} is over: is the disk full or slow?",
            saving.step,
            limit.as_secs()
        ))
    }
}
