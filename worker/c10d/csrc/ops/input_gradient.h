// What a linear map's input gets on the way back: the gradient of its outputs times its weights.
#pragma once
#include <ATen/ATen.h>

#include <vector>

namespace af {

// g [m, outputs] and the weights, [n, k] each, outputs rows together → [m, k]. Summed over all weights before it is rounded.
at::Tensor input_gradient(const at::Tensor& g, const std::vector<at::Tensor>& weights);

}  // namespace af
