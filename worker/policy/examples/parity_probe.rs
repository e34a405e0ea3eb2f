//! Computes what `make parity` compares: one JSON request a line on stdin, one JSON answer a line on stdout,
//! tensors in safetensors files that the request names.
//!
//! Called by deploy/scripts/parity. What must stay true: every figure comes through the calls that workers make
//! (placement, scores, engine, learner, export), on one model at a time; a request that fails is answered with
//! its reason, and the next one is served.
//!
//! `cargo run --release -p agentfly-policy --example parity_probe -- [THREADS]`; `PARITY_DEVICE=cuda:0` moves it to a GPU

use std::collections::BTreeMap;
use std::io::{BufRead as _, Write as _};
use std::path::PathBuf;

use agentfly_common::batch::{MiniBatch, TrainRow, TrainShard};
use agentfly_common::ids::{ChainKey, PolicyVersion, Purpose};
use agentfly_common::sampling::SamplingParams;
use agentfly_policy::engine::{Engine, EngineConfig, TurnRequest};
use agentfly_policy::learner::{Learner, LearnerConfig, MicroBatchLimit};
use agentfly_policy::model::{Decoder, export, score_rows, visit_logits};
use agentfly_policy::placement::{Dtype, Place, open, random, save, set_up};
use anyhow::{Context as _, anyhow, bail};
use serde::{Deserialize, Serialize};
use tch::Tensor;

/// What is asked. Every request but the first two works on the model last opened or drawn.
#[derive(Deserialize)]
#[serde(tag = "op", rename_all = "snake_case", deny_unknown_fields)]
enum Request {
    /// Reads a Hugging Face directory; `dtype` is f32 or bf16.
    Open { model: PathBuf, dtype: String },
    /// Draws fresh f32 weights for a directory's config.json.
    Random { model: PathBuf, seed: u64 },
    /// `log_probs` and `entropies`, `[N]` f32 each: those of the rows' tokens, each row without its first.
    Scores { rows: Vec<Vec<u32>>, out: PathBuf },
    /// `logits`, `[N, vocab]` f32: those that follow each token of the rows.
    Logits { rows: Vec<Vec<u32>>, out: PathBuf },
    /// The gradient of one GRPO update in every parameter, by name, f32.
    Gradients {
        rows: Vec<LossRow>,
        temperature: f64,
        entropy_coeff: f64,
        micro_batch_tokens: usize,
        out: PathBuf,
    },
    /// Greedy turns of several chains through an engine of these limits.
    Greedy { chains: Vec<Chain>, max_slots: usize, max_prefill_tokens: usize, cache_tokens: usize },
    /// Writes the model as training does, with the files beside the weights from `source`, or from its
    /// configuration alone.
    Export { to: PathBuf, source: Option<PathBuf> },
}

/// A row of the batch, one entry a token in each list.
#[derive(Deserialize)]
struct LossRow {
    ids: Vec<u32>,
    loss_mask: Vec<bool>,
    advantages: Vec<f32>,
    /// Rows of a group may share what they begin with; one without is alone.
    group: Option<u32>,
}

/// A chain's turns; chains of a group have the same first tokens.
#[derive(Deserialize)]
struct Chain {
    group: Option<u64>,
    turns: Vec<Turn>,
}

/// New tokens, then this many sampled ones.
#[derive(Deserialize, Clone)]
struct Turn {
    new_tokens: Vec<u32>,
    max_tokens: u32,
}

/// What a turn sampled.
#[derive(Serialize)]
struct Sampled {
    ids: Vec<u32>,
    log_probs: Vec<f32>,
}

fn main() -> anyhow::Result<()> {
    let threads = std::env::args().nth(1).map_or(Ok(1), |text| text.parse()).context("THREADS")?;
    let place: Place = std::env::var("PARITY_DEVICE").map_or(Ok(Place::Cpu), |text| text.parse())?;
    set_up(threads, place)?;
    let mut decoder = None;
    let mut out = std::io::stdout().lock();
    for line in std::io::stdin().lock().lines() {
        let answer =
            match serde_json::from_str(&line?).context("request").and_then(|r| serve(r, place, &mut decoder))
            {
                Ok(value) => serde_json::json!({ "ok": value }),
                Err(error) => serde_json::json!({ "error": format!("{error:#}") }),
            };
        writeln!(out, "{answer}")?;
        out.flush()?;
    }
    Ok(())
}

fn serve(request: Request, place: Place, model: &mut Option<Decoder>) -> anyhow::Result<serde_json::Value> {
    let done = serde_json::Value::Null;
    match request {
        Request::Open { model: dir, dtype } => {
            let dtype = match dtype.as_str() {
                "f32" => Dtype::F32,
                "bf16" => Dtype::Bf16,
                other => bail!("dtype {other:?}; needed: f32 or bf16"),
            };
            *model = None; // one model in memory
            *model = Some(open(&dir, dtype, place)?);
            return Ok(done);
        }
        Request::Random { model: dir, seed } => {
            *model = Some(random(&dir, seed)?);
            return Ok(done);
        }
        _ => {}
    }
    let decoder = model.as_mut().ok_or_else(|| anyhow!("no model is open"))?;
    match request {
        Request::Open { .. } | Request::Random { .. } => {}
        Request::Scores { rows, out } => scores(decoder, &rows, &out)?,
        Request::Logits { rows, out } => logits(decoder, &rows, &out)?,
        Request::Gradients { rows, temperature, entropy_coeff, micro_batch_tokens, out } => {
            let config = LearnerConfig {
                lr: 0.0,
                grad_clip: f64::MAX,
                temperature,
                entropy_coeff,
                micro_batch: MicroBatchLimit::Tokens(micro_batch_tokens),
                ..LearnerConfig::default()
            };
            let gradients = gradients(decoder, config, rows)?;
            Tensor::write_safetensors(&gradients, out)?;
        }
        Request::Greedy { chains, max_slots, max_prefill_tokens, cache_tokens } => {
            let longest = chains.iter().map(Chain::tokens).max().unwrap_or(0);
            // Room for one more: a turn ends when its chain's window is full.
            let max_tokens_per_chain = longest + 1;
            let limits = EngineConfig {
                max_slots,
                cache_tokens,
                max_tokens_per_chain,
                max_prefill_tokens,
                enforce_eager: false,
            };
            return Ok(serde_json::to_value(greedy(decoder, &chains, limits)?)?);
        }
        Request::Export { to, source: Some(source) } => save(&to, decoder, &source)?,
        Request::Export { to, source: None } => {
            let named: Vec<(String, Tensor)> = decoder
                .parameters()
                .iter()
                .map(|(name, tensor)| (name.into(), tensor.shallow_clone()))
                .collect();
            export(&to, decoder.config(), &named, None)?;
        }
    }
    Ok(done)
}

fn scores(decoder: &Decoder, rows: &[Vec<u32>], out: &PathBuf) -> anyhow::Result<()> {
    let rows: Vec<&[u32]> = rows.iter().map(Vec::as_slice).collect();
    let scores = score_rows(decoder, &rows)?;
    let log_probs: Vec<f32> = scores.iter().flat_map(|s| s.log_probs.iter().flatten().copied()).collect();
    let entropies: Vec<f32> = scores.iter().flat_map(|s| s.entropies.iter().flatten().copied()).collect();
    let named =
        [("log_probs", Tensor::from_slice(&log_probs)), ("entropies", Tensor::from_slice(&entropies))];
    Ok(Tensor::write_safetensors(&named, out)?)
}

fn logits(decoder: &Decoder, rows: &[Vec<u32>], out: &PathBuf) -> anyhow::Result<()> {
    let rows: Vec<&[u32]> = rows.iter().map(Vec::as_slice).collect();
    let mut parts = Vec::new();
    visit_logits(decoder, &rows, |_, logits| {
        parts.push(logits.shallow_clone());
        Ok(())
    })?;
    Ok(Tensor::write_safetensors(&[("logits", Tensor::f_cat(&parts, 0)?)], out)?)
}

/// One update on these rows with advantages as given and the old policy the current one.
fn gradients(
    decoder: &mut Decoder,
    config: LearnerConfig,
    rows: Vec<LossRow>,
) -> anyhow::Result<Vec<(String, Tensor)>> {
    let global_loss_tokens = rows.iter().flat_map(|row| &row.loss_mask).filter(|m| **m).count() as u64;
    let global_rows = rows.iter().filter(|row| row.loss_mask.contains(&true)).count() as u64;
    let row = |(chain, row): (usize, LossRow)| TrainRow {
        key: ChainKey {
            purpose: Purpose::Train,
            step: 1,
            group: row.group.unwrap_or(u32::MAX - chain as u32),
            chain: chain as u32,
        },
        rollout_log_probs: vec![0.0; row.ids.len()],
        token_ids: row.ids,
        loss_mask: row.loss_mask,
        advantages: row.advantages,
    };
    let rows = rows.into_iter().enumerate().map(row).collect();
    let batch = MiniBatch { rows, global_loss_tokens, global_rows };
    let shard = TrainShard { step: 1, policy_version: PolicyVersion(0), mini_batches: vec![batch] };
    let mut learner = Learner::new(config, decoder, false, None)?;
    learner.train(decoder, &shard)?;
    Ok(learner.last_gradients()?)
}

impl Chain {
    /// How long it will be.
    fn tokens(&self) -> usize {
        self.turns.iter().map(|turn| turn.new_tokens.len() + turn.max_tokens as usize).sum()
    }
}

/// Every turn of every chain; a chain's next turn is submitted as soon as the one before has ended.
fn greedy(decoder: &Decoder, chains: &[Chain], limits: EngineConfig) -> anyhow::Result<Vec<Vec<Sampled>>> {
    let mut engine = Engine::new(limits, decoder.config());
    let submit = |engine: &mut Engine, chain: usize, turn: &Turn| {
        let Turn { new_tokens, max_tokens } = turn.clone();
        let sampling =
            SamplingParams { temperature: 0.0, top_p: 1.0, top_k: None, max_tokens, stop_ids: Vec::new() };
        let group = chains[chain].group;
        engine.submit(TurnRequest { chain: chain as u64, group, new_tokens, sampling, seed: 0 })
    };
    let mut sampled: BTreeMap<u64, Vec<Sampled>> = BTreeMap::new();
    for (index, chain) in chains.iter().enumerate() {
        submit(&mut engine, index, chain.turns.first().ok_or_else(|| anyhow!("chain {index} has no turn"))?)?;
    }
    while engine.has_work() {
        for (chain, result) in engine.step(decoder, PolicyVersion(0))? {
            let generation = result?;
            let turns = sampled.entry(chain).or_default();
            turns.push(Sampled { ids: generation.ids, log_probs: generation.log_probs });
            match chains[chain as usize].turns.get(turns.len()) {
                Some(next) => submit(&mut engine, chain as usize, next)?,
                None => engine.release(chain),
            }
        }
    }
    Ok(sampled.into_values().collect())
}
