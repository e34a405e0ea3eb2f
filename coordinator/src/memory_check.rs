//! Whether a job's ranks fit the machines they would run on, asked before any of them is started.
//!
//! Called by `coordinator train` and `explain`. Each rank plans again on its own machine, and knows better: what
//! passes here may still be refused there (GPUs do not tell their memory to the coordinator), never the other way round.

use agentfly_common::config::Config;
use agentfly_common::machine::{cores, cpu_computes_bf16, gpus, memory};
use agentfly_common::model_dir::ModelConfig;
use agentfly_common::planner::{DeviceKind, Machine, Plan, Precision, Refusal, Workload, plan};
use agentfly_proto::v1 as pb;
use anyhow::anyhow;

use crate::failure::{Failure, Outcome};

/// The plan of a rank if `ranks` of them run on this machine's CPU; `None` on a machine with GPUs.
pub fn plan_here(config: &Config, model: &ModelConfig, ranks: u32) -> Option<Result<Plan, Box<Refusal>>> {
    if gpus() > 0 {
        return None;
    }
    let here = machine(memory().total_bytes, cores(), ranks);
    Some(plan(&workload(config, model, cpu_computes_bf16()), &here))
}

/// Refuses a job whose ranks fit no node of a cluster that runs on CPUs.
///
/// # Errors
/// What the largest node lacks.
pub fn check_nodes(config: &Config, model: &ModelConfig, nodes: &[pb::NodeInfo]) -> Outcome {
    let alive: Vec<&pb::NodeInfo> = nodes.iter().filter(|node| node.state == "alive").collect();
    if alive.iter().any(|node| node.gpus > 0) {
        return Ok(());
    }
    // A node elsewhere may compute bf16: what would not even fit so fits nowhere.
    let work = workload(config, model, true);
    let mut refused = Vec::new();
    for node in alive.into_iter().filter(|node| node.cpu_ranks > 0) {
        let ranks = config.trainer.n_gpus_per_node.min(node.cpu_ranks);
        match plan(&work, &machine(node.memory_bytes, node.cpus, ranks)) {
            Ok(_) => return Ok(()),
            Err(refusal) => refused.push((node, refusal)),
        }
    }
    match refused.into_iter().max_by_key(|(node, _)| node.memory_bytes) {
        None => Ok(()), // no node yet: the job waits for some
        Some((node, refusal)) => Err(Failure::operator(anyhow!(refusal))
            .context(format!("the job does not fit node {}", node.node_id))),
    }
}

/// CPU ranks on a node.
fn machine(memory_bytes: u64, cores: u32, ranks: u32) -> Machine {
    let threads = (cores / ranks.max(1)).max(1);
    Machine { kind: DeviceKind::Cpu, memory_bytes: Some(memory_bytes), ranks, threads }
}

fn workload<'a>(config: &Config, model: &'a ModelConfig, computes_bf16: bool) -> Workload<'a> {
    let asked = config.actor_rollout_ref.rollout.dtype;
    let precision = Precision::choose(asked, model.torch_dtype.as_deref(), computes_bf16);
    Workload::of(config, model, precision)
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    fn node(id: &str, memory_bytes: u64) -> pb::NodeInfo {
        let (node_id, state) = (id.to_owned(), "alive".to_owned());
        pb::NodeInfo { node_id, state, memory_bytes, cpu_ranks: 2, ..Default::default() }
    }

    #[test]
    fn a_job_that_fits_no_node_is_refused_by_the_largest_and_one_that_fits_any_is_not() {
        let config = agentfly_common::config::resolve(&[], None, []).unwrap().config;
        let tiny = Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy/models/tiny");
        let model = ModelConfig::from_dir(&tiny).unwrap();
        let (small, smaller) = (node("small", 700 << 20), node("smaller", 600 << 20));
        let told = check_nodes(&config, &model, &[smaller.clone(), small.clone()]).unwrap_err();
        assert_eq!(told.whose, agentfly_common::error::Whose::Operator);
        let told = told.to_string();
        assert!(told.contains("node small:") && told.contains("not enough memory"), "{told}");
        assert!(check_nodes(&config, &model, &[small.clone(), node("large", 8 << 30)]).is_ok());
        assert!(check_nodes(&config, &model, &[]).is_ok(), "it waits for nodes");
        let with_gpu = pb::NodeInfo { gpus: 1, ..smaller };
        assert!(
            check_nodes(&config, &model, &[small, with_gpu]).is_ok(),
            "a GPU's memory is the rank's to know"
        );
    }
}
