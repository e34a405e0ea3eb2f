#include "ops.h"

#include "guard.h"
#include "ops/attention.h"
#include "ops/input_gradient.h"
#include "ops/linear.h"
#include "ops/pointwise.h"
#include "ops/vocabulary.h"
#include "ops/weight_gradient.h"

struct AfLinear {
  af::Linear map;
};

namespace {

using af::guarded;

at::Tensor& as_tensor(void* tensor) { return *reinterpret_cast<at::Tensor*>(tensor); }

std::vector<at::Tensor> as_tensors(void** tensors, size_t count) {
  std::vector<at::Tensor> list;
  for (size_t i = 0; tensors && i < count; i++) list.push_back(as_tensor(tensors[i]));
  return list;
}

void give(void** out, at::Tensor tensor) { *out = new at::Tensor(std::move(tensor)); }

}  // namespace

extern "C" {

int af_linear_new(void** weights, void** biases, size_t count, AfLinear** out) {
  return guarded([&] {
    auto linear = std::make_unique<AfLinear>();
    auto& map = linear->map;
    map.weights = as_tensors(weights, count);
    map.biases = as_tensors(biases, count);
    map.inputs = map.weights.at(0).size(1);
    for (const auto& weight : map.weights) map.outputs += weight.size(0);
    *out = linear.release();
  });
}

int af_linear_train(AfLinear* linear, void** grads, void** bias_grads) {
  return guarded([&] {
    linear->map.grads = as_tensors(grads, linear->map.weights.size());
    linear->map.bias_grads = as_tensors(bias_grads, linear->map.biases.size());
  });
}

int af_linear_apply(AfLinear* linear, void* x, int wide, void** out) {
  return guarded([&] { give(out, linear->map.apply(as_tensor(x), {}, wide != 0)); });
}

int af_linear_apply_norm(AfLinear* linear, void* x, void* weight, void* grad, double eps, void** out) {
  return guarded([&] {
    const af::Before norm{af::Before::kNorm, as_tensor(weight), grad ? as_tensor(grad) : at::Tensor(), eps};
    give(out, linear->map.apply(as_tensor(x), norm, false));
  });
}

int af_linear_apply_swiglu(AfLinear* linear, void* x, void** out) {
  return guarded([&] {
    af::Before swiglu;
    swiglu.kind = af::Before::kSwiglu;
    give(out, linear->map.apply(as_tensor(x), swiglu, false));
  });
}

int af_linear_backward(AfLinear* linear, void* x, void* gradient, void** out) {
  return guarded([&] {
    at::NoGradGuard no_grad;
    TORCH_CHECK(linear->map.weights.size() == 1, "only a single map is turned back by itself");
    linear->map.check();
    if (!linear->map.grads.empty()) af::add_weight_gradients(as_tensor(gradient), as_tensor(x), linear->map.grads);
    give(out, af::input_gradient(as_tensor(gradient), linear->map.weights));
  });
}

void af_linear_drop(AfLinear* linear) {
  guarded([&] { delete linear; });
}

int af_rms_norm(void* x, void* weight, void* grad, double eps, void** out) {
  return guarded([&] {
    give(out, af::rms_norm(as_tensor(x), as_tensor(weight), grad ? as_tensor(grad) : at::Tensor(), eps));
  });
}

int af_rope(void* x, void* cos, void* sin, int64_t heads, void** out) {
  return guarded([&] { give(out, af::rope(as_tensor(x), as_tensor(cos), as_tensor(sin), heads)); });
}

int af_attention(void* qkv, const AfPacked* packing, int64_t queries, int64_t keys, int64_t dim, void** out) {
  return guarded([&] {
    af::Packed packed{as_tensor(packing->starts), {}, {}, {}};
    if (packing->rows) {
      packed.rows = as_tensor(packing->rows);
      packed.kept = as_tensor(packing->kept);
      packed.skip = as_tensor(packing->skip);
    }
    give(out, af::attention(as_tensor(qkv), packed, {queries, keys, dim}));
  });
}

int af_paged_attention(void* qkv, void* pages, int64_t layer, const AfPagedStep* step, int64_t queries, int64_t keys,
                       int64_t dim, void** out) {
  return guarded([&] {
    const af::Places places{as_tensor(step->page_of),      as_tensor(step->place_of),   as_tensor(step->own),
                            as_tensor(step->seen),         as_tensor(step->held),       as_tensor(step->flash_starts),
                            as_tensor(step->flash_held),   as_tensor(step->flash_lengths),
                            step->most_new,                step->longest};
    const af::Paged paged{as_tensor(pages),          layer,  as_tensor(step->starts), as_tensor(step->lengths),
                          as_tensor(step->table), places};
    give(out, af::paged_attention(as_tensor(qkv), paged, {queries, keys, dim}));
  });
}

int af_page_numbers(void* like, int64_t dim, int64_t* out) {
  return guarded([&] { *out = af::page_numbers(as_tensor(like), dim); });
}

int af_has_gemm(void* like, int* out) {
  return guarded([&] { *out = af::has_gemm(as_tensor(like)); });
}

int af_token_terms(void* logits, void* targets, double temperature, void** terms) {
  return guarded([&] {
    auto found = af::token_terms(as_tensor(logits), as_tensor(targets), temperature);
    give(terms, found.log_prob);
    give(terms + 1, found.entropy);
    give(terms + 2, found.lse);
  });
}

int af_token_terms_backward(void* logits, void* targets, double temperature, void** terms, void* g_log_prob,
                            void* g_entropy, int to_bf16, void** out) {
  return guarded([&] {
    const af::TokenTerms held{as_tensor(terms[0]), as_tensor(terms[1]), as_tensor(terms[2])};
    give(out, af::token_terms_backward(as_tensor(logits), as_tensor(targets), temperature, held, as_tensor(g_log_prob),
                                       as_tensor(g_entropy), to_bf16 ? at::kBFloat16 : at::kFloat));
  });
}

int af_sample(void* logits, const double* draws, int64_t* tokens, float* log_probs) {
  return guarded([&] {
    std::vector<af::Draw> plan;
    for (int64_t i = 0; i < as_tensor(logits).size(0); i++) {
      const double* d = draws + 4 * i;
      plan.push_back({d[0], d[1], d[2], static_cast<int64_t>(d[3])});
    }
    af::sample(as_tensor(logits), plan.data(), tokens, log_probs);
  });
}

int af_backward(void* tensor, void* gradient) {
  return guarded([&] { as_tensor(tensor).backward(as_tensor(gradient)); });
}

}  // extern "C"
