//! A rank's memory, planned before its weights are loaded.
//!
//! What must stay true: a rank that cannot hold its job says so here, with the numbers, and not by being killed.

use std::path::Path;

use agentfly_common::config::{Config, Dtype as Asked};
use agentfly_common::machine::memory;
use agentfly_common::model_dir::ModelConfig;
use agentfly_common::planner::{DeviceKind, Machine, Plan, Workload, bytes_in_words, plan};
use agentfly_policy::placement::{Dtype, Place};

use super::RankOptions;
use crate::gpu;

/// The number type that a job asks for.
pub(crate) fn dtype(config: &Config) -> Dtype {
    match config.actor_rollout_ref.rollout.dtype {
        Asked::Auto => Dtype::Auto,
        Asked::Float32 => Dtype::F32,
        Asked::Bfloat16 => Dtype::Bf16,
    }
}

/// What this machine has for ranks on such a place.
pub(crate) fn machine(place: Place, ranks: u32) -> Machine {
    match place {
        Place::Cpu => {
            Machine { kind: DeviceKind::Cpu, memory_bytes: Some(memory().total_bytes), ranks: ranks.max(1) }
        }
        Place::Cuda(index) => {
            let gpu = gpu::list().into_iter().find(|gpu| gpu.index as usize == index);
            Machine { kind: DeviceKind::Cuda, memory_bytes: gpu.and_then(|gpu| gpu.memory_bytes), ranks: 1 }
        }
    }
}

/// Plans this rank's memory and says what was decided.
///
/// # Errors
/// A model that cannot be read, a window it was not trained for, or what does not fit and why.
pub(super) fn plan_rank(options: &RankOptions, config: &Config, model_dir: &Path) -> anyhow::Result<Plan> {
    let model = ModelConfig::from_dir(model_dir)?;
    model.window(&config.actor_rollout_ref.rollout)?;
    let place = options.device.0;
    let work = Workload::of(config, &model, dtype(config).precision(&model, place));
    let plan = plan(&work, &machine(place, options.ranks_on_node))?;
    for line in plan.in_words() {
        tracing::info!("memory: {line}");
    }
    let available = memory().available_bytes;
    if place == Place::Cpu && available < plan.rank.total_bytes {
        tracing::warn!(
            "memory: only {} are free now, for other programs run here; this rank's peak is {}",
            bytes_in_words(available),
            bytes_in_words(plan.rank.total_bytes)
        );
    }
    Ok(plan)
}
