// Over the vocabulary, on the CPU: log-probs and entropies of given tokens, the way back to the logits, and drawing
// tokens. What GPUs run instead is src/ops/vocabulary_plain.rs.
#pragma once
#include <ATen/ATen.h>

namespace af {

// Of logits z [n, vocabulary] f32, tempered: log-prob of each target, entropy, and logsumexp(z / t), [n] f32 each.
struct TokenTerms {
  at::Tensor log_prob, entropy, lse;
};
TokenTerms token_terms(const at::Tensor& logits, const at::Tensor& targets, double temperature);

// The gradient of the logits, in `kind`, given those of log_prob and entropy, [n] f32 each.
at::Tensor token_terms_backward(const at::Tensor& logits, const at::Tensor& targets, double temperature,
                                const TokenTerms& terms, const at::Tensor& g_log_prob, const at::Tensor& g_entropy,
                                at::ScalarType kind);

// How one row is drawn; `uniform` in (0, 1].
struct Draw {
  double temperature, top_p, uniform;
  int64_t top_k;
};

// A token a row of logits [n, vocabulary] f32, and its log-prob before top-k and top-p.
void sample(const at::Tensor& logits, const Draw* draws, int64_t* tokens, float* log_probs);

}  // namespace af
