//! Sampling follows the distribution it says it does: drawn tokens against the softmax by chi-square, through the
//! engine, with fixed seeds; and what a chain draws does not depend on who shares its batch.
//!
//! The model's logits depend on the prompt alone, so that every chain with the same prompt draws its first token
//! from one known distribution.
#![allow(clippy::unwrap_used, reason = "helpers of tests fail by panicking, too")]

mod support;

use std::collections::BTreeMap;

use agentfly_common::ids::PolicyVersion;
use agentfly_common::sampling::{Generation, SamplingParams};
use agentfly_policy::engine::{Engine, EngineConfig, TurnRequest};
use agentfly_policy::model::Decoder;
use support::distribution::{assert_drawn_from, distribution};
use support::{full_logits, model, text};
use tch::Kind;

/// Draws of each test: enough that a token of one per cent is expected 100 times.
const DRAWS: u64 = 10_000;
/// Chains at a time.
const BATCH: u64 = 250;

fn sampling(temperature: f64, top_p: f64, top_k: Option<u32>, max_tokens: u32) -> SamplingParams {
    SamplingParams { temperature, top_p, top_k, max_tokens, stop_ids: Vec::new() }
}

/// A chain's number, its prompt, how it samples and its seed.
type Request = (u64, Vec<u32>, SamplingParams, u64);

/// Runs the chains together to their end.
fn generate(
    decoder: &Decoder,
    max_slots: usize,
    requests: impl IntoIterator<Item = Request>,
) -> BTreeMap<u64, Generation> {
    let limits = EngineConfig {
        max_slots,
        cache_tokens: 1 << 16,
        max_tokens_per_chain: 96,
        max_prefill_tokens: 256,
        enforce_eager: false,
    };
    let mut engine = Engine::new(limits, decoder.config());
    for (chain, new_tokens, sampling, seed) in requests {
        let group = Some(u64::from(new_tokens[0]));
        engine.submit(TurnRequest { chain, group, new_tokens, sampling, seed }).unwrap();
    }
    let mut done = BTreeMap::new();
    while engine.has_work() {
        for (chain, result) in engine.step(decoder, PolicyVersion(0)).unwrap() {
            engine.release(chain);
            done.insert(chain, result.unwrap());
        }
    }
    done
}

/// What chains of this prompt sample under seeds 0, 1, 2, …, a batch at a time.
fn draws(decoder: &Decoder, prompt: &[u32], sampling: &SamplingParams) -> Vec<Vec<u32>> {
    let mut all = Vec::new();
    for start in (0..DRAWS).step_by(BATCH as usize) {
        let seeds = start..(start + BATCH).min(DRAWS);
        let requests = seeds.map(|seed| (seed, prompt.to_vec(), sampling.clone(), seed));
        all.extend(generate(decoder, BATCH as usize, requests).into_values().map(|g| g.ids));
    }
    all
}

/// Logits after the prompt.
fn logits(decoder: &Decoder, prompt: &[u32]) -> Vec<f64> {
    let logits = full_logits(decoder, prompt).select(0, prompt.len() as i64 - 1).to_kind(Kind::Double);
    Vec::try_from(logits).unwrap()
}

#[track_caller]
fn assert_draws_follow(decoder: &Decoder, prompt: &[u32], sampling: &SamplingParams) {
    let probs = distribution(&logits(decoder, prompt), sampling);
    let mut counts = vec![0; probs.len()];
    for ids in draws(decoder, prompt, sampling) {
        counts[ids[0] as usize] += 1;
    }
    assert_drawn_from(&probs, &counts, sampling);
}

#[test]
fn tokens_are_drawn_from_the_tempered_softmax() {
    let decoder = model("qwen2", 1);
    for temperature in [0.7, 1.0, 1.8] {
        assert_draws_follow(&decoder, &text(9, 1), &sampling(temperature, 1.0, None, 1));
    }
}

#[test]
fn top_k_leaves_the_k_likeliest_in_proportion() {
    let decoder = model("llama", 2);
    for (top_k, temperature) in [(7, 1.0), (40, 1.5)] {
        assert_draws_follow(&decoder, &text(7, 2), &sampling(temperature, 1.0, Some(top_k), 1));
    }
}

#[test]
fn top_p_leaves_the_nucleus_in_proportion() {
    let decoder = model("qwen3", 3);
    for (top_p, temperature) in [(0.95, 1.0), (0.6, 2.0)] {
        assert_draws_follow(&decoder, &text(11, 3), &sampling(temperature, top_p, None, 1));
    }
}

#[test]
fn top_p_counts_mass_within_what_top_k_left() {
    let decoder = model("qwen2", 4);
    for (top_p, top_k) in [(0.8, 30), (0.9, 12)] {
        assert_draws_follow(&decoder, &text(5, 4), &sampling(1.6, top_p, Some(top_k), 1));
    }
}

#[test]
fn successive_tokens_of_one_chain_are_independent_draws() {
    // Pairs of neighbouring uniforms: were the stream's next number used twice, or a step apart in steps of the
    // batch, the second token of a chain would follow the first.
    let decoder = model("llama", 5);
    let prompt = text(6, 5);
    let plain = sampling(1.0, 1.0, None, 2);
    let pairs = draws(&decoder, &prompt, &plain);
    let first = distribution(&logits(&decoder, &prompt), &plain);
    let likeliest = (0..first.len()).max_by(|&a, &b| first[a].total_cmp(&first[b])).unwrap() as u32;
    let seconds: Vec<u32> = pairs.iter().filter(|pair| pair[0] == likeliest).map(|pair| pair[1]).collect();
    let longer = [prompt.as_slice(), &[likeliest]].concat();
    let probs = distribution(&logits(&decoder, &longer), &plain);
    let expected: f64 = seconds.len() as f64;
    assert!(expected > 500.0, "{expected} chains began with the likeliest token");
    // One cell for each half of the mass, in the order of ids: a binomial count.
    let (mut half, mut below) = (0, 0.0);
    while below < 0.5 {
        below += probs[half];
        half += 1;
    }
    let seen = seconds.iter().filter(|&&id| (id as usize) < half).count() as f64;
    let deviation = (seen - expected * below) / (expected * below * (1.0 - below)).sqrt();
    assert!(deviation.abs() < 4.9, "{seen} of {expected} in a part of mass {below:.3}: {deviation:.1} sigma");
}

#[test]
fn what_a_chain_draws_does_not_depend_on_its_batch() {
    let decoder = model("qwen3", 6);
    let settings =
        [sampling(1.0, 1.0, None, 24), sampling(0.8, 0.9, None, 24), sampling(1.2, 1.0, Some(9), 24)];
    let watched = |chain: u64| {
        let sampling = settings[chain as usize % settings.len()].clone();
        (chain, text(3 + chain as usize, chain as u32), sampling, 1_000 + chain)
    };
    let alone: Vec<Generation> =
        (0..9).map(|chain| generate(&decoder, 1, [watched(chain)]).remove(&chain).unwrap()).collect();
    // Three worlds: few slots; many strangers; strangers that sample otherwise, before and after.
    let stranger = |chain: u64, temperature: f64, top_p: f64| {
        let length = 1 + (chain as usize * 7) % 40;
        (
            100 + chain,
            text(length, chain as u32),
            sampling(temperature, top_p, None, 1 + chain as u32 % 30),
            chain,
        )
    };
    let worlds: [(usize, Vec<_>); 3] = [
        (2, (0..9).map(watched).collect()),
        (64, (0..9).map(watched).chain((0..40).map(|c| stranger(c, 1.0, 1.0))).collect()),
        (
            16,
            (0..20)
                .map(|c| stranger(c, 0.0, 1.0))
                .chain((0..9).map(watched))
                .chain((20..40).map(|c| stranger(c, 1.5, 0.7)))
                .collect(),
        ),
    ];
    for (world, (slots, requests)) in worlds.into_iter().enumerate() {
        let together = generate(&decoder, slots, requests);
        for (chain, alone) in alone.iter().enumerate() {
            let here = &together[&(chain as u64)];
            assert_eq!(here.ids, alone.ids, "chain {chain} in world {world}");
            let differ = here.log_probs.iter().zip(&alone.log_probs).map(|(a, b)| (a - b).abs());
            assert!(differ.fold(0.0, f32::max) < 1e-4, "chain {chain} in world {world}");
        }
    }
}
