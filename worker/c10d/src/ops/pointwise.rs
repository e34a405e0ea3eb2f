//! Norm, rotary embedding and SwiGLU, each one pass over memory forward and back.

use tch::{Kind, Tensor};

use super::{expect, expect_rows, ffi, one, shown};
use crate::Result;
use crate::group::pointer;

/// x / √(mean(x²) + eps) · weight over the last dimension of `[…, n]` (Zhang & Sennrich 2019), computed in f32 and
/// rounded once. `grad`, f32 `[n]`, sums the weight's gradient.
///
/// # Errors
/// When the shapes or kinds do not fit, or memory is out.
pub fn rms_norm(x: &Tensor, weight: &Tensor, grad: Option<&Tensor>, eps: f64) -> Result<Tensor> {
    let operation = "RMS norm";
    let width = x.size().last().copied().unwrap_or(0);
    let fits = weight.size() == [width] && weight.kind() == x.kind() && weight.is_contiguous();
    expect(operation, fits && width > 0, || format!("of {} with weight {}", shown(x), shown(weight)))?;
    if let Some(grad) = grad {
        let fits = grad.size() == [width] && grad.kind() == Kind::Float;
        expect(operation, fits, || format!("its gradient is {}, not [{width}] Float", shown(grad)))?;
    }
    let grad = grad.map_or(std::ptr::null_mut(), pointer);
    // SAFETY: live tensors (or null for no gradient) whose shapes and kinds fit.
    one(
        || operation.to_owned(),
        |out| unsafe { ffi::af_rms_norm(pointer(x), pointer(weight), grad, eps, out) },
    )
}

/// Turns the first `heads` heads of each row by its token's angles (Su et al. 2021, Hugging Face's half-split
/// layout): rows `[n, width]`, cos and sin f32 `[n, head_dim / 2]`. Further columns pass through.
///
/// # Errors
/// When the shapes or kinds do not fit, or memory is out.
pub fn rope(x: &Tensor, cos: &Tensor, sin: &Tensor, heads: i64) -> Result<Tensor> {
    let operation = "rotary embedding";
    let (rows, width) = expect_rows(operation, x)?;
    let half = cos.size().last().copied().unwrap_or(0);
    let angles = |a: &Tensor| a.size() == [rows, half] && a.kind() == Kind::Float && a.is_contiguous();
    expect(operation, angles(cos) && angles(sin) && heads * 2 * half <= width, || {
        format!("of {} by cos {} and sin {}, {heads} heads", shown(x), shown(cos), shown(sin))
    })?;
    // SAFETY: live tensors whose shapes and kinds fit.
    one(
        || operation.to_owned(),
        |out| unsafe { ffi::af_rope(pointer(x), pointer(cos), pointer(sin), heads, out) },
    )
}

/// silu(gate) · up of rows `[gate | up]`, `[n, 2·m]` → `[n, m]` (Shazeer 2020).
///
/// # Errors
/// When the width is odd, or memory is out.
pub fn swiglu(x: &Tensor) -> Result<Tensor> {
    let operation = "SwiGLU";
    let (_, width) = expect_rows(operation, x)?;
    expect(operation, width % 2 == 0, || format!("of {}", shown(x)))?;
    // SAFETY: a live tensor of rows of even width.
    one(|| operation.to_owned(), |out| unsafe { ffi::af_swiglu(pointer(x), out) })
}
