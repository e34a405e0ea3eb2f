//! What the rank is doing right now, and since when: so that whoever waits for it can say so.

use std::sync::{Arc, Mutex, PoisonError};

use tokio::time::Instant;

/// Shared by the session's heartbeat and whatever works.
#[derive(Clone)]
pub struct Activity(Arc<Mutex<(String, Instant)>>);

impl Activity {
    /// Begins with `what`.
    #[must_use]
    pub fn new(what: &str) -> Self {
        Self(Arc::new(Mutex::new((what.to_owned(), Instant::now()))))
    }

    /// Something else begins now.
    pub fn set(&self, what: impl Into<String>) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = (what.into(), Instant::now());
    }

    /// What, and for how many seconds.
    #[must_use]
    pub fn get(&self) -> (String, f64) {
        let (what, since) = self.0.lock().unwrap_or_else(PoisonError::into_inner).clone();
        (what, since.elapsed().as_secs_f64())
    }
}
