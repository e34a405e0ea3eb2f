// The micro-kernel's product for a handful of rows, as decoding has them: a head's few queries against a page.
//
// There the micro-kernel's own set-up costs several times the arithmetic. What must stay true: the bits are those
// that it gives. Which order it sums in depends on the machine and on the length, so at the first use of a length
// each order is tried against it, and only one that agrees in every bit is taken; where none does, the micro-kernel itself is called.
#pragma once
#include "gemm.h"

namespace af {

// Up to this many rows are few.
constexpr int64_t kFewRows = 8;

// As gemm(), for columns that are a multiple of 16. `ahead`, where it is not null, is laid out as B and read next.
void gemm_few_rows(int64_t m, int64_t n, int64_t k, int64_t lda, int64_t ldb, int64_t ldc, bool add, const bf16* a,
                   const bf16* b, float* c, const bf16* ahead);
void gemm_few_rows(int64_t m, int64_t n, int64_t k, int64_t lda, int64_t ldb, int64_t ldc, bool add, const float* a,
                   const float* b, float* c, const float* ahead);

// Up to so many rows are few for a product of bf16 in f32: what widens B costs as much as several of them.
constexpr int64_t kFewWidened = 16;

// A · B of rows in f32 and packed bf16, whose numbers are widened on their way, n a multiple of 16. False, and nothing is
// done, where that would not give the bits of gemm() in f32.
bool gemm_few_widened(int64_t m, int64_t n, int64_t k, int64_t lda, int64_t ldb, int64_t ldc, bool add, const float* a,
                      const bf16* b, float* c, const bf16* ahead);

template <class T>
AF_INLINE void gemm_any_rows(int64_t m, int64_t n, int64_t k, int64_t lda, int64_t ldb, int64_t ldc, bool add,
                             const T* a, const T* b, float* c, const T* ahead = nullptr) {
  if (m <= kFewRows && n % 16 == 0) {
    gemm_few_rows(m, n, k, lda, ldb, ldc, add, a, b, c, ahead);
  } else {
    gemm(m, n, k, lda, ldb, ldc, add, a, b, c);
  }
}

}  // namespace af
