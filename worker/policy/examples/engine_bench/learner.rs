//! The learner: one optimizer step on rows of given length, with the reference's log-probs.

use std::time::Duration;

use agentfly_c10d::{Group, Store};
use agentfly_common::batch::{MiniBatch, TrainRow, TrainShard};
use agentfly_common::ids::{ChainKey, Purpose};
use agentfly_policy::learner::{Learner, LearnerConfig, MicroBatchLimit, PhaseSeconds};
use agentfly_policy::model::Decoder;
use serde::Deserialize;
use serde_json::{Value, json};

use crate::work::{self, GROUP};
use crate::{LearnerArgs, ModelArgs};

/// A rank that does not come, or does not answer, within this ends the measurement.
const RANKS_DEADLINE: Duration = Duration::from_secs(300);

/// One step, over all processes.
#[derive(Debug, Deserialize)]
struct Request {
    rows: usize,
    tokens: usize,
    seed: u64,
}

/// The processes that share the work as a process group; none where there is only this one.
pub(crate) fn group(model: &ModelArgs, store_port: u16) -> anyhow::Result<Option<Group>> {
    const HOST: &str = "127.0.0.1";
    if model.ranks == 1 {
        return Ok(None);
    }
    let store = match model.rank {
        0 => Store::serve(HOST, store_port, RANKS_DEADLINE)?.0,
        _ => Store::connect(HOST, store_port, RANKS_DEADLINE)?,
    };
    Ok(Some(Group::gloo(&store, model.rank, model.ranks, HOST, RANKS_DEADLINE)?))
}

/// The learner's settings where the benchmark says nothing.
pub(crate) fn config(args: &LearnerArgs, reference: bool) -> LearnerConfig {
    let defaults = LearnerConfig::default();
    LearnerConfig {
        use_kl_loss: reference,
        micro_batch: args.micro_tokens.map_or(defaults.micro_batch, MicroBatchLimit::Tokens),
        ..defaults
    }
}

/// Phases by name.
pub(crate) fn phases(phases: &PhaseSeconds) -> Value {
    json!({
        "reference": phases.reference,
        "old_log_prob": phases.old_log_prob,
        "forward_backward": phases.forward_backward,
        "all_reduce": phases.all_reduce,
        "optimizer": phases.optimizer,
        "all_gather": phases.all_gather,
        "total": phases.total,
    })
}

/// Random ids with loss on all but the first, as the peers are given: a token's value costs nothing.
fn row(index: usize, request: &Request, vocab: i64) -> TrainRow {
    let mut state = request.seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) ^ (index as u64 + 1);
    let mut draw = || {
        // xorshift: any spread of ids will do.
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state % vocab.unsigned_abs()) as u32
    };
    let loss_mask: Vec<bool> = (0..request.tokens).map(|position| position > 0).collect();
    let value = |x: f32| loss_mask.iter().map(|m| if *m { x } else { 0.0 }).collect();
    TrainRow {
        key: ChainKey {
            purpose: Purpose::Train,
            step: 1,
            group: (index / GROUP) as u32,
            chain: (index % GROUP) as u32,
        },
        token_ids: (0..request.tokens).map(|_| draw()).collect(),
        rollout_log_probs: value(-(vocab as f32).ln()),
        advantages: value(if index.is_multiple_of(2) { 1.0 } else { -1.0 }),
        loss_mask,
    }
}

/// Answers requests until they end.
pub(crate) fn serve(mut decoder: Decoder, args: &LearnerArgs) -> anyhow::Result<()> {
    let share = args.model.share();
    let group = group(&args.model, args.store_port)?;
    let mut learner = Learner::new(config(args, true), &decoder, true, group)?;
    let parameters: i64 = decoder.parameters().iter().map(|(_, tensor)| tensor.numel() as i64).sum();
    let mut step = 0;
    work::serve(|request: Request| {
        step += 1;
        let vocab = decoder.config().vocab;
        let mini_batch = MiniBatch {
            rows: share.of(request.rows).map(|index| row(index, &request, vocab)).collect(),
            global_loss_tokens: (request.rows * (request.tokens - 1)) as u64,
            global_rows: request.rows as u64,
        };
        let policy_version = learner.policy_version();
        let shard = TrainShard { step, policy_version, mini_batches: vec![mini_batch] };
        let stats = learner.train(&mut decoder, &shard)?;
        Ok(json!({
            "seconds": stats.phases.total,
            "tokens": request.rows * request.tokens,
            "parameters": parameters,
            "skipped_updates": stats.skipped_updates,
            "phases": phases(&stats.phases),
        }))
    })
}
