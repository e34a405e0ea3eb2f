//! What a plan is made for: the job's settings on one side, the machine on the other.

use serde::Serialize;

use crate::config::{Config, MicroBatch, micro_batch};
use crate::model_dir::ModelConfig;

use super::Precision;

/// Tokens of one prefill pass of the rollout engine.
pub const PREFILL_TOKENS: u64 = 4096;

/// Chains of a validation that a rank runs at a time where a training step gives it fewer.
const VALIDATION_CHAINS: u32 = 64;

/// A kind of device.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum DeviceKind {
    /// Ranks share the node's memory.
    Cpu,
    /// Each rank has a GPU with memory of its own.
    Cuda,
}

/// Where ranks run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Machine {
    /// On what.
    pub kind: DeviceKind,
    /// The node's memory for CPU ranks, one GPU's for ranks on GPUs; `None` when it is not known: nothing is refused.
    pub memory_bytes: Option<u64>,
    /// Ranks on the node.
    pub ranks: u32,
}

/// What a rank is asked to do.
#[derive(Debug, Clone, Copy)]
pub struct Workload<'a> {
    /// The network's shape.
    pub model: &'a ModelConfig,
    /// Its numbers.
    pub precision: Precision,
    /// Ranks that share the optimizer's state.
    pub optimizer_shards: u32,
    /// Whether a frozen copy is kept.
    pub reference: bool,
    /// Tokens a chain may have, as set; `None`: the model's window, or as much of it as fits.
    pub window: Option<u32>,
    /// Chains at a time at most.
    pub chains: u32,
    /// How a mini-batch is cut, as set.
    pub micro_batch: MicroBatch,
    /// Whether the learner can compute activations again instead of keeping them.
    pub can_recompute: bool,
}

impl<'a> Workload<'a> {
    /// A job's settings; `precision` is resolved already ([`Precision::choose`]).
    #[must_use]
    pub fn of(config: &Config, model: &'a ModelConfig, precision: Precision) -> Self {
        let rollout = &config.actor_rollout_ref.rollout;
        let of_a_step = config.data.train_batch_size.saturating_mul(config.agent.num_chains);
        let of_a_rank = of_a_step.div_ceil(config.world_size().max(1)).max(VALIDATION_CHAINS);
        let at_a_time = config.agent.max_concurrent_chains.unwrap_or(u32::MAX).min(of_a_rank);
        Self {
            model,
            precision,
            optimizer_shards: 1,
            reference: config.needs_reference(),
            window: rollout.max_model_len,
            chains: rollout.max_num_seqs.min(at_a_time).max(1),
            micro_batch: micro_batch(&config.actor_rollout_ref.actor),
            can_recompute: true,
        }
    }
}
