// One tile of attention: some tokens of one sequence, the query heads that share a key head.
//
// Called by attention.cpp (forward) and attention_backward.cpp. What must stay true: a token's keys are taken in
// blocks of kBlock from its sequence's first, so a token gets the same bits whether it is decoded alone through the
// cache or computed with its whole sequence.
#pragma once
#include <atomic>

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

// Calls `f(i, end)` for i in 0..count on all threads, the next `at_once` (up to `end`) for whoever is free: tasks differ
// in length, and threads with shares of equal number would wait for the longest. Give long ones first.
template <class T, class F>
void hand_out(int64_t count, int64_t at_once, const F& f) {
  std::atomic<int64_t> next{0};
  at::parallel_for(0, std::min<int64_t>(count, at::get_num_threads()), 1, [&](int64_t, int64_t) {
    auto scope = gemm_scope<T>();
    for (int64_t i; (i = next.fetch_add(at_once, std::memory_order_relaxed)) < count;)
      for (const int64_t end = std::min(count, i + at_once); i < end; i++) f(i, end);
  });
}

}  // namespace af
