//! Preparing a job: model, tokenizer, template, tools, reward, and the collective group.
//!
//! Everything that can be wrong with the user's files or settings is found here, before the first chain.

use std::path::Path;
use std::str::FromStr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use agentfly_agent::agents::agent;
use agentfly_agent::chain::ChainDeps;
use agentfly_agent::rewards::reward;
use agentfly_agent::template::ChatTemplate;
use agentfly_agent::tokenizer::ChatTokenizer;
use agentfly_agent::tools::{CodeOptions, PythonRunner, ToolSet};
use agentfly_c10d::{Group, Store};
use agentfly_common::config::{Config, Sandbox};
use agentfly_common::ids::PolicyVersion;
use agentfly_common::planner::{GATHERED_CACHES, PAGE_TOKENS, PREFILL_TOKENS, Plan, SAMPLED_AT_A_TIME};
use agentfly_common::seed::JobSeed;
use agentfly_common::telemetry::TRACE;
use agentfly_policy::device::{Device, DeviceHandle};
use agentfly_policy::engine::{Engine, EngineConfig};
use agentfly_policy::learner::{Learner, LearnerError};
use agentfly_policy::placement::{Place, open, set_up};
use agentfly_proto::v1::{FormGroup, Prepare, Ready, StoreOpened, rank_message::Kind as Say};
use agentfly_sandbox::Tier;
use anyhow::{Context as _, anyhow};
use tracing::{Instrument as _, info_span};

use super::generator::EngineGenerator;
use super::job::{Job, LearnerSeat};
use super::learner_config::learner_config;
use super::memory::{dtype, plan_rank};
use super::python::SandboxPython;
use super::train::learner_error;
use super::{RankError, RankOptions, Reporter, determinism};

/// Folder of the model inside a checkpoint, in Hugging Face layout.
pub(super) const MODEL_DIR: &str = "huggingface";
/// How long rank 0's rendezvous store may take to open or to be reached.
const STORE_DEADLINE: Duration = Duration::from_secs(60);

/// A device by name: `cpu:0`, `cuda:3`.
#[derive(Debug, Clone, Copy)]
pub struct DeviceName(pub Place);

impl FromStr for DeviceName {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        text.parse().map(Self).map_err(|e: agentfly_policy::placement::UnknownPlace| e.to_string())
    }
}

/// An address other ranks can reach this one at.
#[derive(Debug, Clone)]
pub struct Address(pub String);

/// Loads everything. What to report: Ready where there is no group to form, of rank 0 else where to meet.
pub(super) async fn prepare(
    options: &RankOptions,
    reporter: &Reporter,
    prepare: Prepare,
) -> Result<(Job, Option<Say>), RankError> {
    reporter.activity.set("reading the configuration");
    let config: Config = serde_json::from_str(&prepare.config_json)
        .context("the job's configuration does not fit this worker's version")
        .map_err(RankError::us)?;
    if config.trainer.trace_freq < 1 {
        reporter.spans.stop();
    }
    let resume_dir = (!prepare.resume_dir.is_empty()).then(|| Path::new(&prepare.resume_dir).to_path_buf());
    // Also on resume the weights of the start are loaded first: they are the frozen reference.
    let model_dir = config.actor_rollout_ref.model.path.clone();

    reporter.activity.set("planning memory");
    let plan = plan_rank(options, &config, &model_dir).map_err(RankError::operator)?;
    determinism::check(options.device.0, &config, &model_dir, plan.precision).map_err(RankError::operator)?;
    reporter.activity.set(format!("loading {}", model_dir.display()));
    let version = PolicyVersion(prepare.policy_version);
    let load = start_device(options, &config, &model_dir, &plan, version);
    let device = load.instrument(info_span!(target: TRACE, "load the model")).await?;

    reporter.activity.set("starting the sandbox, the tools and the reward");
    let tokenizer = Arc::new(ChatTokenizer::from_dir(&model_dir).map_err(RankError::operator)?);
    let (chain_deps, sandbox_tier) = chain_deps(options, &config, &device, &tokenizer)
        .instrument(info_span!(target: TRACE, "start the sandbox"))
        .await?;
    let job = Job {
        seed: JobSeed(prepare.seed),
        plan,
        chain_deps,
        sandbox_tier,
        rank: options.id.rank,
        world_size: prepare.world_size,
        total_steps: prepare.total_steps,
        model_dir,
        resume_dir,
        stop_ids: tokenizer.stop_ids(),
        address: options.address.0.clone(),
        place: options.device.0,
        device,
        store: Mutex::new(None),
        config,
    };
    let say = match job.world_size {
        1 => Some(take_seat(&job, None).await?),
        _ if job.rank == 0 => Some(open_store(&job, reporter)?),
        _ => None,
    };
    Ok((job, say))
}

/// The device thread with the model on it.
async fn start_device(
    options: &RankOptions,
    config: &Config,
    model_dir: &Path,
    plan: &Plan,
    policy_version: PolicyVersion,
) -> Result<DeviceHandle<LearnerSeat>, RankError> {
    let (place, threads) = (options.device.0, options.threads);
    let (dir, dtype, limits) = (model_dir.to_path_buf(), dtype(config), engine_config(config, plan));
    let make = move || {
        set_up(threads, place)?;
        let decoder = open(&dir, dtype, place)?;
        let engine = Engine::new(limits, decoder.config());
        Ok(Device { decoder, engine, policy_version, extra: None })
    };
    DeviceHandle::start(make).await.map_err(RankError::operator)
}

// The plan counts them, and knows no libtorch.
const _: () = assert!(PAGE_TOKENS == agentfly_c10d::ops::PAGE_TOKENS as u64);
const _: () = assert!(SAMPLED_AT_A_TIME == agentfly_c10d::ops::SAMPLED_AT_A_TIME as u64);
const _: () = assert!(GATHERED_CACHES == agentfly_policy::engine::GATHERED_CACHES as u64);

/// The engine's limits and ways.
fn engine_config(config: &Config, plan: &Plan) -> EngineConfig {
    EngineConfig {
        max_slots: plan.slots as usize,
        cache_tokens: usize::try_from(plan.cache_tokens).unwrap_or(usize::MAX),
        max_tokens_per_chain: plan.window as usize,
        max_prefill_tokens: PREFILL_TOKENS as usize,
        enforce_eager: config.actor_rollout_ref.rollout.enforce_eager,
    }
}

async fn chain_deps(
    options: &RankOptions,
    config: &Config,
    device: &DeviceHandle<LearnerSeat>,
    tokenizer: &Arc<ChatTokenizer>,
) -> Result<(ChainDeps, Tier), RankError> {
    let template = ChatTemplate::new(config.agent.template.as_deref(), tokenizer.clone());
    let (sandbox_config, threads) = (config.clone(), options.threads);
    let python = tokio::task::spawn_blocking(move || SandboxPython::start(&sandbox_config, threads))
        .await
        .map_err(|e| RankError::us(anyhow!("starting the sandbox broke: {e}")))?
        .map_err(RankError::operator)?;
    let tier = python.tier();
    let Sandbox { stateful, partial_output, .. } = config.sandbox;
    let code = CodeOptions { stateful, partial_output };
    let python: Arc<dyn PythonRunner> = Arc::new(python);
    let deps = ChainDeps {
        generator: Arc::new(EngineGenerator(device.clone())),
        template: Arc::new(template.map_err(RankError::operator)?),
        agent: agent(config.agent.agent_type.as_str()).map_err(RankError::operator)?,
        tools: ToolSet::by_names(&config.agent.tools, &python, code).map_err(RankError::operator)?,
        reward: Some(reward(&config.agent.reward_name, &python).map_err(RankError::operator)?),
        system_prompt: config.agent.system_prompt.clone(),
    };
    Ok((deps, tier))
}

/// Rank 0 opens the rendezvous store, on any free port, and says where.
fn open_store(job: &Job, reporter: &Reporter) -> Result<Say, RankError> {
    reporter.activity.set("opening the rendezvous store");
    let (store, port) = Store::serve(&job.address, 0, STORE_DEADLINE).map_err(RankError::outside)?;
    *job.store.lock().unwrap_or_else(PoisonError::into_inner) = Some(store);
    Ok(Say::StoreOpened(StoreOpened { host: job.address.clone(), port: u32::from(port) }))
}

/// Joins the group of this generation; what to report: Ready.
pub(super) async fn form_group(job: &Job, reporter: &Reporter, form: FormGroup) -> Result<Say, RankError> {
    reporter.activity.set("forming the collective group");
    let port = u16::try_from(form.port)
        .with_context(|| format!("{} is not a port", form.port))
        .map_err(RankError::us)?;
    let seat = Seat {
        host: form.host,
        port,
        prefix: format!("generation-{}", form.generation),
        rank: job.rank as usize,
        size: job.world_size as usize,
        bind: job.address.clone(),
        place: job.place,
        timeout: job.config.actor_rollout_ref.collective_timeout(),
    };
    take_seat(job, Some(seat)).await
}

/// A place in a collective group.
struct Seat {
    host: String,
    port: u16,
    prefix: String,
    rank: usize,
    size: usize,
    bind: String,
    place: Place,
    timeout: Duration,
}

impl Seat {
    fn join(&self) -> agentfly_c10d::Result<Group> {
        let store = Store::connect(&self.host, self.port, STORE_DEADLINE)?.with_prefix(&self.prefix)?;
        match self.place {
            Place::Cpu => Group::gloo(&store, self.rank, self.size, &self.bind, self.timeout),
            Place::Cuda(device) => Group::nccl(&store, self.rank, self.size, device, self.timeout),
        }
    }
}

/// Makes the learner, in its group if there is one, and attests the weights.
async fn take_seat(job: &Job, seat: Option<Seat>) -> Result<Say, RankError> {
    let config = learner_config(&job.config, job.total_steps, &job.plan);
    let resume = job.resume_dir.clone();
    let work = move |device: &mut Device<LearnerSeat>| {
        let _span = info_span!(target: TRACE, "make the learner", lane = "device").entered();
        let group = seat.map(|seat| seat.join()).transpose().map_err(RankError::outside)?;
        let reference = config.use_kl_loss;
        let mut learner = Learner::new(config, &device.decoder, reference, group).map_err(learner_error)?;
        if let Some(dir) = resume {
            learner.load(&dir, &mut device.decoder).map_err(load_error)?;
            device.engine.forget_weights();
        }
        let (held, told) = (learner.policy_version(), device.policy_version);
        if held != told {
            return Err(RankError::operator(anyhow!(
                "the checkpoint's weights are policy version {held}, but its manifest says {told}"
            )));
        }
        let hash = learner.weights_hash(&device.decoder).map_err(learner_error)?;
        device.extra = Some(learner);
        Ok((device.policy_version, hash))
    };
    let (version, weights_hash) =
        job.device.call("joining the collective group", work).await.map_err(RankError::us)??;
    let sandbox_tier = job.sandbox_tier.to_string();
    Ok(Say::Ready(Ready { policy_version: version.0, weights_hash, sandbox_tier }))
}

/// Who must act when a checkpoint cannot be loaded. Where another rank is the cause, its own report says why.
fn load_error(error: LearnerError) -> RankError {
    match error {
        LearnerError::Collective(_) | LearnerError::PeerCannotRead { .. } => RankError::outside(error),
        other => RankError::operator(other),
    }
}

#[cfg(test)]
mod tests {
    use agentfly_agent::rewards::REWARD_NAMES;
    use agentfly_agent::template::NamedTemplate;
    use agentfly_agent::tools::TOOL_NAMES;
    use agentfly_common::config::{REWARDS, TEMPLATES, TOOLS};

    /// Settings are checked by the coordinator, which does not know the agent crate: the two lists must agree.
    #[test]
    fn every_tool_reward_and_template_the_settings_allow_exists_and_the_other_way_round() {
        let sorted =
            |names: &[&'static str]| names.iter().copied().collect::<std::collections::BTreeSet<_>>();
        assert_eq!(sorted(TOOLS), sorted(TOOL_NAMES));
        assert_eq!(sorted(TEMPLATES), sorted(NamedTemplate::NAMES));
        assert_eq!(sorted(REWARDS), sorted(REWARD_NAMES));
    }
}
