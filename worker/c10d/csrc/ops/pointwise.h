// The decoder's elementwise operators: each a single pass over memory, forward and back, computed in f32. Those that
// a linear map follows have their two ways here, without autograd, for the map to compute (see linear.h).
#pragma once
#include <ATen/ATen.h>

namespace af {

// x / sqrt(mean(x²) + eps) · weight over the last dimension. `grad` (f32, shaped as weight) sums the weight's gradient;
// undefined: not trained.
at::Tensor rms_norm(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& grad, double eps);

// Turns the first `heads` heads of each row of x [n, width] by its token's angles, cos and sin f32 [n, head_dim / 2];
// Hugging Face's half-split layout. Other columns pass through.
at::Tensor rope(const at::Tensor& x, const at::Tensor& cos, const at::Tensor& sin, int64_t heads);

// rms_norm() and its way back, on dense tensors: `rstd` [rows] f32 is what it divided by. → the gradient of x; `grad`
// as above.
at::Tensor norm_forward(const at::Tensor& x, const at::Tensor& weight, double eps, at::Tensor* rstd);
at::Tensor norm_backward(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& rstd, const at::Tensor& g,
                         const at::Tensor& grad);

// silu(gate) · up of dense rows [gate | up], and the gradient of those rows.
at::Tensor swiglu(const at::Tensor& x);
at::Tensor swiglu_backward(const at::Tensor& x, const at::Tensor& g);

}  // namespace af
