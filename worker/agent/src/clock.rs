//! A chain's two limits of time: its own, which stands still while it waits for a place, and its step's.
//!
//! Used by [`crate::chain::run_chain`] around every wait; tools and rewards get it to say when they merely queue.
//! What must stay true: no wait outlasts the step's deadline; time spent waiting for a place, in the engine or in
//! a sandbox, moves the chain's own deadline by exactly as much.

use std::pin::pin;
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::{Instant, sleep_until, timeout_at};

/// What the reward may still take when the chain's own time is (nearly) spent: a chain that did its work is not
/// thrown away for a moment of comparing. More than the judge's two tries of
/// [`JUDGE_LIMITS`](crate::rewards::JUDGE_LIMITS) take.
const REWARD_GRACE: Duration = Duration::from_secs(60);

/// The clock of one chain.
#[derive(Debug)]
pub struct Clock {
    own: watch::Sender<OwnTime>,
    step_deadline: Instant,
}

/// The chain's own time.
#[derive(Debug, Clone, Copy)]
struct OwnTime {
    /// When it is over, unless it stands still.
    deadline: Instant,
    /// Since when it stands still.
    standing_since: Option<Instant>,
}

/// Which limit ended a wait.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Overdue {
    /// The chain's own.
    Own,
    /// The step's.
    Step,
}

impl Clock {
    /// Starts now.
    #[must_use]
    pub fn start(limit: Duration, step_deadline: Instant) -> Self {
        let (own, _) = watch::channel(OwnTime { deadline: Instant::now() + limit, standing_since: None });
        Self { own, step_deadline }
    }

    /// Waits for a place that others hold: the chain's own time stands still, also when the future is dropped
    /// half-way. One such wait at a time; the step's deadline is kept by whoever awaits the work this is part of.
    pub async fn stand_still<T>(&self, wait: impl Future<Output = T>) -> T {
        self.own.send_modify(|own| own.standing_since = Some(Instant::now()));
        let _goes_on = GoesOn(self);
        wait.await
    }

    /// When the chain's own time is over, as it stands.
    #[must_use]
    pub fn own_deadline(&self) -> Instant {
        self.own.borrow().deadline
    }

    /// Whether the chain's own time is over.
    pub(crate) fn is_over(&self) -> bool {
        Instant::now() >= self.own_deadline()
    }

    /// Waits for what keeps the chain's own deadline by itself, or stands still.
    pub(crate) async fn within_step<T>(&self, wait: impl Future<Output = T>) -> Result<T, Overdue> {
        timeout_at(self.step_deadline, wait).await.map_err(|_| Overdue::Step)
    }

    /// Waits for a part of the chain's work, of which what stands still does not count.
    pub(crate) async fn within<T>(&self, work: impl Future<Output = T>) -> Result<T, Overdue> {
        let (mut work, mut own) = (pin!(work), self.own.subscribe());
        loop {
            let now = *own.borrow_and_update();
            let runs_out = now.standing_since.is_none() && now.deadline < self.step_deadline;
            let (deadline, which) =
                if runs_out { (now.deadline, Overdue::Own) } else { (self.step_deadline, Overdue::Step) };
            tokio::select! {
                biased;
                done = &mut work => return Ok(done),
                Ok(()) = own.changed() => {}
                () = sleep_until(deadline) => return Err(which),
            }
        }
    }

    /// Waits for the reward.
    pub(crate) async fn within_reward<T>(&self, reward: impl Future<Output = T>) -> Result<T, Overdue> {
        let graced = Instant::now() + REWARD_GRACE;
        self.own.send_modify(|own| own.deadline = own.deadline.max(graced));
        self.within(reward).await
    }
}

/// Lets the chain's own time go on when dropped.
struct GoesOn<'a>(&'a Clock);

impl Drop for GoesOn<'_> {
    fn drop(&mut self) {
        self.0.own.send_modify(|own| {
            if let Some(since) = own.standing_since.take() {
                own.deadline += since.elapsed();
            }
        });
    }
}

#[cfg(test)]
mod tests {
    use tokio::time::sleep;

    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    #[tokio::test(start_paused = true)]
    async fn standing_still_inside_a_piece_of_work_is_not_counted_and_the_rest_is() {
        let clock = Clock::start(10 * SECOND, Instant::now() + 1000 * SECOND);
        let work = async |runs: u32| {
            sleep(4 * SECOND).await;
            clock.stand_still(sleep(100 * SECOND)).await;
            sleep(runs * SECOND).await;
        };
        let began = Instant::now();
        assert_eq!(clock.within(work(5)).await, Ok(()), "4 + 5 of 10 s");
        assert_eq!(clock.within(sleep(5 * SECOND)).await, Err(Overdue::Own));
        assert_eq!(began.elapsed(), 110 * SECOND);
    }

    #[tokio::test(start_paused = true)]
    async fn the_step_ends_also_what_stands_still() {
        let clock = Clock::start(10 * SECOND, Instant::now() + 50 * SECOND);
        let began = Instant::now();
        assert_eq!(clock.within(clock.stand_still(sleep(100 * SECOND))).await, Err(Overdue::Step));
        assert_eq!(began.elapsed(), 50 * SECOND);
    }
}
