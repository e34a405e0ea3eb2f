//! A rank's memory, planned before its weights are loaded.
//!
//! What must stay true: a rank that cannot hold its job says so here, with the numbers, and not by being killed.

use std::path::Path;

use agentfly_common::config::{Config, Dtype as Asked};
use agentfly_common::machine::{Memory, memory};
use agentfly_common::model_dir::ModelConfig;
use agentfly_common::planner::{DeviceKind, Machine, Plan, Workload, plan};
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
pub(crate) fn machine(place: Place, ranks: u32, threads: u32) -> Found {
    match place {
        Place::Cpu => {
            let Memory { total_bytes, available_bytes } = memory();
            let ranks = ranks.max(1);
            let machine = Machine { kind: DeviceKind::Cpu, memory_bytes: Some(total_bytes), ranks, threads };
            Found { machine, free_bytes: Some(available_bytes) }
        }
        Place::Cuda(index) => {
            let gpu = gpu::list().into_iter().find(|gpu| gpu.index as usize == index);
            let (memory_bytes, free_bytes) =
                gpu.map_or((None, None), |gpu| (gpu.memory_bytes, gpu.free_bytes));
            let machine = Machine { kind: DeviceKind::Cuda, memory_bytes, ranks: 1, threads };
            Found { machine, free_bytes }
        }
    }
}

/// What [`machine`] found.
pub(crate) struct Found {
    pub(crate) machine: Machine,
    /// Memory that nothing holds now, where it is known: the node's, or the GPU's.
    pub(crate) free_bytes: Option<u64>,
}

impl Found {
    /// What the plan's ranks lack of it now.
    pub(crate) fn lacks_now(&self, plan: &Plan) -> Option<String> {
        plan.lacks_now(self.free_bytes?)
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
    let found = machine(place, options.ranks_on_node, options.threads);
    let plan = plan(&work, &found.machine)?;
    for line in plan.in_words() {
        tracing::info!("memory: {line}");
    }
    if let Some(words) = found.lacks_now(&plan) {
        tracing::warn!("memory: {words}");
    }
    Ok(plan)
}
