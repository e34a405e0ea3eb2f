#include "attention.h"

#include <torch/csrc/autograd/custom_function.h>

#include <cmath>
#include <limits>

#include "attention_backward.h"
#include "attention_plain.h"
#include "few_rows.h"
#include "packed.h"
#include "tile.h"

namespace af {
namespace {

bool fast(const at::Tensor& qkv, const Heads& heads) { return has_gemm(qkv) && heads.dim % 2 == 0; }

template <class T>
AF_VECTORISED void pack_keys(const T* k, int64_t count, int64_t dim, int64_t stride, T* out) {
  pack_transposed(k, count, dim, stride, kBlock, out);
}

template <class T>
AF_VECTORISED void pack_values(const T* v, int64_t count, int64_t dim, int64_t stride, T* out) {
  for_columns(dim, [&](int64_t c, int64_t columns, int64_t width) {
    pack_rows(v + c, count, columns, stride, width, kBlock, out + kBlock * c);
  });
}

// Probabilities of row r of a tile from its scores; both [blocks][rows][kBlock]. Returns what they sum to.
template <class T>
AF_VECTORISED float softmax_row(const float* AF_RESTRICT scores, int64_t rows, int64_t r, int64_t blocks, int64_t visible,
                                float scale, T* AF_RESTRICT probs, float* AF_RESTRICT lse) {
  // Key j goes to lane j % kLanes whatever the vectors' width, and lanes meet once a row. Indices as wide as the
  // numbers: a mask for one is then one for the other.
  constexpr int32_t kLanes = 16;
  const auto seen_of = [visible](int64_t b) {
    return static_cast<int32_t>(std::clamp<int64_t>(visible - b * kBlock, 0, kBlock));
  };
  float most_of[kLanes], total_of[kLanes];
  for (int32_t l = 0; l < kLanes; l++) most_of[l] = -std::numeric_limits<float>::infinity();
  for (int64_t b = 0; b < blocks; b++) {
    const float* s = scores + (b * rows + r) * kBlock;
    const int32_t seen = seen_of(b);
    for (int32_t j = 0; j < seen; j += kLanes)
#pragma omp simd
      for (int32_t l = 0; l < kLanes; l++) {
        const float score = j + l < seen ? s[j + l] : most_of[l];
        most_of[l] = score > most_of[l] ? score : most_of[l];
      }
  }
  float most = most_of[0];
  for (int32_t l = 1; l < kLanes; l++) most = most_of[l] > most ? most_of[l] : most;
  for (int32_t l = 0; l < kLanes; l++) total_of[l] = 0.0f;
  for (int64_t b = 0; b < blocks; b++) {
    const float* s = scores + (b * rows + r) * kBlock;
    T* p = probs + (b * rows + r) * kBlock;
    const int32_t seen = seen_of(b);
    for (int32_t j = 0; j < static_cast<int32_t>(kBlock); j += kLanes)
#pragma omp simd
      for (int32_t l = 0; l < kLanes; l++) {
        const float e = j + l < seen ? exp_f32((s[j + l] - most) * scale) : 0.0f;
        total_of[l] += e;
        store(p + j + l, e);
      }
  }
  float total = 0.0f;
  for (int32_t l = 0; l < kLanes; l++) total += total_of[l];
  if (lse) *lse = most * scale + std::log(total);
  return total;
}

template <class T>
AF_VECTORISED void finish_row(const float* AF_RESTRICT sums, float total, int64_t dim, T* AF_RESTRICT out) {
  const float share = 1.0f / total;
  // What is left out of a short product would have turned -0 into 0.
  for (int64_t d = 0; d < dim; d++) store(out + d, sums[d] * share + 0.0f);
}

// Queries `q` (a token's row `stride` apart) at positions from `first` on; keys(b) and values(b) are packed blocks.
// next_keys(b), where it is not null, is what this thread will read next.
template <class T, class Keys, class Values, class NextKeys>
void attend_tile(const Heads& heads, const T* q, int64_t stride, int64_t tokens, int64_t first, Keys&& keys,
                 Values&& values, NextKeys&& next_keys, T* out, float* lse) {
  const int64_t group = heads.group(), dim = heads.dim, rows = tokens * group, wide = padded_dim(dim);
  const int64_t count = (first + tokens - 1) / kBlock + 1;
  const float scale = 1.0f / std::sqrt(static_cast<float>(dim));
  T* tile = scratch<T, 2>(kBlock * group * dim);
  float* scores = scratch<float, 3>(count * rows * kBlock);
  T* probs = scratch<T, 4>(count * rows * kBlock);
  float* sums = scratch<float, 5>(rows * wide);
  float* totals = scratch<float, 6>(rows);
  gather_tile(q, stride, tokens, group, dim, tile);
  // A decode step reads its cache once, from memory: only what is seen. What is left out would be multiplied by 0.
  const bool few = rows <= kFewRows;
  const auto seen = [&](int64_t b, int64_t step) {
    return few ? std::min(kBlock, round_up(first + tokens - b * kBlock, step)) : kBlock;
  };
  for (int64_t b = 0; b < count; b++)
    gemm_any_rows(rows, seen(b, 16), dim, dim, kBlock, kBlock, false, tile, keys(b), scores + b * rows * kBlock,
                  values(b));
  for (int64_t r = 0; r < rows; r++)
    totals[r] = softmax_row(scores, rows, r, count, first + r / group + 1, scale, probs,
                            lse ? lse + r / group * heads.queries + r % group : nullptr);
  for_columns(dim, [&](int64_t c, int64_t columns, int64_t width) {
    for (int64_t b = 0; b < count; b++) {
      const T* next = next_keys(b);
      gemm_any_rows(rows, columns, seen(b, 32), kBlock, width, wide, b > 0, probs + b * rows * kBlock,
                    values(b) + kBlock * c, sums + c, next ? next + kBlock * c : nullptr);
    }
  });
  for (int64_t r = 0; r < rows; r++)
    finish_row(sums + r * wide, totals[r], dim, out + (r / group) * heads.queries * dim + r % group * dim);
}

// Tiles of a decode step that a thread takes at a time: each but the last has its keys fetched during the one before.
constexpr int64_t kTilesInARow = 8;

// A tile to compute: its sequence, key head, first token within the new ones.
struct Tile {
  int64_t sequence, head, token;
};

// Of the tokens from skip[s] on, or of all.
std::vector<Tile> tiles_of(const int64_t* starts, const int64_t* skip, int64_t sequences, const Heads& heads) {
  std::vector<Tile> tiles;
  for (int64_t s = 0; s < sequences; s++)
    for (int64_t h = 0; h < heads.keys; h++)
      for (int64_t t = skip ? skip[s] : 0; t < starts[s + 1] - starts[s]; t += tile_tokens(heads))
        tiles.push_back({s, h, t});
  return tiles;
}

template <class T>
void attend_packed(const at::Tensor& qkv, const Packed& packing, const Heads& heads, const at::Tensor& out,
                   float* lse) {
  const T* rows = static_cast<const T*>(qkv.const_data_ptr());
  T* result = static_cast<T*>(out.mutable_data_ptr());
  const int64_t* start = packing.starts.const_data_ptr<int64_t>();
  const int64_t sequences = packing.starts.size(0) - 1, dim = heads.dim, row = heads.row();
  std::vector<int64_t> first_block(sequences + 1, 0);
  std::vector<std::pair<int64_t, int64_t>> of_block;  // sequence, block within it
  for (int64_t s = 0; s < sequences; s++) {
    const int64_t count = blocks(start[s + 1] - start[s]);
    for (int64_t b = 0; b < count; b++) of_block.push_back({s, b});
    first_block[s + 1] = first_block[s] + count;
  }
  const int64_t key_size = key_numbers<T>(dim), size = key_size + value_numbers(dim);
  const at::Tensor packed = at::empty({first_block[sequences] * heads.keys * size}, qkv.options());
  T* pack = static_cast<T*>(packed.mutable_data_ptr());
  at::parallel_for(0, first_block[sequences] * heads.keys, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) {
      const auto [s, b] = of_block[i / heads.keys];
      const int64_t token = start[s] + b * kBlock, count = std::min(kBlock, start[s + 1] - token);
      const T* k = rows + token * row + (heads.queries + i % heads.keys) * dim;
      pack_keys(k, count, dim, row, pack + i * size);
      pack_values(k + heads.keys * dim, count, dim, row, pack + i * size + key_size);
    }
  });
  const auto tiles = tiles_of(start, skipped(packing), sequences, heads);
  const auto nothing = [](int64_t) -> const T* { return nullptr; };
  hand_out<T>(static_cast<int64_t>(tiles.size()), 1, [&](int64_t i, int64_t) {
    const auto [s, h, t] = tiles[i];
    const int64_t token = start[s] + t, tokens = std::min(tile_tokens(heads), start[s + 1] - token);
    const T* blocks_of = pack + (first_block[s] * heads.keys + h) * size;
    const auto keys = [&](int64_t b) { return blocks_of + b * heads.keys * size; };
    const auto values = [&](int64_t b) { return blocks_of + b * heads.keys * size + key_size; };
    const int64_t head = h * heads.group();
    attend_tile(heads, rows + token * row + head * dim, row, tokens, t, keys, values, nothing,
                result + (token * heads.queries + head) * dim,
                lse ? lse + token * heads.queries + head : nullptr);
  });
}

template <class T>
void store_and_attend(const at::Tensor& qkv, const Paged& paged, const Heads& heads, const at::Tensor& out) {
  const T* rows = static_cast<const T*>(qkv.const_data_ptr());
  T* result = static_cast<T*>(out.mutable_data_ptr());
  T* cache = static_cast<T*>(paged.pages.mutable_data_ptr());
  const int64_t* start = paged.starts.const_data_ptr<int64_t>();
  const int64_t* length = paged.lengths.const_data_ptr<int64_t>();
  const int64_t* table = paged.table.const_data_ptr<int64_t>();
  const int64_t sequences = paged.lengths.size(0), most = paged.table.size(1), layers = paged.pages.size(1);
  const int64_t dim = heads.dim, row = heads.row(), pair = std::is_same_v<T, bf16> ? 2 : 1;
  const int64_t key_size = key_numbers<T>(dim), size = key_size + value_numbers(dim);
  const auto block = [&](int64_t s, int64_t b, int64_t h) {
    return cache + ((table[s * most + b] * layers + paged.layer) * heads.keys + h) * size;
  };
  at::parallel_for(0, sequences * heads.keys, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) {
      const int64_t s = i / heads.keys, h = i % heads.keys, count = start[s + 1] - start[s];
      for (int64_t t = 0; t < count; t++) {
        const int64_t position = length[s] - count + t, o = position % kBlock;
        const T* k = rows + (start[s] + t) * row + (heads.queries + h) * dim;
        const T* v = k + heads.keys * dim;
        T* keys = block(s, position / kBlock, h);
        for (int64_t d = 0; d < dim; d++) keys[(d / pair * kBlock + o) * pair + d % pair] = k[d];
        for_columns(dim, [&](int64_t c, int64_t columns, int64_t width) {
          T* values = keys + key_size + kBlock * c;
          for (int64_t d = 0; d < columns; d++) values[(o / pair * width + d) * pair + o % pair] = v[c + d];
        });
      }
    }
  });
  const auto tiles = tiles_of(start, nullptr, sequences, heads);
  hand_out<T>(static_cast<int64_t>(tiles.size()), kTilesInARow, [&](int64_t i, int64_t end) {
    const auto [s, h, t] = tiles[i];
    const int64_t token = start[s] + t, count = start[s + 1] - start[s];
    const int64_t tokens = std::min(tile_tokens(heads), count - t), head = h * heads.group();
    // Structured bindings cannot be captured before C++20.
    const int64_t sequence = s, key_head = h;
    const auto keys = [&](int64_t b) { return block(sequence, b, key_head); };
    const auto values = [&](int64_t b) { return block(sequence, b, key_head) + key_size; };
    const auto next_keys = [&](int64_t b) -> const T* {
      if (i + 1 == end) return nullptr;
      const Tile& next = tiles[i + 1];
      return b < blocks(length[next.sequence]) ? block(next.sequence, b, next.head) : nullptr;
    };
    attend_tile(heads, rows + token * row + head * dim, row, tokens, length[s] - count + t, keys, values, next_keys,
                result + (token * heads.queries + head) * dim, static_cast<float*>(nullptr));
  });
}

// Of all tokens' rows; what is skipped stays as it was.
at::Tensor attend(const at::Tensor& qkv, const Packed& packed, const Heads& heads, float* lse) {
  const at::Tensor out = at::empty({qkv.size(0), heads.queries * heads.dim}, qkv.options());
  if (qkv.scalar_type() == at::kBFloat16) {
    attend_packed<bf16>(qkv, packed, heads, out, lse);
  } else {
    attend_packed<float>(qkv, packed, heads, out, lse);
  }
  return out;
}

// Beginnings are laid before each sequence that has them for the time of a call: copies cost little beside the products
// that they are spared, and every token's attention is, to the bit, that of its whole sequence.
struct AttentionGraph : public torch::autograd::Function<AttentionGraph> {
  static at::Tensor forward(torch::autograd::AutogradContext* ctx, const at::Tensor& qkv, int64_t packing,
                            int64_t queries, int64_t keys, int64_t dim) {
    const auto& packed = *reinterpret_cast<const Packed*>(packing);
    const at::Tensor tokens = tokens_of(qkv, packed);
    const at::Tensor lse = at::empty({tokens.size(0), queries}, qkv.options().dtype(at::kFloat));
    const at::Tensor out =
        rows_of(attend(tokens, packed, {queries, keys, dim}, lse.mutable_data_ptr<float>()), packed);
    ctx->save_for_backward({qkv, out, rows_of(lse, packed), packed.starts, packed.rows, packed.kept, packed.skip});
    ctx->saved_data["heads"] = std::vector<int64_t>{queries, keys, dim};
    return out;
  }
  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* ctx,
                                                 torch::autograd::variable_list outputs) {
    at::NoGradGuard no_grad;
    const auto saved = ctx->get_saved_variables();
    const auto heads = ctx->saved_data["heads"].toIntVector();
    const Packed packed{saved[3], saved[4], saved[5], saved[6]};
    const auto all = [&](const at::Tensor& rows) { return tokens_of(rows, packed); };
    const at::Tensor g = attention_backward(all(outputs[0].contiguous()), all(saved[0]), packed, all(saved[1]),
                                            all(saved[2]), {heads[0], heads[1], heads[2]});
    return {summed(g, packed, saved[0].size(0)), at::Tensor(), at::Tensor(), at::Tensor(), at::Tensor()};
  }
};

}  // namespace

at::Tensor attention(const at::Tensor& input, const Packed& packed, Heads heads) {
  if (!fast(input, heads)) return rows_of(plain_attention(tokens_of(input, packed), packed.starts, heads), packed);
  const at::Tensor qkv = input.contiguous();
  if (at::GradMode::is_enabled() && qkv.requires_grad())
    return AttentionGraph::apply(qkv, reinterpret_cast<int64_t>(&packed), heads.queries, heads.keys, heads.dim);
  return rows_of(attend(tokens_of(qkv, packed), packed, heads, nullptr), packed);
}

at::Tensor paged_attention(const at::Tensor& input, const Paged& paged, Heads heads) {
  at::NoGradGuard no_grad;
  if (!fast(input, heads)) return plain_paged_attention(input, paged, heads);
  const at::Tensor qkv = input.contiguous();
  const at::Tensor out = at::empty({qkv.size(0), heads.queries * heads.dim}, qkv.options());
  if (qkv.scalar_type() == at::kBFloat16) {
    store_and_attend<bf16>(qkv, paged, heads, out);
  } else {
    store_and_attend<float>(qkv, paged, heads, out);
  }
  return out;
}

int64_t page_numbers(const at::Tensor& like, int64_t dim) {
  return fast(like, {1, 1, dim}) ? key_numbers<float>(dim) + value_numbers(dim) : 2 * kBlock * dim;
}

}  // namespace af
