//! The journal: jobs, their events, steps and an index of trajectories in one SQLite file (WAL).
//!
//! The scheduler appends an event before anyone hears of it; `jobs` and `watch` read here, so that what they
//! show survives a restart of the head. Small writes on a local disk: tens of microseconds each, under one lock.
//!
//! # Invariants
//! - **J1** A job's events are numbered 1, 2, 3, … without gaps.
//! - **J2** One head at a time: the folder is locked while the journal is open.
//! - **J3** When a head starts, no job is open: those that were when the last one died are marked failed.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use agentfly_common::ids::{ChainKey, Purpose};
use agentfly_proto::v1 as pb;
use prost::Message;
use rusqlite::{Connection, OptionalExtension, Row, params};

use crate::clock::unix_seconds;
use crate::core::event::JobState;

/// Counts up when the tables change in a way that an older program cannot read.
const SCHEMA_VERSION: i64 = 1;

const SCHEMA: &str = "
CREATE TABLE jobs (
    number INTEGER PRIMARY KEY, id TEXT NOT NULL UNIQUE, state TEXT NOT NULL, detail TEXT NOT NULL,
    project TEXT NOT NULL, experiment TEXT NOT NULL, run_dir TEXT NOT NULL, checkpoint_dir TEXT NOT NULL,
    config_json TEXT NOT NULL, ranks INTEGER NOT NULL, step INTEGER NOT NULL, total_steps INTEGER NOT NULL,
    submitted REAL NOT NULL, started REAL, ended REAL, summary_json TEXT NOT NULL DEFAULT '');
CREATE TABLE events (
    job TEXT NOT NULL, sequence INTEGER NOT NULL, time REAL NOT NULL, event BLOB NOT NULL,
    PRIMARY KEY (job, sequence)) WITHOUT ROWID;
CREATE TABLE steps (
    job TEXT NOT NULL, kind TEXT NOT NULL, step INTEGER NOT NULL, time REAL NOT NULL, metrics_json TEXT NOT NULL,
    PRIMARY KEY (job, kind, step)) WITHOUT ROWID;
CREATE TABLE trajectories (
    job TEXT NOT NULL, purpose TEXT NOT NULL, step INTEGER NOT NULL, chain_group INTEGER NOT NULL,
    chain INTEGER NOT NULL, reward REAL NOT NULL, file TEXT NOT NULL,
    PRIMARY KEY (job, purpose, step, chain_group, chain)) WITHOUT ROWID;
";

/// Why the journal cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum JournalError {
    /// SQLite says no.
    #[error("the journal {} failed", path.display())]
    Sqlite {
        /// The database.
        path: PathBuf,
        /// Why.
        #[source]
        source: rusqlite::Error,
    },
    /// The state folder cannot be used.
    #[error("could not use the state folder {}; give another with --state-dir", path.display())]
    Folder {
        /// The folder.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// Another head holds it.
    #[error("the state folder {} is in use by another head; stop it, or give another with --state-dir", path.display())]
    Busy {
        /// The folder.
        path: PathBuf,
    },
    /// Written by a newer program.
    #[error(
        "the journal {} has format {found}, this program knows {SCHEMA_VERSION}: it was written by another version; \
         give another --state-dir", path.display()
    )]
    Version {
        /// The database.
        path: PathBuf,
        /// Its format.
        found: i64,
    },
}

/// The open journal; clones share it.
#[derive(Debug, Clone)]
pub struct Journal {
    connection: Arc<Mutex<Connection>>,
    path: Arc<PathBuf>,
    _lock: Arc<File>,
}

/// A job as it is queued.
#[derive(Debug, Clone)]
pub struct NewJob {
    /// `trainer.project_name`.
    pub project: String,
    /// `trainer.experiment_name`.
    pub experiment: String,
    /// The run's folder, absolute.
    pub run_dir: PathBuf,
    /// Where its checkpoints go.
    pub checkpoint_dir: PathBuf,
    /// The resolved configuration.
    pub config_json: String,
    /// Its world size.
    pub ranks: u32,
    /// Steps behind it already (a resumed run).
    pub step: u64,
    /// Its last step.
    pub total_steps: u64,
}

/// A job that was open when its head died.
#[derive(Debug, Clone, PartialEq)]
pub struct Orphan {
    /// Its name.
    pub job: String,
    /// Where its checkpoints lie.
    pub checkpoint_dir: PathBuf,
}

/// Where one chain is kept.
#[derive(Debug, Clone, PartialEq)]
pub struct TrajectoryEntry {
    /// The chain.
    pub key: ChainKey,
    /// What it earned.
    pub reward: f64,
}

impl Journal {
    /// Opens `journal.sqlite` in `dir`, making both when absent.
    ///
    /// # Errors
    /// When the folder or the file cannot be used, or another head holds it (J2).
    pub fn open(dir: &Path) -> Result<Self, JournalError> {
        let folder = |source| JournalError::Folder { path: dir.to_owned(), source };
        std::fs::create_dir_all(dir).map_err(folder)?;
        let lock = File::options()
            .create(true)
            .truncate(false)
            .write(true)
            .open(dir.join("lock"))
            .map_err(folder)?;
        if rustix::fs::flock(&lock, rustix::fs::FlockOperation::NonBlockingLockExclusive).is_err() {
            return Err(JournalError::Busy { path: dir.to_owned() });
        }
        let path = dir.join("journal.sqlite");
        let failed = |source| JournalError::Sqlite { path: path.clone(), source };
        let connection = Connection::open(&path).map_err(failed)?;
        connection.pragma_update(None, "journal_mode", "WAL").map_err(failed)?;
        connection.pragma_update(None, "synchronous", "NORMAL").map_err(failed)?;
        let found: i64 =
            connection.pragma_query_value(None, "user_version", |row| row.get(0)).map_err(failed)?;
        match found {
            0 => {
                connection.execute_batch(&format!("BEGIN; {SCHEMA} COMMIT;")).map_err(failed)?;
                connection.pragma_update(None, "user_version", SCHEMA_VERSION).map_err(failed)?;
            }
            SCHEMA_VERSION => {}
            found => return Err(JournalError::Version { path, found }),
        }
        Ok(Self { connection: Arc::new(Mutex::new(connection)), path: Arc::new(path), _lock: Arc::new(lock) })
    }

    fn lock(&self) -> MutexGuard<'_, Connection> {
        // A panic while it was held cannot leave half a transaction: SQLite rolls back.
        self.connection.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn failed(&self, source: rusqlite::Error) -> JournalError {
        JournalError::Sqlite { path: self.path.as_ref().clone(), source }
    }

    /// Names and records a new job, `queued`.
    ///
    /// # Errors
    /// When SQLite fails.
    pub fn add_job(&self, job: &NewJob) -> Result<String, JournalError> {
        let add = |c: &mut Connection| {
            let t = c.transaction()?;
            let number: i64 =
                t.query_row("SELECT coalesce(max(number), 0) + 1 FROM jobs", [], |row| row.get(0))?;
            let id = format!("job-{number}");
            t.execute(
                "INSERT INTO jobs (number, id, state, detail, project, experiment, run_dir, checkpoint_dir,
                 config_json, ranks, step, total_steps, submitted)
                 VALUES (?1, ?2, 'queued', '', ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11)",
                params![
                    number,
                    id,
                    job.project,
                    job.experiment,
                    job.run_dir.to_string_lossy(),
                    job.checkpoint_dir.to_string_lossy(),
                    job.config_json,
                    job.ranks,
                    whole(job.step),
                    whole(job.total_steps),
                    unix_seconds()
                ],
            )?;
            t.commit()?;
            Ok(id)
        };
        add(&mut self.lock()).map_err(|e| self.failed(e))
    }

    /// Appends an event of a job, changes the job accordingly, and returns the event with its number (J1).
    ///
    /// # Errors
    /// When SQLite fails.
    pub fn append(&self, job: &str, kind: pb::job_event::Kind) -> Result<pb::JobEvent, JournalError> {
        let append = |c: &mut Connection| {
            let t = c.transaction()?;
            let next = "SELECT coalesce(max(sequence), 0) + 1 FROM events WHERE job = ?1";
            let sequence: i64 = t.query_row(next, [job], |row| row.get(0))?;
            let event =
                pb::JobEvent { sequence: natural(sequence), unix_seconds: unix_seconds(), kind: Some(kind) };
            t.execute(
                "INSERT INTO events VALUES (?1, ?2, ?3, ?4)",
                params![job, sequence, event.unix_seconds, event.encode_to_vec()],
            )?;
            apply(&t, job, &event)?;
            t.commit()?;
            Ok(event)
        };
        append(&mut self.lock()).map_err(|e| self.failed(e))
    }

    /// At most `limit` events of a job after `sequence`, in order.
    ///
    /// # Errors
    /// When SQLite fails.
    pub fn events_after(
        &self,
        job: &str,
        sequence: u64,
        limit: u32,
    ) -> Result<Vec<pb::JobEvent>, JournalError> {
        let read = |c: &Connection| {
            let mut query = c.prepare_cached(
                "SELECT event FROM events WHERE job = ?1 AND sequence > ?2 ORDER BY sequence LIMIT ?3",
            )?;
            let rows =
                query.query_map(params![job, whole(sequence), limit], |row| row.get::<_, Vec<u8>>(0))?;
            rows.map(|bytes| {
                pb::JobEvent::decode(bytes?.as_slice()).map_err(|e| {
                    rusqlite::Error::FromSqlConversionFailure(0, rusqlite::types::Type::Blob, Box::new(e))
                })
            })
            .collect::<rusqlite::Result<Vec<_>>>()
        };
        read(&self.lock()).map_err(|e| self.failed(e))
    }

    /// All jobs, oldest first.
    ///
    /// # Errors
    /// When SQLite fails.
    pub fn jobs(&self) -> Result<Vec<pb::JobInfo>, JournalError> {
        let read = |c: &Connection| {
            let mut query = c.prepare_cached(&format!("{JOB_COLUMNS} ORDER BY number"))?;
            let rows = query.query_map([], job_info)?;
            rows.collect::<rusqlite::Result<Vec<_>>>()
        };
        read(&self.lock()).map_err(|e| self.failed(e))
    }

    /// One job.
    ///
    /// # Errors
    /// When SQLite fails.
    pub fn job(&self, id: &str) -> Result<Option<pb::JobInfo>, JournalError> {
        let read = |c: &Connection| {
            c.prepare_cached(&format!("{JOB_COLUMNS} WHERE id = ?1"))?.query_row([id], job_info).optional()
        };
        read(&self.lock()).map_err(|e| self.failed(e))
    }

    /// Jobs that are open: after [`Self::open`], those whose head died (J3).
    ///
    /// # Errors
    /// When SQLite fails.
    pub fn orphans(&self) -> Result<Vec<Orphan>, JournalError> {
        let read = |c: &Connection| {
            let mut query =
                c.prepare("SELECT id, checkpoint_dir FROM jobs WHERE ended IS NULL ORDER BY number")?;
            let rows = query.query_map([], |row| {
                Ok(Orphan { job: row.get(0)?, checkpoint_dir: PathBuf::from(row.get::<_, String>(1)?) })
            })?;
            rows.collect::<rusqlite::Result<Vec<_>>>()
        };
        read(&self.lock()).map_err(|e| self.failed(e))
    }

    /// Records where a step's chains are kept.
    ///
    /// # Errors
    /// When SQLite fails.
    pub fn index(&self, job: &str, entries: &[TrajectoryEntry], file: &Path) -> Result<(), JournalError> {
        let write = |c: &mut Connection| {
            let t = c.transaction()?;
            {
                let mut insert = t.prepare_cached(
                    "INSERT OR REPLACE INTO trajectories VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7)",
                )?;
                for TrajectoryEntry { key, reward } in entries {
                    let file = file.to_string_lossy();
                    insert.execute(params![
                        job,
                        purpose(key.purpose),
                        whole(key.step),
                        key.group,
                        key.chain,
                        reward,
                        file
                    ])?;
                }
            }
            t.commit()
        };
        write(&mut self.lock()).map_err(|e| self.failed(e))
    }

    /// Number of chains of a job in the index.
    ///
    /// # Errors
    /// When SQLite fails.
    pub fn indexed(&self, job: &str) -> Result<u64, JournalError> {
        let query = "SELECT count(*) FROM trajectories WHERE job = ?1";
        let count = self.lock().query_row(query, [job], |row| row.get::<_, i64>(0));
        count.map(natural).map_err(|e| self.failed(e))
    }
}

/// Moves what an event says into the `jobs` and `steps` tables.
fn apply(t: &rusqlite::Transaction<'_>, job: &str, event: &pb::JobEvent) -> rusqlite::Result<()> {
    use pb::job_event::Kind;
    let time = event.unix_seconds;
    match &event.kind {
        Some(Kind::State(changed)) => {
            t.execute(
                "UPDATE jobs SET state = ?2, detail = ?3,
                 started = CASE WHEN ?2 = 'queued' THEN NULL ELSE coalesce(started, ?4) END WHERE id = ?1",
                params![job, changed.state, changed.detail, time],
            )?;
        }
        Some(Kind::Step(report)) => {
            t.execute("UPDATE jobs SET step = ?2 WHERE id = ?1", params![job, whole(report.step)])?;
            add_step(t, job, "step", report.step, time, &report.metrics)?;
        }
        Some(Kind::Validation(report)) => add_step(t, job, "validation", report.step, time, &report.metrics)?,
        Some(Kind::Ended(ended)) => {
            t.execute(
                "UPDATE jobs SET state = ?2, detail = ?3, ended = ?4, summary_json = ?5 WHERE id = ?1",
                params![job, ended.state, ended.detail, time, ended.summary_json],
            )?;
        }
        Some(Kind::Progress(_) | Kind::Log(_)) | None => {}
    }
    Ok(())
}

fn add_step(
    t: &rusqlite::Transaction<'_>,
    job: &str,
    kind: &str,
    step: u64,
    time: f64,
    metrics: &std::collections::HashMap<String, f64>,
) -> rusqlite::Result<()> {
    let sorted: std::collections::BTreeMap<_, _> = metrics.iter().collect();
    let json =
        serde_json::to_string(&sorted).map_err(|e| rusqlite::Error::ToSqlConversionFailure(Box::new(e)))?;
    let insert = "INSERT OR REPLACE INTO steps VALUES (?1, ?2, ?3, ?4, ?5)";
    t.prepare_cached(insert)?.execute(params![job, kind, whole(step), time, json])?;
    Ok(())
}

const JOB_COLUMNS: &str =
    "SELECT id, state, project, experiment, step, total_steps, submitted, started, ended, run_dir,
    detail, config_json, summary_json, ranks FROM jobs";

fn job_info(row: &Row<'_>) -> rusqlite::Result<pb::JobInfo> {
    let (started, ended): (Option<f64>, Option<f64>) = (row.get(7)?, row.get(8)?);
    Ok(pb::JobInfo {
        job_id: row.get(0)?,
        state: row.get(1)?,
        project: row.get(2)?,
        experiment: row.get(3)?,
        step: natural(row.get(4)?),
        total_steps: natural(row.get(5)?),
        submitted_unix_seconds: row.get(6)?,
        seconds: started.map_or(0.0, |started| ended.unwrap_or_else(unix_seconds) - started),
        run_dir: row.get(9)?,
        detail: row.get(10)?,
        config_json: row.get(11)?,
        summary_json: row.get(12)?,
        ranks: row.get(13)?,
    })
}

fn purpose(purpose: Purpose) -> &'static str {
    match purpose {
        Purpose::Train => "train",
        Purpose::Validation => "validation",
    }
}

/// The word for a state, on the wire and in the journal.
#[must_use]
pub fn state_name(state: JobState) -> &'static str {
    match state {
        JobState::Queued => "queued",
        JobState::Starting => "starting",
        JobState::Running => "running",
        JobState::Stopping => "stopping",
        JobState::Finished => "finished",
        JobState::Failed => "failed",
        JobState::Cancelled => "cancelled",
    }
}

/// SQLite's integers are signed; no counter here comes near the sign bit.
fn whole(value: u64) -> i64 {
    i64::try_from(value).unwrap_or(i64::MAX)
}

fn natural(value: i64) -> u64 {
    u64::try_from(value).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use pb::job_event::Kind;

    fn new_job() -> NewJob {
        NewJob {
            project: "p".into(),
            experiment: "e".into(),
            run_dir: "/runs/p/e".into(),
            checkpoint_dir: "/runs/p/e/checkpoints".into(),
            config_json: "{}".into(),
            ranks: 2,
            step: 0,
            total_steps: 2,
        }
    }

    fn state(state: &str) -> Kind {
        Kind::State(pb::StateChanged { state: state.into(), detail: format!("now {state}") })
    }

    #[test]
    fn a_job_is_found_again_after_the_head_ended() {
        let dir = tempfile::tempdir().unwrap();
        let journal = Journal::open(dir.path()).unwrap();
        let (first, second) = (journal.add_job(&new_job()).unwrap(), journal.add_job(&new_job()).unwrap());
        assert_eq!((first.as_str(), second.as_str()), ("job-1", "job-2"));
        journal.append(&first, state("running")).unwrap();
        let metrics = [("critic/score/mean".to_owned(), 0.5)].into();
        journal.append(&first, Kind::Step(pb::StepReport { step: 1, total_steps: 2, metrics })).unwrap();
        let ended = pb::Ended {
            state: "finished".into(),
            summary_json: "{\"steps\":1}".into(),
            ..Default::default()
        };
        journal.append(&first, Kind::Ended(ended)).unwrap();
        drop(journal);

        let journal = Journal::open(dir.path()).unwrap();
        let jobs = journal.jobs().unwrap();
        assert_eq!(jobs.len(), 2);
        assert_eq!((jobs[0].state.as_str(), jobs[0].step), ("finished", 1));
        assert_eq!(jobs[0].summary_json, "{\"steps\":1}");
        let events = journal.events_after(&first, 1, 10).unwrap();
        assert_eq!(events.iter().map(|e| e.sequence).collect::<Vec<_>>(), [2, 3]);
        let orphan = Orphan { job: second, checkpoint_dir: "/runs/p/e/checkpoints".into() };
        assert_eq!(journal.orphans().unwrap(), [orphan]);
        assert_eq!(journal.add_job(&new_job()).unwrap(), "job-3");
    }

    #[test]
    fn two_heads_cannot_share_a_state_folder() {
        let dir = tempfile::tempdir().unwrap();
        let _first = Journal::open(dir.path()).unwrap();
        let error = Journal::open(dir.path()).unwrap_err();
        assert!(matches!(error, JournalError::Busy { .. }), "{error}");
    }

    #[test]
    fn a_chain_that_is_run_again_is_indexed_once() {
        let dir = tempfile::tempdir().unwrap();
        let journal = Journal::open(dir.path()).unwrap();
        let key = ChainKey { purpose: Purpose::Train, step: 1, group: 0, chain: 0 };
        for reward in [0.0, 1.0] {
            journal
                .index("job-1", &[TrajectoryEntry { key, reward }], Path::new("step_000001.jsonl.zst"))
                .unwrap();
        }
        assert_eq!(journal.indexed("job-1").unwrap(), 1);
    }
}
