//! AdamW over f32 master weights, whatever the model's kind.
//!
//! All parameters lie in one flat buffer, as do gradients and moments: one all-reduce, one norm and one kernel
//! call an update. The model's own tensors are copies of the master weights in the model's kind.

use agentfly_c10d::{AdamWHyper, AdamWState, fused_adamw};
use tch::{Kind, Tensor};

use super::error::LearnerError;
use super::ranks::Ranks;
use crate::model::Decoder;

/// Where one parameter lies in the flat buffers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Slot {
    pub(super) name: String,
    pub(super) shape: Vec<i64>,
    pub(super) start: i64,
    pub(super) len: i64,
}

impl Slot {
    /// This parameter's part of a flat buffer, in its shape, sharing memory.
    pub(super) fn of(&self, flat: &Tensor) -> Result<Tensor, LearnerError> {
        Ok(flat.f_narrow(0, self.start, self.len)?.f_view(self.shape.as_slice())?)
    }
}

/// What became of an update.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Update {
    /// L2 norm of the whole gradient before clipping.
    pub(super) grad_norm: f64,
    /// False when the norm was not finite and nothing changed.
    pub(super) applied: bool,
}

/// The optimizer's state. `[P]` f32 each, P the number of weights.
#[derive(Debug)]
pub(super) struct Optimizer {
    pub(super) slots: Vec<Slot>,
    pub(super) master: Tensor,
    pub(super) grad: Tensor,
    pub(super) exp_avg: Tensor,
    pub(super) exp_avg_sq: Tensor,
    /// Updates applied.
    pub(super) steps: u64,
}

impl Optimizer {
    /// Starts from the model's weights.
    pub(super) fn new(decoder: &Decoder) -> Result<Self, LearnerError> {
        let _no_grad = tch::no_grad_guard();
        let (mut slots, mut start) = (Vec::new(), 0);
        for (name, tensor) in decoder.parameters().iter() {
            let len = tensor.numel() as i64;
            slots.push(Slot { name: name.to_owned(), shape: tensor.size(), start, len });
            start += len;
        }
        let zeros = || Tensor::f_zeros([start], (Kind::Float, decoder.device()));
        let (master, grad, exp_avg, exp_avg_sq) = (zeros()?, zeros()?, zeros()?, zeros()?);
        let optimizer = Self { slots, master, grad, exp_avg, exp_avg_sq, steps: 0 };
        for (slot, (_, tensor)) in optimizer.slots.iter().zip(decoder.parameters().iter()) {
            slot.of(&optimizer.master)?.f_copy_(tensor)?;
        }
        Ok(optimizer)
    }

    /// Forgets gathered gradients.
    pub(super) fn zero_grad(&mut self) -> Result<(), LearnerError> {
        let _same = self.grad.f_zero_()?;
        Ok(())
    }

    /// The sum of a parameter's gradients, sharing memory.
    pub(super) fn gradient_of(&self, name: &str) -> Result<Tensor, LearnerError> {
        let slot = self.slots.iter().find(|slot| slot.name == name);
        slot.map(|slot| slot.of(&self.grad)).unwrap_or_else(|| {
            let needed = "must be one of the model's";
            Err(LearnerError::Config { field: "parameter", value: name.to_owned(), needed })
        })
    }

    /// Clips the gathered gradient (`clip_grad_norm_`: coefficient min(1, clip / (norm + 1e-6))) and applies it,
    /// on every rank with rank 0's norm; a norm that is not finite changes nothing.
    pub(super) fn step(
        &mut self,
        decoder: &Decoder,
        ranks: &Ranks,
        grad_clip: f64,
        hyper: &AdamWHyper,
    ) -> Result<Update, LearnerError> {
        let _no_grad = tch::no_grad_guard();
        let norm = self.grad.f_norm_scalaropt_dtype(2.0, Kind::Double)?.f_double_value(&[])?;
        let grad_norm = ranks.first(norm)?;
        if !grad_norm.is_finite() {
            return Ok(Update { grad_norm, applied: false });
        }
        let coefficient = grad_clip / (grad_norm + 1e-6);
        if coefficient < 1.0 {
            let _same = self.grad.f_mul_scalar_(coefficient)?;
        }
        self.steps += 1;
        let list = |tensor: &Tensor| [tensor.shallow_clone()];
        let (params, grads) = (list(&self.master), list(&self.grad));
        let (exp_avgs, exp_avg_sqs) = (list(&self.exp_avg), list(&self.exp_avg_sq));
        let state =
            AdamWState { params: &params, grads: &grads, exp_avgs: &exp_avgs, exp_avg_sqs: &exp_avg_sqs };
        fused_adamw(state, self.steps, hyper)?;
        self.publish(decoder)?;
        Ok(Update { grad_norm, applied: true })
    }

    /// Copies the master weights into the model, in the model's kind.
    pub(super) fn publish(&self, decoder: &Decoder) -> Result<(), LearnerError> {
        let _no_grad = tch::no_grad_guard();
        for (slot, (_, tensor)) in self.slots.iter().zip(decoder.parameters().iter()) {
            tensor.shallow_clone().f_copy_(&slot.of(&self.master)?)?;
        }
        Ok(())
    }
}
