//! A job that cannot fit: what it needs by part, what there is, and which changes would make it fit.

use crate::config::MicroBatch;

use super::choose::{attempt, budget};
use super::words::{bytes_in_words, sum_in_words};
use super::workload::{DeviceKind, Machine, Workload};
use super::{Precision, RankBytes};

/// A window that is offered instead of a longer one is at least this long.
const LEAST_OFFERED_WINDOW: u32 = 512;

/// What there is too little room for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Lacking {
    /// What is always held.
    Weights,
    /// The smallest micro-batch that the settings allow, or one chain's keys and values.
    Tokens { least: u64 },
}

/// A job that does not fit this machine. The operator must act.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "not enough memory: a rank needs at least {}, and may take {} of the {} of {}; it needs {}{}. {}",
    bytes_in_words(rank.total_bytes),
    bytes_in_words(*budget_bytes),
    bytes_in_words(*memory_bytes),
    where_it_is(*kind, *ranks),
    sum_in_words(rank),
    for_what(*lacking),
    way_out(changes, rank.total_bytes)
)]
pub struct Refusal {
    /// The least a rank needs, by part.
    pub rank: RankBytes,
    /// What a rank may take.
    pub budget_bytes: u64,
    /// What its device or node has.
    pub memory_bytes: u64,
    /// Ranks that share it.
    pub ranks: u32,
    /// What would fit: settings, each of them alone; or one entry with all of them together.
    pub changes: Vec<String>,
    kind: DeviceKind,
    lacking: Lacking,
}

impl Refusal {
    pub(super) fn new(work: &Workload<'_>, machine: &Machine, rank: RankBytes, lacking: Lacking) -> Self {
        Self {
            rank,
            budget_bytes: budget(work, machine).unwrap_or(u64::MAX),
            memory_bytes: machine.memory_bytes.unwrap_or(u64::MAX),
            ranks: machine.ranks,
            changes: changes(work, machine),
            kind: machine.kind,
            lacking,
        }
    }
}

/// Settings that fit where those given do not: each alone, else all together.
fn changes(work: &Workload<'_>, machine: &Machine) -> Vec<String> {
    let fits = |work: &Workload<'_>, machine: &Machine| attempt(work, machine).is_ok();
    let mut alone = Vec::new();
    let (mut all, mut all_machine, mut together) = (*work, *machine, Vec::new());
    let mut offer = |text: String, changed: Workload<'_>, elsewhere: Machine| {
        if fits(&changed, &elsewhere) {
            alone.push(text.clone());
        }
        together.push(text);
    };
    if work.precision == Precision::F32 {
        all.precision = Precision::Bf16;
        let text = "actor_rollout_ref.rollout.dtype=bfloat16".to_owned();
        offer(text, Workload { precision: Precision::Bf16, ..*work }, *machine);
    }
    if work.reference {
        all.reference = false;
        let text = "actor_rollout_ref.actor.use_kl_loss=False (no frozen reference)".to_owned();
        offer(text, Workload { reference: false, ..*work }, *machine);
    }
    if !work.may_recompute {
        all.may_recompute = true;
        let text = "actor_rollout_ref.model.enable_gradient_checkpointing=True".to_owned();
        offer(text, Workload { may_recompute: true, ..*work }, *machine);
    }
    if work.micro_batch != MicroBatch::Planned {
        all.micro_batch = MicroBatch::Planned;
        let key = match work.micro_batch {
            MicroBatch::Chains(_) => "ppo_micro_batch_size_per_gpu",
            _ => "ppo_max_token_len_per_gpu",
        };
        let text = format!("leave actor_rollout_ref.actor.{key} out (it is chosen by memory then)");
        offer(text, Workload { micro_batch: MicroBatch::Planned, ..*work }, *machine);
    }
    if let Some(window) = work.window {
        let halves = std::iter::successors(Some(window / 2), |window| Some(window / 2));
        let mut halves = halves.take_while(|window| *window >= LEAST_OFFERED_WINDOW);
        let with = |window: u32| Workload { window: Some(window), ..*work };
        if let Some(window) = halves.find(|window| fits(&with(*window), machine)) {
            offer(format!("actor_rollout_ref.rollout.max_model_len={window}"), with(window), *machine);
        }
        all.window = Some(window.min(LEAST_OFFERED_WINDOW));
    }
    if machine.kind == DeviceKind::Cpu {
        let fewer = (1..machine.ranks).rev().map(|ranks| machine.with_ranks(ranks));
        let with = |ranks: u32| work.with_ranks(machine.ranks, ranks);
        if let Some(fewer) = fewer.clone().find(|fewer| fits(&with(fewer.ranks), fewer)) {
            let text = format!("trainer.n_gpus_per_node={} instead of {}", fewer.ranks, machine.ranks);
            offer(text, with(fewer.ranks), fewer);
        } else if machine.ranks > 1 {
            all.optimizer_shards = with(1).optimizer_shards;
            all_machine = machine.with_ranks(1);
            together.push("trainer.n_gpus_per_node=1".to_owned());
        }
    }
    match (alone.is_empty(), together.len() > 1 && fits(&all, &all_machine)) {
        (true, true) => vec![format!("all of this together: {}", together.join(", "))],
        _ => alone,
    }
}

fn where_it_is(kind: DeviceKind, ranks: u32) -> String {
    match (kind, ranks) {
        (DeviceKind::Cpu, 1) => "this node".to_owned(),
        (DeviceKind::Cpu, ranks) => format!("this node, which {ranks} ranks share"),
        (DeviceKind::Cuda, _) => "its GPU".to_owned(),
    }
}

fn for_what(lacking: Lacking) -> String {
    match lacking {
        Lacking::Weights => String::new(),
        Lacking::Tokens { least } => {
            format!(" (the smallest micro-batch that the settings allow has {least} tokens)")
        }
    }
}

fn way_out(changes: &[String], need: u64) -> String {
    match changes {
        [] => format!(
            "No setting makes it fit: take a smaller model, or a machine with more than {} a rank",
            bytes_in_words(need)
        ),
        changes => format!("What fits: {}", changes.join("; or ")),
    }
}
