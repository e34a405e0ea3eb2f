//! Train shards that wait to be fetched: one a rank, the newest.
//!
//! The scheduler puts, `api::trajectories` serves. A shard stays until the next one of its rank or the end of
//! its job, so a fetch that broke off can be repeated.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use agentfly_common::batch::TrainShard;

use crate::core::event::RankId;

/// Seat of a rank within a job, whatever its incarnation.
type Seat = (String, u32);

/// A shard and the incarnation it is for.
type Shelved = (u32, Arc<TrainShard>);

/// The shelf; clones share it.
#[derive(Debug, Clone, Default)]
pub struct Shelf(Arc<Mutex<HashMap<Seat, Shelved>>>);

impl Shelf {
    fn with<T>(&self, work: impl FnOnce(&mut HashMap<Seat, Shelved>) -> T) -> T {
        // A map of finished values is whole whatever panicked while it was held.
        work(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Offers a shard to `rank`; its older one goes.
    pub fn put(&self, rank: &RankId, shard: TrainShard) {
        let seat = (rank.job.clone(), rank.rank);
        self.with(|shelf| shelf.insert(seat, (rank.incarnation, Arc::new(shard))));
    }

    /// The shard of `rank` for `step`.
    #[must_use]
    pub fn get(&self, rank: &RankId, step: u64) -> Option<Arc<TrainShard>> {
        let seat = (rank.job.clone(), rank.rank);
        let found = self.with(|shelf| shelf.get(&seat).cloned());
        found
            .filter(|(incarnation, shard)| *incarnation == rank.incarnation && shard.step == step)
            .map(|(_, s)| s)
    }

    /// Drops everything of a job.
    pub fn clear(&self, job: &str) {
        self.with(|shelf| shelf.retain(|(of, _), _| of != job));
    }
}

#[cfg(test)]
mod tests {
    use agentfly_common::ids::PolicyVersion;

    use super::*;

    #[test]
    fn a_rank_finds_its_newest_shard_and_no_other() {
        let shelf = Shelf::default();
        let rank = |rank, incarnation| RankId { job: "job-1".into(), rank, incarnation };
        let shard = |step| TrainShard { step, policy_version: PolicyVersion(0), mini_batches: Vec::new() };
        shelf.put(&rank(0, 1), shard(1));
        shelf.put(&rank(0, 1), shard(2));
        assert!(shelf.get(&rank(0, 1), 1).is_none());
        assert_eq!(shelf.get(&rank(0, 1), 2).unwrap().step, 2);
        assert_eq!(shelf.get(&rank(0, 1), 2).unwrap().step, 2, "a fetch can be repeated");
        assert!(shelf.get(&rank(0, 0), 2).is_none() && shelf.get(&rank(1, 1), 2).is_none());
        shelf.clear("job-1");
        assert!(shelf.get(&rank(0, 1), 2).is_none());
    }
}
