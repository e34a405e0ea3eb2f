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

// Whole sequences, and where their tokens lie in qkv. i64; on the CPU but for `rows` and `kept`, which are where qkv is.
struct Packed {
  at::Tensor starts;  // [s + 1]: sequence s is tokens starts[s] to starts[s + 1] of all sequences, one after another
  // Where some begin alike, whose beginning is one stretch of rows then; else undefined, and token i is row i.
  at::Tensor rows;  // [starts[s]]: each token's row
  at::Tensor kept;  // [n]: the token from which a row gets its result
  at::Tensor skip;  // [s]: tokens a sequence begins with that another one has results for
  bool shared() const { return rows.defined(); }
};

// → [n, queries · dim]. Differentiable.
at::Tensor attention(const at::Tensor& qkv, const Packed& packed, Heads heads);

// What plain_paged_attention() needs to know of a step, on the device of the cache: made once, read by every layer.
struct Places {
  at::Tensor page_of, place_of;  // [n] i64: where each new token's keys and values go
  at::Tensor own;                // [s · most pages] i64: the table below
  at::Tensor seen;               // [s] i64: lengths
  at::Tensor held;               // [g] i64: the pages that each chain needs, one chain after another
  // For FlashAttention, i32: starts [s + 1], where each chain's tokens start in `held` [s + 1], lengths [s].
  at::Tensor flash_starts, flash_held, flash_lengths;
  int64_t most_new, longest;
};

// Where chains continue. i64 on the CPU, but for `places`.
struct Paged {
  at::Tensor pages;    // [pages, layers, page_numbers() · keys], the cache
  int64_t layer;
  at::Tensor starts;   // [s + 1], as above, for the new tokens
  at::Tensor lengths;  // [s] cached tokens, new ones included
  at::Tensor table;    // [s, most pages], the pages of each chain in order; what it does not need is its first
  Places places;
};

// Stores the new tokens' keys and values and attends to all that is cached. → [n, queries · dim]. No autograd.
at::Tensor paged_attention(const at::Tensor& qkv, const Paged& paged, Heads heads);

// Numbers that one head of one layer takes in a page of kBlock tokens.
int64_t page_numbers(const at::Tensor& like, int64_t dim);

}  // namespace af
