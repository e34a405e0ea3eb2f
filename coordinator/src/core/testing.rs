//! Small chains, plans and nodes for the unit tests of this folder.

use std::time::Duration;

use agentfly_common::ids::{ChainKey, PolicyVersion, Purpose};
use agentfly_common::trajectory::{FinishReason, Outcome, Reward, Timings, Trajectory};

use super::advantage::Estimator;
use super::event::{Device, NodeFacts};
use super::settings::JobPlan;

/// A training chain of `tokens` tokens: one of prompt, the others sampled.
pub(super) fn chain(step: u64, group: u32, chain: u32, tokens: usize, reward: f64) -> Trajectory {
    let sampled: Vec<bool> = (0..tokens).map(|token| token > 0).collect();
    Trajectory {
        key: ChainKey { purpose: Purpose::Train, step, group, chain },
        prompt_id: format!("row {group}"),
        policy_version: PolicyVersion(step.saturating_sub(1)),
        token_ids: vec![1; tokens],
        log_probs: sampled.iter().map(|&sampled| if sampled { -0.5 } else { 0.0 }).collect(),
        loss_mask: sampled,
        messages: Vec::new(),
        outcome: Outcome::Finished { reason: FinishReason::Terminal },
        reward: Reward { value: reward, parts: std::collections::BTreeMap::new() },
        timings: Timings { turns: 1, total_seconds: 1.0, ..Timings::default() },
    }
}

/// A job of two steps for `world_size` ranks.
pub(super) fn plan(world_size: u32) -> JobPlan {
    JobPlan {
        ranks_per_node: world_size,
        world_size,
        seed: 1,
        data_seed: 1,
        groups_per_step: 2,
        chains_per_group: 2,
        mini_batch_rows: 4,
        estimator: Estimator::Grpo { by_std: true },
        learning_rate: 1e-3,
        total_steps: 2,
        train_rows: 4,
        validation_rows: 0,
        shuffle: false,
        validation_sources: Vec::new(),
        validate_first: false,
        validate_only: false,
        validate_every: None,
        save_every: None,
        max_turn_tokens: 64,
        start_deadline: Duration::from_secs(60),
        rollout_deadline: Duration::from_secs(60),
        train_deadline: Duration::from_secs(60),
        checkpoint_deadline: Duration::from_secs(60),
        resume: None,
    }
}

/// A node with so many CPU seats and four cores.
pub(super) fn facts(seats: u32) -> NodeFacts {
    NodeFacts {
        hostname: "host".to_owned(),
        devices: (0..seats).map(Device::Cpu).collect(),
        cpus: 4,
        memory_bytes: 1 << 30,
    }
}
