//! A chain's two limits of time: its own, which stands still while the engine has no room, and its step's.
//!
//! Used by [`super::run`] around every wait. What must stay true: no wait outlasts the step's deadline; time spent
//! waiting for room moves the chain's own deadline by exactly as much.

use std::time::Duration;

use tokio::time::{Instant, timeout_at};

/// What the reward may still take when the chain's own time is (nearly) spent: a chain that did its work is not
/// thrown away for a second of comparing.
const REWARD_GRACE: Duration = Duration::from_secs(60);

/// The clock of one chain.
#[derive(Debug)]
pub(super) struct Clock {
    own_deadline: Instant,
    step_deadline: Instant,
}

/// Which limit ended a wait.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Overdue {
    /// The chain's own.
    Own,
    /// The step's.
    Step,
}

impl Clock {
    /// Starts now.
    pub(super) fn start(limit: Duration, step_deadline: Instant) -> Self {
        Self { own_deadline: Instant::now() + limit, step_deadline }
    }

    /// When the chain's own time is over, as it stands.
    pub(super) fn own_deadline(&self) -> Instant {
        self.own_deadline
    }

    /// Whether the chain's own time is over.
    pub(super) fn is_over(&self) -> bool {
        Instant::now() >= self.own_deadline
    }

    /// Waits for what is not the chain's doing: its own time stands still.
    pub(super) async fn stand_still<T>(&mut self, wait: impl Future<Output = T>) -> Result<T, Overdue> {
        let since = Instant::now();
        let waited = self.within_step(wait).await;
        self.own_deadline += since.elapsed();
        waited
    }

    /// Waits for what keeps the chain's own deadline by itself.
    pub(super) async fn within_step<T>(&self, wait: impl Future<Output = T>) -> Result<T, Overdue> {
        timeout_at(self.step_deadline, wait).await.map_err(|_| Overdue::Step)
    }

    /// Waits for a part of the chain's work.
    pub(super) async fn within<T>(&self, wait: impl Future<Output = T>) -> Result<T, Overdue> {
        self.until(self.own_deadline, wait).await
    }

    /// Waits for the reward.
    pub(super) async fn within_reward<T>(&self, wait: impl Future<Output = T>) -> Result<T, Overdue> {
        self.until(self.own_deadline.max(Instant::now() + REWARD_GRACE), wait).await
    }

    async fn until<T>(&self, own: Instant, wait: impl Future<Output = T>) -> Result<T, Overdue> {
        let which = if own < self.step_deadline { Overdue::Own } else { Overdue::Step };
        timeout_at(own.min(self.step_deadline), wait).await.map_err(|_| which)
    }
}
