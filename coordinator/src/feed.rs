//! What watchers of a job wait on: how far its journal goes, and the progress within a step.
//!
//! The scheduler publishes, `api::jobs` watches. Events themselves are read from the journal, so a slow watcher
//! costs nothing and misses nothing; progress is only ever the newest.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use agentfly_proto::v1 as pb;
use tokio::sync::watch;

use crate::core::event::JobId;

/// How far a job has come.
#[derive(Debug, Clone, Default)]
pub struct Mark {
    /// Number of its newest event in the journal.
    pub sequence: u64,
    /// Newest progress within a step.
    pub progress: Option<pb::Progress>,
    /// Counts changes of `progress`.
    pub progress_count: u64,
    /// No event will follow.
    pub over: bool,
}

/// The marks of all jobs that are not over. Clones share them.
#[derive(Debug, Clone, Default)]
pub struct Feeds(Arc<Mutex<HashMap<JobId, watch::Sender<Mark>>>>);

impl Feeds {
    fn with<T>(&self, work: impl FnOnce(&mut HashMap<JobId, watch::Sender<Mark>>) -> T) -> T {
        // A map of senders is whole whatever panicked while it was held.
        work(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// A new job.
    pub fn open(&self, job: &str) {
        self.with(|feeds| feeds.insert(job.to_owned(), watch::Sender::new(Mark::default())));
    }

    /// Its journal now goes to `sequence`.
    pub fn appended(&self, job: &str, sequence: u64) {
        self.change(job, |mark| mark.sequence = sequence);
    }

    /// It is so far within a step.
    pub fn progress(&self, job: &str, progress: pb::Progress) {
        self.change(job, |mark| {
            mark.progress = Some(progress);
            mark.progress_count += 1;
        });
    }

    /// Its last event is in the journal.
    pub fn close(&self, job: &str) {
        self.change(job, |mark| mark.over = true);
        self.with(|feeds| feeds.remove(job));
    }

    fn change(&self, job: &str, change: impl FnOnce(&mut Mark)) {
        self.with(|feeds| {
            if let Some(feed) = feeds.get(job) {
                feed.send_modify(change);
            }
        });
    }

    /// The marks of a job, or `None` when it is over.
    #[must_use]
    pub fn watch(&self, job: &str) -> Option<watch::Receiver<Mark>> {
        self.with(|feeds| feeds.get(job).map(watch::Sender::subscribe))
    }

    /// Jobs that are not over.
    #[must_use]
    pub fn open_jobs(&self) -> usize {
        self.with(|feeds| feeds.len())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_watcher_that_comes_late_or_stays_to_the_end_sees_it() {
        let feeds = Feeds::default();
        feeds.open("job-1");
        let mut early = feeds.watch("job-1").unwrap();
        feeds.appended("job-1", 3);
        assert_eq!(early.wait_for(|mark| mark.sequence == 3).await.unwrap().progress_count, 0);
        feeds.close("job-1");
        assert!(early.wait_for(|mark| mark.over).await.is_ok());
        assert!(feeds.watch("job-1").is_none());
    }
}
