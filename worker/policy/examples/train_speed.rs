//! How fast a training step is on one CPU thread, one JSON line: `make bench`.

use agentfly_common::batch::{MiniBatch, TrainRow, TrainShard};
use agentfly_common::ids::{ChainKey, PolicyVersion, Purpose};
use agentfly_policy::learner::{Learner, LearnerConfig, MicroBatchLimit};
use agentfly_policy::model::{Architecture, Decoder, ModelConfig};
use tch::{Device, Kind};

const ROWS: u32 = 128;
const LENGTH: u32 = 180;

fn main() -> anyhow::Result<()> {
    tch::set_num_threads(1);
    let config = ModelConfig {
        architecture: Architecture::Qwen2,
        hidden: 128,
        layers: 4,
        heads: 4,
        kv_heads: 2,
        head_dim: 32,
        intermediate: 512,
        vocab: 1024,
        rms_eps: 1e-6,
        rope_theta: 10_000.0,
        rope_scaling: None,
        tie_word_embeddings: true,
        max_position_embeddings: 512,
        initializer_range: 0.02,
        eos_ids: vec![0],
        bos_id: None,
        pad_id: None,
        torch_dtype: None,
    };
    let row = |i: u32| {
        let loss_mask: Vec<bool> = (0..LENGTH).map(|j| j > 60 && j % 4 != 0).collect();
        let value = |x: f32| loss_mask.iter().map(|m| if *m { x } else { 0.0 }).collect();
        TrainRow {
            key: ChainKey { purpose: Purpose::Train, step: 1, group: i / 8, chain: i % 8 },
            token_ids: (0..LENGTH).map(|j| (i * 31 + j * 7) % 1024).collect(),
            rollout_log_probs: value(-6.9),
            advantages: value(if i.is_multiple_of(2) { 1.0 } else { -1.0 }),
            loss_mask,
        }
    };
    let rows: Vec<TrainRow> = (0..ROWS).map(row).collect();
    let loss_tokens = rows.iter().flat_map(|r| &r.loss_mask).filter(|m| **m).count() as u64;
    let batch = MiniBatch { rows, global_loss_tokens: loss_tokens, global_rows: u64::from(ROWS) };
    for limit in [1024, 4096] {
        let mut decoder = Decoder::random(config.clone(), 1, Kind::Float, Device::Cpu)?;
        let settings = LearnerConfig {
            use_kl_loss: true,
            micro_batch: MicroBatchLimit::Tokens(limit),
            ..LearnerConfig::default()
        };
        let mut learner = Learner::new(settings, &decoder, true, None)?;
        let mut best = f64::INFINITY;
        let mut last = None;
        for version in 0..2 {
            let policy_version = PolicyVersion(version);
            let shard = TrainShard { step: version + 1, policy_version, mini_batches: vec![batch.clone()] };
            let stats = learner.train(&mut decoder, &shard)?;
            best = best.min(stats.phases.forward_backward);
            last = Some(stats.phases);
        }
        let rate = f64::from(ROWS * LENGTH) / best;
        println!(
            "{}",
            serde_json::json!({
                "what": "forward and backward, hidden 128, 4 layers, vocabulary 1024, f32, 1 thread",
                "micro_batch_tokens": limit, "tokens_per_second": rate, "last_step": format!("{last:?}"),
            })
        );
    }
    Ok(())
}
