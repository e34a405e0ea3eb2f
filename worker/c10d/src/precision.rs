//! How libtorch multiplies float32 matrices. Set once, by the worker at start.

use crate::error::check;
use crate::{Result, ffi};

/// As `torch.set_float32_matmul_precision`, without its `high`, which nothing here wants.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Float32MatmulPrecision {
    /// Full float32.
    Highest,
    /// On CPU it moves the product from MKL to oneDNN: 2.2 times as fast on AMD with AVX-512 and still accurate
    /// to float32 there (largest error 1e-6 of the largest result). A CPU with AMX and CUDA devices may round to
    /// bf16 or TF32, so use it for CPU models only.
    Medium,
}

/// Sets the precision for the whole process.
///
/// # Errors
/// What libtorch says.
pub fn set_float32_matmul_precision(precision: Float32MatmulPrecision) -> Result<()> {
    let name = match precision {
        Float32MatmulPrecision::Highest => c"highest",
        Float32MatmulPrecision::Medium => c"medium",
    };
    // SAFETY: a static NUL-terminated string; libtorch's global context guards the setting itself.
    check(unsafe { ffi::af_float32_matmul_precision(name.as_ptr()) }, || {
        format!("setting the float32 matmul precision to {name:?}")
    })
}
