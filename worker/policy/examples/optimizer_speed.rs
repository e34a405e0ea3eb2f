//! How long an update takes beside forward and backward, one JSON line each: `make bench`. A model of 50M weights and
//! one short row; alone, and on two ranks (threads over loopback) that share the optimizer's state or do not.

use std::thread;
use std::time::Duration;

use agentfly_c10d::{Group, Store};
use agentfly_common::batch::{MiniBatch, TrainRow, TrainShard};
use agentfly_common::ids::{ChainKey, PolicyVersion, Purpose};
use agentfly_policy::learner::{Learner, LearnerConfig, PhaseSeconds};
use agentfly_policy::model::{Architecture, Decoder, ModelConfig};
use anyhow::{Context as _, anyhow};
use tch::{Device, Kind};

const DEADLINE: Duration = Duration::from_secs(60);
const STEPS: u64 = 8;

fn config() -> ModelConfig {
    ModelConfig {
        architecture: Architecture::Llama,
        hidden: 512,
        layers: 14,
        heads: 8,
        kv_heads: 4,
        head_dim: 64,
        intermediate: 1536,
        vocab: 15_360,
        rms_eps: 1e-6,
        rope_theta: 10_000.0,
        rope_scaling: None,
        tie_word_embeddings: true,
        max_position_embeddings: 64,
        initializer_range: 0.02,
        eos_ids: vec![0],
        bos_id: None,
        pad_id: None,
        torch_dtype: None,
    }
}

/// The fastest of each phase over some steps.
fn measure(kind: Kind, shard_optimizer: bool, group: Option<Group>) -> anyhow::Result<(usize, PhaseSeconds)> {
    tch::set_num_threads(1);
    let mut decoder = Decoder::random(config(), 1, kind, Device::Cpu)?;
    let weights = decoder.parameters().elements();
    // A norm below the gradient's: clipping is part of what is measured.
    let settings = LearnerConfig { shard_optimizer, grad_clip: 1e-3, ..LearnerConfig::default() };
    let ranks = group.as_ref().map_or(1, Group::size) as u64;
    let mut learner = Learner::new(settings, &decoder, false, group)?;
    let row = TrainRow {
        key: ChainKey { purpose: Purpose::Train, step: 1, group: 0, chain: 0 },
        token_ids: (1..9).collect(),
        loss_mask: (0..8).map(|i| i > 3).collect(),
        rollout_log_probs: vec![-9.0; 8],
        advantages: vec![1.0; 8],
    };
    let batch = MiniBatch { rows: vec![row], global_loss_tokens: 4 * ranks, global_rows: ranks };
    let mut best: Option<PhaseSeconds> = None;
    for version in 0..STEPS {
        let mini_batches = vec![batch.clone()];
        let shard = TrainShard { step: version + 1, policy_version: PolicyVersion(version), mini_batches };
        let now = learner.train(&mut decoder, &shard)?.phases;
        let so_far = best.unwrap_or(now);
        best = Some(PhaseSeconds {
            optimizer: so_far.optimizer.min(now.optimizer),
            all_reduce: so_far.all_reduce.min(now.all_reduce),
            all_gather: so_far.all_gather.min(now.all_gather),
            ..now
        });
    }
    Ok((weights, best.context("no step was measured")?))
}

/// [`measure`] as rank 0 of two sees it.
fn on_two_ranks(kind: Kind, shard_optimizer: bool) -> anyhow::Result<(usize, PhaseSeconds)> {
    let (_server, port) = Store::serve("127.0.0.1", 0, DEADLINE)?;
    let rank = |rank| {
        thread::spawn(move || {
            let store = Store::connect("127.0.0.1", port, DEADLINE)?;
            measure(kind, shard_optimizer, Some(Group::gloo(&store, rank, 2, "127.0.0.1", DEADLINE)?))
        })
    };
    let [first, second] = [rank(0), rank(1)].map(|t| t.join().map_err(|_| anyhow!("a rank panicked")));
    second??;
    first?
}

fn main() -> anyhow::Result<()> {
    for kind in [Kind::Float, Kind::BFloat16] {
        for (how, measured) in [
            ("alone", measure(kind, true, None)),
            ("2 ranks share the state", on_two_ranks(kind, true)),
            ("2 ranks, all of it on each", on_two_ranks(kind, false)),
        ] {
            let (weights, phases) = measured?;
            let per_50m = phases.optimizer * 1e3 * 50e6 / weights as f64;
            println!(
                "{}",
                serde_json::json!({
                    "what": "an update, 1 thread a rank", "kind": format!("{kind:?}"), "how": how, "weights": weights,
                    "optimizer_ms": phases.optimizer * 1e3, "optimizer_ms_per_50m_weights": per_50m,
                    "sum_gradients_ms": phases.all_reduce * 1e3, "gather_weights_ms": phases.all_gather * 1e3,
                })
            );
        }
    }
    Ok(())
}
