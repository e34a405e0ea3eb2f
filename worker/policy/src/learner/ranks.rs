//! The learner's view of its process group: sums, shares, maxima and common decisions, or nothing to do when it
//! trains alone. Every rank must call the same methods in the same order.

use agentfly_c10d::{Group, ReduceOp};
use tch::{Device, Kind, Tensor};

use super::error::LearnerError;

/// Elements that are received and added at a time: 4 MiB of f32.
const PART: i64 = 1 << 20;

/// A group of ranks, or a single one.
#[derive(Debug)]
pub(super) struct Ranks {
    group: Option<Group>,
    device: Device,
}

impl Ranks {
    pub(super) fn new(group: Option<Group>, device: Device) -> Self {
        Self { group, device }
    }

    /// Sums `tensor` over the ranks, in place.
    pub(super) fn sum(&self, tensor: &mut Tensor) -> Result<(), LearnerError> {
        match &self.group {
            Some(group) => Ok(group.all_reduce(tensor, ReduceOp::Sum)?),
            None => Ok(()),
        }
    }

    /// This rank's number.
    pub(super) fn index(&self) -> usize {
        self.group.as_ref().map_or(0, Group::rank)
    }

    /// How many ranks there are.
    pub(super) fn count(&self) -> usize {
        self.group.as_ref().map_or(1, Group::size)
    }

    /// Sums `whole`, as many equal shares as there are ranks, over the ranks: afterwards this rank's share holds the
    /// sums, and the others are used up.
    pub(super) fn sum_to_shares(&self, whole: &Tensor, share: i64) -> Result<(), LearnerError> {
        let Some(group) = &self.group else { return Ok(()) };
        let of = |rank: usize| whole.f_narrow(0, rank as i64 * share, share);
        let mut own = of(group.rank())?;
        if self.device.is_cuda() {
            return Ok(group.reduce_scatter(&mut own, whole, ReduceOp::Sum)?);
        }
        // Gloo's own reduce-scatter takes four times as long as its all-reduce, and that twice as long as sending each
        // share to its owner (deploy/docs/benchmarks.md). A part is added while it is in the cache.
        let (rank, size) = (group.rank(), group.size());
        let incoming = own.f_narrow(0, 0, share.min(PART))?.f_empty_like()?;
        for (round, tag) in (1..size).zip(1..) {
            let (to, from) = ((rank + round) % size, (rank + size - round) % size);
            let theirs = of(to)?;
            for start in (0..share).step_by(PART as usize) {
                let len = PART.min(share - start);
                let (outgoing, mut part) = (theirs.f_narrow(0, start, len)?, incoming.f_narrow(0, 0, len)?);
                group.exchange(&outgoing, to, &mut part, from, tag)?;
                let _same = own.f_narrow(0, start, len)?.f_add_(&part)?;
            }
        }
        Ok(())
    }

    /// Fills each of `shares`, one a rank and of any length, from the rank it belongs to.
    pub(super) fn gather(&self, shares: &[Tensor]) -> Result<(), LearnerError> {
        let Some(group) = &self.group else { return Ok(()) };
        // A broadcast from each owner takes shares of any length, and on Gloo a tenth of the time of an all-gather.
        for (owner, share) in shares.iter().enumerate().filter(|(_, share)| share.numel() > 0) {
            group.broadcast(&mut share.shallow_clone(), owner)?;
        }
        Ok(())
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
        let Some(group) = &self.group else { return Ok(()) };
        let mut tensor = Tensor::f_from_slice(values)?.f_to_device(self.device)?;
        collective(group, &mut tensor)?;
        let host = tensor.f_to_device(Device::Cpu)?.f_to_kind(Kind::Double)?;
        host.f_copy_data(values, values.len())?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::thread;
    use std::time::Duration;

    use agentfly_c10d::Store;

    use super::*;

    /// Runs `story` on each of three ranks.
    fn on_three<T: Send + 'static>(story: fn(Ranks) -> T) -> Vec<T> {
        let deadline = Duration::from_secs(20);
        let (_server, port) = Store::serve("127.0.0.1", 0, deadline).unwrap();
        let rank = |rank| {
            thread::spawn(move || {
                let store = Store::connect("127.0.0.1", port, deadline).unwrap();
                let group = Group::gloo(&store, rank, 3, "127.0.0.1", deadline).unwrap();
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
}
