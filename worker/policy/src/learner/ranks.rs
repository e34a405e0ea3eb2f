//! The learner's view of its process group: sums, shares, maxima and common decisions, or nothing to do when it
//! trains alone. Every rank must call the same methods in the same order.
//!
//! What must stay true: the first failure drops the group, so that peers which wait for this rank notice at once, and
//! from then on every method is an error. A rank of several never goes on alone.

use std::cell::RefCell;

use agentfly_c10d::{Group, ReduceOp};
use tch::{Device, Kind, Tensor};

use super::error::LearnerError;

/// Elements that are received and added at a time: 4 MiB of f32.
const PART: i64 = 1 << 20;

/// A group of ranks, or a single one.
#[derive(Debug)]
pub(super) struct Ranks {
    /// None of a rank of several: it has left.
    group: RefCell<Option<Group>>,
    index: usize,
    count: usize,
    device: Device,
}

impl Ranks {
    pub(super) fn new(group: Option<Group>, device: Device) -> Self {
        let (index, count) = group.as_ref().map_or((0, 1), |group| (group.rank(), group.size()));
        Self { group: RefCell::new(group), index, count, device }
    }

    /// This rank's number, in the group or out of it.
    pub(super) fn index(&self) -> usize {
        self.index
    }

    /// How many ranks there are, or were when this one left.
    pub(super) fn count(&self) -> usize {
        self.count
    }

    /// Leaves the group for good, as a rank does that fails on its own account: the others wait for it.
    pub(super) fn leave(&self) {
        drop(self.group.take());
    }

    /// An error once this rank has left its group.
    pub(super) fn check(&self) -> Result<(), LearnerError> {
        match self.count > 1 && self.group.borrow().is_none() {
            true => Err(LearnerError::LeftGroup { index: self.index, count: self.count }),
            false => Ok(()),
        }
    }

    /// Runs `work` in the group, if there is one; when it fails, the group is gone.
    fn together(&self, work: impl FnOnce(&Group) -> Result<(), LearnerError>) -> Result<(), LearnerError> {
        self.check()?;
        // Taken out meanwhile: a panic drops it, too.
        let Some(group) = self.group.take() else { return Ok(()) };
        work(&group)?;
        self.group.replace(Some(group));
        Ok(())
    }

    /// Sums `tensor` over the ranks, in place.
    pub(super) fn sum(&self, tensor: &mut Tensor) -> Result<(), LearnerError> {
        self.together(|group| group.all_reduce(tensor, ReduceOp::Sum).map_err(LearnerError::Collective))
    }

    /// Sums `whole`, as many equal shares as there are ranks, over the ranks: afterwards this rank's share holds the
    /// sums, and the others are used up.
    pub(super) fn sum_to_shares(&self, whole: &Tensor, share: i64) -> Result<(), LearnerError> {
        self.together(|group| match self.device.is_cuda() {
            true => {
                let mut own = whole.f_narrow(0, self.index as i64 * share, share)?;
                group.reduce_scatter(&mut own, whole, ReduceOp::Sum).map_err(LearnerError::Collective)
            }
            false => add_shares(group, whole, share),
        })
    }

    /// Fills each of `shares`, one a rank and of any length, from the rank it belongs to.
    pub(super) fn gather(&self, shares: &[Tensor]) -> Result<(), LearnerError> {
        // A broadcast from each owner takes shares of any length, and on Gloo a tenth of the time of an all-gather.
        let mut owned = shares.iter().enumerate().filter(|(_, share)| share.numel() > 0);
        self.together(|group| {
            owned
                .try_for_each(|(owner, share)| group.broadcast(&mut share.shallow_clone(), owner))
                .map_err(LearnerError::Collective)
        })
    }

    /// Sums each value over the ranks.
    pub(super) fn sums(&self, values: &mut [f64]) -> Result<(), LearnerError> {
        self.exchange(values, |group, tensor| group.all_reduce(tensor, ReduceOp::Sum))
    }

    /// The largest of each value over the ranks.
    pub(super) fn maxima(&self, values: &mut [f64]) -> Result<(), LearnerError> {
        self.exchange(values, |group, tensor| group.all_reduce(tensor, ReduceOp::Max))
    }

    /// Rank 0's value, so that all ranks decide alike even where their arithmetic rounds differently.
    pub(super) fn first(&self, value: f64) -> Result<f64, LearnerError> {
        let mut values = [value];
        self.exchange(&mut values, |group, tensor| group.broadcast(tensor, 0))?;
        Ok(values[0])
    }

    fn exchange(
        &self,
        values: &mut [f64],
        collective: impl FnOnce(&Group, &mut Tensor) -> agentfly_c10d::Result<()>,
    ) -> Result<(), LearnerError> {
        self.together(|group| {
            let mut tensor = Tensor::f_from_slice(values)?.f_to_device(self.device)?;
            collective(group, &mut tensor).map_err(LearnerError::Collective)?;
            let host = tensor.f_to_device(Device::Cpu)?.f_to_kind(Kind::Double)?;
            Ok(host.f_copy_data(values, values.len())?)
        })
    }
}

/// Part by part: each rank sends every other the share that is the other's, and adds what it gets to its own.
fn add_shares(group: &Group, whole: &Tensor, share: i64) -> Result<(), LearnerError> {
    // Gloo's own reduce-scatter takes four times as long as its all-reduce, and that twice as long as sending each
    // share to its owner (deploy/docs/benchmarks.md). A part is added while it is in the cache.
    let (rank, size) = (group.rank(), group.size());
    let of = |rank: usize| whole.f_narrow(0, rank as i64 * share, share);
    let own = of(rank)?;
    let incoming = own.f_narrow(0, 0, share.min(PART))?.f_empty_like()?;
    for (round, tag) in (1..size).zip(1..) {
        let (to, from) = ((rank + round) % size, (rank + size - round) % size);
        let theirs = of(to)?;
        for start in (0..share).step_by(PART as usize) {
            let len = PART.min(share - start);
            let (outgoing, mut part) = (theirs.f_narrow(0, start, len)?, incoming.f_narrow(0, 0, len)?);
            group.exchange(&outgoing, to, &mut part, from, tag).map_err(LearnerError::Collective)?;
            let _same = own.f_narrow(0, start, len)?.f_add_(&part)?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::panic::{AssertUnwindSafe, catch_unwind};
    use std::thread;
    use std::time::{Duration, Instant};

    use agentfly_c10d::Store;

    use super::*;

    const DEADLINE: Duration = Duration::from_secs(20);

    /// Runs `story` on each of three ranks.
    fn on_three<T: Send + 'static>(story: impl Fn(Ranks) -> T + Copy + Send + 'static) -> Vec<T> {
        let (_server, port) = Store::serve("127.0.0.1", 0, DEADLINE).unwrap();
        let rank = |rank| {
            thread::spawn(move || {
                let store = Store::connect("127.0.0.1", port, DEADLINE).unwrap();
                let group = Group::gloo(&store, rank, 3, "127.0.0.1", DEADLINE).unwrap();
                story(Ranks::new(Some(group), Device::Cpu))
            })
        };
        let threads: Vec<_> = (0..3).map(rank).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    }

    #[test]
    fn a_share_of_several_parts_is_the_sum_of_all_ranks() {
        // Element i of rank r is (r + 1) · (i mod 1021 + 1): another number in each part and share.
        let off = on_three(|ranks| {
            let share = 2 * PART + 77;
            let numbers = Tensor::arange(3 * share, (Kind::Float, Device::Cpu)).remainder(1021.0) + 1.0;
            let whole = &numbers * (ranks.index() as f64 + 1.0);
            ranks.sum_to_shares(&whole, share).unwrap();
            let own = |tensor: &Tensor| tensor.narrow(0, ranks.index() as i64 * share, share);
            (own(&whole) - own(&numbers) * 6.0).abs().max().double_value(&[])
        });
        assert_eq!(off, [0.0; 3]);
    }

    #[test]
    fn each_share_comes_from_its_owner_whatever_its_length() {
        let told = on_three(|ranks| {
            let shares: Vec<Tensor> = [5, 3, 0]
                .map(|len| Tensor::full([len], ranks.index() as f64 + 1.0, (Kind::Float, Device::Cpu)))
                .into();
            ranks.gather(&shares).unwrap();
            shares.iter().map(|share| Vec::<f32>::try_from(share).unwrap()).collect::<Vec<_>>()
        });
        for of_rank in told {
            assert_eq!(of_rank, [vec![1.0; 5], vec![2.0; 3], vec![]]);
        }
    }

    #[test]
    fn numbers_are_summed_compared_and_taken_from_the_first() {
        let told = on_three(|ranks| {
            let own = ranks.index() as f64;
            let (mut sums, mut maxima) = ([own, -own], [own, -own]);
            ranks.sums(&mut sums).unwrap();
            ranks.maxima(&mut maxima).unwrap();
            (sums, maxima, ranks.first(own + 0.25).unwrap(), ranks.count())
        });
        assert_eq!(told, [([3.0, -3.0], [2.0, 0.0], 0.25, 3); 3]);
    }

    #[test]
    fn a_rank_that_failed_or_panicked_has_left_for_good_and_says_so() {
        for fails in [false, true] {
            // Only the first rank's: the others wait long, and must not have to.
            let story = move |ranks: Ranks| {
                let started = Instant::now();
                if ranks.index() == 0 {
                    let failed = catch_unwind(AssertUnwindSafe(|| {
                        ranks.together(|_| match fails {
                            true => Err(LearnerError::Torch("memory is out".to_owned())),
                            false => panic!("memory is out"),
                        })
                    }));
                    assert!(!matches!(failed, Ok(Ok(()))));
                    assert_eq!((ranks.index(), ranks.count()), (0, 3), "it remembers who it was");
                }
                let share = Tensor::zeros([3], (Kind::Float, Device::Cpu));
                let told = [
                    ranks.sums(&mut [1.0]),
                    ranks.maxima(&mut [1.0]),
                    ranks.first(1.0).map(drop),
                    ranks.sum(&mut share.copy()),
                    ranks.sum_to_shares(&share, 1),
                    ranks.gather(&[share.copy(), share.copy(), share.copy()]),
                    ranks.check(),
                ];
                (started.elapsed(), told.map(Result::unwrap_err))
            };
            let told = on_three(story);
            for (index, (waited, errors)) in told.iter().enumerate() {
                assert!(*waited < DEADLINE / 2, "rank {index} waited {waited:?}");
                let left = |e: &&LearnerError| matches!(e, LearnerError::LeftGroup { count: 3, .. });
                // Whoever hears of it in a collective has that error first.
                let heard = usize::from(index > 0);
                assert_eq!(errors.iter().filter(left).count(), errors.len() - heard, "{errors:?}");
                assert!(index == 0 || matches!(errors[0], LearnerError::Collective(_)), "{errors:?}");
            }
        }
    }

    #[test]
    fn a_rank_that_was_always_alone_cannot_leave() {
        let alone = Ranks::new(None, Device::Cpu);
        alone.leave();
        alone.check().unwrap();
        assert_eq!((alone.first(2.5).unwrap(), alone.index(), alone.count()), (2.5, 0, 1));
    }
}
