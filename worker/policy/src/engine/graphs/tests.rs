//! Padded steps beside ordinary ones, on the CPU: by this project's kernels and, in f16, by libtorch's operators, as on a
//! GPU.

use std::path::Path;

use agentfly_c10d::ops::has_kernels;
use agentfly_common::ids::PolicyVersion;
use agentfly_common::sampling::{Generation, SamplingParams};
use tch::{Device, Kind};

use super::super::{Engine, EngineConfig, TurnRequest};
use super::*;
use crate::model::ModelConfig;

/// Chains with prompts of these lengths and turns of as many tokens: some cross from page to page, and end one by one.
const CHAINS: [(usize, u32); 7] = [(1, 40), (60, 9), (64, 30), (63, 12), (130, 25), (5, 70), (20, 3)];

fn model(kind: Kind, seed: u64) -> Decoder {
    tch::set_num_threads(1);
    let json = serde_json::json!({
        "architectures": ["Qwen2ForCausalLM"], "hidden_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 96, "vocab_size": 120,
        "hidden_act": "silu", "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "max_position_embeddings": 512,
        "initializer_range": 0.3, "eos_token_id": 1, "torch_dtype": "float32", "tie_word_embeddings": true,
    });
    let config = ModelConfig::from_json(json.as_object().unwrap(), Path::new("config.json")).unwrap();
    Decoder::random(config, seed, kind, Device::Cpu).unwrap()
}

fn engine(decoder: &Decoder) -> Engine {
    // As many pages as the chains fill: none but that of padding is left over.
    let pages: usize = CHAINS.iter().map(|(prompt, new)| pages_for(prompt + *new as usize)).sum();
    let limits = EngineConfig {
        max_slots: CHAINS.len(),
        cache_tokens: pages * 64,
        max_tokens_per_chain: 200,
        max_prefill_tokens: 50,
        enforce_eager: false,
    };
    Engine::new(limits, decoder.config())
}

/// Pads on the CPU, and would record if `records`.
fn padding(decoder: &Decoder, records: bool) -> Engine {
    let mut engine = engine(decoder);
    engine.graphs = DecodeGraphs { on_cpus: true, records, ..DecodeGraphs::new(false) };
    engine
}

fn submit(engine: &mut Engine, chain: usize, temperature: f64) {
    let (prompt, max_tokens) = CHAINS[chain];
    let new_tokens = (0..prompt).map(|i| ((i * i * 7 + i * 31 + chain * 13 + 5) % 118 + 2) as u32).collect();
    let sampling = SamplingParams { temperature, top_p: 0.9, top_k: None, max_tokens, stop_ids: vec![] };
    let chain = chain as u64;
    engine.submit(TurnRequest { chain, group: None, new_tokens, sampling, seed: chain }).unwrap();
}

fn finish(engine: &mut Engine, decoder: &Decoder) -> BTreeMap<u64, Generation> {
    let mut all = BTreeMap::new();
    while engine.has_work() {
        for (chain, generation) in engine.step(decoder, PolicyVersion(1)).unwrap() {
            all.insert(chain, generation.unwrap());
        }
    }
    all
}

fn generate(engine: &mut Engine, decoder: &Decoder, temperature: f64) -> BTreeMap<u64, Generation> {
    (0..CHAINS.len()).for_each(|chain| submit(engine, chain, temperature));
    finish(engine, decoder)
}

#[test]
fn padded_steps_give_every_chain_what_ordinary_ones_do() {
    for kind in [Kind::Float, Kind::BFloat16, Kind::Half] {
        let decoder = model(kind, 3);
        let exact = has_kernels(decoder.parameters().flat());
        if kind == Kind::BFloat16 && !exact {
            continue; // two tokens may be as likely as each other to its few digits
        }
        for temperature in [0.0, 1.0] {
            let ordinary = generate(&mut engine(&decoder), &decoder, temperature);
            let mut padding = padding(&decoder, false);
            let padded = generate(&mut padding, &decoder, temperature);
            assert_eq!(ordinary.len(), CHAINS.len());
            for (chain, want) in &ordinary {
                let got = &padded[chain];
                let what = format!("chain {chain} in {kind:?} at temperature {temperature}");
                assert_eq!(got.ids, want.ids, "{what}");
                let off = got.log_probs.iter().zip(&want.log_probs).map(|(a, b)| (a - b).abs());
                let off = off.fold(0.0, f32::max);
                assert!(off <= if exact { 0.0 } else { 0.02 }, "{what}: {off} nats apart");
            }
            let shapes: Vec<_> = padding.graphs.shapes.keys().collect();
            for rows in [1, 2, 3, 4, 6] {
                assert!(
                    shapes.iter().any(|shape| shape.rows == rows),
                    "no step of {rows} rows in {shapes:?}"
                );
            }
            assert!(shapes.len() < 30, "{shapes:?}");
        }
    }
}

#[test]
fn where_recording_fails_chains_go_on_without() {
    let decoder = model(Kind::Float, 3);
    let ordinary = generate(&mut engine(&decoder), &decoder, 1.0);
    let mut recording = padding(&decoder, true);
    assert_eq!(generate(&mut recording, &decoder, 1.0), ordinary, "a CPU has no graphs");
    assert!(recording.graphs.off && recording.graphs.shapes.is_empty(), "it tries once");
}

#[test]
fn a_cpu_and_enforce_eager_pad_nothing() {
    let decoder = model(Kind::Float, 3);
    let mut ordinary = engine(&decoder);
    let mut eager = engine(&decoder);
    eager.graphs = DecodeGraphs { on_cpus: true, records: false, ..DecodeGraphs::new(true) };
    for engine in [&mut ordinary, &mut eager] {
        generate(engine, &decoder, 1.0);
        assert!(engine.graphs.shapes.is_empty());
    }
    assert!(!ordinary.graphs.off, "it tried to record");
}

#[test]
fn nothing_of_another_model_or_cache_is_kept() {
    let (first, second) = (model(Kind::Float, 3), model(Kind::Float, 4));
    let mut padding = padding(&first, false);
    generate(&mut padding, &first, 1.0);
    let held = |padding: &Engine| (padding.graphs.made_for, padding.graphs.shapes.len());
    let (of_first, shapes) = held(&padding);
    assert!(of_first.is_some() && shapes > 0);
    padding.forget_weights();
    assert_eq!(held(&padding), (None, 0), "they would hold memory that is to be given back");
    for chain in 0..CHAINS.len() as u64 {
        padding.release(chain);
    }
    // The same engine under another model, without a word to it.
    submit(&mut padding, 0, 1.0);
    finish(&mut padding, &first);
    let of_first = padding.graphs.made_for;
    let shape = StepShape { rows: 1000, pages_each: 1, pages_all: 1000 };
    let inputs = FixedStep::new(shape, 10, Device::Cpu).unwrap();
    padding.graphs.shapes.insert(shape, Shape { recorded: None, inputs });
    submit(&mut padding, 5, 1.0);
    let got = finish(&mut padding, &second);
    assert_ne!(padding.graphs.made_for, of_first);
    assert!(!padding.graphs.shapes.contains_key(&shape), "it has the first one's addresses");
    let mut alone = engine(&second);
    submit(&mut alone, 5, 1.0);
    assert_eq!(got, finish(&mut alone, &second));
}

#[test]
fn further_shapes_than_are_kept_are_computed_as_before() {
    let decoder = model(Kind::Float, 3);
    let ordinary = generate(&mut engine(&decoder), &decoder, 0.0);
    let mut padding = padding(&decoder, false);
    generate(&mut padding, &decoder, 0.0);
    padding.graphs.shapes.clear();
    for rows in 1000..1000 + MOST_SHAPES {
        let shape = StepShape { rows, pages_each: 1, pages_all: rows };
        let inputs = FixedStep::new(shape, 10, Device::Cpu).unwrap();
        padding.graphs.shapes.insert(shape, Shape { recorded: None, inputs });
    }
    (0..CHAINS.len() as u64).for_each(|chain| padding.release(chain));
    assert_eq!(generate(&mut padding, &decoder, 0.0), ordinary);
    assert_eq!(padding.graphs.shapes.len(), MOST_SHAPES);
    assert!(padding.graphs.shapes.keys().all(|shape| shape.rows >= 1000));
}

#[test]
fn shapes_are_few_and_hold_what_they_are_made_for() {
    assert_eq!([1, 2, 3, 4, 5, 7, 9, 13, 17, 25, 33].map(rounded), [1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48]);
    for n in 1..1000 {
        assert!(rounded(n) >= n && 2 * rounded(n) < 3 * n + 2, "{n} became {}", rounded(n));
    }
    // Pages 1, 2, 5, 1 and 1, and one more for the sixth row.
    let shape = shape_of(&[64, 65, 300, 1, 10]);
    assert_eq!(shape, StepShape { rows: 6, pages_each: 8, pages_all: 12 });
}
