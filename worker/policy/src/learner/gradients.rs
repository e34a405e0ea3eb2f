//! The gradient an update applied, for those who compare it with another implementation's: `make parity` and the
//! goldens. Nothing in training reads it back.

use tch::Tensor;

use super::Learner;
use super::error::LearnerError;

impl Learner {
    /// Gradient of the last update's loss in each parameter, by name, in the parameter's shape, f32: summed over
    /// micro-batches and ranks, and scaled where the whole norm exceeded `grad_clip`. Zeros before the first
    /// update. With `lr` 0 a step leaves the weights as they are and this is all it does.
    ///
    /// # Errors
    /// [`LearnerError::SharedGradients`] where ranks share the optimizer's state: each has summed its own share, and
    /// what it holds of the others' is no gradient of anything. When memory is out.
    pub fn last_gradients(&self) -> Result<Vec<(String, Tensor)>, LearnerError> {
        let (index, count) = (self.optimizer.shards.index, self.optimizer.shards.count);
        if count > 1 {
            return Err(LearnerError::SharedGradients { index, count });
        }
        let _no_grad = tch::no_grad_guard();
        let copy = |tensor: Tensor| {
            tensor.f_empty_like().and_then(|mut own| {
                own.f_copy_(&tensor)?;
                Ok(own)
            })
        };
        let slots = &self.optimizer.shards.slots;
        slots.iter().map(|slot| Ok((slot.name.clone(), copy(slot.of(&self.optimizer.grad)?)?))).collect()
    }
}
