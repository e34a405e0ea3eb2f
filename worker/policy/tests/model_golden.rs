//! The decoder computes what Hugging Face `transformers` computes: log-probs of small random models, written
//! by golden/make_goldens.py.

use std::path::Path;

use agentfly_policy::model::{Decoder, score};
use tch::{Device, Kind};

#[derive(serde::Deserialize)]
struct Golden {
    ids: Vec<u32>,
    log_probs: Vec<f32>,
}

#[test]
fn log_probs_are_those_of_transformers() {
    agentfly_policy::placement::set_up(1, agentfly_policy::placement::Place::Cpu).unwrap(); // as the programs run
    for family in ["qwen2", "llama", "qwen3"] {
        let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(family);
        let decoder = Decoder::load(&dir, Kind::Float, Device::Cpu).unwrap();
        let golden: Golden =
            serde_json::from_str(&std::fs::read_to_string(dir.join("golden.json")).unwrap()).unwrap();
        let scores = score(&decoder, &golden.ids).unwrap();
        assert_eq!(golden.log_probs.len() + 1, scores.len());
        for (at, (expected, got)) in golden.log_probs.iter().zip(&scores[1..]).enumerate() {
            let got = got.unwrap();
            assert!((got - expected).abs() < 1e-4, "{family}, token {}: {got} is not {expected}", at + 1);
        }
    }
}
