//! The engine where its cache grows, and where a chain takes over a prompt that is only half computed.

mod support;

use std::collections::BTreeMap;

use agentfly_common::ids::PolicyVersion;
use agentfly_common::sampling::{Generation, SamplingParams};
use agentfly_policy::engine::{Engine, EngineConfig, TurnRequest};
use agentfly_policy::model::{Decoder, score};
use support::{FAMILIES, model, text};

fn turn(chain: u64, group: Option<u64>, new_tokens: Vec<u32>, max_tokens: u32) -> TurnRequest {
    let sampling = SamplingParams { temperature: 1.0, top_p: 1.0, top_k: None, max_tokens, stop_ids: vec![] };
    TurnRequest { chain, group, new_tokens, sampling, seed: chain + 1 }
}

/// Steps until every turn has ended.
fn run(engine: &mut Engine, decoder: &Decoder) -> BTreeMap<u64, Generation> {
    let mut ended = BTreeMap::new();
    while engine.has_work() {
        let of_step = engine.step(decoder, PolicyVersion(3)).expect("the forward pass works");
        ended.extend(of_step.into_iter().map(|(chain, result)| (chain, result.expect("the turn works"))));
    }
    ended
}

/// The reported log-probs are those that one pass over the whole text gives.
fn assert_scored(decoder: &Decoder, prompt: &[u32], generation: &Generation, what: &str) {
    let whole = [prompt, generation.ids.as_slice()].concat();
    let expected = score(decoder, &whole).expect("the text is well formed");
    for (at, log_prob) in generation.log_probs.iter().enumerate() {
        let expected = expected[prompt.len() + at].expect("it is not the first token");
        assert!((log_prob - expected).abs() < 5e-5, "{what}, token {at}: {log_prob}, not {expected}");
    }
}

#[test]
fn a_chain_that_outgrows_the_first_cache_keeps_what_was_cached() {
    for family in FAMILIES {
        let decoder = model(family, 1);
        let config = EngineConfig {
            max_slots: 2,
            cache_tokens: 8192,
            max_tokens_per_chain: 400,
            max_prefill_tokens: 128,
        };
        let mut engine = Engine::new(config, decoder.config());
        let prompts = [text(250, 1), text(3, 2)];
        for (chain, prompt) in (0..).zip(&prompts) {
            engine.submit(turn(chain, None, prompt.clone(), 20)).expect("it fits");
        }
        let ended = run(&mut engine, &decoder);
        for (chain, prompt) in (0..).zip(&prompts) {
            assert_eq!(ended[&chain].ids.len(), 20);
            assert_scored(&decoder, prompt, &ended[&chain], &format!("{family}, chain {chain}"));
        }
    }
}

#[test]
fn a_chain_shares_no_more_of_its_prompt_than_its_group_mate_has_computed() {
    let decoder = model("qwen2", 1);
    for steps in 0..4 {
        let config = EngineConfig {
            max_slots: 4,
            cache_tokens: 8192,
            max_tokens_per_chain: 400,
            max_prefill_tokens: 32,
        };
        let mut engine = Engine::new(config, decoder.config());
        let prompt = text(100, 3);
        let other = [&prompt[..40], &text(30, 9)].concat();
        engine.submit(turn(0, Some(7), prompt.clone(), 5)).expect("it fits");
        let mut ended = BTreeMap::new();
        for _ in 0..steps {
            assert!(engine.step(&decoder, PolicyVersion(3)).expect("the forward pass works").is_empty());
        }
        engine.submit(turn(1, Some(7), prompt.clone(), 5)).expect("it fits");
        engine.submit(turn(2, Some(7), other.clone(), 5)).expect("it fits");
        ended.extend(run(&mut engine, &decoder));
        for (chain, prompt) in [(0, &prompt), (1, &prompt), (2, &other)] {
            let what = format!("chain {chain}, begun after {steps} steps");
            assert_scored(&decoder, prompt, &ended[&chain], &what);
        }
    }
}

#[test]
fn a_queued_turns_cache_does_not_stop_a_running_one() {
    let decoder = model("llama", 2);
    // Four pages of 64 tokens in all, for one chain at a time.
    let config =
        EngineConfig { max_slots: 1, cache_tokens: 256, max_tokens_per_chain: 256, max_prefill_tokens: 64 };
    let mut engine = Engine::new(config, decoder.config());
    let (elder, younger, observation) = (text(130, 1), text(150, 2), text(10, 3));
    engine.submit(turn(0, None, elder.clone(), 4)).expect("it fits");
    let first = run(&mut engine, &decoder).remove(&0).expect("its turn ended");
    // The elder's three pages stay its own while its next turn waits behind the younger chain, which needs three.
    engine.submit(turn(1, None, younger.clone(), 20)).expect("it fits");
    engine.submit(turn(0, None, observation.clone(), 4)).expect("it fits");
    let mut ended = BTreeMap::new();
    for _ in 0..200 {
        let of_step = engine.step(&decoder, PolicyVersion(3)).expect("the forward pass works");
        ended.extend(of_step.into_iter().map(|(chain, result)| (chain, result.expect("the turn works"))));
    }
    assert!(!engine.has_work(), "{:?}", engine.stats());
    assert_scored(&decoder, &younger, &ended[&1], "the younger");
    let before = [elder, first.ids, observation].concat();
    assert_scored(&decoder, &before, &ended[&0], "the elder's second turn");
}
