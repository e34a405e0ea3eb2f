// Linear maps with weights kept in the micro-kernel's layout, and the pointwise operators before them.
#pragma once
#include <torch/csrc/autograd/custom_function.h>

#include "gemm.h"

namespace af {

// What a map's input goes through first. The result is not kept for the way back but computed again from what went in:
// in a layer it would be half as large as all else that is kept, and it costs next to nothing beside the map.
struct Before {
  enum Kind : int { kNothing = 0, kNorm = 1, kSwiglu = 2 };
  Kind kind = kNothing;
  // Of the norm: see rms_norm().
  at::Tensor weight, grad;
  double eps = 0.0;
};

// y = f(x) · [W₁; W₂; …]ᵀ + [b₁; b₂; …]: maps of one input, computed as one.
struct Linear {
  std::vector<at::Tensor> weights;  // [nᵢ, k]
  std::vector<at::Tensor> biases;   // [nᵢ], or none at all
  std::vector<at::Tensor> grads;    // f32 sums of the weights' gradients, shaped as they are; none: not trained
  std::vector<at::Tensor> bias_grads;
  int64_t inputs = 0;
  int64_t outputs = 0;

  // y in x's kind or, with `wide`, in f32 as it was summed (libtorch's products on CPUs round to x's kind first).
  // Differentiable in x where that is asked for; the weights' gradients are added to `grads` on the way back.
  at::Tensor apply(const at::Tensor& x, const Before& before, bool wide);
  // y of rows that have gone through f, without autograd.
  at::Tensor forward(const at::Tensor& x, bool wide);

  // An error unless weights and sums still have the shapes that they came with: kernels write by them.
  void check() const;

 private:
  // By libtorch's products, in x's kind: on GPUs, and where the micro-kernel does not run.
  at::Tensor plain(const at::Tensor& x, bool wide) const;
  at::Tensor plain(const at::Tensor& x) const;
  const at::Tensor& packed();
  at::Tensor packed_;
  std::vector<int64_t> packed_versions_;
};

}  // namespace af
