//! The decoder computes what Hugging Face `transformers` computes with small random models: log-probs, entropies,
//! gradients and greedy continuations, written by golden/make_goldens.py. `make parity` compares far more.
#![allow(clippy::unwrap_used, reason = "helpers of tests fail by panicking, too")]

use std::collections::BTreeMap;
use std::path::Path;

use agentfly_common::batch::{MiniBatch, TrainRow, TrainShard};
use agentfly_common::ids::{ChainKey, PolicyVersion, Purpose};
use agentfly_common::sampling::SamplingParams;
use agentfly_policy::engine::{Engine, EngineConfig, TurnRequest};
use agentfly_policy::learner::{Learner, LearnerConfig, MicroBatchLimit};
use agentfly_policy::model::{Decoder, score, score_rows};
use agentfly_policy::placement::{Place, set_up};
use tch::{Device, Kind, Tensor};

const MODELS: [&str; 4] = ["qwen2", "llama", "qwen3", "qwen2_untied"];

#[derive(serde::Deserialize)]
struct Golden {
    ids: Vec<u32>,
    log_probs: Vec<f32>,
    entropies: Vec<f32>,
    temperature: f64,
    entropy_coeff: f64,
    rows: Vec<LossRow>,
    gradients: BTreeMap<String, [f64; 4]>,
    greedy: Vec<Continuation>,
}

#[derive(serde::Deserialize)]
struct LossRow {
    ids: Vec<u32>,
    loss_mask: Vec<bool>,
    advantages: Vec<f32>,
}

#[derive(serde::Deserialize)]
struct Continuation {
    prompt: Vec<u32>,
    ids: Vec<u32>,
}

fn read(name: &str) -> (Decoder, Golden) {
    set_up(1, Place::Cpu).unwrap(); // as the programs run
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(name);
    let decoder = Decoder::load(&dir, Kind::Float, Device::Cpu).unwrap();
    (decoder, serde_json::from_str(&std::fs::read_to_string(dir.join("golden.json")).unwrap()).unwrap())
}

#[track_caller]
fn all_close(what: &str, got: &[Option<f32>], expected: &[f32]) {
    assert_eq!(got.len(), expected.len() + 1);
    assert_eq!(got[0], None);
    for (at, (got, expected)) in got[1..].iter().zip(expected).enumerate() {
        let got = got.unwrap();
        assert!((got - expected).abs() < 1e-4, "{what}, token {}: {got} is not {expected}", at + 1);
    }
}

#[test]
fn log_probs_and_entropies_are_those_of_transformers() {
    for name in MODELS {
        let (decoder, golden) = read(name);
        all_close(name, &score(&decoder, &golden.ids).unwrap(), &golden.log_probs);
        // Beside longer and shorter texts, which change nothing.
        let (short, long) = (&golden.ids[7..8], [&golden.ids[..], &golden.ids[..90]].concat());
        let scores = score_rows(&decoder, &[short, &golden.ids, &long]).unwrap();
        all_close(name, &scores[1].log_probs, &golden.log_probs);
        all_close(name, &scores[1].entropies, &golden.entropies);
        assert_eq!((scores[0].log_probs.len(), scores[2].entropies.len()), (1, 210));
    }
}

/// The four numbers make_goldens.py keeps of a gradient.
fn sketch(gradient: &Tensor) -> [f64; 4] {
    let flat = gradient.to_kind(Kind::Double).flatten(0, -1);
    let at = Tensor::arange(flat.numel() as i64, (Kind::Double, Device::Cpu));
    let sum = |t: Tensor| t.sum(Kind::Double).double_value(&[]);
    [
        sum(flat.square()).sqrt(),
        sum(flat.shallow_clone()),
        sum(&flat * at.cos()),
        sum(&flat * (at * 0.7).sin()),
    ]
}

#[test]
fn gradients_are_those_of_transformers() {
    for name in MODELS {
        let (mut decoder, golden) = read(name);
        let row = |(chain, row): (usize, &LossRow)| TrainRow {
            key: ChainKey { purpose: Purpose::Train, step: 1, group: 0, chain: chain as u32 },
            token_ids: row.ids.clone(),
            loss_mask: row.loss_mask.clone(),
            rollout_log_probs: vec![0.0; row.ids.len()],
            advantages: row.advantages.clone(),
        };
        let rows: Vec<TrainRow> = golden.rows.iter().enumerate().map(row).collect();
        let with_loss = rows.iter().flat_map(|row| &row.loss_mask).filter(|m| **m).count() as u64;
        for micro_batch in [MicroBatchLimit::Rows(1), MicroBatchLimit::Tokens(4096)] {
            let config = LearnerConfig {
                lr: 0.0,
                grad_clip: f64::MAX,
                temperature: golden.temperature,
                entropy_coeff: golden.entropy_coeff,
                micro_batch,
                ..LearnerConfig::default()
            };
            let batch = MiniBatch {
                rows: rows.clone(),
                global_loss_tokens: with_loss,
                global_rows: rows.len() as u64,
            };
            let shard = TrainShard { step: 1, policy_version: PolicyVersion(0), mini_batches: vec![batch] };
            let before = decoder.weights_hash().unwrap();
            let mut learner = Learner::new(config, &decoder, false, None).unwrap();
            learner.train(&mut decoder, &shard).unwrap();
            assert_eq!(decoder.weights_hash().unwrap(), before, "a rate of 0 changes nothing");
            let gradients = learner.last_gradients().unwrap();
            assert_eq!(gradients.len(), golden.gradients.len());
            for (parameter, gradient) in gradients {
                let expected = golden.gradients[&parameter];
                for (got, wanted) in sketch(&gradient).into_iter().zip(expected) {
                    let off = (got - wanted).abs();
                    assert!(off <= 1e-4 * expected[0], "{name}, {parameter}: {got} is not {wanted}");
                }
            }
        }
    }
}

#[test]
fn greedy_continuations_are_those_of_transformers() {
    for name in MODELS {
        let (decoder, golden) = read(name);
        let limits = EngineConfig {
            max_slots: 3,
            cache_tokens: 1024,
            max_tokens_per_chain: 96,
            max_prefill_tokens: 16,
            enforce_eager: false,
        };
        let mut engine = Engine::new(limits, decoder.config());
        for (chain, Continuation { prompt, ids }) in golden.greedy.iter().enumerate() {
            let max_tokens = ids.len() as u32;
            let sampling = SamplingParams {
                temperature: 0.0,
                top_p: 1.0,
                top_k: None,
                max_tokens,
                stop_ids: Vec::new(),
            };
            let (chain, new_tokens) = (chain as u64, prompt.clone());
            engine.submit(TurnRequest { chain, group: None, new_tokens, sampling, seed: 0 }).unwrap();
        }
        let mut ended = 0;
        while engine.has_work() {
            for (chain, result) in engine.step(&decoder, PolicyVersion(0)).unwrap() {
                assert_eq!(result.unwrap().ids, golden.greedy[chain as usize].ids, "{name}, chain {chain}");
                engine.release(chain);
                ended += 1;
            }
        }
        assert_eq!(ended, golden.greedy.len());
    }
}
