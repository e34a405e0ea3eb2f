//! What the rollout reports of a token is what the learner computes for it, bit for bit: whatever was batched, in
//! whatever stretches a chain was computed, in f32 and in bf16.

mod support;

use std::collections::BTreeMap;
use std::env;
use std::io::Read as _;
use std::process::{Command, Stdio};
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use agentfly_c10d::ops::has_kernels;
use agentfly_common::batch::{MiniBatch, TrainRow, TrainShard};
use agentfly_common::ids::{ChainKey, PolicyVersion, Purpose};
use agentfly_common::sampling::SamplingParams;
use agentfly_policy::engine::{Engine, EngineConfig, TurnRequest};
use agentfly_policy::learner::{Learner, LearnerConfig, MicroBatchLimit};
use agentfly_policy::model::Decoder;
use support::{FAMILIES, model, text};
use tch::{Device, Kind, Tensor};

const TEMPERATURE: f64 = 0.7;
/// Whether bf16 is multiplied in f32; read once, so that each way takes a process of its own.
const IN_F32: &str = "AGENTFLY_BF16_IN_F32";
const DEADLINE: Duration = Duration::from_secs(300);

/// Chains of three turns with observations between, through a cache that does not hold them all; as training rows.
fn rollout(decoder: &Decoder) -> Vec<TrainRow> {
    let limits = EngineConfig {
        max_slots: 5,
        cache_tokens: 512,
        max_tokens_per_chain: 400,
        max_prefill_tokens: 40,
        enforce_eager: false,
    };
    let mut engine = Engine::new(limits, decoder.config());
    let mut rows: BTreeMap<u64, TrainRow> = BTreeMap::new();
    for round in 0..3_u32 {
        for chain in 0..8_u64 {
            let prompt_of = if round == 0 { chain as u32 / 4 } else { 10 * round + chain as u32 };
            let new_tokens = text(if round == 0 { 70 } else { 9 + chain as usize }, prompt_of);
            let row = rows.entry(chain).or_insert_with(|| TrainRow {
                key: ChainKey {
                    purpose: Purpose::Train,
                    step: 1,
                    group: chain as u32 / 4,
                    chain: chain as u32 % 4,
                },
                token_ids: Vec::new(),
                rollout_log_probs: Vec::new(),
                advantages: Vec::new(),
                loss_mask: Vec::new(),
            });
            append(row, &new_tokens, None);
            let sampling = SamplingParams {
                temperature: TEMPERATURE,
                top_p: 0.95,
                top_k: None,
                max_tokens: 80 + chain as u32,
                stop_ids: vec![],
            };
            let group = (round == 0).then_some(chain / 4);
            engine.submit(TurnRequest { chain, group, new_tokens, sampling, seed: chain }).expect("it fits");
        }
        while engine.has_work() {
            for (chain, ended) in engine.step(decoder, PolicyVersion(0)).expect("the forward pass works") {
                let generation = ended.expect("the turn ends well");
                let row = rows.get_mut(&chain).expect("it was submitted");
                append(row, &generation.ids, Some(&generation.log_probs));
            }
        }
    }
    let stats = engine.stats();
    assert!(stats.shared_tokens > 0 && stats.preemptions > 0, "the hard ways were taken: {stats:?}");
    rows.into_values().collect()
}

fn append(row: &mut TrainRow, ids: &[u32], log_probs: Option<&[f32]>) {
    row.token_ids.extend(ids);
    row.loss_mask.extend(ids.iter().map(|_| log_probs.is_some()));
    row.rollout_log_probs.extend(log_probs.map_or(vec![0.0; ids.len()], <[f32]>::to_vec));
    row.advantages.extend(ids.iter().map(|_| if log_probs.is_some() { 1.0 } else { 0.0 }));
}

#[test]
fn a_rollouts_log_probs_are_the_learners_to_the_bit() {
    for family in FAMILIES {
        for kind in [Kind::Float, Kind::BFloat16] {
            let mut decoder = model(family, 3).cast(kind, Device::Cpu).expect("it is small");
            if !has_kernels(&Tensor::zeros([1], (kind, Device::Cpu))) {
                eprintln!(
                    "{kind:?} not checked: this CPU lacks the instructions, and libtorch's own products decide"
                );
                continue;
            }
            let rows = rollout(&decoder);
            let loss_tokens = rows.iter().flat_map(|row| &row.loss_mask).filter(|m| **m).count() as u64;
            let config = LearnerConfig {
                temperature: TEMPERATURE,
                micro_batch: MicroBatchLimit::Tokens(500),
                ..LearnerConfig::default()
            };
            let mut learner = Learner::new(config, &decoder, false, None).expect("the settings are sound");
            let mini_batch =
                MiniBatch { global_rows: rows.len() as u64, global_loss_tokens: loss_tokens, rows };
            let shard =
                TrainShard { step: 1, policy_version: PolicyVersion(0), mini_batches: vec![mini_batch] };
            let stats = learner.train(&mut decoder, &shard).expect("the step works");
            assert_eq!(stats.metrics["training/rollout_probs_diff_max"], 0.0, "{family} {kind:?}");
            assert_eq!(stats.metrics["rollout_corr/log_prob_diff_max"], 0.0, "{family} {kind:?}");
            assert_eq!(stats.metrics["rollout_corr/kl"], 0.0, "{family} {kind:?}");
        }
    }
}

#[test]
fn so_they_are_in_whichever_way_bf16_is_multiplied() {
    if env::var_os(IN_F32).is_some() {
        return;
    }
    for way in ["0", "1"] {
        let mut story = Command::new(env::current_exe().expect("this test"))
            .args(["--exact", "a_rollouts_log_probs_are_the_learners_to_the_bit"])
            .env(IN_F32, way)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .expect("it runs already");
        let mut told = story.stdout.take().expect("it is piped");
        let (sender, ended) = mpsc::channel();
        thread::spawn(move || {
            let mut text = String::new();
            let read = told.read_to_string(&mut text).map(|_| text);
            sender.send(read)
        });
        let text = ended.recv_timeout(DEADLINE).inspect_err(|_| story.kill().expect("it is ours"));
        let status = story.wait().expect("it ended, or was killed");
        let text = text.expect("within its deadline").expect("it tells in UTF-8");
        assert!(status.success() && text.contains("1 passed"), "{IN_F32}={way}, {status}:\n{text}");
    }
}
