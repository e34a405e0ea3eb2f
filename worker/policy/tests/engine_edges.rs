//! The engine where prompts take several steps, are shared half computed, and where its cache is full.

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
fn a_prompt_longer_than_a_step_is_computed_in_parts_beside_others() {
    for family in FAMILIES {
        let decoder = model(family, 1);
        let config = EngineConfig {
            max_slots: 2,
            cache_tokens: 8192,
            max_tokens_per_chain: 400,
            max_prefill_tokens: 128,
            enforce_eager: false,
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
            enforce_eager: false,
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
    let config = EngineConfig {
        max_slots: 1,
        cache_tokens: 256,
        max_tokens_per_chain: 256,
        max_prefill_tokens: 64,
        enforce_eager: false,
    };
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

/// Steps until every turn has ended; who ended, in order.
fn order_of_ends(engine: &mut Engine, decoder: &Decoder) -> Vec<u64> {
    let mut order = Vec::new();
    for _ in 0..2000 {
        let of_step = engine.step(decoder, PolicyVersion(3)).expect("the forward pass works");
        order.extend(
            of_step.into_iter().map(|(chain, result)| result.map(|_| chain).expect("the turn works")),
        );
    }
    assert!(!engine.has_work(), "{:?}", engine.stats());
    order
}

#[test]
fn chains_wait_for_a_slot_rather_than_take_each_others_cache() {
    let decoder = model("llama", 2);
    // Eight pages: two chains of 100 tokens, with room to grow, at a time.
    let config = EngineConfig {
        max_slots: 6,
        cache_tokens: 512,
        max_tokens_per_chain: 256,
        max_prefill_tokens: 64,
        enforce_eager: false,
    };
    let mut engine = Engine::new(config, decoder.config());
    for chain in 0..6 {
        engine.submit(turn(chain.into(), None, text(100, chain), 20)).expect("it fits");
    }
    assert_eq!(order_of_ends(&mut engine, &decoder), [0, 1, 2, 3, 4, 5]);
    let stats = engine.stats();
    // Nothing was computed twice.
    assert_eq!((stats.preemptions, stats.prefill_tokens), (0, 6 * 99), "{stats:?}");
}

#[test]
fn of_chains_that_outgrow_the_cache_the_oldest_ends_first() {
    let decoder = model("llama", 2);
    // Six pages: all three fit at first, and one alone comes to four.
    let config = EngineConfig {
        max_slots: 3,
        cache_tokens: 384,
        max_tokens_per_chain: 256,
        max_prefill_tokens: 64,
        enforce_eager: false,
    };
    let mut engine = Engine::new(config, decoder.config());
    let prompts: Vec<Vec<u32>> = (0..3).map(|chain| text(30, chain)).collect();
    for (chain, prompt) in (0..).zip(&prompts) {
        engine.submit(turn(chain, None, prompt.clone(), 200)).expect("it fits");
    }
    assert_eq!(order_of_ends(&mut engine, &decoder), [0, 1, 2]);
    assert!(engine.stats().preemptions >= 2, "{:?}", engine.stats());
}

#[test]
fn chains_of_other_groups_share_whole_pages_of_a_common_beginning() {
    let decoder = model("llama", 2);
    let config = EngineConfig {
        max_slots: 4,
        cache_tokens: 2048,
        max_tokens_per_chain: 256,
        max_prefill_tokens: 512,
        enforce_eager: false,
    };
    let mut engine = Engine::new(config, decoder.config());
    let system = text(130, 1);
    let prompts: Vec<Vec<u32>> =
        (0..3).map(|group| [system.clone(), text(20, 10 + group)].concat()).collect();
    for (chain, prompt) in (0..).zip(&prompts) {
        engine.submit(turn(chain, Some(chain), prompt.clone(), 5)).expect("it fits");
    }
    let ended = run(&mut engine, &decoder);
    assert_eq!(engine.stats().shared_tokens, 2 * 128);
    for (chain, prompt) in (0..).zip(&prompts) {
        assert_scored(&decoder, prompt, &ended[&chain], &format!("chain {chain}"));
    }
}
