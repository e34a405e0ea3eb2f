//! Multi-turn chains: a tool runs between a chain's turns while the batch goes on without it.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use agentfly_common::ids::PolicyVersion;
use agentfly_policy::engine::Engine;
use agentfly_policy::model::Decoder;
use serde::Deserialize;
use serde_json::json;

use crate::EngineArgs;
use crate::rollout::engine;
use crate::work::{self, Sampling, Work};

/// One run, over all processes.
#[derive(Debug, Deserialize)]
struct Request {
    chains: usize,
    turns: usize,
    new_tokens: u32,
    tool_seconds: f64,
    seed: u64,
}

/// A chain whose tool is done at `at`.
#[derive(Debug, Clone, Copy)]
struct Due {
    at: Instant,
    chain: u64,
    /// The turn that follows, 0-based.
    turn: usize,
}

/// Answers requests until they end.
pub(crate) fn serve(decoder: &Decoder, work: &Work, args: &EngineArgs) -> anyhow::Result<()> {
    let mut engine = engine(decoder, args.slots, args.window);
    let share = args.model.share();
    work::serve(|request: Request| {
        engine.forget_weights();
        let own = share.of(request.chains);
        let mut run = Run::new(&request, work);
        let before = engine.stats();
        let started = Instant::now();
        let sampling = Sampling { new_tokens: request.new_tokens, seed: request.seed };
        for chain in own.clone() {
            engine.submit(work.first_turn(chain, 0, sampling))?;
            run.context_tokens += work.prompt(chain / work::GROUP).len();
        }
        run.run_to_the_end(&mut engine, decoder)?;
        let seconds = started.elapsed().as_secs_f64();
        let after = engine.stats();
        for chain in own {
            engine.release(chain as u64);
        }
        Ok(json!({
            "seconds": seconds,
            "new_tokens": run.sampled,
            // What a server without a cache would have prefilled.
            "context_tokens": run.context_tokens,
            "prefill_tokens": after.prefill_tokens - before.prefill_tokens,
            "shared_tokens": after.shared_tokens - before.shared_tokens,
            "evictions": after.evictions - before.evictions,
            "preemptions": after.preemptions - before.preemptions,
            "idle_seconds": run.idle.as_secs_f64(),
        }))
    })
}

struct Run<'a> {
    request: &'a Request,
    work: &'a Work,
    /// Tools that run: all take equally long, so the first to start is the first to end.
    tools: VecDeque<Due>,
    /// The turn each chain is in.
    turns: Vec<usize>,
    /// Tokens of each chain so far.
    lengths: Vec<usize>,
    sampled: usize,
    context_tokens: usize,
    /// Time in which there was nothing to compute: every chain's tool ran.
    idle: Duration,
}

impl<'a> Run<'a> {
    fn new(request: &'a Request, work: &'a Work) -> Self {
        let prompt = |chain| work.prompt(chain / work::GROUP).len();
        Self {
            request,
            work,
            tools: VecDeque::new(),
            turns: vec![0; request.chains],
            lengths: (0..request.chains).map(prompt).collect(),
            sampled: 0,
            context_tokens: 0,
            idle: Duration::ZERO,
        }
    }

    fn run_to_the_end(&mut self, engine: &mut Engine, decoder: &Decoder) -> anyhow::Result<()> {
        loop {
            self.submit_due(engine)?;
            if engine.has_work() {
                self.step(engine, decoder)?;
            } else if let Some(next) = self.tools.front() {
                let wait = next.at.saturating_duration_since(Instant::now());
                let slept = Instant::now();
                std::thread::park_timeout(wait);
                self.idle += slept.elapsed();
            } else {
                return Ok(());
            }
        }
    }

    fn submit_due(&mut self, engine: &mut Engine) -> anyhow::Result<()> {
        let now = Instant::now();
        while let Some(due) = self.tools.pop_front_if(|due| due.at <= now) {
            let chain = due.chain as usize;
            let observation = &self.work.observations[(chain + due.turn) % self.work.observations.len()];
            let seed = self.request.seed.wrapping_mul(31).wrapping_add(due.turn as u64);
            let sampling = Sampling { new_tokens: self.request.new_tokens, seed };
            self.turns[chain] = due.turn;
            self.lengths[chain] += observation.len();
            self.context_tokens += self.lengths[chain];
            engine.submit(sampling.turn(due.chain, observation.clone()))?;
        }
        Ok(())
    }

    fn step(&mut self, engine: &mut Engine, decoder: &Decoder) -> anyhow::Result<()> {
        for (chain, result) in engine.step(decoder, PolicyVersion(0))? {
            let sampled = result?.ids.len();
            let index = chain as usize;
            anyhow::ensure!(
                sampled == self.request.new_tokens as usize,
                "chain {chain} stopped after {sampled} of {} tokens: is --window too small?",
                self.request.new_tokens
            );
            self.sampled += sampled;
            self.lengths[index] += sampled;
            let turn = self.turns[index] + 1;
            if turn < self.request.turns {
                let at = Instant::now() + Duration::from_secs_f64(self.request.tool_seconds);
                self.tools.push_back(Due { at, chain, turn });
            }
        }
        Ok(())
    }
}
