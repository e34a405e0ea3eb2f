//! Where what is computed for a token is the same to the bit whatever rows are beside it.
//!
//! That is where this project's kernels run. libtorch's own products, and any on a GPU, choose the order in which they sum
//! by the number of rows.

use agentfly_c10d::ops::has_kernels;
use agentfly_common::model_dir::ModelConfig;
use tch::{Device, Kind, Tensor};

/// Of products in this kind on this device.
pub(crate) fn of_products(kind: Kind, device: Device) -> bool {
    device == Device::Cpu && Tensor::f_zeros([1], (kind, device)).is_ok_and(|like| has_kernels(&like))
}

/// Of all that a model computes: the kernels leave odd widths of heads, and in bf16 of any product, to libtorch.
pub(crate) fn of_model(config: &ModelConfig, kind: Kind, device: Device) -> bool {
    let widths = match kind {
        Kind::Float => vec![config.head_dim],
        _ => vec![config.head_dim, config.hidden, config.intermediate],
    };
    of_products(kind, device) && widths.iter().all(|width| width % 2 == 0)
}
