// What must stay true: on a GPU nothing here waits for it. What a layer needs beside its rows lies there already.
#include "attention_plain.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <vector>

#include "gemm.h"

namespace af {
namespace {

// On GPUs FlashAttention takes all sequences as they lie, forward and back.
bool has_flash(const at::Tensor& qkv, const Heads& heads) {
  const bool half = qkv.scalar_type() == at::kBFloat16 || qkv.scalar_type() == at::kHalf;
  return qkv.is_cuda() && half && heads.dim % 8 == 0 && heads.dim <= 256;
}

// Heads `first` to `first + count` of each row, [n, count, dim].
at::Tensor part(const at::Tensor& qkv, int64_t first, int64_t count, int64_t dim) {
  return qkv.narrow(1, first * dim, count * dim).unflatten(1, {count, dim});
}

at::Tensor heads_of(const at::Tensor& qkv, int64_t first, int64_t count, int64_t dim) {
  return part(qkv, first, count, dim).transpose(0, 1).unsqueeze(0);
}

at::Tensor flash(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& q_starts,
                 const at::Tensor& k_starts, int64_t most_q, int64_t most_k, const std::optional<at::Tensor>& k_used) {
  const auto mixed = at::_flash_attention_forward(q, k, v, q_starts, k_starts, most_q, most_k, /*dropout_p=*/0.0,
                                                  /*is_causal=*/true, /*return_debug_mask=*/false, std::nullopt,
                                                  std::nullopt, std::nullopt, k_used);
  return std::get<0>(mixed).flatten(1);
}

at::Tensor flash_attention(const at::Tensor& qkv, const at::Tensor& starts, const Heads& heads) {
  const int64_t* start = starts.const_data_ptr<int64_t>();
  int64_t longest = 0;
  for (int64_t s = 0; s + 1 < starts.size(0); s++) longest = std::max(longest, start[s + 1] - start[s]);
  const at::Tensor ends = starts.to(at::kInt).pin_memory().to(qkv.device(), /*non_blocking=*/true);
  const int64_t dim = heads.dim;
  return flash(part(qkv, 0, heads.queries, dim), part(qkv, heads.queries, heads.keys, dim),
               part(qkv, heads.queries + heads.keys, heads.keys, dim), ends, ends, longest, longest, std::nullopt);
}

// Which of `columns` cached tokens are not behind each of `last`: [..., columns].
at::Tensor up_to(const at::Tensor& last, int64_t columns) {
  return at::arange(columns, last.options()).le(last.unsqueeze(-1));
}

at::Tensor sdpa(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& seen,
                const Heads& heads) {
  return at::scaled_dot_product_attention(q, k, v, seen, 0.0, false, std::nullopt, heads.group() > 1);
}

}  // namespace

// Without FlashAttention a sequence at a time.
at::Tensor plain_attention(const at::Tensor& qkv, const at::Tensor& starts, const Heads& heads) {
  if (has_flash(qkv, heads)) return flash_attention(qkv.contiguous(), starts, heads);
  const int64_t* start = starts.const_data_ptr<int64_t>();
  std::vector<at::Tensor> mixed;
  for (int64_t s = 0; s + 1 < starts.size(0); s++) {
    const int64_t length = start[s + 1] - start[s];
    const at::Tensor rows = qkv.narrow(0, start[s], length);
    const at::Tensor q = heads_of(rows, 0, heads.queries, heads.dim), k = heads_of(rows, heads.queries, heads.keys, heads.dim),
                     v = heads_of(rows, heads.queries + heads.keys, heads.keys, heads.dim);
    const at::Tensor m =
        at::scaled_dot_product_attention(q, k, v, {}, 0.0, length > 1, std::nullopt, heads.group() > 1);
    mixed.push_back(m.squeeze(0).transpose(0, 1).flatten(1));
  }
  return at::cat(mixed);
}

// FlashAttention reads pages of 256 tokens and their multiples only: the chains' pages are gathered for it, those that
// hold something and no others. Without it decode steps, one new token a chain, are computed together.
at::Tensor plain_paged_attention(const at::Tensor& qkv, const Paged& paged, const Heads& heads) {
  const int64_t dim = heads.dim, sequences = paged.lengths.size(0), width = heads.keys * dim;
  const Places& places = paged.places;
  const at::Tensor layer = paged.pages.select(1, paged.layer);
  // All pages' keys (0) or values (1), [pages, kBlock · width].
  const auto half = [&](int64_t which) { return layer.narrow(1, which * kBlock * width, kBlock * width); };
  for (const int64_t which : {0, 1})
    half(which)
        .unflatten(1, {kBlock, heads.keys, dim})
        .index_put_({places.page_of, places.place_of}, part(qkv, heads.queries + which * heads.keys, heads.keys, dim));
  // Those of some pages, one token after another: [tokens, keys, dim].
  const auto read = [&](int64_t which, const at::Tensor& pages) {
    return half(which).index_select(0, pages).view({pages.size(0) * kBlock, heads.keys, dim});
  };
  if (has_flash(qkv, heads))
    return flash(part(qkv, 0, heads.queries, dim), read(0, places.held), read(1, places.held), places.flash_starts,
                 places.flash_held, places.most_new, places.longest, places.flash_lengths);
  // Places that a chain does not need may hold anything. It reads its own first page there, masked: a NaN of another
  // chain would pass through the mask.
  const int64_t columns = paged.table.size(1) * kBlock;
  if (places.most_new == 1) {
    const at::Tensor q = part(qkv, 0, heads.queries, dim).unsqueeze(2);
    const auto all = [&](int64_t which) {
      return read(which, places.own).view({sequences, columns, heads.keys, dim}).transpose(1, 2);
    };
    const at::Tensor seen = up_to(places.seen - 1, columns).view({sequences, 1, 1, columns});
    return sdpa(q, all(0), all(1), seen, heads).reshape({sequences, heads.queries * dim});
  }
  const int64_t *start = paged.starts.const_data_ptr<int64_t>(), *length = paged.lengths.const_data_ptr<int64_t>();
  std::vector<at::Tensor> mixed;
  for (int64_t s = 0; s < sequences; s++) {
    const int64_t count = start[s + 1] - start[s], used = (length[s] + kBlock - 1) / kBlock;
    const at::Tensor own = places.own.narrow(0, s * paged.table.size(1), used);
    const auto all = [&](int64_t which) { return read(which, own).transpose(0, 1).unsqueeze(0); };
    const at::Tensor q = heads_of(qkv.narrow(0, start[s], count), 0, heads.queries, dim);
    const at::Tensor seen = up_to(at::arange(length[s] - count, length[s], own.options()), used * kBlock);
    mixed.push_back(sdpa(q, all(0), all(1), seen, heads).squeeze(0).transpose(0, 1).flatten(1));
  }
  return at::cat(mixed);
}

}  // namespace af
