#include "weight_gradient.h"

#include "gemm.h"
#include "tile.h"

namespace af {
namespace {

// Tokens that are summed at a time: few sizes, so that few micro-kernels are compiled.
constexpr int64_t kTokens = 512;
// Rows of the turned block lie this many numbers further apart: a power of two would put all of them into the same few
// places of the cache.
constexpr int64_t kApart = 32;
// With fewer blocks each is two tasks, so that no thread waits long for another's last.
constexpr int64_t kFewBlocks = 16;

// g's `columns` columns as rows, `apart` from one to the next, of `padded` values: B's partner when a product sums over
// tokens.
template <class T>
void transpose_slab(const T* g, int64_t tokens, int64_t columns, int64_t stride, int64_t padded, int64_t apart, T* out) {
  const int64_t whole_tokens = tokens / 8 * 8, whole_columns = columns / 8 * 8;
  for (int64_t t = 0; t < whole_tokens; t += 8)
    for (int64_t c = 0; c < whole_columns; c += 8) transpose_8x8(g + t * stride + c, stride, out + c * apart + t, apart);
  for (int64_t c = 0; c < columns; c++) {
    T* row = out + c * apart;
    for (int64_t t = c < whole_columns ? whole_tokens : 0; t < tokens; t++) row[t] = g[t * stride + c];
    std::fill(row + tokens, row + padded, T(0.0f));
  }
}

template <class T>
AF_VECTORISED void pack_slab(const T* x, int64_t tokens, int64_t columns, int64_t stride, int64_t padded, T* out) {
  pack_rows(x, tokens, columns, stride, kBlock, padded, out);
}

// Rows of one sum: columns of g.
struct Block {
  float* sum;
  int64_t column, rows;
};

std::vector<Block> blocks_of(const std::vector<at::Tensor>& sums, int64_t k) {
  std::vector<Block> all;
  int64_t column = 0;
  for (const auto& sum : sums) {
    const int64_t n = sum.size(0);
    for (int64_t first = 0; first < n; first += kBlock)
      all.push_back({sum.data_ptr<float>() + first * k, column + first, std::min(kBlock, n - first)});
    column += n;
  }
  return all;
}

template <class T>
void by_micro_kernel(const at::Tensor& g, const at::Tensor& x, const std::vector<at::Tensor>& sums) {
  const int64_t m = g.size(0), k = x.size(1), stride = g.size(1), k_blocks = blocks(k);
  const T* gs = static_cast<const T*>(g.const_data_ptr());
  const T* xs = static_cast<const T*>(x.const_data_ptr());
  const auto all = blocks_of(sums, k);
  const int64_t count = static_cast<int64_t>(all.size()), parts = count < kFewBlocks ? 2 : 1;
  const at::Tensor packed = at::empty({k_blocks * kTokens * kBlock}, x.options());
  T* pack = static_cast<T*>(packed.mutable_data_ptr());
  for (int64_t first = 0; first < m; first += kTokens) {
    const int64_t tokens = std::min(kTokens, m - first), padded = round_up(tokens, kBlock), apart = padded + kApart;
    at::parallel_for(0, k_blocks, 1, [&](int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; b++)
        pack_slab(xs + first * k + b * kBlock, tokens, std::min(kBlock, k - b * kBlock), k, padded,
                  pack + b * kTokens * kBlock);
    });
    hand_out<T>(count * parts, 1, [&](int64_t i, int64_t) {
      const Block& block = all[i / parts];
      T* turned = scratch<T, 1>(kBlock * (kTokens + kApart));
      transpose_slab(gs + first * stride + block.column, tokens, block.rows, stride, padded, apart, turned);
      for (int64_t kb = k_blocks * (i % parts) / parts; kb < k_blocks * (i % parts + 1) / parts; kb++)
        // Not past the end of a row of the sum: the last block of x may be narrower.
        gemm(block.rows, std::min(kBlock, k - kb * kBlock), padded, apart, kBlock, k, true, turned,
             pack + kb * kTokens * kBlock, block.sum + kb * kBlock);
    });
  }
}

}  // namespace

void add_weight_gradients(const at::Tensor& g, const at::Tensor& x, const std::vector<at::Tensor>& sums) {
  int64_t column = 0;
  for (const auto& sum : sums) {
    TORCH_CHECK(sum.dim() == 2 && sum.size(1) == x.size(1) && sum.is_contiguous() && sum.device() == x.device() &&
                    sum.scalar_type() == at::kFloat,
                "a gradient's sum became ", sum.sizes(), " where rows of ", x.size(1), " belong");
    column += sum.size(0);
  }
  TORCH_CHECK(column == g.size(1), "the gradients' sums became ", column, " rows where ", g.size(1), " belong");
  if (!has_gemm(x)) {
    column = 0;
    for (at::Tensor sum : sums) {
      // Not rounded to x's kind: what a micro-batch adds may be small beside what the others do.
      sum.add_(mm_wide(g.narrow(1, column, sum.size(0)).t(), x));
      column += sum.size(0);
    }
  } else if (x.scalar_type() == at::kBFloat16) {
    by_micro_kernel<bf16>(g, x, sums);
  } else {
    by_micro_kernel<float>(g, x, sums);
  }
}

}  // namespace af
