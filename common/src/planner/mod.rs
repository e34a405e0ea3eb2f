//! How much memory a rank will need, and what fits: arithmetic alone, before any weight is loaded.
//!
//! ```text
//! model, precision, settings ─┐                ┌─▶ Plan: bytes by part, micro-batch, KV cache, window, recomputation
//! memory, ranks beside it ────┴─▶ plan() ──────┤
//!                                              └─▶ Refusal: what is how big, what there is, what would fit
//! ```
//!
//! Ranks take their micro-batch and KV cache from it at start, `worker doctor` prints it, the coordinator asks before
//! a job's ranks are started. Nothing here reads a file or knows libtorch.
//!
//! A rank's peak is what it always holds, plus the largest of what it holds at one time only:
//!
//! | part | bytes |
//! |---|---|
//! | weights; on a CPU the matrices again, as products read them | P · e; 2 P · e |
//! | reference (`use_kl_loss`) | the same |
//! | gradients | 4 P: summed in f32 |
//! | optimizer | both moments in f32, of a bf16 model master weights, too: 8 P or 12 P; divided by the ranks that share it |
//! | libtorch, tokenizer, process | [`fixed_bytes`] |
//! | *rollout:* KV cache, prefill, sampling | [`Plan::cache_tokens`] · 2 · layers · kv · e, and workspace |
//! | *training:* activations, head in pieces | [`activations`] |
//!
//! P weights, e bytes a number (f32 4, bf16 2), kv = key/value heads × channels of a head. The KV cache is given back
//! before a training step, which is why rollout and training do not add up.

mod activations;
mod choose;
mod parts;
mod precision;
mod refusal;
#[cfg(test)]
mod tests;
mod words;
mod workload;

pub use activations::{activation_bytes, head_bytes, layer_numbers};
pub use choose::plan;
pub use parts::{RankBytes, SandboxBytes, fixed_bytes, parameters};
pub use precision::Precision;
pub use refusal::Refusal;
pub use words::{bytes_in_words, rows};
pub use workload::{
    ATTENDED_FOR_EACH, DeviceKind, GATHERED_CACHES, Machine, PAGE_TOKENS, PREFILL_TOKENS, SAMPLED_AT_A_TIME,
    SandboxRoom, Workload, head_tokens,
};

use serde::Serialize;

use crate::config::MicroBatch;

/// What a rank will do and need.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Plan {
    /// Bytes of a rank, by part.
    pub rank: RankBytes,
    /// The peak with a chain that fills its window, where that is more than a full micro-batch needs: it is one alone.
    pub longest_chain_bytes: Option<u64>,
    /// On what.
    pub kind: DeviceKind,
    /// Ranks that share the memory.
    pub ranks: u32,
    /// The memory they share, if it is known: the node's for CPU ranks, the GPU's for a rank on one.
    pub memory_bytes: Option<u64>,
    /// What one rank may take of it.
    pub budget_bytes: Option<u64>,
    /// Numbers of weights, activations and KV cache.
    pub precision: Precision,
    /// Ranks that share the optimizer's state; 1: each holds all of it.
    pub optimizer_shards: u32,
    /// The Python processes beside it.
    pub sandbox: SandboxBytes,
    /// Tokens a chain may have.
    pub window: u32,
    /// What the model was trained for, where memory makes the window shorter than that.
    pub shortened_from: Option<u32>,
    /// Chains whose keys and values are cached at a time, at most.
    pub slots: u32,
    /// Tokens whose keys and values fit the cache, all chains together.
    pub cache_tokens: u64,
    /// How a rank cuts its part of a mini-batch.
    pub micro_batch: MicroBatch,
    /// Tokens of a micro-batch that is full.
    pub micro_batch_tokens: u32,
    /// Micro-batches with more tokens than this keep one number a layer and token and compute the rest again in the
    /// backward pass; `None`: nothing is ever computed again.
    pub recompute_above_tokens: Option<u32>,
}
