// Small matrix products by libtorch's own micro-kernel (oneDNN's brgemm: AMX, AVX-512 bf16 or AVX2, as the machine
// has), and the layouts it reads.
//
// C[m, n] (f32) = A[m, k] · B[k, n], A in rows, B packed: f32 in rows; bf16 in pairs of rows, B[k / 2][n][k % 2].
// The row stride of B is a multiple of 16 and at most 64: wider matrices are cut into blocks of 64 columns.
//
// What must stay true: one row of C is summed over k in the same order whatever m is. Tests hold it to that.
#pragma once
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <ATen/native/CPUBlas.h>

#include <algorithm>
#include <vector>

#include "numbers.h"

namespace af {

// Columns of a packed block, and tokens of a page of the KV cache: PAGE_TOKENS in src/ops/attention.rs, to which a test
// of the pages' size holds it.
constexpr int64_t kBlock = 64;

constexpr int64_t round_up(int64_t value, int64_t to) { return (value + to - 1) / to * to; }
constexpr int64_t blocks(int64_t n) { return (n + kBlock - 1) / kBlock; }

// Whether the micro-kernel runs here for tensors of this kind on this device.
bool has_gemm(const at::Tensor& like);

// a · b by libtorch, in f32: as it was summed where libtorch can give that, which is on GPUs. On CPUs its products of
// 16 bits are rounded to them first.
at::Tensor mm_wide(const at::Tensor& a, const at::Tensor& b);

// Whether this processor multiplies bf16 faster as f32. Intel's without AMX do: a product of pairs takes twice the time
// of the two in f32 (measured: 84 GFLOPS a core and 155).
bool widens();

// `rows` rows of `n` numbers, `stride` apart, as f32 `width` apart; what lies between becomes 0.
void widen_rows(const bf16* a, int64_t rows, int64_t n, int64_t stride, int64_t width, float* out);

// Rows of packed B, [rows / 2][stride][2], as f32 [rows][n].
void widen_pairs(const bf16* b, int64_t rows, int64_t n, int64_t stride, float* out);

// Of a sum so many products at a time, so that what is multiplied in f32 stays in the second-level cache.
constexpr int64_t kWideDepth = 1536;

// The same product from A and B in f32. Each of their numbers, and each product of two, is exact there.
void gemm_widened(int64_t m, int64_t n, int64_t k, int64_t lda, int64_t ldb, int64_t ldc, bool add, const bf16* a,
                  const bf16* b, float* c);

AF_INLINE void gemm(int64_t m, int64_t n, int64_t k, int64_t lda, int64_t ldb, int64_t ldc, bool add, const bf16* a,
                    const bf16* b, float* c) {
  if (widens()) return gemm_widened(m, n, k, lda, ldb, ldc, add, a, b, c);
  at::native::cpublas::brgemm(m, n, k, lda, ldb, ldc, add, a, b, c, /*is_vnni=*/true);
}
AF_INLINE void gemm(int64_t m, int64_t n, int64_t k, int64_t lda, int64_t ldb, int64_t ldc, bool add, const float* a,
                    const float* b, float* c) {
  at::native::cpublas::brgemm(m, n, k, lda, ldb, ldc, add, a, b, c, /*is_vnni=*/false);
}

// Gives the tile unit back; the micro-kernel sets it up again by itself.
struct GemmScope {
  FlushTiny flush;
  bool vnni;
  explicit GemmScope(bool is_bf16) : vnni(is_bf16) {}
  ~GemmScope() { at::native::cpublas::brgemm_release(vnni); }
};
template <class T>
GemmScope gemm_scope() {
  return GemmScope(std::is_same_v<T, bf16>);
}

// Packs B = Wᵀ from rows of W: `count` columns of B are rows of W of `k` values, `stride` apart; room for `width`.
AF_INLINE void pack_transposed(const bf16* w, int64_t count, int64_t k, int64_t stride, int64_t width, bf16* out) {
  for (int64_t n = 0; n < count; n++) {
    const bf16* row = w + n * stride;
    for (int64_t i = 0; i < k; i += 2) {
      bf16* pair = out + (i / 2 * width + n) * 2;
      pair[0] = row[i];
      pair[1] = row[i + 1];
    }
  }
}
AF_INLINE void pack_transposed(const float* w, int64_t count, int64_t k, int64_t stride, int64_t width, float* out) {
  for (int64_t n = 0; n < count; n++)
    for (int64_t i = 0; i < k; i++) out[i * width + n] = w[n * stride + i];
}

// Packs B from its own rows: `rows` rows of `n` values, `stride` apart, columns up to `width`; rows up to
// `padded_rows` and columns from n on become 0.
AF_INLINE void pack_rows(const bf16* b, int64_t rows, int64_t n, int64_t stride, int64_t width, int64_t padded_rows,
                         bf16* out) {
  const bf16 zero(0.0f);
  for (int64_t i = 0; i < padded_rows; i += 2) {
    const bf16* AF_RESTRICT first = b + i * stride;
    const bf16* AF_RESTRICT second = first + stride;
    bf16* AF_RESTRICT pairs = out + i * width;
    if (i + 1 < rows) {
      // As one number of 32 bits: two of 16 apart would be written one by one.
      for (int64_t j = 0; j < n; j++) {
        const uint32_t pair = first[j].x | static_cast<uint32_t>(second[j].x) << 16;
        std::memcpy(static_cast<void*>(pairs + 2 * j), &pair, sizeof(pair));
      }
    } else {
      for (int64_t j = 0; j < n; j++) {
        pairs[2 * j] = i < rows ? first[j] : zero;
        pairs[2 * j + 1] = zero;
      }
    }
    for (int64_t j = n; j < width; j++) pairs[2 * j] = pairs[2 * j + 1] = zero;
  }
}
AF_INLINE void pack_rows(const float* b, int64_t rows, int64_t n, int64_t stride, int64_t width, int64_t padded_rows,
                         float* out) {
  for (int64_t i = 0; i < padded_rows; i++)
    for (int64_t j = 0; j < width; j++) out[i * width + j] = i < rows && j < n ? b[i * stride + j] : 0.0f;
}

// out[j][i] = in[i][j] of 8 x 8 values.
AF_INLINE void transpose_8x8(const float* in, int64_t stride, float* out, int64_t out_stride) {
  for (int64_t j = 0; j < 8; j++)
    for (int64_t i = 0; i < 8; i++) out[j * out_stride + i] = in[i * stride + j];
}
AF_INLINE void transpose_8x8(const bf16* in, int64_t stride, bf16* out, int64_t out_stride) {
#if defined(__x86_64__)
  const auto row = [&](int64_t i) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(in + i * stride)); };
  const auto save = [&](int64_t j, __m128i x) { _mm_storeu_si128(reinterpret_cast<__m128i*>(out + j * out_stride), x); };
  __m128i a[8], b[8];
  for (int i = 0; i < 4; i++) {
    a[2 * i] = _mm_unpacklo_epi16(row(i), row(i + 4));
    a[2 * i + 1] = _mm_unpackhi_epi16(row(i), row(i + 4));
  }
  for (int i = 0; i < 4; i++) {
    b[2 * i] = _mm_unpacklo_epi16(a[i], a[i + 4]);
    b[2 * i + 1] = _mm_unpackhi_epi16(a[i], a[i + 4]);
  }
  for (int i = 0; i < 4; i++) {
    save(2 * i, _mm_unpacklo_epi16(b[i], b[i + 4]));
    save(2 * i + 1, _mm_unpackhi_epi16(b[i], b[i + 4]));
  }
#else
  for (int64_t j = 0; j < 8; j++)
    for (int64_t i = 0; i < 8; i++) out[j * out_stride + i] = in[i * stride + j];
#endif
}

// Asks for memory that is read soon.
AF_INLINE void fetch_ahead(const void* from, int64_t bytes) {
  const char* line = static_cast<const char*>(from);
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(line + i, 0, 2);
}

// A buffer of this thread that is kept from call to call; `tag` tells the uses of one function apart.
template <class T, int tag>
T* scratch(int64_t count) {
  static thread_local std::vector<T> kept;
  if (static_cast<int64_t>(kept.size()) < count) kept.resize(count);
  return kept.data();
}

}  // namespace af
