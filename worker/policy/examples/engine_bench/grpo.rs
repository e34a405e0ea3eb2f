//! A GRPO step: generate groups, reward them, train on them and attest the new weights, on one decoder a process.
//!
//! Each answer holds the step's spans as trace events, with times since 1970, so that those of several ranks line up.

use std::time::Instant;

use agentfly_common::batch::{MiniBatch, TrainRow, TrainShard};
use agentfly_common::ids::{ChainKey, Purpose};
use agentfly_common::sampling::Generation;
use agentfly_common::telemetry::spans::Spans;
use agentfly_common::telemetry::{self, LogTo, TRACE, chrome};
use agentfly_policy::learner::Learner;
use agentfly_policy::model::Decoder;
use serde::Deserialize;
use serde_json::{Value, json};
use tracing::info_span;

use crate::GrpoArgs;
use crate::learner::{config, group, phases};
use crate::rollout::{engine, generate};
use crate::work::{self, GROUP, Sampling, Share, Work};

/// Keeps the advantages of a group that agrees at 0.
const EPSILON: f32 = 1e-4;

/// One step, over all processes.
#[derive(Debug, Deserialize)]
struct Request {
    completions: usize,
    new_tokens: u32,
    seed: u64,
}

/// The toy reward of TRL's run too: the share of digits.
fn reward(work: &Work, generation: &Generation) -> f32 {
    let digits = generation.ids.iter().filter(|id| work.digits.binary_search(id).is_ok()).count();
    digits as f32 / generation.ids.len().max(1) as f32
}

/// Rewards of whole groups → advantages: less the group's mean, over its standard deviation.
fn advantages(rewards: &[f32]) -> Vec<f32> {
    let mut all = Vec::with_capacity(rewards.len());
    for group in rewards.chunks(GROUP) {
        let count = group.len() as f32;
        let mean = group.iter().sum::<f32>() / count;
        let variance = group.iter().map(|r| (r - mean).powi(2)).sum::<f32>() / (count - 1.0).max(1.0);
        all.extend(group.iter().map(|r| (r - mean) / (variance.sqrt() + EPSILON)));
    }
    all
}

fn row(chain: usize, step: u64, prompt: &[u32], generation: &Generation, advantage: f32) -> TrainRow {
    let before = prompt.len();
    let padded = |values: &mut dyn Iterator<Item = f32>| -> Vec<f32> {
        std::iter::repeat_n(0.0, before).chain(values).collect()
    };
    TrainRow {
        key: ChainKey {
            purpose: Purpose::Train,
            step,
            group: (chain / GROUP) as u32,
            chain: (chain % GROUP) as u32,
        },
        token_ids: prompt.iter().chain(&generation.ids).copied().collect(),
        loss_mask: (0..before + generation.ids.len()).map(|at| at >= before).collect(),
        rollout_log_probs: padded(&mut generation.log_probs.iter().copied()),
        advantages: padded(&mut generation.ids.iter().map(|_| advantage)),
    }
}

struct Trainer<'a> {
    decoder: Decoder,
    engine: agentfly_policy::engine::Engine,
    learner: Learner,
    work: &'a Work,
    share: Share,
    step: u64,
    spans: Spans,
}

impl Trainer<'_> {
    /// A step, with its spans.
    fn step(&mut self, request: &Request) -> anyhow::Result<Value> {
        self.step += 1;
        let whole = info_span!(target: TRACE, "step", lane = "rank", title = format!("step {}", self.step));
        let mut answer = whole.in_scope(|| self.generate_and_train(request))?;
        drop(whole);
        let (gathered, rank) = (self.spans.take(), self.share.rank);
        anyhow::ensure!(gathered.dropped == 0, "{} spans of a step were too many to keep", gathered.dropped);
        let events = chrome::process_events(rank as u64 + 1, &format!("rank {rank}"), &gathered.spans, 0);
        answer["trace_events"] = events.into();
        Ok(answer)
    }

    fn generate_and_train(&mut self, request: &Request) -> anyhow::Result<Value> {
        let sampling = Sampling { new_tokens: request.new_tokens, seed: request.seed };
        let own = self.share.of(request.completions);
        anyhow::ensure!(
            own.start.is_multiple_of(GROUP) && own.end.is_multiple_of(GROUP),
            "{} completions over {} processes split a group of {GROUP}",
            request.completions,
            self.share.ranks
        );
        let first_group = (self.step as usize - 1) * request.completions / GROUP;
        let started = Instant::now();
        let chains = (self.share, request.completions);
        let rollout = info_span!(target: TRACE, "rollout");
        let done = rollout.in_scope(|| {
            generate(&mut self.engine, &self.decoder, self.work, chains, first_group, sampling)
        })?;
        drop(rollout);
        let generated = started.elapsed().as_secs_f64();

        let rewards: Vec<f32> = done.iter().map(|generation| reward(self.work, generation)).collect();
        let rows: Vec<TrainRow> = own
            .zip(done.iter().zip(advantages(&rewards)))
            .map(|(chain, (generation, advantage))| {
                let prompt = self.work.prompt(first_group + chain / GROUP);
                row(chain, self.step, prompt, generation, advantage)
            })
            .collect();
        let mini_batch = MiniBatch {
            rows,
            global_loss_tokens: request.completions as u64 * u64::from(request.new_tokens),
            global_rows: request.completions as u64,
        };
        let policy_version = self.learner.policy_version();
        let shard = TrainShard { step: self.step, policy_version, mini_batches: vec![mini_batch] };
        // As in a rank: its memory is the activations' now, and the next step samples with an empty cache.
        self.engine.forget_weights();
        let update = info_span!(target: TRACE, "update the policy");
        let stats = update.in_scope(|| self.learner.train(&mut self.decoder, &shard))?;
        drop(update);
        // Every step of a job pays for it: ranks attest that they hold the same weights.
        let hashing = Instant::now();
        info_span!(target: TRACE, "hash the weights")
            .in_scope(|| self.learner.weights_hash(&self.decoder))?;
        let hashed = hashing.elapsed().as_secs_f64();
        Ok(json!({
            "seconds": started.elapsed().as_secs_f64(),
            "completion_tokens": request.completions * request.new_tokens as usize,
            "generate": generated,
            "hash": hashed,
            "phases": phases(&stats.phases),
            "reward": rewards.iter().sum::<f32>() / rewards.len() as f32,
            "metrics": stats.metrics,
        }))
    }
}

/// Answers requests until they end.
pub(crate) fn serve(decoder: Decoder, work: &Work, args: &GrpoArgs) -> anyhow::Result<()> {
    let model = &args.learner.model;
    let group = group(model, args.learner.store_port)?;
    let learner = Learner::new(config(&args.learner, false), &decoder, false, group)?;
    let mut trainer = Trainer {
        engine: engine(&decoder, 2 * GROUP, args.window),
        learner,
        work,
        share: model.share(),
        step: 0,
        spans: telemetry::init_gathering(LogTo::Stderr, "warn")?,
        decoder,
    };
    work::serve(|request: Request| trainer.step(&request))
}
