#include "pointwise.h"

#include <torch/csrc/autograd/custom_function.h>

#include <cmath>

#include "gemm.h"

namespace af {
namespace {

// Rows that one task takes. A thread that has just worked waits awake and starts within a microsecond or two, in which
// some ten thousand numbers are computed; a decode step has little more in each of its hundred operators.
int64_t grain(int64_t width) { return std::max<int64_t>(1, (16 << 10) / std::max<int64_t>(1, width)); }

// Rows that are turned back at a time where there is no kernel.
constexpr int64_t kPlainRows = 1024;

bool fast(const at::Tensor& x) {
  return x.is_cpu() && (x.scalar_type() == at::kFloat || x.scalar_type() == at::kBFloat16);
}

template <class F>
void by_kind(const at::Tensor& x, F&& f) {
  if (x.scalar_type() == at::kBFloat16) {
    f(bf16());
  } else {
    f(float());
  }
}

template <class T>
const T* in(const at::Tensor& x) {
  return static_cast<const T*>(x.const_data_ptr());
}
template <class T>
T* out(const at::Tensor& x) {
  return static_cast<T*>(x.mutable_data_ptr());
}

// ---- RMSNorm ----

template <class T>
AF_VECTORISED void norm_row(const T* AF_RESTRICT x, const T* AF_RESTRICT w, int64_t n, float eps, T* AF_RESTRICT y, float* AF_RESTRICT rstd) {
  float squares = 0.0f;
#pragma omp simd reduction(+ : squares)
  for (int64_t i = 0; i < n; i++) squares += load(x + i) * load(x + i);
  const float r = 1.0f / std::sqrt(squares / static_cast<float>(n) + eps);
  for (int64_t i = 0; i < n; i++) store(y + i, load(x + i) * r * load(w + i));
  if (rstd) *rstd = r;
}

// x̂ = x·r; dx = r·(w·g − x̂·mean(w·g·x̂)); dw += g·x̂.
template <class T>
AF_VECTORISED void norm_row_backward(const T* AF_RESTRICT x, const T* AF_RESTRICT w, const T* AF_RESTRICT g, float r, int64_t n, T* AF_RESTRICT dx, float* AF_RESTRICT dw) {
  float mean = 0.0f;
#pragma omp simd reduction(+ : mean)
  for (int64_t i = 0; i < n; i++) mean += load(g + i) * load(w + i) * load(x + i) * r;
  mean /= static_cast<float>(n);
  for (int64_t i = 0; i < n; i++) {
    const float normed = load(x + i) * r;
    dw[i] += load(g + i) * normed;
    store(dx + i, r * (load(g + i) * load(w + i) - normed * mean));
  }
}

}  // namespace

at::Tensor norm_forward(const at::Tensor& x, const at::Tensor& weight, double eps, at::Tensor* rstd) {
  const int64_t n = weight.size(0), rows = x.numel() / n;
  if (!fast(x)) {
    const at::Tensor wide = x.to(at::kFloat);
    const at::Tensor r = (wide.square().mean(-1, true) + eps).rsqrt();
    if (rstd) *rstd = r;
    return (wide * r * weight.to(at::kFloat)).to(x.scalar_type());
  }
  const at::Tensor y = at::empty_like(x);
  float* rs = nullptr;
  if (rstd) {
    *rstd = at::empty({rows}, x.options().dtype(at::kFloat));
    rs = rstd->mutable_data_ptr<float>();
  }
  by_kind(x, [&](auto zero) {
    using T = decltype(zero);
    at::parallel_for(0, rows, grain(n), [&](int64_t begin, int64_t end) {
      const FlushTiny flush;
      for (int64_t i = begin; i < end; i++)
        norm_row(in<T>(x) + i * n, in<T>(weight), n, static_cast<float>(eps), out<T>(y) + i * n, rs ? rs + i : nullptr);
    });
  });
  return y;
}

at::Tensor norm_backward(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& rstd, const at::Tensor& g,
                         const at::Tensor& grad) {
  const int64_t n = weight.size(0), rows = x.numel() / n;
  if (!fast(x)) {
    const at::Tensor normed = x.to(at::kFloat) * rstd, wide = g.to(at::kFloat), wg = wide * weight.to(at::kFloat);
    const at::Tensor dx = rstd * (wg - normed * (wg * normed).mean(-1, true));
    if (grad.defined()) grad.add_((wide * normed).reshape({rows, n}).sum(0));
    return dx.to(x.scalar_type());
  }
  const at::Tensor dx = at::empty_like(x);
  // One sum a stretch of rows, added in the rows' order: the same bits however many threads there are.
  const int64_t stretch = 256, stretches = (rows + stretch - 1) / stretch;
  const at::Tensor sums = at::zeros({stretches, n}, x.options().dtype(at::kFloat));
  by_kind(x, [&](auto zero) {
    using T = decltype(zero);
    at::parallel_for(0, stretches, 1, [&](int64_t begin, int64_t end) {
      const FlushTiny flush;
      for (int64_t s = begin; s < end; s++)
        for (int64_t i = s * stretch; i < std::min(rows, (s + 1) * stretch); i++)
          norm_row_backward(in<T>(x) + i * n, in<T>(weight), in<T>(g) + i * n, rstd.const_data_ptr<float>()[i], n,
                            out<T>(dx) + i * n, sums.mutable_data_ptr<float>() + s * n);
    });
  });
  for (int64_t s = 0; grad.defined() && s < stretches; s++) grad.add_(sums[s]);
  return dx;
}

namespace {

struct NormGraph : public torch::autograd::Function<NormGraph> {
  static at::Tensor forward(torch::autograd::AutogradContext* ctx, const at::Tensor& x, const at::Tensor& weight,
                            const std::optional<at::Tensor>& grad, double eps) {
    at::Tensor rstd;
    const at::Tensor y = norm_forward(x, weight, eps, &rstd);
    ctx->save_for_backward({x, weight, rstd});
    ctx->saved_data["grad"] = grad;
    return y;
  }
  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* ctx,
                                                 torch::autograd::variable_list outputs) {
    at::NoGradGuard no_grad;
    const auto saved = ctx->get_saved_variables();
    const auto grad = ctx->saved_data["grad"].toOptional<at::Tensor>();
    const at::Tensor dx =
        norm_backward(saved[0], saved[1], saved[2], outputs[0].contiguous(), grad ? *grad : at::Tensor());
    return {dx, at::Tensor(), at::Tensor(), at::Tensor()};
  }
};

// ---- Rotary embedding ----

// Rotates heads [first, first + heads) of one token's row; `sign` −1 turns back.
template <class T>
AF_VECTORISED void rotate_row(const T* x, const float* cos, const float* sin, int64_t heads, int64_t half, float sign,
                              T* y) {
  for (int64_t h = 0; h < heads; h++) {
    const T* AF_RESTRICT a = x + h * 2 * half;
    const T* AF_RESTRICT b = a + half;
    T* AF_RESTRICT to_a = y + h * 2 * half;
    T* AF_RESTRICT to_b = to_a + half;
    for (int64_t i = 0; i < half; i++) {
      const float left = load(a + i), right = load(b + i), s = sin[i] * sign;
      store(to_a + i, left * cos[i] - right * s);
      store(to_b + i, right * cos[i] + left * s);
    }
  }
}

at::Tensor rotate(const at::Tensor& x, const at::Tensor& cos, const at::Tensor& sin, int64_t heads, float sign) {
  const int64_t rows = x.size(0), width = x.size(1), half = cos.size(1), turned = heads * half * 2;
  if (!fast(x)) {
    const at::Tensor part = x.narrow(1, 0, turned).reshape({rows, heads, 2 * half}).to(at::kFloat);
    const at::Tensor a = part.narrow(2, 0, half), b = part.narrow(2, half, half);
    const at::Tensor c = cos.unsqueeze(1), s = sin.unsqueeze(1) * sign;
    const at::Tensor y = at::cat({a * c - b * s, b * c + a * s}, 2).reshape({rows, turned}).to(x.scalar_type());
    return at::cat({y, x.narrow(1, turned, width - turned)}, 1);
  }
  const at::Tensor y = at::empty_like(x);
  by_kind(x, [&](auto zero) {
    using T = decltype(zero);
    at::parallel_for(0, rows, grain(x.size(1)), [&](int64_t begin, int64_t end) {
      const FlushTiny flush;
      for (int64_t i = begin; i < end; i++) {
        const T* from = in<T>(x) + i * width;
        T* to = out<T>(y) + i * width;
        rotate_row(from, cos.const_data_ptr<float>() + i * half, sin.const_data_ptr<float>() + i * half, heads, half,
                   sign, to);
        std::memcpy(static_cast<void*>(to + turned), from + turned, (width - turned) * sizeof(T));
      }
    });
  });
  return y;
}

struct RotateGraph : public torch::autograd::Function<RotateGraph> {
  static at::Tensor forward(torch::autograd::AutogradContext* ctx, const at::Tensor& x, const at::Tensor& cos,
                            const at::Tensor& sin, int64_t heads) {
    ctx->save_for_backward({cos, sin});
    ctx->saved_data["heads"] = heads;
    return rotate(x, cos, sin, heads, 1.0f);
  }
  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* ctx,
                                                 torch::autograd::variable_list outputs) {
    at::NoGradGuard no_grad;
    const auto saved = ctx->get_saved_variables();
    const at::Tensor g = rotate(outputs[0].contiguous(), saved[0], saved[1], ctx->saved_data["heads"].toInt(), -1.0f);
    return {g, at::Tensor(), at::Tensor(), at::Tensor()};
  }
};

// ---- SwiGLU ----

template <class T>
AF_VECTORISED void swiglu_row(const T* AF_RESTRICT x, int64_t n, T* AF_RESTRICT y) {
  for (int64_t i = 0; i < n; i++) store(y + i, load(x + i) * sigmoid(load(x + i)) * load(x + n + i));
}

template <class T>
AF_VECTORISED void swiglu_row_backward(const T* AF_RESTRICT x, const T* AF_RESTRICT g, int64_t n, T* AF_RESTRICT dx) {
  for (int64_t i = 0; i < n; i++) {
    const float gate = load(x + i), up = load(x + n + i), s = sigmoid(gate), grad = load(g + i);
    store(dx + i, grad * up * s * (1.0f + gate * (1.0f - s)));
    store(dx + n + i, grad * gate * s);
  }
}

}  // namespace

at::Tensor swiglu(const at::Tensor& x) {
  const int64_t rows = x.size(0), n = x.size(1) / 2;
  if (!fast(x)) {
    const at::Tensor gate = x.narrow(1, 0, n).to(at::kFloat), up = x.narrow(1, n, n).to(at::kFloat);
    return (at::silu(gate) * up).to(x.scalar_type());
  }
  const at::Tensor y = at::empty({rows, n}, x.options());
  by_kind(x, [&](auto zero) {
    using T = decltype(zero);
    at::parallel_for(0, rows, grain(x.size(1)), [&](int64_t begin, int64_t end) {
      const FlushTiny flush;
      for (int64_t i = begin; i < end; i++) swiglu_row(in<T>(x) + i * 2 * n, n, out<T>(y) + i * n);
    });
  });
  return y;
}

at::Tensor swiglu_backward(const at::Tensor& x, const at::Tensor& g) {
  const int64_t rows = x.size(0), n = x.size(1) / 2;
  const at::Tensor dx = at::empty_like(x);
  if (!fast(x)) {
    // Some rows at a time: libtorch's operators leave half a dozen results in f32 on their way.
    for (int64_t first = 0; first < rows; first += kPlainRows) {
      const int64_t count = std::min(kPlainRows, rows - first);
      const at::Tensor part = x.narrow(0, first, count), to = dx.narrow(0, first, count);
      const at::Tensor gate = part.narrow(1, 0, n).to(at::kFloat), up = part.narrow(1, n, n).to(at::kFloat);
      const at::Tensor s = gate.sigmoid(), wide = g.narrow(0, first, count).to(at::kFloat);
      to.narrow(1, 0, n).copy_(wide * up * s * (1 + gate * (1 - s)));
      to.narrow(1, n, n).copy_(wide * gate * s);
    }
    return dx;
  }
  by_kind(x, [&](auto zero) {
    using T = decltype(zero);
    at::parallel_for(0, rows, grain(x.size(1)), [&](int64_t begin, int64_t end) {
      const FlushTiny flush;
      for (int64_t i = begin; i < end; i++)
        swiglu_row_backward(in<T>(x) + i * 2 * n, in<T>(g) + i * n, n, out<T>(dx) + i * 2 * n);
    });
  });
  return dx;
}

namespace {

bool recorded(const at::Tensor& x) { return at::GradMode::is_enabled() && x.requires_grad(); }

}  // namespace

at::Tensor rms_norm(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& grad, double eps) {
  const at::Tensor dense = x.contiguous();
  if (!recorded(x)) return norm_forward(dense, weight, eps, nullptr);
  return NormGraph::apply(dense, weight, grad.defined() ? std::optional<at::Tensor>(grad) : std::nullopt, eps);
}

at::Tensor rope(const at::Tensor& x, const at::Tensor& cos, const at::Tensor& sin, int64_t heads) {
  const at::Tensor dense = x.contiguous();
  return recorded(x) ? RotateGraph::apply(dense, cos, sin, heads) : rotate(dense, cos, sin, heads, 1.0f);
}

}  // namespace af
