#include "attention_backward.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <vector>

#include "packed.h"
#include "tile.h"

namespace af {
namespace {

template <class T>
AF_VECTORISED void pack_both(const T* tile, int64_t rows, int64_t dim, T* transposed, T* by_rows) {
  pack_transposed(tile, rows, dim, dim, kBlock, transposed);
  for_columns(dim, [&](int64_t c, int64_t columns, int64_t width) {
    pack_rows(tile + c, rows, columns, dim, width, kBlock, by_rows + kBlock * c);
  });
}

template <class T>
AF_VECTORISED void pack_keys_by_rows(const T* k, int64_t count, int64_t dim, int64_t stride, T* out) {
  for_columns(dim, [&](int64_t c, int64_t columns, int64_t width) {
    pack_rows(k + c, count, columns, stride, width, kBlock, out + kBlock * c);
  });
}

template <class T>
AF_VECTORISED float dot(const T* a, const T* b, int64_t n) {
  float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < n; i++) sum += load(a + i) * load(b + i);
  return sum;
}

// Of one block, keys down and rows across: P = exp(S·scale − lse) where the key is visible, dS = P·(dP − δ)·scale.
template <class T>
AF_VECTORISED void block_gradient(const float* AF_RESTRICT s, const float* AF_RESTRICT dp, const float* AF_RESTRICT lse, const float* AF_RESTRICT delta,
                                  const int32_t* AF_RESTRICT last_key, int64_t keys, int64_t first_key, float scale, T* AF_RESTRICT p, T* AF_RESTRICT ds) {
  for (int64_t j = 0; j < kBlock; j++) {
    if (j >= keys) {
      for (int64_t r = 0; r < kBlock; r++) p[j * kBlock + r] = ds[j * kBlock + r] = T(0.0f);
      continue;
    }
    const int32_t key = static_cast<int32_t>(first_key + j);
    for (int64_t r = 0; r < kBlock; r++) {
      const int64_t at = j * kBlock + r;
      const float prob = key <= last_key[r] ? exp_f32(s[at] * scale - lse[r]) : 0.0f;
      const float grad = key <= last_key[r] ? prob * (dp[at] - delta[r]) * scale : 0.0f;
      store(p + at, prob);
      store(ds + at, grad);
    }
  }
}

template <class T>
void turn_block(const T* x, T* out) {
  for (int64_t j = 0; j < kBlock; j += 8)
    for (int64_t r = 0; r < kBlock; r += 8) transpose_8x8(x + j * kBlock + r, kBlock, out + r * kBlock + j, kBlock);
}

template <class T>
AF_VECTORISED void round_row(const float* AF_RESTRICT x, int64_t n, T* AF_RESTRICT out) {
  for (int64_t i = 0; i < n; i++) store(out + i, x[i]);
}

// One sequence and one key head: all that adds to the same keys and values, so nothing is shared between tasks.
template <class T>
struct Task {
  const Heads& heads;
  const T *g, *qkv, *out;  // at the sequence's first token
  const float* lse;
  int64_t length, skip, head;
  T* dqkv;

  void run() {
    const int64_t dim = heads.dim, row = heads.row(), wide = padded_dim(dim), count = blocks(length);
    const T* k = qkv + (heads.queries + head) * dim;
    T* keys = scratch<T, 10>(count * value_numbers(dim));
    for (int64_t b = 0; b < count; b++)
      pack_keys_by_rows(k + b * kBlock * row, std::min(kBlock, length - b * kBlock), dim, row,
                        keys + b * value_numbers(dim));
    float* dk = scratch<float, 11>(count * kBlock * wide);
    float* dv = scratch<float, 12>(count * kBlock * wide);
    std::fill_n(dk, count * kBlock * wide, 0.0f);
    std::fill_n(dv, count * kBlock * wide, 0.0f);
    for (int64_t t = skip; t < length; t += tile_tokens(heads)) tile(t, keys, dk, dv);
    for (int64_t t = 0; t < skip; t++)
      std::fill_n(dqkv + t * row + head * heads.group() * dim, heads.group() * dim, T(0.0f));
    T* to = dqkv + (heads.queries + head) * dim;
    for (int64_t t = 0; t < length; t++) {
      round_row(dk + t * wide, dim, to + t * row);
      round_row(dv + t * wide, dim, to + t * row + heads.keys * dim);
    }
  }

  void tile(int64_t first, const T* keys, float* dk, float* dv) {
    const int64_t group = heads.group(), dim = heads.dim, row = heads.row(), wide = padded_dim(dim);
    const int64_t tokens = std::min(tile_tokens(heads), length - first), rows = tokens * group;
    // Groups of more heads than a tile has rows: some heads at a time.
    for (int64_t at = 0; at < rows; at += kBlock)
      part(first, at, std::min(kBlock, rows - at), keys, dk, dv, group, dim, row, wide);
  }

  void part(int64_t first, int64_t at, int64_t rows, const T* keys, float* dk, float* dv, int64_t group, int64_t dim,
            int64_t row, int64_t wide) {
    const int64_t out_row = heads.queries * dim;
    const float scale = 1.0f / std::sqrt(static_cast<float>(dim));
    T* q = scratch<T, 13>(kBlock * dim);
    T* go = scratch<T, 14>(kBlock * dim);
    float* dq = scratch<float, 15>(kBlock * wide);
    float lses[kBlock] = {}, deltas[kBlock] = {};
    int32_t last_key[kBlock];
    int64_t last = 0;
    for (int64_t r = 0; r < kBlock; r++) {
      last_key[r] = -1;
      if (r >= rows) continue;
      const int64_t token = first + (at + r) / group, h = head * group + (at + r) % group;
      std::memcpy(static_cast<void*>(q + r * dim), qkv + token * row + h * dim, dim * sizeof(T));
      std::memcpy(static_cast<void*>(go + r * dim), g + token * out_row + h * dim, dim * sizeof(T));
      lses[r] = lse[token * heads.queries + h];
      deltas[r] = dot(go + r * dim, out + token * out_row + h * dim, dim);
      last_key[r] = static_cast<int32_t>(token);
      last = token;
    }
    T* q_turned = scratch<T, 16>(kBlock * dim);
    T* g_turned = scratch<T, 17>(kBlock * dim);
    T* q_rows = scratch<T, 18>(value_numbers(dim));
    T* g_rows = scratch<T, 19>(value_numbers(dim));
    pack_both(q, rows, dim, q_turned, q_rows);
    pack_both(go, rows, dim, g_turned, g_rows);
    float* s = scratch<float, 20>(kBlock * kBlock);
    float* dp = scratch<float, 21>(kBlock * kBlock);
    T* p = scratch<T, 22>(kBlock * kBlock);
    T* ds = scratch<T, 23>(kBlock * kBlock);
    T* ds_turned = scratch<T, 24>(kBlock * kBlock);
    for (int64_t b = 0; b <= last / kBlock; b++) {
      const int64_t count = std::min(kBlock, length - b * kBlock);
      const T* k = qkv + b * kBlock * row + (heads.queries + head) * dim;
      gemm(count, kBlock, dim, row, kBlock, kBlock, false, k, q_turned, s);
      gemm(count, kBlock, dim, row, kBlock, kBlock, false, k + heads.keys * dim, g_turned, dp);
      block_gradient(s, dp, lses, deltas, last_key, count, b * kBlock, scale, p, ds);
      turn_block(ds, ds_turned);
      for_columns(dim, [&](int64_t c, int64_t columns, int64_t width) {
        float *to_k = dk + b * kBlock * wide + c, *to_v = dv + b * kBlock * wide + c;
        gemm(kBlock, columns, kBlock, kBlock, width, wide, true, p, g_rows + kBlock * c, to_v);
        gemm(kBlock, columns, kBlock, kBlock, width, wide, true, ds, q_rows + kBlock * c, to_k);
        gemm(rows, columns, kBlock, kBlock, width, wide, b > 0, ds_turned,
             keys + b * value_numbers(dim) + kBlock * c, dq + c);
      });
    }
    for (int64_t r = 0; r < rows; r++) {
      const int64_t token = first + (at + r) / group, h = head * group + (at + r) % group;
      round_row(dq + r * wide, dim, dqkv + token * row + h * dim);
    }
  }
};

template <class T>
void run_all(const at::Tensor& g, const at::Tensor& qkv, const Packed& packed, const at::Tensor& out,
             const at::Tensor& lse, const Heads& heads, const at::Tensor& dqkv) {
  const int64_t *start = packed.starts.const_data_ptr<int64_t>(), *skip = skipped(packed);
  const int64_t sequences = packed.starts.size(0) - 1, tasks = sequences * heads.keys;
  const int64_t out_row = heads.queries * heads.dim;
  const auto in = [](const at::Tensor& x) { return static_cast<const T*>(x.const_data_ptr()); };
  // The longest first: the last to be handed out are short, and no thread waits long for another's.
  std::vector<int64_t> order(sequences);
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(),
                   [&](int64_t a, int64_t b) { return start[a + 1] - start[a] > start[b + 1] - start[b]; });
  hand_out<T>(tasks, 1, [&](int64_t i, int64_t) {
    const int64_t s = order[i / heads.keys], token = start[s];
    Task<T>{heads,
            in(g) + token * out_row,
            in(qkv) + token * heads.row(),
            in(out) + token * out_row,
            lse.const_data_ptr<float>() + token * heads.queries,
            start[s + 1] - token,
            skip ? skip[s] : 0,
            i % heads.keys,
            static_cast<T*>(dqkv.mutable_data_ptr()) + token * heads.row()}
        .run();
  });
}

}  // namespace

at::Tensor attention_backward(const at::Tensor& g, const at::Tensor& qkv, const Packed& packed, const at::Tensor& out,
                              const at::Tensor& lse, Heads heads) {
  const at::Tensor dqkv = at::empty_like(qkv);
  if (qkv.scalar_type() == at::kBFloat16) {
    run_all<bf16>(g, qkv, packed, out, lse, heads, dqkv);
  } else {
    run_all<float>(g, qkv, packed, out, lse, heads, dqkv);
  }
  return dqkv;
}

}  // namespace af
