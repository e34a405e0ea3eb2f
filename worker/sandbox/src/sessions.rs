//! The sessions of a pool, by their owners' names: which one serves a turn, and which one is dropped for room.
//!
//! A session is out of the table while a turn runs on it, so it has one turn at a time. Idle ones are dropped, the least
//! recently used first, when there are too many or they hold too much memory; their names are remembered until their
//! owners end them, so that the next turn can say that its state is lost.

use std::collections::HashMap;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// What is known of a name.
#[derive(Debug)]
enum Entry<S> {
    /// A turn runs: the one of this number.
    Busy(u64),
    /// Waits for the next turn.
    Idle { session: S, used: u64, bytes: u64 },
    /// Its state was dropped, or died.
    Lost,
}

#[derive(Debug)]
struct State<S> {
    entries: HashMap<String, Entry<S>>,
    clock: u64,
}

/// The table; `S` is a session.
#[derive(Debug)]
pub(crate) struct Sessions<S> {
    state: Mutex<State<S>>,
    changed: Condvar,
    most: usize,
    most_bytes: u64,
}

/// What a turn finds, and what it leaves.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Found<S> {
    /// A name that is new.
    Nothing,
    /// Its session.
    Session(S),
    /// Its state was lost since its last turn.
    Lost,
}

impl<S> Sessions<S> {
    /// Keeps at most so many idle sessions, and at most so many bytes in them.
    pub(crate) fn new(most: usize, most_bytes: u64) -> Self {
        let state = State { entries: HashMap::new(), clock: 0 };
        Self { state: Mutex::new(state), changed: Condvar::new(), most, most_bytes }
    }

    /// Takes the session of a name for a turn, with the turn's number; `None` if another turn of it runs for longer than
    /// `patience`.
    pub(crate) fn take(&self, name: &str, patience: Duration) -> Option<(u64, Found<S>)> {
        let deadline = Instant::now() + patience;
        let mut state = self.lock();
        while matches!(state.entries.get(name), Some(Entry::Busy(_))) {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return None;
            }
            state = self.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        state.clock += 1;
        let turn = state.clock;
        let found = match state.entries.insert(name.to_owned(), Entry::Busy(turn)) {
            Some(Entry::Idle { session, .. }) => Found::Session(session),
            Some(Entry::Lost) => Found::Lost,
            Some(Entry::Busy(_)) | None => Found::Nothing,
        };
        Some((turn, found))
    }

    /// Ends the turn of this number, with what the next one shall find: a session with the bytes that it holds, its loss,
    /// or nothing. Returns what to drop: where the owner has ended the name meanwhile, and may have begun it anew, that is
    /// this turn's session.
    pub(crate) fn put(&self, name: &str, turn: u64, left: Found<(S, u64)>) -> Vec<S> {
        let mut state = self.lock();
        state.clock += 1;
        let used = state.clock;
        let mut dropped = Vec::new();
        let own = state.entries.get_mut(name).filter(|entry| matches!(entry, Entry::Busy(of) if *of == turn));
        match (own, left) {
            (Some(entry), Found::Session((session, bytes))) => {
                *entry = Entry::Idle { session, used, bytes };
            }
            (Some(entry), Found::Lost) => *entry = Entry::Lost,
            (Some(_), Found::Nothing) => drop(state.entries.remove(name)),
            (None, Found::Session((session, _))) => dropped.push(session),
            (None, Found::Lost | Found::Nothing) => {}
        }
        dropped.extend(state.make_room(self.most, self.most_bytes));
        drop(state);
        self.changed.notify_all();
        dropped
    }

    /// Forgets a name. Returns its session; one with a turn goes when the turn ends.
    pub(crate) fn end(&self, name: &str) -> Option<S> {
        let ended = self.lock().entries.remove(name);
        self.changed.notify_all();
        match ended {
            Some(Entry::Idle { session, .. }) => Some(session),
            _ => None,
        }
    }

    /// Sessions that wait for a turn.
    pub(crate) fn idle(&self) -> usize {
        self.lock().idle().count()
    }

    fn lock(&self) -> MutexGuard<'_, State<S>> {
        // Every change under the lock is complete, so a panic elsewhere leaves a usable state.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<S> State<S> {
    /// (last use, bytes, name) of each idle session.
    fn idle(&self) -> impl Iterator<Item = (u64, u64, &String)> {
        self.entries.iter().filter_map(|(name, entry)| match entry {
            Entry::Idle { used, bytes, .. } => Some((*used, *bytes, name)),
            _ => None,
        })
    }

    fn make_room(&mut self, most: usize, most_bytes: u64) -> Vec<S> {
        let mut dropped = Vec::new();
        loop {
            let (count, held) = self.idle().fold((0, 0), |(n, sum), (_, bytes, _)| (n + 1, sum + bytes));
            if count <= most && held <= most_bytes {
                return dropped;
            }
            let Some(oldest) = self.idle().min().map(|(_, _, name)| name.clone()) else { return dropped };
            if let Some(Entry::Idle { session, .. }) = self.entries.insert(oldest, Entry::Lost) {
                dropped.push(session);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn turn(sessions: &Sessions<u32>, name: &str, session: u32, bytes: u64) -> (Found<u32>, Vec<u32>) {
        let (turn, found) = sessions.take(name, Duration::ZERO).expect("no other turn runs");
        (found, sessions.put(name, turn, Found::Session((session, bytes))))
    }

    #[test]
    fn a_name_gets_its_own_session_again() {
        let sessions = Sessions::new(8, 1000);
        assert_eq!(turn(&sessions, "a", 1, 10), (Found::Nothing, vec![]));
        assert_eq!(turn(&sessions, "b", 2, 10), (Found::Nothing, vec![]));
        assert_eq!(turn(&sessions, "a", 1, 10), (Found::Session(1), vec![]));
        assert_eq!(sessions.end("a"), Some(1));
        assert_eq!(turn(&sessions, "a", 3, 10), (Found::Nothing, vec![]), "ended and begun anew is not lost");
    }

    #[test]
    fn the_least_recently_used_go_first_and_their_owners_are_told_once() {
        let sessions = Sessions::new(2, 1000);
        for (name, session) in [("a", 1), ("b", 2), ("a", 1)] {
            turn(&sessions, name, session, 10);
        }
        assert_eq!(turn(&sessions, "c", 3, 10).1, [2], "b was used before a");
        assert_eq!(turn(&sessions, "b", 4, 10), (Found::Lost, vec![1]));
        assert_eq!(turn(&sessions, "b", 4, 10), (Found::Session(4), vec![]));
        assert_eq!(sessions.idle(), 2);
    }

    #[test]
    fn memory_bounds_what_is_kept() {
        let sessions = Sessions::new(8, 100);
        turn(&sessions, "a", 1, 40);
        turn(&sessions, "b", 2, 40);
        assert_eq!(turn(&sessions, "c", 3, 90).1, [1, 2]);
        assert_eq!(turn(&sessions, "d", 4, 101).1, [3, 4], "one alone may be too much");
        assert_eq!(turn(&sessions, "d", 5, 1).0, Found::Lost);
    }

    #[test]
    fn a_turn_that_runs_is_waited_for_and_never_dropped() {
        let sessions = Sessions::new(1, 100);
        let (of_a, found) = sessions.take("a", Duration::ZERO).expect("no other turn runs");
        assert_eq!(found, Found::Nothing);
        assert_eq!(sessions.take("a", Duration::from_millis(5)), None);
        turn(&sessions, "b", 2, 10);
        turn(&sessions, "c", 3, 10);
        assert_eq!(sessions.put("a", of_a, Found::Session((1, 10))), [3], "a's turn ended last");
    }

    #[test]
    fn a_turn_whose_owner_has_gone_leaves_nothing_to_who_begins_under_its_name() {
        let sessions = Sessions::new(8, 100);
        let (old, _) = sessions.take("a", Duration::ZERO).expect("no other turn runs");
        assert_eq!(sessions.end("a"), None, "it goes when its turn ends");
        let (new, found) = sessions.take("a", Duration::ZERO).expect("the old turn is not its own");
        assert_eq!(found, Found::Nothing);
        assert_eq!(sessions.put("a", old, Found::Session((1, 10))), [1]);
        assert_eq!(sessions.put("a", new, Found::Session((2, 10))), [0_u32; 0]);
        assert_eq!(turn(&sessions, "a", 2, 10).0, Found::Session(2));
    }

    #[test]
    fn a_turn_that_never_ran_leaves_what_it_found() {
        let sessions = Sessions::<u32>::new(1, 100);
        for lost in [false, true] {
            let left = || if lost { Found::Lost } else { Found::Nothing };
            let (first, _) = sessions.take("a", Duration::ZERO).expect("no other turn runs");
            sessions.put("a", first, left());
            let (second, found) = sessions.take("a", Duration::ZERO).expect("no other turn runs");
            assert_eq!(matches!(found, Found::Lost), lost);
            sessions.put("a", second, Found::Nothing);
        }
    }
}
