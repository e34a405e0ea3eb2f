//! The learner's view of its process group: sums, maxima and shared decisions, or nothing to do when it trains
//! alone. Every rank must call the same methods in the same order.

use agentfly_c10d::{Group, ReduceOp};
use tch::{Device, Kind, Tensor};

use super::error::LearnerError;

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
