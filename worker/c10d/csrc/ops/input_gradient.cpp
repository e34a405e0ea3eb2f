#include "input_gradient.h"

#include "gemm.h"
#include "tile.h"

namespace af {
namespace {

// Outputs that are summed over at a time, and rows of one task: in f32 both, and the sums, stay in the second-level cache.
constexpr int64_t kOutputs = 512, kRows = 512;

AF_VECTORISED void round_rows(const float* AF_RESTRICT sums, int64_t rows, int64_t columns, int64_t stride,
                              bf16* AF_RESTRICT out) {
  for (int64_t r = 0; r < rows; r++)
    for (int64_t c = 0; c < columns; c++) store(out + r * stride + c, sums[r * kBlock + c]);
}

// In f32, which each part of g and of the weights becomes when its turn comes.
at::Tensor widened(const at::Tensor& g, const std::vector<at::Tensor>& weights) {
  const int64_t m = g.size(0), outputs = g.size(1), k = weights[0].size(1);
  const at::Tensor gx = at::empty({m, k}, g.options());
  const bf16* gs = static_cast<const bf16*>(g.const_data_ptr());
  bf16* to = static_cast<bf16*>(gx.mutable_data_ptr());
  hand_out<bf16>((m + kRows - 1) / kRows * blocks(k), 1, [&](int64_t i, int64_t) {
    const int64_t first = i / blocks(k) * kRows, rows = std::min(kRows, m - first);
    const int64_t column = i % blocks(k) * kBlock, columns = std::min(kBlock, k - column);
    float* sums = scratch<float, 40>(kRows * kBlock);
    float* wide_g = scratch<float, 41>(kBlock * kOutputs);
    float* wide_w = scratch<float, 42>(kOutputs * kBlock);
    int64_t at = 0;
    for (const auto& weight : weights) {
      const bf16* w = static_cast<const bf16*>(weight.const_data_ptr());
      for (int64_t o = 0; o < weight.size(0); o += kOutputs) {
        const int64_t part = std::min(kOutputs, weight.size(0) - o);
        widen_rows(w + o * k + column, part, columns, k, kBlock, wide_w);
        for (int64_t r = 0; r < rows; r += kBlock) {
          const int64_t count = std::min(kBlock, rows - r);
          widen_rows(gs + (first + r) * outputs + at + o, count, part, outputs, part, wide_g);
          gemm(count, kBlock, part, part, kBlock, kBlock, at + o > 0, wide_g, wide_w, sums + r * kBlock);
        }
      }
      at += weight.size(0);
    }
    round_rows(sums, rows, columns, k, to + first * k + column);
  });
  return gx;
}

}  // namespace

at::Tensor input_gradient(const at::Tensor& g, const std::vector<at::Tensor>& weights) {
  if (g.scalar_type() == at::kBFloat16 && has_gemm(g) && widens()) return widened(g.contiguous(), weights);
  // One product: of several, each would be rounded to x's kind before they are added. That is worth a copy of this map's
  // weights, which lives for this call alone. The way forward adds nothing up, each weight has columns of its own, and
  // there every token decoded would pay for the copy.
  return at::mm(g, weights.size() == 1 ? weights[0] : at::cat(weights));
}

}  // namespace af
