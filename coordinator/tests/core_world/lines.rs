//! Decisions as text, one a line, for golden files and for people who read a failed test.

use agentfly_common::batch::{MiniBatch, TrainShard};
use agentfly_common::ids::Purpose;
use agentfly_coordinator::core::event::{Decision, JudgedTrajectory, RankCommand, RankId};

/// A decision as one line.
pub(crate) fn line(decision: &Decision) -> String {
    match decision {
        Decision::StartRank { node, rank, device, threads, .. } => {
            format!("start {} on {node} {device:?} threads={threads}", name(rank))
        }
        Decision::StopRanks { node, job, grace } => format!("stop ranks of {job} on {node} within {grace:?}"),
        Decision::Command { rank, command } => format!("{} <- {}", name(rank), command_line(command)),
        Decision::State { job, state, detail } => format!("{job} is {state:?}: {detail}"),
        Decision::Progress { job, phase, step, done, total } => {
            format!("{job} {phase:?} of step {step}: {done}/{total}")
        }
        Decision::KeepTrajectories { job, purpose, step, rows } => {
            format!("{job} keep {purpose:?} {step}: {}", joined(rows.iter().map(judged)))
        }
        Decision::OfferShard { rank, shard } => format!("{} {}", name(rank), shard_line(shard)),
        Decision::StepFinished { job, step, metrics } => {
            let shown = ["critic/score/mean", "training/epoch", "perf/total_num_tokens"];
            let shown = joined(shown.iter().map(|name| format!("{name}={}", metrics[*name])));
            format!("{job} finished step {step}: {shown}")
        }
        Decision::ValidationFinished { job, step, metrics } => {
            let accuracy = metrics["val-core/exam/acc/mean@1"];
            format!("{job} validated step {step}: val-core/exam/acc/mean@1={accuracy}")
        }
        Decision::CommitCheckpoint { job, point, files } => {
            let files = joined(files.iter().flatten().cloned());
            let (step, policy, hash) = (point.step, point.policy_version, &point.weights_hash);
            format!("{job} commit step {step} policy {policy} {hash}: {files}")
        }
        Decision::Log { job, level, text } => format!("{job} {level:?}: {text}"),
        Decision::Ended { job, end } => {
            let (state, steps, policy) = (end.state, end.steps_done, end.policy_version);
            format!("{job} ended {state:?} after {steps} steps at policy {policy}: {}", end.detail)
        }
    }
}

fn name(rank: &RankId) -> String {
    format!("{}/{}", rank.job, rank.rank)
}

fn joined(parts: impl Iterator<Item = String>) -> String {
    parts.collect::<Vec<_>>().join(" ")
}

fn judged(row: &JudgedTrajectory) -> String {
    let key = row.trajectory.key;
    let advantage = row.advantage.map_or(String::new(), |advantage| format!("={advantage:.3}"));
    format!("{}.{}@row{}{advantage}", key.group, key.chain, row.row)
}

fn shard_line(shard: &TrainShard) -> String {
    let batch = |batch: &MiniBatch| {
        let keys = joined(batch.rows.iter().map(|row| format!("{}.{}", row.key.group, row.key.chain)));
        format!("[{keys} of {} rows, {} tokens]", batch.global_rows, batch.global_loss_tokens)
    };
    let batches = joined(shard.mini_batches.iter().map(batch));
    format!("shard of step {} policy {}: {batches}", shard.step, shard.policy_version)
}

fn command_line(command: &RankCommand) -> String {
    match command {
        RankCommand::Prepare { world_size, policy_version, total_steps, .. } => {
            format!("prepare world={world_size} policy={policy_version} steps={total_steps}")
        }
        RankCommand::FormGroup { generation, host, port } => {
            format!("form group {generation} at {host}:{port}")
        }
        RankCommand::RunRollout { shard, purpose, step, policy_version, chains, groups, .. } => {
            let purpose = if *purpose == Purpose::Train { "rollout" } else { "validate" };
            format!("{purpose} shard={shard} step={step} policy={policy_version} {chains}x{groups:?}")
        }
        RankCommand::RunTrain { step, policy_version } => {
            format!("train step={step} policy={policy_version}")
        }
        RankCommand::WriteCheckpoint { step } => format!("write checkpoint {step}"),
        RankCommand::Stop { why } => format!("stop: {why}"),
    }
}
