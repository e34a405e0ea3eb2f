//! The engine samples what the model says, whatever else it is doing.

mod support;

use std::collections::BTreeMap;

use agentfly_common::ids::PolicyVersion;
use agentfly_common::sampling::{Generation, SamplingParams, StopReason};
use agentfly_policy::engine::{Engine, EngineConfig, EngineError, TurnRequest};
use agentfly_policy::model::{Decoder, score};
use support::distribution::{assert_drawn_from, distribution};
use support::{FAMILIES, full_logits, model, text};
use tch::Kind;

fn greedy(max_tokens: u32) -> SamplingParams {
    SamplingParams { temperature: 0.0, top_p: 1.0, top_k: None, max_tokens, stop_ids: vec![] }
}

fn sampled(max_tokens: u32) -> SamplingParams {
    SamplingParams { temperature: 1.0, ..greedy(max_tokens) }
}

fn turn(chain: u64, new_tokens: Vec<u32>, sampling: SamplingParams) -> TurnRequest {
    TurnRequest { chain, group: None, new_tokens, sampling, seed: chain * 1000 + 1 }
}

fn engine(decoder: &Decoder, max_slots: usize) -> Engine {
    engine_with_cache(decoder, max_slots, 8192)
}

fn engine_with_cache(decoder: &Decoder, max_slots: usize, cache_tokens: usize) -> Engine {
    let config = EngineConfig {
        max_slots,
        cache_tokens,
        max_tokens_per_chain: 400,
        max_prefill_tokens: 128,
        enforce_eager: false,
    };
    Engine::new(config, decoder.config())
}

/// Steps until every turn has ended.
fn run(engine: &mut Engine, decoder: &Decoder) -> BTreeMap<u64, Generation> {
    let mut ended = BTreeMap::new();
    while engine.has_work() {
        for (chain, result) in engine.step(decoder, PolicyVersion(3)).expect("the forward pass works") {
            assert!(
                ended.insert(chain, result.expect("the turn works")).is_none(),
                "chain {chain} ended twice"
            );
        }
    }
    ended
}

/// The turn computed the slow way: the whole text for every token.
fn greedy_by_hand(decoder: &Decoder, prompt: &[u32], tokens: usize) -> Vec<u32> {
    let mut all = prompt.to_vec();
    for _ in 0..tokens {
        let logits = full_logits(decoder, &all);
        all.push(logits.get(all.len() as i64 - 1).argmax(-1, false).int64_value(&[]) as u32);
    }
    all.split_off(prompt.len())
}

#[test]
fn cached_decoding_samples_what_the_whole_text_gives() {
    for family in FAMILIES {
        let decoder = model(family, 1);
        let mut engine = engine(&decoder, 8);
        let prompts: Vec<Vec<u32>> = (0..5).map(|i| text(3 + 9 * i, i as u32)).collect();
        for (i, prompt) in prompts.iter().enumerate() {
            engine.submit(turn(i as u64, prompt.clone(), greedy(12))).unwrap();
        }
        let ended = run(&mut engine, &decoder);
        for (i, prompt) in prompts.iter().enumerate() {
            let generation = &ended[&(i as u64)];
            assert_eq!(generation.ids, greedy_by_hand(&decoder, prompt, 12), "{family}, chain {i}");
            assert_eq!(generation.policy_version, PolicyVersion(3));
            let whole = [prompt.clone(), generation.ids.clone()].concat();
            let expected = score(&decoder, &whole).unwrap();
            for (at, log_prob) in generation.log_probs.iter().enumerate() {
                let expected = expected[prompt.len() + at].unwrap();
                assert!((log_prob - expected).abs() < 2e-5, "{family}: {log_prob} is not {expected}");
            }
        }
    }
}

#[test]
fn turns_of_a_chain_continue_from_its_cache() {
    let decoder = model("llama", 2);
    let mut engine = engine(&decoder, 4);
    let (prompt, observation) = (text(40, 1), text(17, 2));
    engine.submit(turn(7, prompt.clone(), greedy(6))).unwrap();
    let first = run(&mut engine, &decoder).remove(&7).unwrap();
    let computed = engine.stats().prefill_tokens;
    assert_eq!(computed, 39);
    engine.submit(turn(7, observation.clone(), greedy(6))).unwrap();
    let second = run(&mut engine, &decoder).remove(&7).unwrap();
    // The last token of the first turn and all but the last of the observation.
    assert_eq!(engine.stats().prefill_tokens - computed, 17);
    let history = [prompt, first.ids, observation].concat();
    assert_eq!(second.ids, greedy_by_hand(&decoder, &history, 6));
}

#[test]
fn what_else_is_batched_changes_nothing() {
    let decoder = model("qwen2", 3);
    let requests: Vec<TurnRequest> =
        (0..12).map(|i| turn(i, text(4 + (i as usize * 7) % 30, i as u32), sampled(5 + i as u32))).collect();
    let mut alone = BTreeMap::new();
    for request in &requests {
        let mut engine = engine(&decoder, 1);
        engine.submit(request.clone()).unwrap();
        alone.extend(run(&mut engine, &decoder));
    }
    for (slots, backwards) in [(12, false), (12, true), (3, false), (5, true)] {
        let mut engine = engine(&decoder, slots);
        let mut order = requests.clone();
        if backwards {
            order.reverse();
        }
        let mut together = BTreeMap::new();
        for (i, request) in order.into_iter().enumerate() {
            engine.submit(request).unwrap();
            if i % 3 == 0 {
                // Some have begun when others join.
                for (chain, result) in engine.step(&decoder, PolicyVersion(3)).unwrap() {
                    together.insert(chain, result.unwrap());
                }
            }
        }
        while engine.has_work() {
            for (chain, result) in engine.step(&decoder, PolicyVersion(3)).unwrap() {
                engine.release(chain);
                together.insert(chain, result.unwrap());
            }
        }
        for (chain, expected) in &alone {
            assert_eq!(
                together[chain].ids, expected.ids,
                "{slots} slots, backwards: {backwards}, chain {chain}"
            );
        }
        assert_eq!(engine.stats().chains, 0);
        assert_eq!(engine.stats().cache_tokens_used, 0);
    }
}

#[test]
fn a_group_computes_its_prompt_once() {
    let decoder = model("qwen3", 4);
    let prompt = text(90, 3);
    let mut results = Vec::new();
    for group in [None, Some(5)] {
        let mut engine = engine(&decoder, 8);
        for chain in 0..8 {
            engine.submit(TurnRequest { group, ..turn(chain, prompt.clone(), sampled(10)) }).unwrap();
        }
        results.push(run(&mut engine, &decoder));
        let stats = engine.stats();
        let once = prompt.len() as u64 - 1;
        // Others share whole pages only.
        let shared = if group.is_some() { once } else { 64 };
        assert_eq!((stats.prefill_tokens, stats.shared_tokens), (8 * once - 7 * shared, 7 * shared));
    }
    for chain in 0..8 {
        assert_eq!(results[0][&chain].ids, results[1][&chain].ids);
    }
    let different: std::collections::BTreeSet<_> = results[0].values().map(|g| g.ids.clone()).collect();
    assert!(different.len() > 4, "chains of a group have streams of their own");
}

#[test]
fn a_chain_that_lost_its_cache_goes_on_from_its_tokens() {
    let decoder = model("llama", 5);
    let script = |cache_tokens: usize| {
        let mut engine = engine_with_cache(&decoder, 6, cache_tokens);
        let mut said: BTreeMap<u64, Generation> = BTreeMap::new();
        for round in 0..2_u32 {
            for chain in 0..6 {
                let new = text(40 + chain as usize, round * 10 + chain as u32);
                engine.submit(turn(chain, new, sampled(140))).unwrap();
            }
            for (chain, generation) in run(&mut engine, &decoder) {
                match said.get_mut(&chain) {
                    None => drop(said.insert(chain, generation)),
                    Some(before) => {
                        before.ids.extend(generation.ids);
                        before.log_probs.extend(generation.log_probs);
                    }
                }
                assert!(engine.stats().cache_tokens_used <= engine.stats().cache_tokens);
            }
        }
        (said, engine.stats())
    };
    let (roomy, before) = script(8192);
    let (tight, after) = script(448);
    assert_eq!((before.evictions, before.preemptions, before.cache_tokens), (0, 0, 8192));
    assert_eq!(after.cache_tokens, 448, "one window is the least");
    assert!(after.evictions >= 4, "only {} evictions", after.evictions);
    assert!(after.preemptions >= 2, "only {} running chains were paused", after.preemptions);
    assert_eq!(roomy, tight, "ids and log-probs, to the bit");
}

#[test]
fn new_weights_are_used_at_once_and_no_turn_has_tokens_of_both() {
    let (old, new) = (model("qwen2", 6), model("qwen2", 7));
    let mut engine = engine(&old, 4);
    let prompt = text(20, 1);
    for chain in 0..3 {
        engine.submit(turn(chain, prompt.clone(), greedy(10))).unwrap();
    }
    let mut ended = Vec::new();
    for _ in 0..4 {
        ended.extend(engine.step(&old, PolicyVersion(0)).unwrap());
    }
    assert!(ended.is_empty());
    engine.forget_weights();
    let mut ended = engine.step(&new, PolicyVersion(1)).unwrap();
    assert_eq!(ended.len(), 3, "{ended:?}");
    let text = ended.remove(0).1.unwrap_err().to_string();
    assert_eq!(
        text,
        "chain 0: token 24 comes from policy version 1, but its turn began under 0; let turns end before the weights change"
    );
    // The chain itself is whole: its next turn follows the tokens it has.
    engine.submit(turn(0, vec![7], greedy(5))).unwrap();
    let history = [prompt.clone(), greedy_by_hand(&old, &prompt, 4), vec![7]].concat();
    let generation = run(&mut engine, &new).remove(&0).unwrap();
    assert_eq!(generation.ids, greedy_by_hand(&new, &history, 5));
    // Also one that adds nothing.
    engine.submit(turn(1, vec![], greedy(5))).unwrap();
    let history = [prompt.clone(), greedy_by_hand(&old, &prompt, 4)].concat();
    assert_eq!(run(&mut engine, &new).remove(&1).unwrap().ids, greedy_by_hand(&new, &history, 5));
}

#[test]
fn a_shared_prompt_stays_when_its_last_page_becomes_one_chains_own() {
    // A cache of one window, 7 pages, all of which a group's prompt needs; it ends within the last.
    let decoder = model("llama", 5);
    let mut engine = engine_with_cache(&decoder, 2, 448);
    let (prompt, group) = (text(390, 1), Some(1));
    engine.submit(TurnRequest { group, ..turn(0, prompt.clone(), sampled(5)) }).unwrap();
    run(&mut engine, &decoder);
    let before = engine.stats();
    assert_eq!((before.prefill_tokens, before.cache_tokens_used), (389, 448));
    engine.submit(TurnRequest { group, ..turn(1, prompt.clone(), sampled(5)) }).unwrap();
    let shared = run(&mut engine, &decoder).remove(&1).unwrap();
    let after = engine.stats();
    assert_eq!((after.prefill_tokens, after.shared_tokens), (389, 389), "the prompt is computed once");
    assert_eq!((after.evictions, after.preemptions), (1, 0), "the first chain, which is idle, gave way");
    let mut alone = engine_with_cache(&decoder, 2, 448);
    alone.submit(turn(1, prompt, sampled(5))).unwrap();
    assert_eq!(run(&mut alone, &decoder).remove(&1).unwrap(), shared);
}

#[test]
fn a_turn_ends_for_its_own_reasons() {
    let decoder = model("qwen2", 8);
    let mut engine = engine(&decoder, 4);
    let prompt = text(10, 1);
    let free = greedy_by_hand(&decoder, &prompt, 8);
    let stop = free[5];
    let first = free.iter().position(|&id| id == stop).unwrap();
    engine.submit(turn(0, prompt.clone(), SamplingParams { stop_ids: vec![stop], ..greedy(8) })).unwrap();
    engine.submit(turn(1, prompt.clone(), greedy(3))).unwrap();
    engine.submit(turn(2, text(397, 4), greedy(50))).unwrap();
    engine.submit(turn(3, text(400, 4), greedy(50))).unwrap();
    let ended = run(&mut engine, &decoder);
    assert_eq!((ended[&0].ids.as_slice(), ended[&0].stop), (&free[..=first], StopReason::Stop));
    assert_eq!((ended[&1].ids.len(), ended[&1].stop), (3, StopReason::Length));
    assert_eq!((ended[&2].ids.len(), ended[&2].stop), (3, StopReason::Length), "the window of 400 is full");
    assert_eq!((ended[&3].ids.len(), ended[&3].stop), (0, StopReason::Length), "the prompt fills the window");
    assert_eq!(ended[&3].policy_version, PolicyVersion(3));
}

#[test]
fn a_cancelled_turn_leaves_the_others_alone() {
    let decoder = model("llama", 9);
    let mut engine = engine(&decoder, 4);
    for chain in 0..4 {
        engine.submit(turn(chain, text(12, chain as u32), greedy(9))).unwrap();
    }
    for _ in 0..3 {
        assert!(engine.step(&decoder, PolicyVersion(3)).unwrap().is_empty());
    }
    engine.cancel(0);
    engine.release(2);
    let ended = run(&mut engine, &decoder);
    assert_eq!(ended.keys().copied().collect::<Vec<_>>(), [1, 3]);
    for chain in [1, 3] {
        assert_eq!(ended[&chain].ids, greedy_by_hand(&decoder, &text(12, chain as u32), 9));
    }
}

#[test]
fn refusals_say_what_is_wrong() {
    let decoder = model("qwen2", 10);
    let mut engine = engine(&decoder, 2);
    let mut refuse = |request: TurnRequest| engine.submit(request).unwrap_err().to_string();
    assert_eq!(refuse(turn(1, vec![], greedy(1))), "chain 1 has no tokens: its first turn needs a prompt");
    let unknown = refuse(turn(1, vec![3, 120], greedy(1)));
    assert!(unknown.contains("token 120 is not in the model's vocabulary of 120"), "{unknown}");
    for (sampling, text) in [
        (SamplingParams { temperature: -0.5, ..greedy(1) }, "temperature = -0.5"),
        (SamplingParams { temperature: 1e39, ..greedy(1) }, "temperature = 1000"),
        (SamplingParams { temperature: 1e-39, ..greedy(1) }, "temperature = 0.000"),
        (SamplingParams { top_p: 0.0, ..greedy(1) }, "top_p = 0"),
        (SamplingParams { top_k: Some(0), ..greedy(1) }, "top_k = 0"),
    ] {
        let said = refuse(turn(1, vec![3], sampling));
        assert!(said.contains(text), "{said}");
    }
    engine.submit(turn(2, vec![3], greedy(2))).unwrap();
    assert!(matches!(engine.submit(turn(2, vec![3], greedy(2))), Err(EngineError::Busy { chain: 2 })));
    engine.release(2);
    assert!(!engine.has_work());
}

#[test]
fn weights_that_are_not_numbers_fail_the_turn_by_name() {
    let decoder = model("qwen2", 11);
    let _no_grad = tch::no_grad_guard();
    let _same = decoder.parameters().get("model.norm.weight").unwrap().shallow_clone().fill_(f64::NAN);
    let mut engine = engine(&decoder, 2);
    engine.submit(turn(4, text(5, 1), sampled(3))).unwrap();
    let mut ended = engine.step(&decoder, PolicyVersion(9)).unwrap();
    let (chain, result) = ended.remove(0);
    let said = result.unwrap_err().to_string();
    assert!(chain == 4 && said.contains("policy version 9") && said.contains("NaN"), "{said}");
}

#[test]
fn a_turn_cut_short_keeps_its_tokens_and_its_chain_goes_on_from_them() {
    let decoder = model("qwen2", 1);
    let mut engine = engine(&decoder, 1);
    let prompt = text(7, 1);
    engine.submit(turn(1, prompt.clone(), greedy(50))).unwrap();
    engine.submit(turn(2, prompt.clone(), greedy(3))).unwrap();
    for _ in 0..6 {
        assert!(engine.step(&decoder, PolicyVersion(3)).unwrap().is_empty());
    }
    assert!(engine.is_admitted(1) && !engine.is_admitted(2));
    engine.cut_short(1);
    engine.cut_short(2);
    engine.cut_short(3);
    let ended = run(&mut engine, &decoder);
    let expected = greedy_by_hand(&decoder, &prompt, 10);
    assert_eq!(
        (ended.len(), ended[&1].stop, ended[&1].policy_version),
        (2, StopReason::TimeLimit, PolicyVersion(3))
    );
    let sampled = &ended[&1].ids;
    assert!(sampled.len() >= 4 && expected.starts_with(sampled), "{sampled:?}");
    assert_eq!((ended[&2].ids.len(), ended[&2].stop), (0, StopReason::TimeLimit), "it never had a slot");
    engine.submit(turn(1, Vec::new(), greedy(2))).unwrap();
    let next = run(&mut engine, &decoder);
    assert_eq!(next[&1].ids, expected[sampled.len()..sampled.len() + 2]);
}

#[test]
fn tokens_are_drawn_from_the_distribution_asked_for() {
    let decoder = model("qwen2", 12);
    let prompt = text(6, 2);
    let logits = full_logits(&decoder, &prompt).get(5).to_kind(Kind::Double);
    let logits = Vec::<f64>::try_from(&logits).unwrap();
    let kinds = [
        SamplingParams { temperature: 2.0, ..sampled(1) },
        SamplingParams { temperature: 3.0, top_k: Some(9), ..sampled(1) },
        SamplingParams { temperature: 3.0, top_p: 0.8, ..sampled(1) },
        SamplingParams { temperature: 4.0, top_p: 0.7, top_k: Some(20), ..sampled(1) },
        greedy(1),
    ];
    // All five kinds share every batch.
    let mut engine = engine(&decoder, 200);
    let draws = 2400_u64;
    let mut counts = vec![vec![0_u64; logits.len()]; kinds.len()];
    for chunk in 0..draws / 40 {
        for i in 0..200 {
            let chain = chunk * 200 + i;
            let sampling = kinds[(i % 5) as usize].clone();
            engine.submit(TurnRequest { group: Some(1), ..turn(chain, prompt.clone(), sampling) }).unwrap();
        }
        for (chain, generation) in run(&mut engine, &decoder) {
            counts[(chain % 5) as usize][generation.ids[0] as usize] += 1;
            let temperature = match kinds[(chain % 5) as usize].temperature {
                0.0 => 1.0,
                above => above,
            };
            let untruncated = SamplingParams { temperature, ..sampled(1) };
            if chunk == 0 {
                let expected = distribution(&logits, &untruncated)[generation.ids[0] as usize].ln();
                assert!((f64::from(generation.log_probs[0]) - expected).abs() < 1e-4);
            }
            engine.release(chain);
        }
    }
    for (kind, counts) in kinds.iter().zip(&counts).take(4) {
        assert_drawn_from(&distribution(&logits, kind), counts, kind);
    }
    assert_eq!(counts[4].iter().filter(|&&count| count > 0).count(), 1, "greedy has one answer");
}
