// What the weights of a linear map get on its way back.
#pragma once
#include <ATen/ATen.h>

#include <vector>

namespace af {

// sums[i] += gᵢᵀ · x, f32 [nᵢ, k]: the columns gᵢ of g [m, Σ nᵢ] side by side, x [m, k], both dense and of one kind.
void add_weight_gradients(const at::Tensor& g, const at::Tensor& x, const std::vector<at::Tensor>& sums);

}  // namespace af
