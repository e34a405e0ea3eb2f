//! The core's words ⇄ the wire's, for sessions and commands. Called by the scheduler and the API.

use agentfly_proto::v1 as pb;
use pb::rank_command::Kind;

use crate::core::NodeView;
use crate::core::event::{CoreFault, Device, Level, NodeFacts, Phase, RankCommand, RankId};

/// A rank, from the wire.
#[must_use]
pub fn rank_from(rank: pb::RankId) -> RankId {
    RankId { job: rank.job_id, rank: rank.rank, incarnation: rank.incarnation }
}

/// A rank, to the wire.
#[must_use]
pub fn rank_to(rank: &RankId) -> pb::RankId {
    pb::RankId { job_id: rank.job.clone(), rank: rank.rank, incarnation: rank.incarnation }
}

/// A fault, from the wire.
#[must_use]
pub fn fault_from(fault: pb::Fault) -> CoreFault {
    CoreFault { whose: fault.whose().into(), message: fault.message }
}

/// A fault, to the wire.
#[must_use]
pub fn fault_to(fault: &CoreFault) -> pb::Fault {
    pb::Fault { whose: pb::Whose::from(fault.whose).into(), message: fault.message.clone() }
}

/// A device, to the wire.
#[must_use]
pub fn device_to(device: Device) -> pb::Device {
    let (kind, index) = match device {
        Device::Cpu(index) => ("cpu", index),
        Device::Cuda(index) => ("cuda", index),
    };
    pb::Device { kind: kind.to_owned(), index }
}

/// A node's facts, from the wire.
///
/// # Errors
/// Names a device of a kind that is not known.
pub fn facts_from(hello: &pb::NodeHello) -> Result<NodeFacts, String> {
    let device = |device: &pb::Device| match device.kind.as_str() {
        "cpu" => Ok(Device::Cpu(device.index)),
        "cuda" => Ok(Device::Cuda(device.index)),
        other => Err(format!("node {} has a device of kind {other}; known are cpu and cuda", hello.node_id)),
    };
    Ok(NodeFacts {
        hostname: hello.hostname.clone(),
        devices: hello.devices.iter().map(device).collect::<Result<_, _>>()?,
        cpus: hello.cpus,
        memory_bytes: hello.memory_bytes,
    })
}

/// A node, for people.
#[must_use]
pub fn node_info(node: &NodeView, memory_used_bytes: u64) -> pb::NodeInfo {
    let count = |cpu: bool| node.facts.devices.iter().filter(|d| matches!(d, Device::Cpu(_)) == cpu).count();
    let ranks = node.ranks.iter().map(|rank| pb::RankInfo {
        rank: Some(rank_to(&rank.rank)),
        activity: rank.activity.clone(),
        activity_seconds: rank.activity_for.as_secs_f64(),
    });
    pb::NodeInfo {
        node_id: node.node.clone(),
        hostname: node.facts.hostname.clone(),
        state: if node.lost.is_none() { "alive" } else { "lost" }.to_owned(),
        cpus: node.facts.cpus,
        memory_bytes: node.facts.memory_bytes,
        memory_used_bytes,
        cpu_ranks: u32::try_from(count(true)).unwrap_or(u32::MAX),
        gpus: u32::try_from(count(false)).unwrap_or(u32::MAX),
        silent_seconds: node.silent.as_secs_f64(),
        ranks: ranks.collect(),
    }
}

/// How a rank's process ended, in words.
#[must_use]
pub fn exit_cause(exited: &pb::RankExited) -> String {
    let how = match (exited.signal, exited.exit_code) {
        (Some(9), _) => "was killed (signal 9; out of memory?)".to_owned(),
        (Some(signal), _) => format!("was ended by signal {signal}"),
        (None, Some(code)) => format!("ended with exit code {code}"),
        (None, None) => "ended".to_owned(),
    };
    // That all went well until then explains nothing; it is in the rank's log.
    let telling = |line: &&String| !line.contains(" INFO ") && !line.contains(" DEBUG ");
    let words: Vec<&str> = exited.log_tail.iter().filter(telling).map(String::as_str).collect();
    match words.is_empty() || exited.exit_code == Some(0) {
        true => how,
        false => format!("{how}; its last words: {}", words.join(" | ")),
    }
}

/// The word for a phase.
#[must_use]
pub fn phase_name(phase: Phase) -> &'static str {
    match phase {
        Phase::Rollout => "rollout",
        Phase::Train => "train",
        Phase::Validation => "validation",
        Phase::Checkpoint => "checkpoint",
    }
}

/// The word for a level.
#[must_use]
pub fn level_name(level: Level) -> &'static str {
    match level {
        Level::Info => "info",
        Level::Warn => "warn",
        Level::Error => "error",
    }
}

/// What the shell adds to a command.
pub struct Attachments<'a> {
    /// The job's configuration.
    pub config_json: &'a str,
    /// `(id, row as JSON)` of a row of the command's data set.
    pub row: &'a dyn Fn(agentfly_common::ids::Purpose, usize) -> Option<(String, String)>,
    /// Where a checkpoint is to be written.
    pub checkpoint_dir: &'a std::path::Path,
}

/// A command to a rank, with what the shell attaches.
///
/// # Errors
/// When a row does not exist.
pub fn command_to(command: RankCommand, with: &Attachments<'_>) -> Result<Kind, CoreFault> {
    Ok(match command {
        RankCommand::Prepare { world_size, seed, resume, policy_version, total_steps } => {
            Kind::Prepare(pb::Prepare {
                config_json: with.config_json.to_owned(),
                world_size,
                seed,
                resume_dir: resume.map(|dir| dir.to_string_lossy().into_owned()).unwrap_or_default(),
                policy_version: policy_version.0,
                total_steps,
            })
        }
        RankCommand::FormGroup { generation, host, port } => {
            Kind::FormGroup(pb::FormGroup { generation, host, port: u32::from(port) })
        }
        RankCommand::RunRollout { shard, purpose, step, policy_version, chains, groups, deadline } => {
            let group = |(index, row): (u32, usize)| match (with.row)(purpose, row) {
                Some((prompt_id, row_json)) => Ok(pb::Group { index, prompt_id, row_json }),
                None => Err(CoreFault {
                    whose: agentfly_common::error::Whose::Us,
                    message: format!(
                        "step {step}: there is no row {row} in the data set; please report this"
                    ),
                }),
            };
            Kind::RunRollout(pb::RunRollout {
                shard_id: shard,
                purpose: pb::Purpose::from(purpose).into(),
                step,
                policy_version: policy_version.0,
                chains,
                groups: groups.into_iter().map(group).collect::<Result<_, _>>()?,
                deadline_seconds: deadline.as_secs_f64(),
            })
        }
        RankCommand::RunTrain { step, policy_version } => {
            Kind::RunTrain(pb::RunTrain { step, policy_version: policy_version.0 })
        }
        RankCommand::WriteCheckpoint { step } => {
            let dir = with.checkpoint_dir.to_string_lossy().into_owned();
            Kind::WriteCheckpoint(pb::WriteCheckpoint { step, dir })
        }
        RankCommand::Stop { why } => Kind::Stop(pb::Stop { why }),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rank_that_died_says_how_and_its_last_words() {
        let rank = Some(pb::RankId { job_id: "job-1".into(), rank: 0, incarnation: 0 });
        let exited = |signal, exit_code, tail: &[&str]| pb::RankExited {
            rank: rank.clone(),
            signal,
            exit_code,
            log_tail: tail.iter().map(|&line| line.to_owned()).collect(),
        };
        assert_eq!(exit_cause(&exited(Some(9), None, &[])), "was killed (signal 9; out of memory?)");
        let cause = exit_cause(&exited(None, Some(70), &["a", "b"]));
        assert_eq!(cause, "ended with exit code 70; its last words: a | b");
        let cause = exit_cause(&exited(None, Some(70), &["12:00 INFO rank: all is well", "Aborted"]));
        assert_eq!(cause, "ended with exit code 70; its last words: Aborted");
    }
}
