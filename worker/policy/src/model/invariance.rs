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

/// Of all that a model computes.
pub(crate) fn of_model(config: &ModelConfig, kind: Kind, device: Device) -> bool {
    of_products(kind, device) && odd_widths(config, kind).is_empty()
}

/// The widths that the kernels leave to libtorch, by their keys in `config.json`: odd ones, of heads, and in bf16 of any
/// product.
pub(crate) fn odd_widths(config: &ModelConfig, kind: Kind) -> Vec<(&'static str, i64)> {
    let heads = ("head_dim", config.head_dim);
    let mut widths = match kind {
        Kind::Float => vec![heads],
        _ => vec![heads, ("hidden_size", config.hidden), ("intermediate_size", config.intermediate)],
    };
    widths.retain(|(_, width)| width % 2 != 0);
    widths
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    fn model(hidden: i64, intermediate: i64) -> ModelConfig {
        let json = serde_json::json!({
            "architectures": ["Qwen3ForCausalLM"], "hidden_size": hidden, "num_hidden_layers": 1,
            "num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 12, "intermediate_size": intermediate,
            "vocab_size": 50, "hidden_act": "silu", "rms_norm_eps": 1e-6, "max_position_embeddings": 64,
            "eos_token_id": 1,
        });
        ModelConfig::from_json(json.as_object().unwrap(), Path::new("config.json")).unwrap()
    }

    #[test]
    fn odd_widths_are_left_to_libtorch_in_bf16_alone() {
        for (model, odd) in [
            (model(33, 64), vec![("hidden_size", 33)]),
            (model(32, 65), vec![("intermediate_size", 65)]),
            (model(32, 64), vec![]),
        ] {
            assert_eq!(odd_widths(&model, Kind::BFloat16), odd);
            assert!(odd_widths(&model, Kind::Float).is_empty());
            for kind in [Kind::Float, Kind::BFloat16] {
                // Where this CPU has no kernel for a kind, no width has one.
                let kernels = has_kernels(&Tensor::zeros([1], (kind, Device::Cpu)));
                let even = kind == Kind::Float || odd.is_empty();
                assert_eq!(of_model(&model, kind, Device::Cpu), kernels && even, "{kind:?}, {odd:?}");
            }
        }
    }
}
