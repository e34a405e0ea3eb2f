//! Stories of a recorder that dies: its job ends, and whoever watches hears it.

use std::path::Path;

use agentfly_common::config::resolve;
use pb::job_event::Kind;
use tempfile::TempDir;

use super::*;
use crate::core::event::{Device, NodeFacts};
use crate::journal::NewJob;
use crate::recorder::Record;
use crate::store::run_dir::RunDir;
use crate::submission::Questions;

/// A scheduler, and a job of one rank that starts. Its records go where the test says.
struct Story {
    scheduler: Scheduler,
    job: JobId,
    folder: TempDir,
}

fn submission(folder: &Path) -> Submission {
    let questions = r#"[{"id": "a", "question": "1 + 1?", "answer": "2"}]"#;
    std::fs::write(folder.join("train.json"), questions).unwrap();
    let here = |key: &str, name: &str| format!("{key}={}", folder.join(name).display());
    let settings = [
        here("data.train_files", "train.json"),
        here("trainer.run_dir", "run"),
        "data.val_files=[]".to_owned(),
        "data.train_batch_size=1".to_owned(),
    ];
    let config = resolve(&settings, None, []).unwrap().config;
    let run_dir = RunDir::open(&config, 2, "a test").unwrap().run_dir;
    let new_job = NewJob {
        project: "p".to_owned(),
        experiment: "e".to_owned(),
        run_dir: run_dir.path().to_owned(),
        checkpoint_dir: config.trainer.checkpoint_dir(),
        config_json: "{}".to_owned(),
        ranks: 1,
        step: 0,
        total_steps: 2,
    };
    let questions = Questions::load(&config).unwrap();
    let (validation_rows, validation_sources) = (0, Vec::new());
    let spec = JobSpec { config, train_rows: 1, validation_rows, validation_sources, resume: None };
    Submission { spec, new_job, questions, run_dir, notes: Vec::new() }
}

impl Story {
    async fn begin(records: mpsc::Sender<Record>) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let parts = Parts {
            journal: Journal::open(&folder.path().join("state")).unwrap(),
            feeds: Feeds::default(),
            shelf: Shelf::default(),
            recorders: TaskTracker::new(),
        };
        let (mut scheduler, _) = Scheduler::new(CoreSettings::default(), parts);
        let facts = NodeFacts {
            hostname: "host".to_owned(),
            devices: vec![Device::Cpu(0)],
            cpus: 1,
            memory_bytes: 1 << 30,
        };
        scheduler.apply(Event::NodeJoined { node: "node-a".to_owned(), facts }).await.unwrap();
        let (reply, answer) = oneshot::channel();
        scheduler.submit(submission(folder.path()), reply).await.unwrap();
        let Ok(job) = answer.await.unwrap() else { panic!("the job is refused") };
        scheduler.jobs.get_mut(&job).unwrap().records = records;
        Self { scheduler, job, folder }
    }

    async fn its_rank_dies(&mut self) {
        let rank = RankId { job: self.job.clone(), rank: 0, incarnation: 1 };
        let cause = "was killed (signal 9)".to_owned();
        self.scheduler.apply(Event::RankExited { rank, cause }).await.unwrap();
    }

    /// How the job ended, as a watcher and the journal have it.
    fn end(&self) -> Option<pb::Ended> {
        let parts = &self.scheduler.parts;
        let events = parts.journal.events_after(&self.job, 0, 100).unwrap();
        let end = events.into_iter().find_map(|event| match event.kind {
            Some(Kind::Ended(ended)) => Some(ended),
            _ => None,
        });
        assert_eq!(end.is_some(), parts.feeds.watch(&self.job).is_none(), "the feed closes with the end");
        assert_eq!(end.is_some(), self.scheduler.jobs.is_empty());
        end
    }

    fn over(self) {
        drop(self.scheduler);
        self.folder.close().unwrap();
    }
}

#[tokio::test]
async fn a_job_ends_though_its_recorder_died_before_it() {
    let (records, recorder) = mpsc::channel(4);
    drop(recorder);
    let mut story = Story::begin(records).await;
    assert_eq!(story.end(), None);
    story.its_rank_dies().await;
    let end = story.end().unwrap();
    assert_eq!((end.state.as_str(), end.summary_json.as_str()), ("failed", ""));
    assert!(end.detail.contains("was killed (signal 9)"), "{}", end.detail);
    story.over();
}

#[tokio::test]
async fn a_job_ends_though_its_recorder_died_over_the_last_record() {
    let (records, mut recorder) = mpsc::channel(4);
    let mut story = Story::begin(records).await;
    story.its_rank_dies().await;
    assert!(matches!(recorder.recv().await, Some(Record::End { .. })));
    story.scheduler.tick().await.unwrap();
    assert_eq!(story.end(), None, "the recorder is at work");
    drop(recorder);
    story.scheduler.tick().await.unwrap();
    assert_eq!(story.end().unwrap().state, "failed");
    story.over();
}

#[tokio::test]
async fn a_job_that_runs_is_ended_when_its_recorder_dies() {
    let (records, recorder) = mpsc::channel(4);
    let mut story = Story::begin(records).await;
    drop(recorder);
    story.scheduler.tick().await.unwrap();
    assert_eq!(story.end(), None, "its rank is there still");
    story.its_rank_dies().await;
    let end = story.end().unwrap();
    assert!(end.detail.starts_with("the job's recorder has died"), "{}", end.detail);
    story.over();
}
