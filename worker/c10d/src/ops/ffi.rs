//! The operators' functions as `csrc/ops.h` declares them, and nothing else.

use std::ffi::{c_int, c_void};

/// Opaque: a linear map with its packed weights.
pub(super) enum RawLinear {}

/// `AfPacked`; the last three are null together.
#[repr(C)]
pub(super) struct RawPacked {
    pub(super) starts: *mut c_void,
    pub(super) rows: *mut c_void,
    pub(super) kept: *mut c_void,
    pub(super) skip: *mut c_void,
}

/// `AfPagedStep`: tensors, then whole numbers.
#[repr(C)]
pub(super) struct RawPagedStep {
    pub(super) starts: *mut c_void,
    pub(super) lengths: *mut c_void,
    pub(super) table: *mut c_void,
    pub(super) page_of: *mut c_void,
    pub(super) place_of: *mut c_void,
    pub(super) own: *mut c_void,
    pub(super) seen: *mut c_void,
    pub(super) held: *mut c_void,
    pub(super) flash_starts: *mut c_void,
    pub(super) flash_held: *mut c_void,
    pub(super) flash_lengths: *mut c_void,
    pub(super) most_new: i64,
    pub(super) longest: i64,
}

unsafe extern "C" {
    pub(super) fn af_linear_new(
        weights: *const *mut c_void,
        biases: *const *mut c_void,
        count: usize,
        out: *mut *mut RawLinear,
    ) -> c_int;
    pub(super) fn af_linear_train(
        linear: *mut RawLinear,
        grads: *const *mut c_void,
        bias_grads: *const *mut c_void,
    ) -> c_int;
    pub(super) fn af_linear_apply(
        linear: *mut RawLinear,
        x: *mut c_void,
        wide: c_int,
        out: *mut *mut c_void,
    ) -> c_int;
    pub(super) fn af_linear_apply_norm(
        linear: *mut RawLinear,
        x: *mut c_void,
        weight: *mut c_void,
        grad: *mut c_void,
        eps: f64,
        out: *mut *mut c_void,
    ) -> c_int;
    pub(super) fn af_linear_apply_swiglu(
        linear: *mut RawLinear,
        x: *mut c_void,
        out: *mut *mut c_void,
    ) -> c_int;
    pub(super) fn af_linear_backward(
        linear: *mut RawLinear,
        x: *mut c_void,
        gradient: *mut c_void,
        out: *mut *mut c_void,
    ) -> c_int;
    pub(super) fn af_linear_drop(linear: *mut RawLinear);

    pub(super) fn af_rms_norm(
        x: *mut c_void,
        weight: *mut c_void,
        grad: *mut c_void,
        eps: f64,
        out: *mut *mut c_void,
    ) -> c_int;
    pub(super) fn af_rope(
        x: *mut c_void,
        cos: *mut c_void,
        sin: *mut c_void,
        heads: i64,
        out: *mut *mut c_void,
    ) -> c_int;

    pub(super) fn af_attention(
        qkv: *mut c_void,
        packed: *const RawPacked,
        queries: i64,
        keys: i64,
        dim: i64,
        out: *mut *mut c_void,
    ) -> c_int;
    pub(super) fn af_paged_attention(
        qkv: *mut c_void,
        pages: *mut c_void,
        layer: i64,
        step: *const RawPagedStep,
        queries: i64,
        keys: i64,
        dim: i64,
        out: *mut *mut c_void,
    ) -> c_int;
    pub(super) fn af_page_numbers(like: *mut c_void, dim: i64, out: *mut i64) -> c_int;
    pub(super) fn af_has_gemm(like: *mut c_void, out: *mut c_int) -> c_int;

    pub(super) fn af_token_terms(
        logits: *mut c_void,
        targets: *mut c_void,
        temperature: f64,
        terms: *mut *mut c_void,
    ) -> c_int;
    pub(super) fn af_token_terms_backward(
        logits: *mut c_void,
        targets: *mut c_void,
        temperature: f64,
        terms: *const *mut c_void,
        g_log_prob: *mut c_void,
        g_entropy: *mut c_void,
        to_bf16: c_int,
        out: *mut *mut c_void,
    ) -> c_int;
    pub(super) fn af_sample(
        logits: *mut c_void,
        draws: *const f64,
        tokens: *mut i64,
        log_probs: *mut f32,
    ) -> c_int;

    pub(super) fn af_backward(tensor: *mut c_void, gradient: *mut c_void) -> c_int;
}
