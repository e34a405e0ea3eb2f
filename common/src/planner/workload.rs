//! What a plan is made for: the job's settings on one side, the machine on the other.

use serde::Serialize;

use crate::config::{Config, MicroBatch, micro_batch};
use crate::model_dir::ModelConfig;

use super::Precision;

/// Tokens of one prefill pass of the rollout engine.
pub const PREFILL_TOKENS: u64 = 4096;
/// Tokens of a page of the rollout engine's KV cache.
pub const PAGE_TOKENS: u64 = 64;
/// Tokens that attention may see for each token of a micro-batch: beginnings that rows share are laid before each of them.
pub const ATTENDED_FOR_EACH: u64 = 4;
/// Logits from which a GPU draws tokens at a time.
pub const SAMPLED_AT_A_TIME: u64 = 4 << 20;
/// Tokens that a GPU's attention gathers for a pass, in KV caches at most: a page that chains share is gathered for each.
pub const GATHERED_CACHES: u64 = 2;
/// Logits of the head that exist at a time in training: 128 MiB in f32. Enough rows that adding the head's gradient is a
/// small part.
const HEAD_LOGITS: u64 = 32 << 20;
/// The head's pieces are a multiple of this many tokens, the height of the matrix unit's tiles.
const HEAD_TOKENS: u64 = 64;

/// Tokens whose logits exist together in training, for a vocabulary of this size: head and loss run in such pieces.
#[must_use]
pub fn head_tokens(vocab: i64) -> u64 {
    let vocab = u64::try_from(vocab).unwrap_or(0).max(1);
    (HEAD_LOGITS / vocab / HEAD_TOKENS * HEAD_TOKENS).max(HEAD_TOKENS)
}

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
    /// CPU threads of each.
    pub threads: u32,
}

/// The Python processes of a rank's tools and rewards.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SandboxRoom {
    /// Calls at a time as set; `None`: two per thread of the rank.
    pub slots: Option<u32>,
    /// The limit of a call.
    pub limit_bytes: u64,
    /// What chains may hold between their calls; 0 where each call begins afresh.
    pub idle_bytes: u64,
}

impl SandboxRoom {
    /// Slots of a rank with this many threads.
    #[must_use]
    pub fn slots(&self, threads: u32) -> u32 {
        self.slots.unwrap_or(threads.max(1).saturating_mul(2))
    }
}

impl Machine {
    /// The same machine with its cores and its memory shared by another number of ranks.
    #[must_use]
    pub fn with_ranks(self, ranks: u32) -> Self {
        let cores = self.threads.saturating_mul(self.ranks);
        Self { ranks, threads: (cores / ranks.max(1)).max(1), ..self }
    }
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
    /// Whether the learner may compute activations again instead of keeping them.
    pub may_recompute: bool,
    /// The job's sandbox on each rank.
    pub sandbox: SandboxRoom,
}

impl<'a> Workload<'a> {
    /// The same work on nodes of `now` ranks instead of `before`: fewer share the optimizer's state.
    #[must_use]
    pub fn with_ranks(self, before: u32, now: u32) -> Self {
        let shards = u64::from(self.optimizer_shards) * u64::from(now) / u64::from(before.max(1));
        Self { optimizer_shards: u32::try_from(shards).unwrap_or(u32::MAX).max(1), ..self }
    }

    /// A job's settings; `precision` is resolved already ([`Precision::choose`]).
    #[must_use]
    pub fn of(config: &Config, model: &'a ModelConfig, precision: Precision) -> Self {
        let rollout = &config.actor_rollout_ref.rollout;
        let shards = config.actor_rollout_ref.actor.fsdp_config.shards_optimizer();
        let of_a_step = config.data.train_batch_size.saturating_mul(config.agent.num_chains);
        let validation = if config.data.val_files.is_empty() { 1 } else { VALIDATION_CHAINS };
        let of_a_rank = of_a_step.div_ceil(config.world_size().max(1)).max(validation);
        let at_a_time = config.agent.max_concurrent_chains.unwrap_or(u32::MAX).min(of_a_rank);
        Self {
            model,
            precision,
            optimizer_shards: if shards { config.world_size().max(1) } else { 1 },
            reference: config.needs_reference(),
            window: rollout.max_model_len,
            chains: rollout.max_num_seqs.min(at_a_time).max(1),
            micro_batch: micro_batch(&config.actor_rollout_ref.actor),
            may_recompute: config.actor_rollout_ref.model.enable_gradient_checkpointing,
            sandbox: SandboxRoom {
                slots: config.sandbox.slots,
                limit_bytes: config.sandbox.memory_bytes(),
                idle_bytes: if config.sandbox.stateful { config.sandbox.idle_session_bytes() } else { 0 },
            },
        }
    }
}
