// Attention by libtorch's own operators: on GPUs, and on the CPU for heads and kinds without a kernel of this crate.
#pragma once
#include "attention.h"

namespace af {

// As attention() and paged_attention(). A page of a layer holds kBlock tokens' keys, [tokens, keys, dim], then values.
at::Tensor plain_attention(const at::Tensor& qkv, const at::Tensor& starts, const Heads& heads);
at::Tensor plain_paged_attention(const at::Tensor& qkv, const Paged& paged, const Heads& heads);

}  // namespace af
