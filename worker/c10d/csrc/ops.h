// The C face of the operators that libtorch lacks on CPUs, or has slower: see ops/.
//
// Conventions as in shim.h. A tensor that is given back is a new `torch::Tensor*`, the caller's to free as tch does.
#pragma once
#include "shim.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct AfLinear AfLinear;

int af_linear_new(void** weights, void** biases, size_t count, AfLinear** out);  // biases: NULL or count of them
int af_linear_train(AfLinear* linear, void** grads, void** bias_grads);           // NULL: no longer trained
int af_linear_apply(AfLinear* linear, void* x, int wide, void** out);
int af_linear_apply_norm(AfLinear* linear, void* x, void* weight, void* grad, double eps, void** out);  // of rms_norm(x)
int af_linear_apply_swiglu(AfLinear* linear, void* x, void** out);                                      // of swiglu(x)
int af_linear_backward(AfLinear* linear, void* x, void* gradient, void** out);
void af_linear_drop(AfLinear* linear);

int af_rms_norm(void* x, void* weight, void* grad, double eps, void** out);  // grad: NULL or a sum in f32
int af_rope(void* x, void* cos, void* sin, int64_t heads, void** out);

// The tensors of af::Packed, see ops/attention.h; rows, kept and skip may be NULL together.
typedef struct AfPacked {
  void *starts, *rows, *kept, *skip;
} AfPacked;
int af_attention(void* qkv, const AfPacked* packing, int64_t queries, int64_t keys, int64_t dim, void** out);
// The tensors of af::Paged and af::Places, see ops/attention.h.
typedef struct AfPagedStep {
  void *starts, *lengths, *table;
  void *page_of, *place_of, *own, *seen, *held;
  void *flash_starts, *flash_held, *flash_lengths;
  int64_t most_new, longest;
} AfPagedStep;
int af_paged_attention(void* qkv, void* pages, int64_t layer, const AfPagedStep* step, int64_t queries, int64_t keys,
                       int64_t dim, void** out);
int af_page_numbers(void* like, int64_t dim, int64_t* out);
int af_has_gemm(void* like, int* out);

// terms: three tensors out: log-probs, entropies, log-sum-exps.
int af_token_terms(void* logits, void* targets, double temperature, void** terms);
int af_token_terms_backward(void* logits, void* targets, double temperature, void** terms, void* g_log_prob,
                            void* g_entropy, int to_bf16, void** out);
// draws: rows of temperature, top_p, uniform, top_k.
int af_sample(void* logits, const double* draws, int64_t* tokens, float* log_probs);

int af_backward(void* tensor, void* gradient);

#ifdef __cplusplus
}
#endif
