// The way back through attention over packed sequences: FlashAttention-2's, recomputing probabilities from the
// log-sum-exp of each row.
#pragma once
#include "attention.h"

namespace af {

// g and out [n, queries · dim], lse [n, queries] f32 → the gradient of qkv.
at::Tensor attention_backward(const at::Tensor& g, const at::Tensor& qkv, const at::Tensor& starts,
                              const at::Tensor& out, const at::Tensor& lse, Heads heads);

}  // namespace af
