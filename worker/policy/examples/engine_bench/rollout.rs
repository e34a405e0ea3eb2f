//! Rollout: a batch of chains in groups of one prompt, exactly so many new tokens each.

use std::time::Instant;

use agentfly_common::ids::PolicyVersion;
use agentfly_common::planner::PREFILL_TOKENS;
use agentfly_common::sampling::Generation;
use agentfly_policy::device::traced_round;
use agentfly_policy::engine::{Engine, EngineConfig};
use agentfly_policy::model::Decoder;
use serde::Deserialize;
use serde_json::json;

use crate::EngineArgs;
use crate::work::{self, Sampling, Share, Work};

/// One batch, over all processes.
#[derive(Debug, Deserialize)]
struct Request {
    batch: usize,
    new_tokens: u32,
    seed: u64,
}

/// An engine for the decoder.
pub(crate) fn engine(decoder: &Decoder, slots: usize, window: usize) -> Engine {
    let limits = EngineConfig {
        max_slots: slots,
        cache_tokens: slots.saturating_mul(window),
        max_tokens_per_chain: window,
        max_prefill_tokens: PREFILL_TOKENS as usize,
        enforce_eager: false,
    };
    Engine::new(limits, decoder.config())
}

/// Generates this process's share of the chains from their prompts, beginning with group `first_group`'s, with an
/// empty cache; in the order of the chains.
pub(crate) fn generate(
    engine: &mut Engine,
    decoder: &Decoder,
    work: &Work,
    (share, chains): (Share, usize),
    first_group: usize,
    sampling: Sampling,
) -> anyhow::Result<Vec<Generation>> {
    let own = share.of(chains);
    for chain in own.clone() {
        engine.submit(work.first_turn(chain, first_group, sampling))?;
    }
    let mut done: Vec<Option<Generation>> = vec![None; own.len()];
    while engine.has_work() {
        let ended = traced_round(engine, |engine| engine.step(decoder, PolicyVersion(0)))?;
        for (chain, result) in ended {
            done[chain as usize - own.start] = Some(result?);
        }
    }
    for chain in own {
        engine.release(chain as u64);
    }
    let done: Vec<Generation> = done.into_iter().flatten().collect();
    let short = done.iter().find(|generation| generation.ids.len() != sampling.new_tokens as usize);
    if let Some(short) = short {
        anyhow::bail!(
            "a chain stopped after {} of {} tokens: is --window too small?",
            short.ids.len(),
            sampling.new_tokens
        );
    }
    Ok(done)
}

/// Answers requests until they end.
pub(crate) fn serve(decoder: &Decoder, work: &Work, args: &EngineArgs) -> anyhow::Result<()> {
    let mut engine = engine(decoder, args.slots, args.window);
    let share = args.model.share();
    work::serve(|request: Request| {
        let sampling = Sampling { new_tokens: request.new_tokens, seed: request.seed };
        engine.forget_weights();
        let before = engine.stats();
        let started = Instant::now();
        let done = generate(&mut engine, decoder, work, (share, request.batch), 0, sampling)?;
        let seconds = started.elapsed().as_secs_f64();
        let after = engine.stats();
        Ok(json!({
            "seconds": seconds,
            "new_tokens": done.iter().map(|generation| generation.ids.len()).sum::<usize>(),
            "prefill_tokens": after.prefill_tokens - before.prefill_tokens,
            "shared_tokens": after.shared_tokens - before.shared_tokens,
            "steps": after.steps - before.steps,
        }))
    })
}
