//! The decoder's operators where libtorch's waste a CPU: linear maps over packed weights, norms and activations in
//! one pass, attention over packed sequences and a paged KV cache, log-probs and draws over the vocabulary.
//!
//! The model, the engine and the learner call them on every device; where there is no kernel of this crate they are
//! libtorch's operators (`csrc/ops`). All work on rows: tokens of any number of sequences, without padding.
//!
//! What must stay true: a token's forward result depends on its own sequence alone, bit for bit, never on what else
//! is in the batch (on CPUs, f32 from AVX2 on and bf16 from AVX-512 on; elsewhere libtorch's products decide).
//! Gradients of weights are added, in f32, to the sums that a map or norm was given; autograd carries those of the rows.

mod attention;
mod ffi;
mod fixed;
mod linear;
mod packed;
mod paged;
mod pointwise;
mod vocabulary;
mod vocabulary_plain;

use std::ffi::c_void;

use tch::{Device, Kind, Tensor};

pub use attention::{Heads, PAGE_TOKENS, attention, page_numbers};
pub use fixed::{FixedStep, StepShape};
pub use linear::Linear;
pub use packed::{Packed, Sequence};
pub use paged::{PagedStep, paged_attention};
pub use pointwise::{Norm, rms_norm, rope};
pub use vocabulary::{Draw, SAMPLED_AT_A_TIME, TokenTerms, is_divisor, sample, token_terms};

use crate::error::check;
use crate::group::pointer;
use crate::{Error, Result};

/// A call that gives one tensor.
fn one(
    operation: impl Fn() -> String,
    call: impl FnOnce(*mut *mut c_void) -> std::ffi::c_int,
) -> Result<Tensor> {
    let mut out = std::ptr::null_mut();
    check(call(&raw mut out), operation)?;
    // SAFETY: on success the shim has stored a new `torch::Tensor*` there, ours from now on.
    Ok(unsafe { Tensor::from_ptr(out.cast()) })
}

/// An error unless `holds`: kernels take shapes, kinds and devices on trust.
fn expect(operation: &'static str, holds: bool, what: impl FnOnce() -> String) -> Result<()> {
    if holds { Ok(()) } else { Err(Error::invalid(operation, what())) }
}

/// What an error says of a tensor.
fn shown(tensor: &Tensor) -> String {
    if tensor.defined() {
        format!("{:?} {:?} on {:?}", tensor.size(), tensor.kind(), tensor.device())
    } else {
        "an undefined tensor".to_owned()
    }
}

/// Its size, or none of what is undefined: tch panics there.
fn size(x: &Tensor) -> Vec<i64> {
    if x.defined() { x.size() } else { Vec::new() }
}

/// Whether `x` is a defined tensor of this kind and device.
fn is(x: &Tensor, kind: Kind, device: Device) -> bool {
    x.defined() && x.kind() == kind && x.device() == device
}

/// Whether `x` holds floating numbers.
fn is_floating(x: &Tensor) -> bool {
    x.defined() && matches!(x.kind(), Kind::Float | Kind::BFloat16 | Kind::Half | Kind::Double)
}

/// An error unless `x` is rows of a floating kind; their number and width.
fn expect_rows(operation: &'static str, x: &Tensor) -> Result<(i64, i64)> {
    match size(x).as_slice() {
        &[rows, width] if is_floating(x) => Ok((rows, width)),
        _ => Err(Error::invalid(operation, format!("needs rows of numbers, got {}", shown(x)))),
    }
}

/// Whether this crate's kernels run for tensors like this one: its kind and device, and this CPU.
#[must_use]
pub fn has_kernels(like: &Tensor) -> bool {
    let mut out = 0;
    // SAFETY: a live tensor and an out-pointer to a live local.
    let code = unsafe { ffi::af_has_gemm(pointer(like), &raw mut out) };
    code == 0 && out != 0
}

/// Runs autograd back from `tensor` with this gradient (`torch.Tensor.backward(gradient)`, which tch lacks).
///
/// # Errors
/// When `tensor` depends on nothing that asks for a gradient, the shapes differ, or memory is out.
pub fn backward(tensor: &Tensor, gradient: &Tensor) -> Result<()> {
    let operation = "backward";
    expect(operation, tensor.defined() && gradient.defined(), || {
        format!("from {} with {}", shown(tensor), shown(gradient))
    })?;
    // SAFETY: two live, defined tensors; libtorch checks the rest.
    let code = unsafe { ffi::af_backward(pointer(tensor), pointer(gradient)) };
    check(code, || format!("backward from {}", shown(tensor)))
}
