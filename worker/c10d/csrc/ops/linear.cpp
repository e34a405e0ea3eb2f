#include "linear.h"

#include "few_rows.h"
#include "input_gradient.h"
#include "pointwise.h"
#include "weight_gradient.h"

namespace af {

namespace {

// Rows of x that stay in the second-level cache while all weights pass by.
constexpr int64_t kCachedBytes = 384 << 10;
// With fewer blocks a product of few rows takes halves of them: of nine blocks one of two threads would have five.
constexpr int64_t kFewBlocks = 16;
// Products of f32 that are summed in a row.
constexpr int64_t kShortSum = 128;

template <class T>
AF_VECTORISED void pack_block(const T* w, int64_t count, int64_t k, T* out) {
  pack_transposed(w, count, k, k, kBlock, out);
}

template <class T>
void pack_weight(const at::Tensor& weight, int64_t first_column, T* packed) {
  const int64_t n = weight.size(0), k = weight.size(1);
  const T* w = static_cast<const T*>(weight.const_data_ptr());
  // A column's block may also hold another weight's columns.
  int64_t done = 0;
  while (done < n) {
    const int64_t column = first_column + done, in_block = column % kBlock;
    const int64_t count = std::min(n - done, kBlock - in_block);
    T* block = packed + column / kBlock * k * kBlock;
    const int64_t pair = std::is_same_v<T, bf16> ? 2 : 1;
    pack_block(w + done * k, count, k, block + in_block * pair);
    done += count;
  }
}

template <class O>
AF_VECTORISED void finish_tile(const float* AF_RESTRICT sums, const float* AF_RESTRICT bias, int64_t rows, int64_t columns, int64_t stride,
                               O* AF_RESTRICT out) {
  for (int64_t r = 0; r < rows; r++) {
    const float* from = sums + r * kBlock;
    O* to = out + r * stride;
    if (bias) {
      for (int64_t c = 0; c < columns; c++) store(to + c, from[c] + bias[c]);
    } else {
      for (int64_t c = 0; c < columns; c++) store(to + c, from[c]);
    }
  }
}

// Sums of `rows` rows and `width` columns, kBlock apart. `ahead`, where it is not null, is laid out as the block and read next.
void sum_rows(const bf16* x, int64_t rows, int64_t width, int64_t k, const bf16* block, const bf16*, float* sums) {
  for (int64_t r = 0; r < rows; r += kBlock)
    gemm(std::min(kBlock, rows - r), width, k, k, kBlock, kBlock, false, x + r * k, block, sums + r * kBlock);
}

// In f32, where a sum's own rounding is all there is: short sums of products, and a sum of those, err less than one long sum.
void sum_rows(const float* x, int64_t rows, int64_t width, int64_t k, const float* block, const float*, float* sums) {
  for (int64_t r = 0; r < rows; r += kBlock)
    for (int64_t first = 0; first < k; first += kShortSum)
      gemm(std::min(kBlock, rows - r), width, std::min(kShortSum, k - first), k, kBlock, kBlock, first > 0,
           x + r * k + first, block + first * kBlock, sums + r * kBlock);
}

// The same of rows in f32; a part of the weights is widened once for all of them.
void sum_rows(const float* x, int64_t rows, int64_t width, int64_t k, const bf16* block, const bf16* ahead,
              float* sums) {
  for (int64_t first = 0; first < k; first += kWideDepth) {
    const int64_t part = std::min(kWideDepth, k - first);
    const bf16* b = block + first * kBlock;
    if (rows <= kFewWidened &&
        gemm_few_widened(rows, width, part, k, kBlock, kBlock, first > 0, x + first, b, sums,
                         ahead ? ahead + first * kBlock : nullptr))
      continue;
    float* wide = scratch<float, 1>(part * width);
    widen_pairs(b, part, width, kBlock, wide);
    for (int64_t r = 0; r < rows; r += kBlock)
      gemm(std::min(kBlock, rows - r), width, part, k, width, kBlock, first > 0, x + r * k + first, wide,
           sums + r * kBlock);
  }
}

// x in the weights' kind, or in f32.
template <class X, class T, class O>
void multiply(const X* x, int64_t m, int64_t k, const T* packed, const float* bias, int64_t n, O* out) {
  const int64_t pair = std::is_same_v<T, bf16> ? 2 : 1;
  const auto weights_of = [&](int64_t column) { return packed + column / kBlock * kBlock * k + column % kBlock * pair; };
  const int64_t chunk =
      std::max<int64_t>(kBlock, kCachedBytes / (k * static_cast<int64_t>(sizeof(T))) / kBlock * kBlock);
  const int64_t chunks = (m + chunk - 1) / chunk;
  // Weights that are widened are so for as many rows as can be, sums that are not stay in the first-level cache.
  const int64_t step = std::is_same_v<X, T> ? kBlock : chunk;
  const int64_t width = chunks == 1 && blocks(n) < kFewBlocks ? kBlock / 2 : kBlock, columns = (n + width - 1) / width;
  at::parallel_for(0, chunks * columns, 1, [&](int64_t begin, int64_t end) {
    auto scope = gemm_scope<T>();
    float* sums = scratch<float, 0>(std::min(m, step) * kBlock);
    for (int64_t task = begin; task < end; task++) {
      const int64_t column = task % columns * width, first = task / columns * chunk;
      const int64_t wanted = std::min(width, n - column), last = std::min(m, first + chunk);
      const T* block = weights_of(column);
      // A short product reads its weights once: have the next ones on their way meanwhile.
      const T* ahead = m <= kBlock && task + 1 < end ? weights_of(column + width) : nullptr;
      const bool asks_itself = !std::is_same_v<X, T> && m <= kFewWidened;
      if (ahead && !asks_itself)
        for (int64_t i = 0; i < k; i += pair)
          fetch_ahead(ahead + i * kBlock, width * pair * static_cast<int64_t>(sizeof(T)));
      for (int64_t row = first; row < last; row += step) {
        const int64_t rows = std::min(step, last - row);
        sum_rows(x + row * k, rows, width, k, block, ahead, sums);
        finish_tile(sums, bias ? bias + column : nullptr, rows, wanted, n, out + row * n + column);
      }
    }
  });
}

// Every change in place counts a tensor's version up.
std::vector<int64_t> versions_of(const std::vector<at::Tensor>& tensors) {
  std::vector<int64_t> versions;
  for (const auto& tensor : tensors) versions.push_back(tensor._version());
  return versions;
}

// f(x), and what the norm divided by.
at::Tensor fed(const at::Tensor& x, const Before& before, at::Tensor* rstd) {
  switch (before.kind) {
    case Before::kNorm: return norm_forward(x, before.weight, before.eps, rstd);
    case Before::kSwiglu: return swiglu(x);
    default: return x;
  }
}

at::Tensor fed_backward(const at::Tensor& x, const Before& before, const at::Tensor& rstd, const at::Tensor& g) {
  switch (before.kind) {
    case Before::kNorm: return norm_backward(x, before.weight, rstd, g, before.grad);
    case Before::kSwiglu: return swiglu_backward(x, g);
    default: return g;
  }
}

// Autograd's view: y depends on x; what the weights get is added on the way.
struct LinearGraph : public torch::autograd::Function<LinearGraph> {
  static at::Tensor forward(torch::autograd::AutogradContext* ctx, const at::Tensor& x, int64_t map, int64_t first,
                            bool wide) {
    auto& linear = *reinterpret_cast<Linear*>(map);
    const auto& before = *reinterpret_cast<const Before*>(first);
    ctx->save_for_backward({x, before.weight});
    ctx->saved_data["before"] = static_cast<int64_t>(before.kind);
    ctx->saved_data["norm_grad"] =
        before.grad.defined() ? std::optional<at::Tensor>(before.grad) : std::optional<at::Tensor>();
    ctx->saved_data["eps"] = before.eps;
    ctx->saved_data["weights"] = linear.weights;
    ctx->saved_data["grads"] = linear.grads;
    ctx->saved_data["bias_grads"] = linear.bias_grads;
    ctx->saved_data["versions"] = versions_of(linear.weights);
    return linear.forward(fed(x, before, nullptr), wide);
  }
  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* ctx,
                                                 torch::autograd::variable_list outputs) {
    at::NoGradGuard no_grad;
    const auto saved = ctx->get_saved_variables();
    const auto norm_grad = ctx->saved_data["norm_grad"].toOptional<at::Tensor>();
    const Before before{static_cast<Before::Kind>(ctx->saved_data["before"].toInt()), saved[1],
                        norm_grad ? *norm_grad : at::Tensor(), ctx->saved_data["eps"].toDouble()};
    at::Tensor rstd;
    const at::Tensor x = fed(saved[0], before, &rstd);
    const at::Tensor g = outputs[0].to(x.scalar_type()).contiguous();
    const auto weights = ctx->saved_data["weights"].toTensorVector();
    TORCH_CHECK(versions_of(weights) == ctx->saved_data["versions"].toIntVector(),
                "a weight was changed in place between a linear map's way forward and its way back");
    const auto grads = ctx->saved_data["grads"].toTensorVector();
    const auto bias_grads = ctx->saved_data["bias_grads"].toTensorVector();
    if (!grads.empty()) add_weight_gradients(g, x, grads);
    int64_t column = 0;
    for (const auto& bias_grad : bias_grads) {
      bias_grad.add_(g.narrow(1, column, bias_grad.size(0)).sum(0, false, at::kFloat));
      column += bias_grad.size(0);
    }
    const at::Tensor gx = input_gradient(g, weights);
    return {fed_backward(saved[0], before, rstd, gx), at::Tensor(), at::Tensor(), at::Tensor()};
  }
};

}  // namespace

const at::Tensor& Linear::packed() {
  // Packed weights can never be those of an older policy.
  const auto versions = versions_of(weights);
  if (packed_.defined() && versions == packed_versions_) return packed_;
  if (!packed_.defined()) packed_ = at::zeros({blocks(outputs) * kBlock * inputs}, weights[0].options());
  int64_t column = 0;
  for (const auto& weight : weights) {
    if (weight.scalar_type() == at::kBFloat16) {
      pack_weight(weight, column, static_cast<bf16*>(packed_.mutable_data_ptr()));
    } else {
      pack_weight(weight, column, packed_.mutable_data_ptr<float>());
    }
    column += weight.size(0);
  }
  packed_versions_ = versions;
  return packed_;
}

at::Tensor Linear::plain(const at::Tensor& x, bool wide) const {
  if (wide && x.is_cuda() && weights.size() == 1 && biases.empty()) return mm_wide(x, weights[0].t());
  const at::Tensor y = plain(x);
  return wide ? y.to(at::kFloat) : y;
}

// Each map writes its own columns: weights side by side would be a copy of most of the model at every call.
at::Tensor Linear::plain(const at::Tensor& x) const {
  if (weights.size() == 1) return at::linear(x, weights[0], biases.empty() ? at::Tensor() : biases[0]);
  at::Tensor y = at::empty({x.size(0), outputs}, x.options());
  int64_t column = 0;
  for (size_t i = 0; i < weights.size(); i++) {
    at::Tensor part = y.narrow(1, column, weights[i].size(0));
    if (biases.empty()) {
      at::mm_out(part, x, weights[i].t());
    } else {
      at::addmm_out(part, biases[i], x, weights[i].t());
    }
    column += part.size(1);
  }
  return y;
}

at::Tensor Linear::forward(const at::Tensor& input, bool wide) {
  at::NoGradGuard no_grad;
  const bool pairs = input.scalar_type() != at::kBFloat16 || inputs % 2 == 0;
  if (!has_gemm(input) || !pairs) return plain(input, wide);
  const at::Tensor x = input.contiguous();
  const int64_t m = x.size(0);
  const at::Tensor bias = biases.empty() ? at::Tensor() : at::cat(biases).to(at::kFloat).contiguous();
  const float* b = bias.defined() ? bias.const_data_ptr<float>() : nullptr;
  const at::Tensor y = at::empty({m, outputs}, x.options().dtype(wide ? at::kFloat : x.scalar_type()));
  if (x.scalar_type() == at::kFloat) {
    multiply(x.const_data_ptr<float>(), m, inputs, packed().const_data_ptr<float>(), b, outputs,
             y.mutable_data_ptr<float>());
    return y;
  }
  const auto* weight = static_cast<const bf16*>(packed().const_data_ptr());
  const auto by_rows = [&](const auto* xs) {
    if (wide) {
      multiply(xs, m, inputs, weight, b, outputs, y.mutable_data_ptr<float>());
    } else {
      multiply(xs, m, inputs, weight, b, outputs, static_cast<bf16*>(y.mutable_data_ptr()));
    }
  };
  if (widens()) {
    const at::Tensor wide_x = x.to(at::kFloat);
    by_rows(wide_x.const_data_ptr<float>());
  } else {
    by_rows(static_cast<const bf16*>(x.const_data_ptr()));
  }
  return y;
}

void Linear::check() const {
  int64_t rows = 0;
  for (const auto& weight : weights) {
    TORCH_CHECK(weight.dim() == 2 && weight.size(1) == inputs && weight.is_contiguous(), "a weight became ",
                weight.sizes(), " where rows of ", inputs, " belong");
    rows += weight.size(0);
  }
  TORCH_CHECK(rows == outputs, "the weights became ", rows, " rows where ", outputs, " belong");
  int64_t shifts = 0;
  for (const auto& bias : biases) shifts += bias.numel();
  TORCH_CHECK(biases.empty() || shifts == outputs, "the biases became ", shifts, " where ", outputs, " belong");
}

at::Tensor Linear::apply(const at::Tensor& input, const Before& before, bool wide) {
  check();
  // Dense before it is recorded: the way back reads the same rows.
  const at::Tensor x = input.contiguous();
  if (at::GradMode::is_enabled() && x.requires_grad())
    return LinearGraph::apply(x, reinterpret_cast<int64_t>(this), reinterpret_cast<int64_t>(&before), wide);
  return forward(fed(x, before, nullptr), wide);
}

}  // namespace af
