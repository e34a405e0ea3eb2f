//! Decode tokens per second of the engine on one CPU thread, for a tiny random model.
//!
//! `cargo run --release -p agentfly-policy --example decode_speed [CHAINS]`

use std::time::Instant;

use agentfly_common::ids::PolicyVersion;
use agentfly_common::sampling::SamplingParams;
use agentfly_policy::engine::{Engine, EngineConfig, TurnRequest};
use agentfly_policy::model::{Decoder, ModelConfig};
use tch::{Device, Kind};

fn main() -> anyhow::Result<()> {
    tch::set_num_threads(1);
    let chains: u64 = std::env::args().nth(1).map_or(Ok(64), |text| text.parse())?;
    let json = serde_json::json!({
        "architectures": ["Qwen2ForCausalLM"], "hidden_size": 128, "num_hidden_layers": 4,
        "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 384, "vocab_size": 1024,
        "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "max_position_embeddings": 2048,
        "tie_word_embeddings": true,
    });
    let map = json.as_object().ok_or_else(|| anyhow::anyhow!("the configuration is an object"))?;
    let config = ModelConfig::from_json(map, std::path::Path::new("config.json"))?;
    for (temperature, top_p) in [(0.0, 1.0), (1.0, 1.0), (1.0, 0.9)] {
        for kind in [Kind::Float, Kind::BFloat16] {
            let decoder = Decoder::random(config.clone(), 1, kind, Device::Cpu)?;
            let limits = EngineConfig {
                max_slots: 256,
                cache_tokens: 256 * 1024,
                max_tokens_per_chain: 1024,
                max_prefill_tokens: 4096,
            };
            let mut engine = Engine::new(limits, decoder.config());
            let sampling =
                SamplingParams { temperature, top_p, top_k: None, max_tokens: 128, stop_ids: vec![] };
            for chain in 0..chains {
                let new_tokens = (0..100).map(|i| (i * 7 + chain as u32) % 1024).collect();
                let sampling = sampling.clone();
                engine.submit(TurnRequest {
                    chain,
                    group: Some(chain / 8),
                    new_tokens,
                    sampling,
                    seed: chain,
                })?;
            }
            let began = Instant::now();
            while engine.stats().waiting > 0 {
                engine.step(&decoder, PolicyVersion(0))?;
            }
            let (prefilled, before) = (began.elapsed(), engine.stats().decode_tokens);
            let began = Instant::now();
            while engine.has_work() {
                engine.step(&decoder, PolicyVersion(0))?;
            }
            let seconds = began.elapsed().as_secs_f64();
            let tokens = engine.stats().decode_tokens - before;
            println!(
                "{}",
                serde_json::json!({
                    "what": "decode, hidden 128, 4 layers, vocabulary 1024, 1 thread",
                    "chains": chains, "temperature": temperature, "top_p": top_p, "dtype": format!("{kind:?}"),
                    "prefill_seconds": prefilled.as_secs_f64(), "tokens_per_second": tokens as f64 / seconds,
                })
            );
        }
    }
    Ok(())
}
