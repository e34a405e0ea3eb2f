//! Tiny models of every supported family, for the tests of this crate.

#![allow(dead_code, reason = "each test binary uses some of it")]

pub(crate) mod distribution;

use std::path::Path;

use agentfly_c10d::ops::Packed;
use agentfly_policy::model::{Attention, Decoder, ModelConfig};
use tch::{Device, Kind, Tensor};

/// A family's `config.json` in the small.
pub(crate) fn config_json(family: &str) -> serde_json::Value {
    let mut config = serde_json::json!({
        "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "intermediate_size": 96, "vocab_size": 120, "hidden_act": "silu", "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0, "max_position_embeddings": 512, "initializer_range": 0.3,
        "eos_token_id": 1, "torch_dtype": "float32",
    });
    match family {
        "qwen2" => {
            config["architectures"] = serde_json::json!(["Qwen2ForCausalLM"]);
            config["tie_word_embeddings"] = true.into();
        }
        "llama" => {
            config["architectures"] = serde_json::json!(["LlamaForCausalLM"]);
            config["tie_word_embeddings"] = false.into();
            config["rope_scaling"] = serde_json::json!({
                "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            });
        }
        "qwen3" => {
            config["architectures"] = serde_json::json!(["Qwen3ForCausalLM"]);
            config["tie_word_embeddings"] = true.into();
            config["head_dim"] = 16.into();
            config["num_key_value_heads"] = 1.into();
        }
        other => panic!("no family {other}"),
    }
    config
}

/// The families.
pub(crate) const FAMILIES: [&str; 3] = ["qwen2", "llama", "qwen3"];

/// Its configuration.
pub(crate) fn config(family: &str) -> ModelConfig {
    let json = config_json(family);
    let map = json.as_object().expect("it is an object");
    ModelConfig::from_json(map, Path::new("config.json")).expect("it is a valid configuration")
}

/// A random f32 model of the family; biases and norms too are random, so that forgetting one shows.
pub(crate) fn model(family: &str, seed: u64) -> Decoder {
    tch::set_num_threads(1);
    let decoder = Decoder::random(config(family), seed, Kind::Float, Device::Cpu).expect("it is small");
    let _no_grad = tch::no_grad_guard();
    for (_, tensor) in decoder.parameters().iter().filter(|(_, tensor)| tensor.dim() == 1) {
        let noise = tensor.randn_like() * 0.2;
        let _same_tensor = tensor.shallow_clone().g_add_(&noise);
    }
    decoder
}

/// Logits `[tokens, vocab]` of one text, computed at once.
pub(crate) fn full_logits(decoder: &Decoder, ids: &[u32]) -> Tensor {
    let ids: Vec<i64> = ids.iter().map(|&id| i64::from(id)).collect();
    let positions = Tensor::arange(ids.len() as i64, (Kind::Int64, Device::Cpu));
    let packed = Packed::new(&[0, ids.len() as i64], Device::Cpu).expect("a text has tokens");
    let hidden = decoder
        .hidden(&Tensor::from_slice(&ids), &positions, Attention::Packed(&packed))
        .expect("the input is well formed");
    decoder.logits(&hidden).expect("the hidden states are the model's")
}

/// Some text.
pub(crate) fn text(length: usize, seed: u32) -> Vec<u32> {
    (0..length as u32).map(|i| (i * i * 7 + i * 31 + seed * 13 + 5) % 118 + 2).collect()
}
