//! Norm and rotary embedding, each one pass over memory forward and back.

use tch::{Kind, Tensor};

use super::{expect, expect_rows, ffi, is, is_floating, one, shown, size};
use crate::Result;
use crate::group::pointer;

/// x / √(mean(x²) + eps) · weight over the last dimension of `[…, n]` (Zhang & Sennrich 2019), computed in f32 and
/// rounded once.
#[derive(Debug, Clone, Copy)]
pub struct Norm<'a> {
    /// `[n]`, of x's kind.
    pub weight: &'a Tensor,
    /// f32 `[n]`: sums the weight's gradient, where it is trained.
    pub grad: Option<&'a Tensor>,
    /// At least 0.
    pub eps: f64,
}

impl Norm<'_> {
    pub(super) fn check(&self, x: &Tensor) -> Result<()> {
        let (operation, Self { weight, grad, eps }) = ("RMS norm", *self);
        let width = size(x).last().copied().unwrap_or(0);
        let fits = width > 0
            && is_floating(x)
            && is(weight, x.kind(), x.device())
            && weight.size() == [width]
            && weight.is_contiguous();
        expect(operation, fits, || format!("of {} with weight {}", shown(x), shown(weight)))?;
        expect(operation, eps >= 0.0 && eps.is_finite(), || {
            format!("with eps {eps}, which must be at least 0")
        })?;
        let Some(grad) = grad else { return Ok(()) };
        let fits = is(grad, Kind::Float, x.device()) && grad.size() == [width];
        expect(operation, fits, || format!("its gradient is {}, not [{width}] Float", shown(grad)))
    }
}

/// The norm of `[…, n]`.
///
/// # Errors
/// When the shapes or kinds do not fit, or memory is out.
pub fn rms_norm(x: &Tensor, norm: &Norm<'_>) -> Result<Tensor> {
    norm.check(x)?;
    let grad = norm.grad.map_or(std::ptr::null_mut(), pointer);
    // SAFETY: live tensors (or null for no gradient) whose shapes and kinds fit.
    one(
        || "RMS norm".to_owned(),
        |out| unsafe { ffi::af_rms_norm(pointer(x), pointer(norm.weight), grad, norm.eps, out) },
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
    let half = size(cos).last().copied().unwrap_or(0);
    let angles = |a: &Tensor| is(a, Kind::Float, x.device()) && a.size() == [rows, half] && a.is_contiguous();
    // Compared by division: a product could wrap around.
    let inside = half > 0 && heads >= 0 && heads <= width / (2 * half);
    expect(operation, angles(cos) && angles(sin) && inside, || {
        format!("of {} by cos {} and sin {}, {heads} heads", shown(x), shown(cos), shown(sin))
    })?;
    // SAFETY: live tensors whose shapes and kinds fit.
    one(
        || operation.to_owned(),
        |out| unsafe { ffi::af_rope(pointer(x), pointer(cos), pointer(sin), heads, out) },
    )
}
