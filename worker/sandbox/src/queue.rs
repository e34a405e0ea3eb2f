//! Slots of the pool, handed out first come, first served.
//!
//! Every call holds one slot while its snippet runs. A call that has waited too long leaves the line; the others keep
//! their places, so one busy caller cannot starve another.

use std::collections::VecDeque;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

#[derive(Debug)]
struct State {
    free: VecDeque<usize>,
    waiting: VecDeque<u64>,
    next_ticket: u64,
}

/// The slots `0..count`.
#[derive(Debug)]
pub(crate) struct Queue {
    state: Mutex<State>,
    changed: Condvar,
}

/// One slot, free again when dropped.
#[derive(Debug)]
pub(crate) struct Slot<'a> {
    queue: &'a Queue,
    pub(crate) number: usize,
}

impl Queue {
    pub(crate) fn new(count: usize) -> Self {
        let state = State { free: (0..count).collect(), waiting: VecDeque::new(), next_ticket: 0 };
        Self { state: Mutex::new(state), changed: Condvar::new() }
    }

    /// Takes the next slot; `None` if that takes longer than `patience`.
    pub(crate) fn take(&self, patience: Duration) -> Option<Slot<'_>> {
        let deadline = Instant::now() + patience;
        let mut state = self.lock();
        let ticket = state.next_ticket;
        state.next_ticket += 1;
        state.waiting.push_back(ticket);
        loop {
            if state.waiting.front() == Some(&ticket)
                && let Some(number) = state.free.pop_front()
            {
                state.waiting.pop_front();
                self.changed.notify_all();
                return Some(Slot { queue: self, number });
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                state.waiting.retain(|waiting| *waiting != ticket);
                self.changed.notify_all();
                return None;
            }
            state = self.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // Every change under the lock is complete, so a panic elsewhere leaves a usable state.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Slot<'_> {
    fn drop(&mut self) {
        self.queue.lock().free.push_back(self.number);
        self.queue.changed.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_call_that_finds_no_slot_in_time_leaves_the_line_to_the_others() {
        let queue = Queue::new(1);
        let held = queue.take(Duration::ZERO).expect("one slot is free");
        assert!(queue.take(Duration::from_millis(5)).is_none());
        assert!(queue.lock().waiting.is_empty());
        drop(held);
        assert_eq!(queue.take(Duration::ZERO).map(|s| s.number), Some(0));
    }

    #[test]
    fn never_more_holders_than_slots_and_everybody_is_served() {
        let queue = Queue::new(3);
        let (inside, most) = (std::sync::atomic::AtomicUsize::new(0), std::sync::atomic::AtomicUsize::new(0));
        let order = std::sync::atomic::Ordering::SeqCst;
        std::thread::scope(|scope| {
            for _ in 0..12 {
                scope.spawn(|| {
                    for _ in 0..50 {
                        let slot = queue.take(Duration::from_secs(20)).expect("served");
                        most.fetch_max(inside.fetch_add(1, order) + 1, order);
                        std::thread::yield_now();
                        inside.fetch_sub(1, order);
                        drop(slot);
                    }
                });
            }
        });
        assert!((1..=3).contains(&most.into_inner()));
        assert_eq!(queue.lock().free.len(), 3);
    }
}
