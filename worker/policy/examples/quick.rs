use std::time::Instant;
use agentfly_common::ids::{PolicyVersion, ChainKey, Purpose};
use agentfly_common::batch::{MiniBatch, TrainRow, TrainShard};
use agentfly_common::sampling::SamplingParams;
use agentfly_policy::engine::{Engine, EngineConfig, TurnRequest};
use agentfly_policy::model::Decoder;
use agentfly_policy::learner::*;
use tch::{Device, Kind};
fn main() -> anyhow::Result<()> {
    let a: Vec<String> = std::env::args().collect();
    let kind = if a[2] == "f32" { Kind::Float } else { Kind::BFloat16 };
    agentfly_policy::placement::set_up(a[3].parse()?, agentfly_policy::placement::Place::Cpu)?;
    let t = Instant::now();
    let mut decoder = Decoder::load(std::path::Path::new(&a[1]), kind, Device::Cpu)?;
    println!("load {:.2}", t.elapsed().as_secs_f64());
    if a[4] == "gen" {
        for chains in [16u64, 64, 32] {
            for rep in 0..4 {
                let mut engine = Engine::new(EngineConfig { max_slots: 64, cache_tokens: 64*256, max_tokens_per_chain: 1024, max_prefill_tokens: 4096 }, decoder.config());
                for chain in 0..chains {
                    let g = chain / 8;
                    let new_tokens = (0..98).map(|i| ((i * 7 + g * 131 + 11) % 40000) as u32).collect();
                    engine.submit(TurnRequest { chain, group: Some(g), new_tokens, seed: chain + rep, sampling: SamplingParams { temperature: 1.0, top_p: 1.0, top_k: None, max_tokens: 128, stop_ids: vec![] } })?;
                }
                let t = Instant::now();
                let mut first = 0.0;
                while engine.has_work() { engine.step(&decoder, PolicyVersion(0))?; if first == 0.0 { first = t.elapsed().as_secs_f64(); } }
                let s = t.elapsed().as_secs_f64();
                println!("chains {chains} rep {rep}: {:.0} tok/s, first step {first:.3}s total {s:.2}", chains as f64 * 128.0 / s);
            }
        }
    } else {
        let v = decoder.config().vocab as u32;
        let rows: Vec<TrainRow> = (0..16).map(|i| TrainRow { key: ChainKey { purpose: Purpose::Train, step: 1, group: i / 8, chain: i % 8 },
            token_ids: (0..256).map(|j| (i * 31 + j * 701) % v).collect(), rollout_log_probs: vec![-5.0; 256], advantages: vec![if i % 2 == 0 { 1.0 } else { -1.0 }; 256], loss_mask: (0..256).map(|j| j > 0).collect() }).collect();
        let cfg = LearnerConfig { use_kl_loss: true, micro_batch: MicroBatchLimit::Tokens(a[5].parse()?), recompute: a.get(6).is_some(), ..LearnerConfig::default() };
        let mut learner = Learner::new(cfg, &decoder, true, None)?;
        for s in 0..4 {
            let shard = TrainShard { step: s + 1, policy_version: PolicyVersion(s), mini_batches: vec![MiniBatch { rows: rows.clone(), global_loss_tokens: 16 * 255, global_rows: 16 }] };
            let st = learner.train(&mut decoder, &shard)?;
            println!("fb {:.0} tok/s ref {:.0} tok/s  {:?}", 4096.0 / st.phases.forward_backward, 4096.0 / st.phases.reference, st.phases);
        }
        println!("{}", std::fs::read_to_string("/proc/self/status")?.lines().filter(|l| l.starts_with("VmHWM")).collect::<String>());
    }
    Ok(())
}
