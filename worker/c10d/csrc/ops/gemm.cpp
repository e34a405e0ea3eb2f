#include "gemm.h"

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
