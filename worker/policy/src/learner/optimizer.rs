//! AdamW over f32 master weights, whatever the model's kind; each of several ranks updates its share of them.
//!
//! Parameters, gradients and moments lie in flat buffers of one layout, so that a share of each is one piece of memory:
//! one norm, one kernel call and one copy an update. An f32 model is its own master; of another, the model's
//! weights are rounded copies.
//!
//! What must stay true: after an update and [`Optimizer::gather`] the model's weights are bit-equal on every rank,
//! since each weight was computed by one.

use agentfly_c10d::{AdamWHyper, AdamWState, fused_adamw};
use tch::{Kind, Tensor};

use super::error::LearnerError;
use super::ranks::Ranks;
use super::shard::{BLOCK, Shards};
use crate::model::{Decoder, ModelError, for_each_chunk};

/// What became of an update.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Update {
    /// L2 norm of the whole gradient before clipping.
    pub(super) grad_norm: f64,
    /// False when the norm was not finite and nothing changed.
    pub(super) applied: bool,
}

/// The optimizer's state: f32, flat.
#[derive(Debug)]
pub(super) struct Optimizer {
    /// The weights of the model that it was made from, `[elements and padding]` in the model's kind: the model's own
    /// buffer, which stays where it is as long as this is held.
    weights: Tensor,
    /// Who updates what.
    pub(super) shards: Shards,
    /// Gradients of all weights, gathered here before ranks share them; as long as all padded shares.
    pub(super) grad: Tensor,
    /// This rank's share of the weights. Of an f32 model it is a part of the model's own buffer.
    pub(super) master: Tensor,
    pub(super) exp_avg: Tensor,
    pub(super) exp_avg_sq: Tensor,
    /// Updates applied.
    pub(super) steps: u64,
}

impl Optimizer {
    /// Starts from the model's weights, of which this rank is to update share `index` of `count`.
    pub(super) fn new(decoder: &Decoder, index: usize, count: usize) -> Result<Self, LearnerError> {
        let _no_grad = tch::no_grad_guard();
        let weights = decoder.parameters().flat();
        let shards = Shards::new(decoder.parameters().slots(), weights.numel() as i64, index, count);
        let own = shards.own();
        let zeros = |len| Tensor::f_zeros([len], (Kind::Float, decoder.device()));
        let grad = zeros(shards.padded())?;
        let share = weights.f_narrow(0, own.start, own.end - own.start)?;
        let master = match weights.kind() {
            Kind::Float => share,
            _ => share.f_to_kind(Kind::Float)?,
        };
        let (exp_avg, exp_avg_sq) = (zeros(own.end - own.start)?, zeros(own.end - own.start)?);
        let weights = weights.shallow_clone();
        Ok(Self { weights, shards, grad, master, exp_avg, exp_avg_sq, steps: 0 })
    }

    /// Whether this is the decoder that it was made from, which is known by where its weights lie.
    pub(super) fn is_of(&self, decoder: &Decoder) -> bool {
        self.weights.data_ptr() == decoder.parameters().flat().data_ptr()
    }

    /// Forgets gathered gradients.
    pub(super) fn zero_grad(&mut self) -> Result<(), LearnerError> {
        let _same = self.grad.f_zero_()?;
        Ok(())
    }

    /// Makes what is gathered no gradient, so that its norm, summed over ranks, is finite on none.
    pub(super) fn spoil_grad(&mut self) -> Result<(), LearnerError> {
        let _same = self.grad.f_narrow(0, 0, 1)?.f_fill_(f64::NAN)?;
        Ok(())
    }

    /// The sum of a parameter's gradients, sharing memory.
    pub(super) fn gradient_of(&self, name: &str) -> Result<Tensor, ModelError> {
        match self.shards.slots.iter().find(|slot| slot.name == name) {
            Some(slot) => Ok(slot.of(&self.grad)?),
            None => Err(ModelError::Input {
                what: "parameter to train",
                got: format!("`{name}`"),
                needed: format!("one of the {} that the optimizer was made for", self.shards.slots.len()),
            }),
        }
    }

    /// Sums the gathered gradients over the ranks: of all weights where every rank updates all, else of this rank's
    /// share, after which the rest is used up.
    pub(super) fn reduce(&mut self, ranks: &Ranks) -> Result<(), LearnerError> {
        let _no_grad = tch::no_grad_guard();
        match self.shards.count {
            1 => ranks.sum(&mut self.grad),
            _ => ranks.sum_to_shares(&self.grad, self.shards.share()),
        }
    }

    /// Clips the summed gradient (`clip_grad_norm_`: coefficient min(1, clip / (norm + 1e-6))) and applies this
    /// rank's share of it, on every rank with the same norm; a norm that is not finite changes nothing. Until
    /// [`Self::gather`] the model holds other ranks' shares as they were.
    pub(super) fn step(
        &mut self,
        decoder: &Decoder,
        ranks: &Ranks,
        grad_clip: f64,
        hyper: &AdamWHyper,
    ) -> Result<Update, LearnerError> {
        let _no_grad = tch::no_grad_guard();
        let grad_norm = self.grad_norm(ranks)?;
        if !grad_norm.is_finite() {
            return Ok(Update { grad_norm, applied: false });
        }
        self.steps += 1;
        let (own, clipped_norm) = (self.shards.own(), grad_norm + 1e-6);
        if !own.is_empty() {
            let list = |tensor: &Tensor| [tensor.shallow_clone()];
            let grads = [self.grad.f_narrow(0, own.start, own.end - own.start)?];
            let (params, exp_avgs, exp_avg_sqs) =
                (list(&self.master), list(&self.exp_avg), list(&self.exp_avg_sq));
            let state =
                AdamWState { params: &params, grads: &grads, exp_avgs: &exp_avgs, exp_avg_sqs: &exp_avg_sqs };
            let scale = (clipped_norm > grad_clip).then_some(clipped_norm / grad_clip);
            fused_adamw(state, self.steps, hyper, scale)?;
        }
        self.publish(decoder)?;
        Ok(Update { grad_norm, applied: true })
    }

    /// L2 norm over all weights. Squares are summed in f32 within a block and in f64 over blocks.
    fn grad_norm(&self, ranks: &Ranks) -> Result<f64, LearnerError> {
        let share = self.shards.share();
        let own = self.grad.f_narrow(0, self.shards.index as i64 * share, share)?.f_view([-1, BLOCK])?;
        let of_blocks = own.f_norm_scalaropt_dim(2.0, [1_i64], false)?;
        let of_blocks = of_blocks.f_to_kind(Kind::Double)?;
        let mut squares = [of_blocks.f_dot(&of_blocks)?.f_double_value(&[])?];
        match self.shards.count {
            // Ranks hold the same sums, but may round them differently.
            1 => squares[0] = ranks.first(squares[0])?,
            _ => ranks.sums(&mut squares)?,
        }
        Ok(squares[0].sqrt())
    }

    /// Copies this rank's master weights into the model, in the model's kind; nothing where they are the model's own.
    pub(super) fn publish(&self, decoder: &Decoder) -> Result<(), LearnerError> {
        let _no_grad = tch::no_grad_guard();
        let (own, weights) = (self.shards.own(), decoder.parameters().flat());
        if weights.kind() != Kind::Float {
            weights.f_narrow(0, own.start, own.end - own.start)?.f_copy_(&self.master)?;
        }
        Ok(())
    }

    /// Fetches what other ranks have updated into the model.
    pub(super) fn gather(&self, decoder: &Decoder, ranks: &Ranks) -> Result<(), LearnerError> {
        let _no_grad = tch::no_grad_guard();
        let share = |rank| {
            let range = self.shards.range(rank);
            Ok(decoder.parameters().flat().f_narrow(0, range.start, range.end - range.start)?)
        };
        match self.shards.count {
            1 => Ok(()),
            count => ranks.gather(&(0..count).map(share).collect::<Result<Vec<_>, LearnerError>>()?),
        }
    }

    /// What the master weights are, whichever ranks hold which of them: the sum, in eight lanes of 32 bits, of the
    /// BLAKE3 hashes of all blocks with their numbers. All ranks must call it at the same time.
    pub(super) fn master_digest(&self, ranks: &Ranks) -> Result<[u32; 8], LearnerError> {
        let mut lanes = [0_u32; 8];
        let mut block = self.shards.own().start / BLOCK;
        for_each_chunk(&self.master, |bytes| {
            for bytes in bytes.chunks(BLOCK as usize * size_of::<f32>()) {
                let mut hasher = blake3::Hasher::new();
                hasher.update(&block.to_le_bytes());
                hasher.update(bytes);
                let hash = hasher.finalize();
                for (lane, bytes) in lanes.iter_mut().zip(hash.as_bytes().chunks_exact(4)) {
                    *lane = lane.wrapping_add(bytes.iter().rev().fold(0, |x, &b| (x << 8) | u32::from(b)));
                }
                block += 1;
            }
            Ok(())
        })?;
        if self.shards.count > 1 {
            // Sums of numbers below 2³² are exact in f64 for two million ranks.
            let mut sums = lanes.map(f64::from);
            ranks.sums(&mut sums)?;
            lanes = sums.map(|sum| sum.rem_euclid(f64::from(u32::MAX) + 1.0) as u32);
        }
        Ok(lanes)
    }
}
