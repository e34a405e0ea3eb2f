#include "vocabulary.h"

#include <ATen/Parallel.h>
#include <ATen/core/grad_mode.h>

#include <algorithm>
#include <cmath>
#include <numeric>
#include <vector>

#include "numbers.h"

namespace af {
namespace {

// Logits whose exponentials are summed together; drawing then searches one such stretch only.
constexpr int64_t kStretch = 512;

AF_VECTORISED float largest(const float* z, int64_t n) {
  float most = z[0];
#pragma omp simd reduction(max : most)
  for (int64_t i = 0; i < n; i++) most = z[i] > most ? z[i] : most;
  return most;
}

// Σ e and Σ e·(z − most)/t with e = exp((z − most)/t).
AF_VECTORISED void sum_stretch(const float* z, int64_t n, float most, float scale, float* sum, float* weighted) {
  float s = 0.0f, w = 0.0f;
#pragma omp simd reduction(+ : s, w)
  for (int64_t i = 0; i < n; i++) {
    const float x = (z[i] - most) * scale, e = exp_f32(x);
    s += e;
    w += e > 0.0f ? e * x : 0.0f;  // what is ruled out has x = -infinity
  }
  *sum = s;
  *weighted = w;
}

struct RowSums {
  float most, scale;
  double total, weighted;
  float lse() const { return most * scale + static_cast<float>(std::log(total)); }
  // Not from lse(): far from zero the difference of two large numbers would lose the small one.
  float log_prob(float z) const {
    return static_cast<float>((static_cast<double>(z) - most) * scale - std::log(total));
  }
  float entropy() const { return static_cast<float>(std::log(total) - weighted / total); }
};

// Used by learning and by sampling alike: the same logits give the same log-prob, bit for bit.
RowSums sum_row(const float* z, int64_t n, float scale, float* stretches) {
  RowSums row{largest(z, n), scale, 0.0, 0.0};
  for (int64_t i = 0, k = 0; i < n; i += kStretch, k++) {
    float sum, weighted;
    sum_stretch(z + i, std::min(kStretch, n - i), row.most, scale, &sum, &weighted);
    row.total += sum;
    row.weighted += weighted;
    if (stretches) stretches[k] = sum;
  }
  return row;
}

// dz = (g_lp·(1{target} − p) − g_h·p·(log p + H)) / t
template <class T>
AF_VECTORISED void logits_gradient(const float* AF_RESTRICT z, int64_t n, float scale, float lse, float entropy, float g_lp,
                                   float g_h, T* AF_RESTRICT out) {
  for (int64_t i = 0; i < n; i++) {
    const float lp = z[i] * scale - lse, p = exp_f32(lp);
    store(out + i, -(p * (g_lp + g_h * (lp + entropy))) * scale);
  }
}

template <class T>
void gradient_rows(const at::Tensor& logits, const at::Tensor& targets, float scale, const TokenTerms& terms,
                   const at::Tensor& g_log_prob, const at::Tensor& g_entropy, const at::Tensor& out) {
  const int64_t n = logits.size(1);
  const float* z = logits.const_data_ptr<float>();
  const int64_t* target = targets.const_data_ptr<int64_t>();
  const auto column = [](const at::Tensor& x) { return x.const_data_ptr<float>(); };
  const float *lse = column(terms.lse), *entropy = column(terms.entropy), *g_lp = column(g_log_prob),
              *g_h = column(g_entropy);
  T* to = static_cast<T*>(out.mutable_data_ptr());
  at::parallel_for(0, logits.size(0), 1, [&](int64_t begin, int64_t end) {
    const FlushTiny flush;
    for (int64_t i = begin; i < end; i++) {
      logits_gradient(z + i * n, n, scale, lse[i], entropy[i], g_lp[i], g_h[i], to + i * n);
      // The target's own term, from its probability and not from a rounded difference.
      const float lp = z[i * n + target[i]] * scale - lse[i], p = exp_f32(lp);
      store(to + i * n + target[i], (g_lp[i] * (1.0f - p) - g_h[i] * p * (lp + entropy[i])) * scale);
    }
  });
}

// The first token whose running mass reaches `aim`; `stretches` are the masses of the row's stretches.
int64_t draw_any(const float* z, int64_t n, const RowSums& row, const float* stretches, double uniform) {
  const double aim = uniform * row.total;
  double before = 0.0;
  int64_t k = 0;
  const int64_t count = (n + kStretch - 1) / kStretch;
  while (k + 1 < count && before + stretches[k] < aim) before += stretches[k++];
  int64_t last = k * kStretch;
  for (int64_t i = k * kStretch; i < std::min(n, (k + 1) * kStretch); i++) {
    const double e = exp_f32((z[i] - row.most) * row.scale);
    if (e > 0.0) last = i;
    before += e;
    if (e > 0.0 && before >= aim) return i;
  }
  return last;  // rounding: the stretch's own sum was a hair above that of its parts
}

// Indices of the tokens that may be drawn, the most likely first; equals in the vocabulary's order.
std::vector<int64_t> most_likely(const float* z, int64_t n, const RowSums& row, const Draw& draw) {
  const auto more_likely = [z](int64_t a, int64_t b) { return z[a] > z[b] || (z[a] == z[b] && a < b); };
  std::vector<int64_t> kept;
  if (draw.top_k < n) {
    kept.resize(n);
    std::iota(kept.begin(), kept.end(), 0);
    std::nth_element(kept.begin(), kept.begin() + draw.top_k, kept.end(), more_likely);
    kept.resize(draw.top_k);
  } else {
    // As much of the top as holds the nucleus: most rows need few tokens, and only those are sorted.
    for (float below = 8.0f;; below *= 2.0f) {
      const float least = row.most - below / row.scale;
      double mass = 0.0;
      kept.clear();
      for (int64_t i = 0; i < n; i++) {
        if (!(z[i] >= least)) continue;
        kept.push_back(i);
        mass += exp_f32((z[i] - row.most) * row.scale);
      }
      if (mass >= draw.top_p * row.total || below > 128.0f) break;
    }
  }
  std::sort(kept.begin(), kept.end(), more_likely);
  return kept;
}

// Top-k cuts first, top-p counts mass within what it left.
int64_t draw_restricted(const float* z, int64_t n, const RowSums& row, const Draw& draw) {
  const auto kept = most_likely(z, n, row, draw);
  std::vector<double> mass;
  double total = 0.0;
  for (const int64_t i : kept) mass.push_back(total += exp_f32((z[i] - row.most) * row.scale));
  const double nucleus = draw.top_p * (draw.top_k < n ? total : row.total);
  // A token is in the nucleus if those before it do not reach its mass: what is kept is a prefix.
  size_t count = 0;
  while (count < kept.size() && (count == 0 || mass[count - 1] < nucleus)) count++;
  const double aim = draw.uniform * mass[count - 1];
  const size_t at = std::lower_bound(mass.begin(), mass.begin() + count, aim) - mass.begin();
  return kept[std::min(at, count - 1)];
}

int64_t draw_row(const float* z, int64_t n, const RowSums& row, const float* stretches, const Draw& draw) {
  // Among NaNs there is no order to sort by, nor any mass. The log-prob says so.
  if (!std::isfinite(row.total)) return 0;
  if (draw.temperature == 0.0) return std::max_element(z, z + n) - z;
  if (draw.top_k < n || draw.top_p < 1.0) return draw_restricted(z, n, row, draw);
  return draw_any(z, n, row, stretches, draw.uniform);
}

}  // namespace

TokenTerms token_terms(const at::Tensor& logits, const at::Tensor& targets, double temperature) {
  at::NoGradGuard no_grad;
  const int64_t rows = logits.size(0), n = logits.size(1);
  const auto column = [&] { return at::empty({rows}, logits.options()); };
  TokenTerms terms{column(), column(), column()};
  const float* z = logits.const_data_ptr<float>();
  const int64_t* target = targets.const_data_ptr<int64_t>();
  float *log_prob = terms.log_prob.mutable_data_ptr<float>(), *entropy = terms.entropy.mutable_data_ptr<float>(),
        *lse = terms.lse.mutable_data_ptr<float>();
  at::parallel_for(0, rows, 1, [&](int64_t begin, int64_t end) {
    const FlushTiny flush;
    for (int64_t i = begin; i < end; i++) {
      const RowSums row = sum_row(z + i * n, n, static_cast<float>(1.0 / temperature), nullptr);
      log_prob[i] = row.log_prob(z[i * n + target[i]]);
      entropy[i] = row.entropy();
      lse[i] = row.lse();
    }
  });
  return terms;
}

at::Tensor token_terms_backward(const at::Tensor& logits, const at::Tensor& targets, double temperature,
                                const TokenTerms& terms, const at::Tensor& g_log_prob, const at::Tensor& g_entropy,
                                at::ScalarType kind) {
  at::NoGradGuard no_grad;
  const at::Tensor out = at::empty(logits.sizes(), logits.options().dtype(kind));
  const float scale = static_cast<float>(1.0 / temperature);
  if (kind == at::kBFloat16) {
    gradient_rows<bf16>(logits, targets, scale, terms, g_log_prob, g_entropy, out);
  } else {
    gradient_rows<float>(logits, targets, scale, terms, g_log_prob, g_entropy, out);
  }
  return out;
}

void sample(const at::Tensor& logits, const Draw* draws, int64_t* tokens, float* log_probs) {
  const int64_t rows = logits.size(0), n = logits.size(1);
  const float* z = logits.const_data_ptr<float>();
  at::parallel_for(0, rows, 1, [&](int64_t begin, int64_t end) {
    const FlushTiny flush;
    std::vector<float> stretches((n + kStretch - 1) / kStretch);
    for (int64_t i = begin; i < end; i++) {
      const double temperature = draws[i].temperature == 0.0 ? 1.0 : draws[i].temperature;
      const RowSums row = sum_row(z + i * n, n, static_cast<float>(1.0 / temperature), stretches.data());
      tokens[i] = draw_row(z + i * n, n, row, stretches.data(), draws[i]);
      log_probs[i] = row.log_prob(z[i * n + tokens[i]]);
    }
  });
}

}  // namespace af
