// Causal grouped-query attention over packed sequences, and over a paged KV cache.
//
// Rows of qkv are a token's heads side by side, [queries | keys | values], queries and keys rotated.
#pragma once
#include <ATen/ATen.h>

namespace af {

struct Heads {
  int64_t queries;
  int64_t keys;
  int64_t dim;
  int64_t row() const { return (queries + 2 * keys) * dim; }
  int64_t group() const { return queries / keys; }
};

// Sequences one after another: sequence s is rows starts[s] to starts[s + 1] of qkv; `starts` is i64 on the CPU.
// → [n, queries · dim]. Differentiable.
at::Tensor attention(const at::Tensor& qkv, const at::Tensor& starts, Heads heads);

// Where chains continue. All i64 on the CPU.
struct Paged {
  at::Tensor pages;    // [pages, layers, page_numbers() · keys], the cache
  int64_t layer;
  at::Tensor starts;   // [s + 1], as above, for the new tokens
  at::Tensor lengths;  // [s] cached tokens, new ones included
  at::Tensor table;    // [s, most pages], the pages of each chain in order
};

// Stores the new tokens' keys and values and attends to all that is cached. → [n, queries · dim]. No autograd.
at::Tensor paged_attention(const at::Tensor& qkv, const Paged& paged, Heads heads);

// Numbers that one head of one layer takes in a page of kBlock tokens.
int64_t page_numbers(const at::Tensor& like, int64_t dim);

}  // namespace af
