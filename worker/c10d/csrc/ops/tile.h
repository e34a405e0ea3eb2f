// One tile of attention: some tokens of one sequence, the query heads that share a key head.
//
// Called by attention.cpp (forward) and attention_backward.cpp. What must stay true: a token's keys are taken in
// blocks of kBlock from its sequence's first, so a token gets the same bits whether it is decoded alone through the
// cache or computed with its whole sequence.
#pragma once
#include "attention.h"
#include "gemm.h"

namespace af {

// A block's keys, packed to be B of queries · keysᵀ, then its values, packed to be B of probabilities · values.
template <class T>
int64_t key_numbers(int64_t dim) {
  return kBlock * dim;
}
inline int64_t padded_dim(int64_t dim) { return round_up(dim, 16); }
inline int64_t value_numbers(int64_t dim) { return kBlock * padded_dim(dim); }

// Tokens a tile holds: as many as fill the micro-kernel's rows.
inline int64_t tile_tokens(const Heads& heads) { return std::max<int64_t>(1, kBlock / heads.group()); }

// The column blocks of a row of `dim` values.
template <class F>
AF_INLINE void for_columns(int64_t dim, F&& f) {
  for (int64_t c = 0; c < dim; c += kBlock)
    f(c, std::min(kBlock, dim - c), std::min(kBlock, padded_dim(dim) - c));
}

// Copies a tile's rows: row r is head r % group of token r / group.
template <class T>
AF_INLINE void gather_tile(const T* x, int64_t stride, int64_t tokens, int64_t group, int64_t dim, T* tile) {
  for (int64_t t = 0; t < tokens; t++)
    std::memcpy(static_cast<void*>(tile + t * group * dim), x + t * stride, group * dim * sizeof(T));
}

}  // namespace af
