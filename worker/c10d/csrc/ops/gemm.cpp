#include "gemm.h"

#include <cstdlib>
#include <string>

namespace af {

namespace {

// Tried once, and what it gives is looked at: a processor may have the instructions and libtorch, or its settings, not
// use them, or read B in another layout. libtorch itself packs bf16 for AMX only; the micro-kernel has it for all of
// AVX-512.
template <class T>
bool micro_kernel_runs() {
  constexpr int64_t rows = 16, depth = 32;
  try {
    // Whole numbers that no rounding touches, different at each place.
    std::vector<T> a(rows * depth), w(kBlock * depth), b(depth * kBlock);
    for (int64_t i = 0; i < rows * depth; i++) store(&a[i], static_cast<float>(i % 13 - 6));
    for (int64_t i = 0; i < kBlock * depth; i++) store(&w[i], static_cast<float>(i % 11 - 5));
    pack_transposed(w.data(), kBlock, depth, depth, kBlock, b.data());
    std::vector<float> c(rows * kBlock);
    auto scope = gemm_scope<T>();
    gemm(rows, kBlock, depth, depth, kBlock, kBlock, false, a.data(), b.data(), c.data());
    for (int64_t r = 0; r < rows; r++)
      for (int64_t n = 0; n < kBlock; n++) {
        float sum = 0.0f;
        for (int64_t i = 0; i < depth; i++) sum += load(&a[r * depth + i]) * load(&w[n * depth + i]);
        if (c[r * kBlock + n] != sum) return false;
      }
    return true;
  } catch (const std::exception&) {
    return false;
  }
}

}  // namespace

bool widens() {
  static const bool wider = [] {
    // For tests and comparisons on any processor.
    if (const char* asked = std::getenv("AGENTFLY_BF16_IN_F32")) {
      const std::string value = asked;
      TORCH_CHECK(value == "0" || value == "1", "AGENTFLY_BF16_IN_F32=", value,
                  ": expected 1, to multiply bf16 in float32, or 0, to multiply it in bf16; or leave it unset");
      return value == "1";
    }
#if defined(__x86_64__)
    return __builtin_cpu_is("intel") && !__builtin_cpu_supports("amx-bf16");
#else
    return false;
#endif
  }();
  return wider;
}

AF_VECTORISED void widen_rows(const bf16* AF_RESTRICT a, int64_t rows, int64_t n, int64_t stride, int64_t width,
                              float* AF_RESTRICT out) {
  for (int64_t r = 0; r < rows; r++) {
    for (int64_t i = 0; i < n; i++) out[r * width + i] = load(a + r * stride + i);
    for (int64_t i = n; i < width; i++) out[r * width + i] = 0.0f;
  }
}

AF_VECTORISED void widen_pairs(const bf16* AF_RESTRICT b, int64_t rows, int64_t n, int64_t stride,
                               float* AF_RESTRICT out) {
  for (int64_t i = 0; i < rows; i += 2) {
    const bf16* AF_RESTRICT pairs = b + i * stride;
    float* AF_RESTRICT even = out + i * n;
    float* AF_RESTRICT odd = even + n;
    for (int64_t j = 0; j < n; j++) {
      uint32_t pair;
      std::memcpy(&pair, pairs + 2 * j, sizeof(pair));
      even[j] = bits_to_float(pair << 16);
      odd[j] = bits_to_float(pair & 0xffff0000u);
    }
  }
}

void gemm_widened(int64_t m, int64_t n, int64_t k, int64_t lda, int64_t ldb, int64_t ldc, bool add, const bf16* a,
                  const bf16* b, float* c) {
  for (int64_t first = 0; first < k; first += kWideDepth) {
    const int64_t part = std::min(kWideDepth, k - first), width = std::min(ldb, round_up(n, 16));
    float* wide_a = scratch<float, 30>(m * part);
    float* wide_b = scratch<float, 31>(part * width);
    widen_rows(a + first, m, part, lda, part, wide_a);
    widen_pairs(b + first * ldb, part, width, ldb, wide_b);
    gemm(m, n, part, part, width, ldc, add || first > 0, wide_a, wide_b, c);
  }
}

bool has_gemm(const at::Tensor& like) {
  if (!like.is_cpu()) return false;
  if (like.scalar_type() == at::kBFloat16) {
    static const bool runs = micro_kernel_runs<bf16>();
    return runs;
  }
  static const bool runs = micro_kernel_runs<float>();
  return like.scalar_type() == at::kFloat && runs;
}

at::Tensor mm_wide(const at::Tensor& a, const at::Tensor& b) {
  const bool half = a.scalar_type() == at::kBFloat16 || a.scalar_type() == at::kHalf;
  if (half && a.is_cuda()) return at::mm(a, b, at::kFloat);
  return at::mm(a, b).to(at::kFloat);
}

}  // namespace af
