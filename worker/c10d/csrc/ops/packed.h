// Between rows, of which sequences that begin alike share some, and the tokens of all sequences, one after another.
#pragma once
#include "attention.h"

namespace af {

// A row for each token.
inline at::Tensor tokens_of(const at::Tensor& rows, const Packed& packed) {
  return packed.shared() ? rows.index_select(0, packed.rows) : rows;
}

// A token for each row: that which was computed.
inline at::Tensor rows_of(const at::Tensor& tokens, const Packed& packed) {
  return packed.shared() ? tokens.index_select(0, packed.kept) : tokens;
}

// Tokens that each sequence begins with and nothing is computed for; null: none.
inline const int64_t* skipped(const Packed& packed) {
  return packed.shared() ? packed.skip.const_data_ptr<int64_t>() : nullptr;
}

// Each row's sum over its tokens, [n, width]: in f32, in the tokens' order, rounded once. f32 or bf16 on the CPU.
at::Tensor summed(const at::Tensor& tokens, const Packed& packed, int64_t n);

}  // namespace af
