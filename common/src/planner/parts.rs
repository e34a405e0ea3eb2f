//! A rank's memory by part.

use serde::Serialize;

use crate::model_dir::ModelConfig;

use super::activations::{attended_numbers, passing_numbers};
use super::workload::{
    ATTENDED_FOR_EACH, DeviceKind, GATHERED_CACHES, Machine, PAGE_TOKENS, PREFILL_TOKENS, SAMPLED_AT_A_TIME,
    Workload,
};
use super::{Precision, activation_bytes, head_bytes, layer_numbers};

/// libtorch and its kernels, this program, a tokenizer, chains on their way.
const CPU_FIXED_BYTES: u64 = 220 << 20;
/// A CUDA context, its libraries' workspaces, NCCL's buffers.
const CUDA_FIXED_BYTES: u64 = 1200 << 20;
/// f32 tensors `[slots, vocab]` alive on a CPU while tokens are drawn: logits, and their order where that is asked for.
const SAMPLING_COPIES: u64 = 2;
/// What libtorch's operators hold of a logit that a GPU draws from, at most: log-probs and their copy in descending order
/// (4 each), ids (8), and of top-k and top-p five tensors in f64 or on their way to it.
const SAMPLING_BYTES: u64 = 56;
/// Halves of a layer's part of the cache that a GPU holds once more: attention gathers what it reads, in memory of
/// ordinary passes and in that of recorded ones, whose padding is up to half as much again.
const GATHERED_HALVES: u64 = 2 + 3;
/// On a CPU activations take a quarter more than their bytes: what the heap keeps between them, too small for the
/// next. Measured (deploy/docs/memory.md).
const HEAP_HOLES: u64 = 4;
/// A warm interpreter with the packages that snippets import.
const INTERPRETER_BYTES: u64 = 128 << 20;
/// What a call that computes little writes of the warm interpreter's pages and its own.
const CALL_BYTES: u64 = 32 << 20;

/// Bytes of one rank.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct RankBytes {
    /// The network; on a CPU its matrices once more, as products read them.
    pub weights: u64,
    /// The frozen copy for the KL loss.
    pub reference: u64,
    /// The f32 sums of the gradients.
    pub gradients: u64,
    /// Master weights and both moments: this rank's share.
    pub optimizer: u64,
    /// libtorch, the process.
    pub fixed: u64,
    /// Keys and values of all cached chains, full.
    pub kv_cache: u64,
    /// Prefill and sampling beside the cache; on a GPU what attention gathers of it.
    pub rollout_workspace: u64,
    /// A full micro-batch on its way forward and back.
    pub activations: u64,
    /// Head and loss, in pieces.
    pub head: u64,
    /// The peak: what is always held, and the larger of rollout and training.
    pub total_bytes: u64,
}

impl RankBytes {
    /// What is held all the time.
    #[must_use]
    pub fn resident(&self) -> u64 {
        let parts = [self.weights, self.reference, self.gradients, self.optimizer, self.fixed];
        parts.into_iter().fold(0, u64::saturating_add)
    }

    /// Held while chains run.
    #[must_use]
    pub fn rollout(&self) -> u64 {
        self.kv_cache.saturating_add(self.rollout_workspace)
    }

    /// Held while a micro-batch is computed.
    #[must_use]
    pub fn training(&self) -> u64 {
        self.activations.saturating_add(self.head)
    }

    fn summed(mut self) -> Self {
        self.total_bytes = self.resident().saturating_add(self.rollout().max(self.training()));
        self
    }
}

/// The Python processes of a rank's tools and rewards. They are no part of its own memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct SandboxBytes {
    /// Calls at a time.
    pub slots: u32,
    /// What the plan leaves them: a warm interpreter, and calls that hold little.
    pub kept_free: u64,
    /// What chains may hold between their calls (`sandbox.idle_sessions_mb`).
    pub idle: u64,
    /// What they hold if every call reaches `sandbox.memory_mb`, and what is idle its limit.
    pub at_most: u64,
}

/// The sandbox beside a rank.
pub(super) fn sandbox_bytes(work: &Workload<'_>, machine: &Machine) -> SandboxBytes {
    let slots = work.sandbox.slots(machine.threads);
    let all = |a_call: u64| a_call.saturating_mul(u64::from(slots)).saturating_add(INTERPRETER_BYTES);
    let idle = work.sandbox.idle_bytes;
    let at_most = all(work.sandbox.limit_bytes).saturating_add(idle);
    SandboxBytes { slots, kept_free: all(CALL_BYTES.min(work.sandbox.limit_bytes)), idle, at_most }
}

/// Number of weights.
#[must_use]
pub fn parameters(model: &ModelConfig) -> u64 {
    let count = |shape: &[i64]| {
        shape.iter().fold(1_u64, |all, &dim| all.saturating_mul(u64::try_from(dim).unwrap_or(u64::MAX)))
    };
    model.tensors().iter().fold(0, |sum, (_, shape)| sum.saturating_add(count(shape)))
}

/// Weights that a CPU holds a second time, in the layout that products read: every matrix but an embedding that is not
/// the head too.
fn packed(model: &ModelConfig) -> u64 {
    let of = |dimension: i64| u64::try_from(dimension).unwrap_or(u64::MAX);
    let embedding = of(model.vocab).saturating_mul(of(model.hidden));
    let once = if model.tie_word_embeddings { 0 } else { embedding };
    parameters(model).saturating_sub(once)
}

/// What a rank's process holds before it has a model.
#[must_use]
pub fn fixed_bytes(kind: DeviceKind) -> u64 {
    match kind {
        DeviceKind::Cpu => CPU_FIXED_BYTES,
        DeviceKind::Cuda => CUDA_FIXED_BYTES,
    }
}

/// Bytes of keys and values of one token.
fn cache_bytes_a_token(work: &Workload<'_>) -> u64 {
    let of = |dimension: i64| u64::try_from(dimension).unwrap_or(u64::MAX);
    let (model, number) = (work.model, work.precision.bytes());
    (2 * number)
        .saturating_mul(of(model.layers))
        .saturating_mul(of(model.kv_heads))
        .saturating_mul(of(model.head_dim))
}

/// Bytes of each token that attention gathers of the cache, while chains run.
fn gathered_bytes_a_token(work: &Workload<'_>, kind: DeviceKind) -> u64 {
    match kind {
        DeviceKind::Cpu => 0,
        DeviceKind::Cuda => {
            let layers = u64::try_from(work.model.layers).unwrap_or(u64::MAX).max(1);
            (cache_bytes_a_token(work) / layers).saturating_mul(GATHERED_HALVES) / 2
        }
    }
}

/// All bytes that a token in the cache takes at most.
pub(super) fn bytes_a_token(work: &Workload<'_>, kind: DeviceKind) -> u64 {
    let gathered = gathered_bytes_a_token(work, kind).saturating_mul(GATHERED_CACHES);
    cache_bytes_a_token(work).saturating_add(gathered)
}

/// Prefill of one pass, the logits of all slots, and on a GPU the page that padding is written to.
pub(super) fn rollout_workspace(work: &Workload<'_>, kind: DeviceKind, slots: u64) -> u64 {
    let vocab = u64::try_from(work.model.vocab).unwrap_or(u64::MAX);
    let a_token = layer_numbers(work.model).saturating_add(passing_numbers(work.model));
    let prefill = a_token.saturating_mul(work.precision.bytes()).saturating_mul(PREFILL_TOKENS);
    let logits = slots.saturating_mul(vocab);
    let beside = match kind {
        DeviceKind::Cpu => logits.saturating_mul(4 * SAMPLING_COPIES),
        DeviceKind::Cuda => {
            let piece = logits.min(SAMPLED_AT_A_TIME.max(vocab)).saturating_mul(SAMPLING_BYTES);
            let padding = cache_bytes_a_token(work).saturating_mul(PAGE_TOKENS);
            logits.saturating_mul(4).saturating_add(piece).saturating_add(padding)
        }
    };
    prefill.saturating_add(beside)
}

/// Activations of a micro-batch as its device's memory holds them.
fn held_activations(work: &Workload<'_>, kind: DeviceKind, tokens: u64, recompute: bool) -> u64 {
    let bytes = activation_bytes(work.model, work.precision, tokens, recompute);
    match kind {
        DeviceKind::Cpu => {
            let attended =
                (ATTENDED_FOR_EACH - 1).saturating_mul(tokens).saturating_mul(attended_numbers(work.model));
            let bytes = bytes.saturating_add(attended.saturating_mul(work.precision.bytes()));
            bytes.saturating_add(bytes / HEAP_HOLES)
        }
        // Beginnings are not shared there.
        DeviceKind::Cuda => bytes,
    }
}

/// Head and activations of a micro-batch.
pub(super) fn training_bytes(work: &Workload<'_>, kind: DeviceKind, tokens: u64, recompute: bool) -> u64 {
    let head = head_bytes(work.model, work.precision, kind, tokens);
    held_activations(work, kind, tokens, recompute).saturating_add(head)
}

/// What chains of a rollout get.
#[derive(Debug, Clone, Copy)]
pub(super) struct Rollout {
    /// Chains at a time.
    pub(super) slots: u64,
    /// Tokens of one at most.
    pub(super) window: u64,
    /// Tokens of all whose keys and values are cached.
    pub(super) cache_tokens: u64,
}

/// All parts, for these chains and micro-batches of `tokens`.
pub(super) fn rank_bytes(
    work: &Workload<'_>,
    kind: DeviceKind,
    Rollout { slots, window, cache_tokens }: Rollout,
    (tokens, recompute): (u64, bool),
) -> RankBytes {
    let (all, number) = (parameters(work.model), work.precision.bytes());
    let again = if kind == DeviceKind::Cpu { packed(work.model) } else { 0 };
    let weights = all.saturating_add(again).saturating_mul(number);
    // An f32 model is its own master.
    let a_weight = match work.precision {
        Precision::F32 => 8,
        Precision::Bf16 => 12,
    };
    // No chain reads more than its window.
    let read = slots.saturating_mul(window).min(cache_tokens.saturating_mul(GATHERED_CACHES));
    let gathered = gathered_bytes_a_token(work, kind).saturating_mul(read);
    RankBytes {
        weights,
        reference: if work.reference { weights } else { 0 },
        gradients: all.saturating_mul(4),
        optimizer: all.saturating_mul(a_weight).div_ceil(u64::from(work.optimizer_shards.max(1))),
        fixed: fixed_bytes(kind),
        kv_cache: cache_bytes_a_token(work).saturating_mul(cache_tokens),
        rollout_workspace: rollout_workspace(work, kind, slots).saturating_add(gathered),
        activations: held_activations(work, kind, tokens, recompute),
        head: head_bytes(work.model, work.precision, kind, tokens),
        total_bytes: 0,
    }
    .summed()
}
