//! What training holds for a micro-batch besides the weights: the one place where that is counted.
//!
//! Packed rows: no padding, so everything is linear in the tokens.

use crate::model_dir::ModelConfig;

use super::Precision;
use super::workload::{DeviceKind, head_tokens};

/// Numbers that one layer keeps of one token for the backward pass.
///
/// | kept | numbers |
/// |---|---|
/// | input of the block | h |
/// | rotated queries and keys, values | q + 2 kv |
/// | attention's output | q |
/// | residual after attention | h |
/// | gate and up | 2 m |
/// | queries and keys before their norms (Qwen3) | q + kv |
///
/// Norms and SwiGLU are computed again on the way back instead of kept.
///
/// h: hidden size; q: query heads × channels; kv: key/value heads × channels; m: width of the MLP.
#[must_use]
pub fn layer_numbers(model: &ModelConfig) -> u64 {
    let of = |dimension: i64| u64::try_from(dimension).unwrap_or(u64::MAX);
    let (hidden, mlp) = (of(model.hidden), of(model.intermediate));
    let queries = of(model.heads).saturating_mul(of(model.head_dim));
    let keys = of(model.kv_heads).saturating_mul(of(model.head_dim));
    let before_norms = u64::from(model.architecture.qk_norm());
    [(2, hidden), (2 + before_norms, queries), (2 + before_norms, keys), (2, mlp)]
        .iter()
        .fold(0, |sum: u64, (times, numbers)| sum.saturating_add(numbers.saturating_mul(*times)))
}

/// Numbers of one token that a layer makes and does not keep: its normed rows, and SwiGLU's product.
#[must_use]
pub(super) fn passing_numbers(model: &ModelConfig) -> u64 {
    let of = |dimension: i64| u64::try_from(dimension).unwrap_or(u64::MAX);
    of(model.hidden).saturating_mul(2).saturating_add(of(model.intermediate))
}

/// Numbers of one token that attention needs on its way back: rotated queries and keys, values, its output, and the gradients
/// of all.
#[must_use]
pub(super) fn attended_numbers(model: &ModelConfig) -> u64 {
    let of = |dimension: i64| u64::try_from(dimension).unwrap_or(u64::MAX);
    let queries = of(model.heads).saturating_mul(of(model.head_dim));
    let keys = of(model.kv_heads).saturating_mul(of(model.head_dim));
    queries.saturating_add(keys).saturating_mul(4)
}

/// Bytes that forward and backward of `tokens` tokens hold at their peak, the head aside: what all layers keep, and
/// once more a layer's worth of gradients on the way back, with what is computed again there. With `recompute`, layers keep their input alone and are
/// computed again one at a time.
#[must_use]
pub fn activation_bytes(model: &ModelConfig, precision: Precision, tokens: u64, recompute: bool) -> u64 {
    let of = |dimension: i64| u64::try_from(dimension).unwrap_or(u64::MAX);
    let (layers, hidden, layer) = (of(model.layers), of(model.hidden), layer_numbers(model));
    let kept = if recompute {
        layers.saturating_mul(hidden).saturating_add(layer)
    } else {
        layers.saturating_mul(layer)
    };
    let working = layer.saturating_add(passing_numbers(model));
    // Final norm, and where the two halves of the backward pass meet: hidden states and their gradient.
    let ends = 3 * hidden;
    kept.saturating_add(working).saturating_add(ends).saturating_mul(precision.bytes()).saturating_mul(tokens)
}

/// Bytes of the head and the loss, by piece: the logits in f32 and their gradient in the model's numbers. libtorch's
/// operators, which GPUs run, also make log-probs, probabilities and four steps to the gradient, all in f32.
#[must_use]
pub fn head_bytes(model: &ModelConfig, precision: Precision, kind: DeviceKind, tokens: u64) -> u64 {
    let vocab = u64::try_from(model.vocab).unwrap_or(u64::MAX).max(1);
    let rows = head_tokens(model.vocab).min(tokens);
    let in_f32 = match kind {
        DeviceKind::Cpu => 1,
        DeviceKind::Cuda => 1 + 2 + 4,
    };
    rows.saturating_mul(vocab).saturating_mul(4 * in_f32 + precision.bytes())
}
