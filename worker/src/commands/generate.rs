//! `worker generate`: one prompt, one answer, from the same engine that makes rollouts.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use agentfly_agent::agents::{Agent, agent};
use agentfly_agent::template::ChatTemplate;
use agentfly_agent::tokenizer::ChatTokenizer;
use agentfly_common::ids::PolicyVersion;
use agentfly_common::sampling::{Generation, SamplingParams, StopReason};
use agentfly_hub::{Want, local_model};
use agentfly_policy::engine::{Engine, EngineConfig, TurnRequest};
use agentfly_policy::model::ModelConfig;
use agentfly_policy::placement::{Place, open, set_up};
use anyhow::{Context as _, ensure};
use serde::Serialize;

use super::{DtypeArg, check_place};

/// Arguments of `worker generate`.
#[derive(Debug, clap::Args)]
pub struct GenerateArgs {
    /// Hugging Face model directory, or a hub name: org/name[@revision]
    #[arg(long, value_name = "MODEL")]
    model: PathBuf,
    /// What to say
    #[arg(long)]
    prompt: String,
    /// Chat template by name (qwen-chat, chatml, …) [default: the model's own]
    #[arg(long)]
    template: Option<String>,
    /// System prompt [default: the agent's, else the template's]
    #[arg(long)]
    system: Option<String>,
    /// Speak to it as this agent type does in training (code): with its system prompt
    #[arg(long, value_name = "TYPE")]
    agent: Option<String>,
    /// 0 is greedy
    #[arg(long, default_value_t = 1.0)]
    temperature: f64,
    /// Nucleus sampling
    #[arg(long, default_value_t = 1.0)]
    top_p: f64,
    /// Only the K most likely tokens
    #[arg(long)]
    top_k: Option<u32>,
    /// Longest answer, tokens
    #[arg(long, default_value_t = 256, value_parser = clap::value_parser!(u32).range(1..))]
    max_tokens: u32,
    /// Seed of the random stream
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Ids, log-probs and text as one JSON object
    #[arg(long)]
    json: bool,
    /// Numbers to compute in
    #[arg(long, value_enum, default_value = "auto")]
    dtype: DtypeArg,
    /// Device: cpu or cuda:N
    #[arg(long, default_value = "cpu")]
    device: Place,
    /// CPU threads
    #[arg(long, default_value_t = 1)]
    threads: u32,
}

#[derive(Serialize)]
struct Answer {
    prompt_ids: Vec<u32>,
    ids: Vec<u32>,
    logprobs: Vec<f32>,
    text: String,
    stop: StopReason,
}

/// Prints the answer.
///
/// # Errors
/// A model, template or sampling setting that cannot be used.
pub fn run(args: &GenerateArgs) -> anyhow::Result<()> {
    let model = local_model(&args.model, Want::Everything)?;
    let tokenizer = Arc::new(ChatTokenizer::from_dir(&model)?);
    let template = ChatTemplate::new(args.template.as_deref(), tokenizer.clone())?;
    let agent = args.agent.as_deref().map(agent).transpose()?;
    let system = args.system.as_deref().or(agent.as_deref().and_then(Agent::system_prompt));
    let prompt_ids = template.prompt_ids(system, &args.prompt, &[])?;
    let generation = sample(args, &model, &prompt_ids, tokenizer.stop_ids())?;
    let text = tokenizer.decode(&generation.ids)?;
    if args.json {
        let Generation { ids, log_probs, stop, .. } = generation;
        println!("{}", serde_json::to_string(&Answer { prompt_ids, ids, logprobs: log_probs, text, stop })?);
    } else {
        println!("{text}");
    }
    Ok(())
}

fn sample(
    args: &GenerateArgs,
    model: &Path,
    prompt_ids: &[u32],
    stop_ids: Vec<u32>,
) -> anyhow::Result<Generation> {
    let config = ModelConfig::from_dir(model)?;
    config.check_tokenizer(model)?;
    let trained = config.max_position_embeddings;
    let trained = usize::try_from(trained).unwrap_or(usize::MAX);
    ensure!(
        prompt_ids.len() < trained,
        "the prompt has {} tokens with its template, and the model was trained for {trained} \
         (max_position_embeddings), answer included; shorten the prompt",
        prompt_ids.len()
    );
    check_place(args.threads, args.device)?;
    set_up(args.threads, args.device)?;
    let decoder = open(model, args.dtype.into(), args.device)?;
    let window = trained.min(prompt_ids.len() + args.max_tokens as usize);
    let limits = EngineConfig {
        max_slots: 1,
        cache_tokens: window,
        max_tokens_per_chain: window,
        max_prefill_tokens: window,
        enforce_eager: false,
    };
    let mut engine = Engine::new(limits, decoder.config());
    let sampling = SamplingParams {
        temperature: args.temperature,
        top_p: args.top_p,
        top_k: args.top_k,
        max_tokens: args.max_tokens,
        stop_ids,
    };
    let request =
        TurnRequest { chain: 0, group: None, new_tokens: prompt_ids.to_vec(), sampling, seed: args.seed };
    engine.submit(request)?;
    while engine.has_work() {
        if let Some((_, ended)) = engine.step(&decoder, PolicyVersion::default())?.into_iter().next() {
            return Ok(ended?);
        }
    }
    Err(anyhow::anyhow!("the engine had nothing to do")).context("the prompt was not taken")
}
