//! `worker doctor`: what this machine has, and whether a job fits it. Loads no weights and starts nothing that stays.

mod facts;
mod show;

use std::path::{Path, PathBuf};

use agentfly_common::config::resolve;
use agentfly_common::model_dir::ModelConfig;
use agentfly_common::planner::{Plan, Workload, parameters, plan};
use agentfly_hub::{Want, local_model};
use agentfly_policy::placement::{Place, cuda_built};
use anyhow::Context as _;
use serde::Serialize;

use super::DtypeArg;
use crate::rank::determinism;
use crate::rank::memory::{dtype, machine};
use facts::Facts;

/// The setting that names the model.
const MODEL: &str = "actor_rollout_ref.model.path";

/// Arguments of `worker doctor`.
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub struct DoctorArgs {
    /// Plan for this model: a Hugging Face directory, or a hub name (org/name[@revision]), of which only the
    /// configuration is fetched
    #[arg(long, value_name = "MODEL")]
    model: Option<PathBuf>,
    /// Ranks on this machine [default: trainer.n_gpus_per_node of the settings]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    num_ranks: Option<u32>,
    /// Numbers to compute in [default: actor_rollout_ref.rollout.dtype of the settings]
    #[arg(long, value_enum)]
    dtype: Option<DtypeArg>,
    /// Print JSON
    #[arg(long)]
    json: bool,
    /// The job's settings, as for `coordinator train`
    #[arg(value_name = "KEY=VALUE")]
    settings: Vec<String>,
}

const EXAMPLES: &str = "\
Examples:
  worker doctor
  worker doctor --model deploy/models/tiny --num-ranks 2
  worker doctor --model Qwen/Qwen2.5-3B-Instruct --dtype bf16 trainer.n_gpus_per_node=8

Ends with a non-zero code where something is missing or does not fit, and says what would.";

/// What was found.
#[derive(Debug, Serialize)]
struct Report {
    machine: Facts,
    job: Option<JobReport>,
    /// What must be mended; empty where all is well.
    problems: Vec<String>,
}

/// The plan of a model on this machine.
#[derive(Debug, Serialize)]
struct JobReport {
    model: PathBuf,
    architecture: &'static str,
    parameters: u64,
    device: &'static str,
    plan: Plan,
    /// What the ranks lack of the memory that is free now; nothing: it is enough.
    lacks_now: Option<String>,
}

/// Prints what there is, and the plan.
///
/// # Errors
/// Settings or a model that cannot be read; whatever keeps a job from running here.
pub fn run(args: &DoctorArgs) -> anyhow::Result<()> {
    let machine = Facts::gather();
    let mut problems: Vec<String> = machine.problems();
    let job = match examine(args, &machine) {
        Ok(job) => job,
        Err(error) => {
            problems.push(format!("{error:#}"));
            None
        }
    };
    let report = Report { machine, job, problems };
    match args.json {
        true => println!("{}", serde_json::to_string_pretty(&report)?),
        false => show::print(&report),
    }
    match report.problems.as_slice() {
        [] => Ok(()),
        problems => Err(anyhow::anyhow!("{}", problems.join("\nerror: "))),
    }
}

/// Plans the job that was asked about, if any.
fn examine(args: &DoctorArgs, facts: &Facts) -> anyhow::Result<Option<JobReport>> {
    let mut settings = args.settings.clone();
    if let Some(model) = &args.model {
        let model = model.to_str().context("--model is no text")?;
        settings.push(format!("{MODEL}={model}"));
    }
    match args.dtype {
        None => {}
        Some(DtypeArg::Auto) => settings.push("actor_rollout_ref.rollout.dtype=auto".to_owned()),
        Some(DtypeArg::F32) => settings.push("actor_rollout_ref.rollout.dtype=float32".to_owned()),
        Some(DtypeArg::Bf16) => settings.push("actor_rollout_ref.rollout.dtype=bfloat16".to_owned()),
    }
    if let Some(ranks) = args.num_ranks {
        settings.push(format!("trainer.n_gpus_per_node={ranks}"));
    }
    let environment = std::env::vars_os()
        .filter_map(|(name, value)| Some((name.into_string().ok()?, value.into_string().ok()?)));
    let resolved = resolve(&settings, None, environment)?;
    if !resolved.provenance.contains_key(MODEL) {
        return Ok(None);
    }
    let config = &resolved.config;
    let dir = local_model(&config.actor_rollout_ref.model.path, Want::Configuration)?;
    let model = read(&dir)?;
    model.window(&config.actor_rollout_ref.rollout)?;
    let ranks = config.trainer.n_gpus_per_node;
    let usable = if cuda_built() { facts.gpus.len() } else { 0 };
    let place = if ranks as usize <= usable { Place::Cuda(0) } else { Place::Cpu };
    let precision = dtype(config).precision(&model, place);
    determinism::check(place, config, &dir, precision)?;
    let work = Workload::of(config, &model, precision);
    let found = machine(place, ranks, (facts.cores / ranks.max(1)).max(1));
    let plan = plan(&work, &found.machine)?;
    Ok(Some(JobReport {
        lacks_now: found.lacks_now(&plan),
        parameters: parameters(&model),
        architecture: model.architecture.class_name(),
        model: dir,
        device: if place == Place::Cpu { "cpu" } else { "cuda" },
        plan,
    }))
}

fn read(dir: &Path) -> anyhow::Result<ModelConfig> {
    ModelConfig::from_dir(dir).context("the model cannot be planned for")
}
