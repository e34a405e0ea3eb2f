// The way back through attention over packed sequences: FlashAttention-2's, recomputing probabilities from the
// log-sum-exp of each row.
#pragma once
#include "attention.h"

namespace af {

// Of all tokens: g and out [n, queries · dim], lse [n, queries] f32 → the gradient of qkv. Those that are skipped give
// their keys and values one and their queries none.
at::Tensor attention_backward(const at::Tensor& g, const at::Tensor& qkv, const Packed& packed, const at::Tensor& out,
                              const at::Tensor& lse, Heads heads);

}  // namespace af
