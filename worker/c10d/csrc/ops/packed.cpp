#include "packed.h"

#include <ATen/Parallel.h>

#include <vector>

#include "numbers.h"

namespace af {
namespace {

template <class T>
AF_VECTORISED void sum_tokens(const T* AF_RESTRICT tokens, const int64_t* from, int64_t count, int64_t width,
                              float* AF_RESTRICT sums, T* AF_RESTRICT out) {
  for (int64_t c = 0; c < width; c++) sums[c] = load(tokens + from[0] * width + c);
  for (int64_t i = 1; i < count; i++) {
    const T* AF_RESTRICT token = tokens + from[i] * width;
    for (int64_t c = 0; c < width; c++) sums[c] += load(token + c);
  }
  for (int64_t c = 0; c < width; c++) store(out + c, sums[c]);
}

template <class T>
void sum_all(const at::Tensor& tokens, const Packed& packed, const at::Tensor& out) {
  const int64_t* row = packed.rows.const_data_ptr<int64_t>();
  const int64_t n = out.size(0), width = out.size(1), count = tokens.size(0);
  // The tokens of each row, by counting.
  std::vector<int64_t> first(n + 1, 0), of_row(count);
  for (int64_t i = 0; i < count; i++) first[row[i] + 1]++;
  for (int64_t r = 0; r < n; r++) first[r + 1] += first[r];
  std::vector<int64_t> next(first.begin(), first.end() - 1);
  for (int64_t i = 0; i < count; i++) of_row[next[row[i]]++] = i;
  const T* in = static_cast<const T*>(tokens.const_data_ptr());
  T* to = static_cast<T*>(out.mutable_data_ptr());
  at::parallel_for(0, n, 64, [&](int64_t begin, int64_t end) {
    std::vector<float> sums(width);
    for (int64_t r = begin; r < end; r++)
      sum_tokens(in, &of_row[first[r]], first[r + 1] - first[r], width, sums.data(), to + r * width);
  });
}

}  // namespace

at::Tensor summed(const at::Tensor& tokens, const Packed& packed, int64_t n) {
  if (!packed.shared()) return tokens;
  const at::Tensor out = at::empty({n, tokens.size(1)}, tokens.options());
  if (tokens.scalar_type() == at::kBFloat16) {
    sum_all<bf16>(tokens, packed, out);
  } else {
    sum_all<float>(tokens, packed, out);
  }
  return out;
}

}  // namespace af
