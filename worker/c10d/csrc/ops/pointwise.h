// The decoder's elementwise operators: each a single pass over memory, forward and back, computed in f32.
#pragma once
#include <ATen/ATen.h>

namespace af {

// x / sqrt(mean(x²) + eps) · weight over the last dimension. `grad` (f32, shaped as weight) sums the weight's gradient;
// undefined: not trained.
at::Tensor rms_norm(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& grad, double eps);

// Turns the first `heads` heads of each row of x [n, width] by its token's angles, cos and sin f32 [n, head_dim / 2];
// Hugging Face's half-split layout. Other columns pass through.
at::Tensor rope(const at::Tensor& x, const at::Tensor& cos, const at::Tensor& sin, int64_t heads);

// silu(gate) · up of rows [gate | up].
at::Tensor swiglu(const at::Tensor& x);

}  // namespace af
