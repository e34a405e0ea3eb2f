//! The order of the questions: a permutation per epoch from (seed, epoch) alone, and a cursor into it.
//!
//! Called by the coordinator's step loop. Nothing is drawn from a running generator, so resuming is a matter of
//! two numbers, and no epoch can be skipped or repeated at its boundary. The shuffle is written out here: a
//! library's may change with its version, and an old checkpoint would then see other questions.

use agentfly_common::seed::JobSeed;
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::RngCore;
use serde::{Deserialize, Serialize};

/// Where in the data the next batch starts. Saved in checkpoints.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Cursor {
    /// Passes finished.
    pub epoch: u64,
    /// Questions of this pass that were dealt.
    pub position: usize,
}

/// Deals indices of rows in batches.
#[derive(Debug, Clone)]
pub struct Order {
    /// The rows that take part, in file order.
    subset: Vec<usize>,
    seed: JobSeed,
    shuffle: bool,
    /// The permutation of one epoch, kept between batches.
    current: Option<(u64, Vec<usize>)>,
}

impl Order {
    /// An order over `rows` rows. `limit` takes a random subset, drawn from `seed` once (`data.train_max_samples`);
    /// without `shuffle` every epoch runs in file order.
    #[must_use]
    pub fn new(rows: usize, limit: Option<usize>, seed: u64, shuffle: bool) -> Self {
        let seed = JobSeed(seed);
        let mut subset: Vec<usize> = (0..rows).collect();
        if let Some(limit) = limit.filter(|limit| *limit < rows) {
            permute(&mut subset, &mut seed.rng("data/subset", &[]));
            subset.truncate(limit);
            subset.sort_unstable();
        }
        Self { subset, seed, shuffle, current: None }
    }

    /// Rows an epoch, the dropped rest included.
    #[must_use]
    pub fn len(&self) -> usize {
        self.subset.len()
    }

    /// Whether there are no rows.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.subset.is_empty()
    }

    /// The next `size` row indices; moves `cursor` behind them. What is left of an epoch and does not fill a batch
    /// is dropped, and the next epoch begins. Empty if `size` is 0 or more than there are rows: `batch_plan`
    /// refuses such a job.
    pub fn next_batch(&mut self, cursor: &mut Cursor, size: usize) -> Vec<usize> {
        if size == 0 || size > self.subset.len() {
            return Vec::new();
        }
        if cursor.position.saturating_add(size) > self.subset.len() {
            *cursor = Cursor { epoch: cursor.epoch + 1, position: 0 };
        }
        let start = cursor.position;
        cursor.position += size;
        self.epoch(cursor.epoch)[start..start + size].to_vec()
    }

    /// All rows in the order of `epoch`.
    fn epoch(&mut self, epoch: u64) -> &[usize] {
        let cached = self.current.take().filter(|(cached, _)| *cached == epoch);
        let (_, order) = self.current.insert(cached.unwrap_or_else(|| {
            let mut order = self.subset.clone();
            if self.shuffle {
                permute(&mut order, &mut self.seed.rng("data/order", &[epoch]));
            }
            (epoch, order)
        }));
        order
    }
}

/// Fisher–Yates, from the last to the second.
fn permute(items: &mut [usize], rng: &mut ChaCha8Rng) {
    for last in (1..items.len()).rev() {
        let other = below(last as u64 + 1, rng);
        items.swap(last, usize::try_from(other).expect("it is at most `last`, a usize"));
    }
}

/// A uniform number below `bound`: draws from the incomplete last span are thrown away, so that none is likelier.
fn below(bound: u64, rng: &mut ChaCha8Rng) -> u64 {
    let complete = u64::MAX - u64::MAX % bound;
    loop {
        let draw = rng.next_u64();
        if draw < complete {
            return draw % bound;
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn batches(order: &mut Order, cursor: &mut Cursor, size: usize, count: usize) -> Vec<Vec<usize>> {
        (0..count).map(|_| order.next_batch(cursor, size)).collect()
    }

    #[test]
    fn the_order_never_changes_with_platform_or_version() {
        let mut order = Order::new(10, None, 1, true);
        let mut cursor = Cursor::default();
        assert_eq!(
            batches(&mut order, &mut cursor, 5, 4),
            GOLDEN_SEED_1,
            "an old checkpoint would see other questions"
        );
    }

    /// Rows 0..10, seed 1, two epochs in batches of 5.
    const GOLDEN_SEED_1: [[usize; 5]; 4] =
        [[0, 7, 2, 9, 3], [4, 6, 8, 5, 1], [0, 7, 6, 9, 4], [5, 3, 1, 8, 2]];

    #[test]
    fn without_shuffle_epochs_run_in_file_order_and_drop_the_rest() {
        let mut order = Order::new(5, None, 1, false);
        let mut cursor = Cursor::default();
        assert_eq!(batches(&mut order, &mut cursor, 2, 3), [[0, 1], [2, 3], [0, 1]]);
        assert_eq!(cursor, Cursor { epoch: 1, position: 2 });
    }

    #[test]
    fn a_batch_that_cannot_be_filled_is_empty_and_moves_nothing() {
        let mut cursor = Cursor::default();
        assert!(Order::new(3, None, 1, true).next_batch(&mut cursor, 4).is_empty());
        assert!(Order::new(0, None, 1, true).next_batch(&mut cursor, 1).is_empty());
        assert_eq!(cursor, Cursor::default());
    }

    proptest! {
        #[test]
        fn every_epoch_is_another_permutation_of_the_same_rows(rows in 1usize..80, seed: u64, limit in 1usize..80) {
            let mut order = Order::new(rows, Some(limit), seed, true);
            prop_assert_eq!(order.len(), rows.min(limit));
            let mut cursor = Cursor::default();
            let len = order.len();
            let mut sorted = batches(&mut order, &mut cursor, len, 3);
            if len > 20 {
                prop_assert_ne!(&sorted[0], &sorted[1]);
            }
            for epoch in &mut sorted {
                epoch.sort_unstable();
                epoch.dedup();
                prop_assert_eq!(epoch.len(), len);
            }
            prop_assert_eq!(&sorted[0], &sorted[1]);
            prop_assert_eq!(&sorted[1], &sorted[2]);
            prop_assert!(sorted[0].iter().all(|row| *row < rows));
        }

        #[test]
        fn resuming_gives_exactly_the_rest_also_at_an_epochs_end(
            rows in 1usize..40, size in 1usize..10, done in 0usize..20, seed: u64, shuffle: bool,
        ) {
            prop_assume!(size <= rows);
            let mut cursor = Cursor::default();
            let mut whole = Order::new(rows, None, seed, shuffle);
            batches(&mut whole, &mut cursor, size, done);
            prop_assert_eq!(cursor.epoch, (done.max(1) as u64 - 1) / (rows / size) as u64);
            let saved = serde_json::to_string(&cursor).unwrap();
            let expected = batches(&mut whole, &mut cursor, size, 12);

            let mut cursor: Cursor = serde_json::from_str(&saved).unwrap();
            let mut resumed = Order::new(rows, None, seed, shuffle);
            prop_assert_eq!(batches(&mut resumed, &mut cursor, size, 12), expected);
        }
    }
}
