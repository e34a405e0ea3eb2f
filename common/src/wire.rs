//! Proto ⇄ domain: the only place that knows both. Used at the edges of the coordinator and the worker.
//!
//! Arrays travel as little-endian bytes; what comes in is checked before it becomes a domain value.

mod spans;

use agentfly_proto::{CHUNK_BYTES, v1 as pb};
use bytemuck::cast_slice;

use crate::batch::{MiniBatch, TrainRow, TrainShard};
use crate::error::Whose;
use crate::ids::{ChainKey, PolicyVersion, Purpose};
use crate::trajectory::{
    BrokenTrajectory, FinishReason, Message, Outcome, Reward, Role, Timings, Trajectory,
};

pub use spans::{gathered_from, unix_micros};

/// A message that does not say what it should: a fault of the sender's program.
#[derive(Debug, thiserror::Error)]
pub enum WireError {
    /// A field is absent or has no known value.
    #[error("{message}.{field} is {found}; expected {expected} (is the other side of the same version?)")]
    Field {
        /// Message type.
        message: &'static str,
        /// Field.
        field: &'static str,
        /// What was there.
        found: String,
        /// What should be.
        expected: &'static str,
    },
    /// An array's bytes are not a whole number of elements.
    #[error("{field} has {bytes} bytes, which is no multiple of {element_bytes}")]
    Packing {
        /// Field.
        field: &'static str,
        /// Its length.
        bytes: usize,
        /// Size of one element.
        element_bytes: usize,
    },
    /// The chunks do not decode.
    #[error("could not decode a {message} of {bytes} bytes")]
    Decode {
        /// Message type.
        message: &'static str,
        /// Its length.
        bytes: usize,
        /// The cause.
        #[source]
        source: tonic::codegen::StdError,
    },
    /// The trajectory breaks an invariant.
    #[error(transparent)]
    Broken(#[from] BrokenTrajectory),
}

fn field<T>(
    message: &'static str,
    field: &'static str,
    found: impl std::fmt::Debug,
    expected: &'static str,
) -> Result<T, WireError> {
    Err(WireError::Field { message, field, found: format!("{found:?}"), expected })
}

/// Splits an encoded message into chunks of at most [`CHUNK_BYTES`].
pub fn chunks(encoded: Vec<u8>) -> impl Iterator<Item = pb::Chunk> {
    let count = encoded.len().div_ceil(CHUNK_BYTES).max(1);
    (0..count).map(move |i| {
        let end = encoded.len().min((i + 1) * CHUNK_BYTES);
        pb::Chunk { data: encoded[i * CHUNK_BYTES..end].to_vec(), last: i + 1 == count }
    })
}

fn u32s(field: &'static str, bytes: &[u8]) -> Result<Vec<u32>, WireError> {
    if !bytes.len().is_multiple_of(4) {
        return Err(WireError::Packing { field, bytes: bytes.len(), element_bytes: 4 });
    }
    Ok(bytes.chunks_exact(4).map(|b| u32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect())
}

fn f32s(field: &'static str, bytes: &[u8]) -> Result<Vec<f32>, WireError> {
    Ok(u32s(field, bytes)?.into_iter().map(f32::from_bits).collect())
}

fn pack_u32s(values: &[u32]) -> Vec<u8> {
    values.iter().flat_map(|v| v.to_le_bytes()).collect()
}

fn pack_f32s(values: &[f32]) -> Vec<u8> {
    pack_u32s(cast_slice(values))
}

fn pack_mask(mask: &[bool]) -> Vec<u8> {
    mask.iter().map(|&m| u8::from(m)).collect()
}

fn mask(bytes: &[u8]) -> Vec<bool> {
    bytes.iter().map(|&b| b != 0).collect()
}

impl From<Whose> for pb::Whose {
    fn from(whose: Whose) -> Self {
        match whose {
            Whose::Operator => Self::Operator,
            Whose::Outside => Self::Outside,
            Whose::Us => Self::Us,
        }
    }
}

impl From<pb::Whose> for Whose {
    fn from(whose: pb::Whose) -> Self {
        match whose {
            pb::Whose::Operator => Self::Operator,
            pb::Whose::Outside => Self::Outside,
            pb::Whose::Us | pb::Whose::Unspecified => Self::Us,
        }
    }
}

impl From<Purpose> for pb::Purpose {
    fn from(purpose: Purpose) -> Self {
        match purpose {
            Purpose::Train => Self::Train,
            Purpose::Validation => Self::Validation,
        }
    }
}

impl TryFrom<pb::Purpose> for Purpose {
    type Error = WireError;
    fn try_from(purpose: pb::Purpose) -> Result<Self, WireError> {
        match purpose {
            pb::Purpose::Train => Ok(Self::Train),
            pb::Purpose::Validation => Ok(Self::Validation),
            pb::Purpose::Unspecified => field("ChainKey", "purpose", purpose, "train or validation"),
        }
    }
}

impl From<ChainKey> for pb::ChainKey {
    fn from(key: ChainKey) -> Self {
        let purpose = pb::Purpose::from(key.purpose).into();
        Self { purpose, step: key.step, group: key.group, chain: key.chain }
    }
}

fn key(message: &'static str, key: Option<pb::ChainKey>) -> Result<ChainKey, WireError> {
    let Some(key) = key else {
        return field(message, "key", "absent", "a chain key");
    };
    Ok(ChainKey { purpose: key.purpose().try_into()?, step: key.step, group: key.group, chain: key.chain })
}

fn role_name(role: Role) -> &'static str {
    match role {
        Role::System => "system",
        Role::User => "user",
        Role::Assistant => "assistant",
        Role::Tool => "tool",
    }
}

fn role(name: &str) -> Result<Role, WireError> {
    Ok(match name {
        "system" => Role::System,
        "user" => Role::User,
        "assistant" => Role::Assistant,
        "tool" => Role::Tool,
        other => return field("Message", "role", other, "system, user, assistant or tool"),
    })
}

fn finish_reason(name: &str) -> Result<FinishReason, WireError> {
    Ok(match name {
        "terminal" => FinishReason::Terminal,
        "no_tool_calls" => FinishReason::NoToolCalls,
        "max_turns" => FinishReason::MaxTurns,
        "max_model_len" => FinishReason::MaxModelLen,
        "timeout" => FinishReason::Timeout,
        other => {
            return field("Trajectory", "finish_reason", other, "a finish reason");
        }
    })
}

impl FinishReason {
    /// Its name on the wire and in files: AgentFly's where AgentFly has it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Terminal => "terminal",
            Self::NoToolCalls => "no_tool_calls",
            Self::MaxTurns => "max_turns",
            Self::MaxModelLen => "max_model_len",
            Self::Timeout => "timeout",
        }
    }
}

impl From<&Trajectory> for pb::Trajectory {
    fn from(t: &Trajectory) -> Self {
        let (finish_reason, infrastructure_fault) = match &t.outcome {
            Outcome::Finished { reason } => (reason.name().to_owned(), String::new()),
            Outcome::InfrastructureFault { cause } => (String::new(), cause.clone()),
        };
        let messages = t.messages.iter().map(|m| pb::Message {
            role: role_name(m.role).to_owned(),
            content: m.content.clone(),
            tool: m.tool.clone().unwrap_or_default(),
        });
        Self {
            key: Some(t.key.into()),
            prompt_id: t.prompt_id.clone(),
            policy_version: t.policy_version.0,
            token_ids: pack_u32s(&t.token_ids),
            loss_mask: pack_mask(&t.loss_mask),
            log_probs: pack_f32s(&t.log_probs),
            messages: messages.collect(),
            finish_reason,
            infrastructure_fault,
            reward: t.reward.value,
            reward_parts: t.reward.parts.clone().into_iter().collect(),
            timings: Some(pb::Timings {
                generate_seconds: t.timings.generate_seconds,
                tool_seconds: t.timings.tool_seconds,
                reward_seconds: t.timings.reward_seconds,
                total_seconds: t.timings.total_seconds,
                turns: t.timings.turns,
                tool_calls: t.timings.tool_calls,
            }),
        }
    }
}

impl TryFrom<pb::Trajectory> for Trajectory {
    type Error = WireError;
    fn try_from(t: pb::Trajectory) -> Result<Self, WireError> {
        let outcome = match t.infrastructure_fault.is_empty() {
            true => Outcome::Finished { reason: finish_reason(&t.finish_reason)? },
            false => Outcome::InfrastructureFault { cause: t.infrastructure_fault },
        };
        let messages = t.messages.into_iter().map(|m| {
            let tool = (!m.tool.is_empty()).then_some(m.tool);
            Ok(Message { role: role(&m.role)?, content: m.content, tool })
        });
        let timings = t.timings.unwrap_or_default();
        let trajectory = Self {
            key: key("Trajectory", t.key)?,
            prompt_id: t.prompt_id,
            policy_version: PolicyVersion(t.policy_version),
            token_ids: u32s("token_ids", &t.token_ids)?,
            loss_mask: mask(&t.loss_mask),
            log_probs: f32s("log_probs", &t.log_probs)?,
            messages: messages.collect::<Result<_, WireError>>()?,
            outcome,
            reward: Reward { value: t.reward, parts: t.reward_parts.into_iter().collect() },
            timings: Timings {
                generate_seconds: timings.generate_seconds,
                tool_seconds: timings.tool_seconds,
                reward_seconds: timings.reward_seconds,
                total_seconds: timings.total_seconds,
                turns: timings.turns,
                tool_calls: timings.tool_calls,
            },
        };
        trajectory.check()?;
        Ok(trajectory)
    }
}

impl From<&TrainShard> for pb::TrainShard {
    fn from(shard: &TrainShard) -> Self {
        let row = |r: &TrainRow| pb::TrainRow {
            key: Some(r.key.into()),
            token_ids: pack_u32s(&r.token_ids),
            loss_mask: pack_mask(&r.loss_mask),
            rollout_log_probs: pack_f32s(&r.rollout_log_probs),
            advantages: pack_f32s(&r.advantages),
        };
        let mini_batch = |m: &MiniBatch| pb::MiniBatch {
            rows: m.rows.iter().map(row).collect(),
            global_loss_tokens: m.global_loss_tokens,
            global_rows: m.global_rows,
        };
        Self {
            step: shard.step,
            policy_version: shard.policy_version.0,
            mini_batches: shard.mini_batches.iter().map(mini_batch).collect(),
        }
    }
}

impl TryFrom<pb::TrainShard> for TrainShard {
    type Error = WireError;
    fn try_from(shard: pb::TrainShard) -> Result<Self, WireError> {
        let row = |r: pb::TrainRow| {
            Ok(TrainRow {
                key: key("TrainRow", r.key)?,
                token_ids: u32s("token_ids", &r.token_ids)?,
                loss_mask: mask(&r.loss_mask),
                rollout_log_probs: f32s("rollout_log_probs", &r.rollout_log_probs)?,
                advantages: f32s("advantages", &r.advantages)?,
            })
        };
        let mini_batch = |m: pb::MiniBatch| {
            Ok(MiniBatch {
                rows: m.rows.into_iter().map(row).collect::<Result<_, WireError>>()?,
                global_loss_tokens: m.global_loss_tokens,
                global_rows: m.global_rows,
            })
        };
        Ok(Self {
            step: shard.step,
            policy_version: PolicyVersion(shard.policy_version),
            mini_batches: shard.mini_batches.into_iter().map(mini_batch).collect::<Result<_, WireError>>()?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn trajectory(tokens: Vec<(u32, Option<f32>)>) -> Trajectory {
        Trajectory {
            key: ChainKey { purpose: Purpose::Train, step: 3, group: 1, chain: 2 },
            prompt_id: "q1".into(),
            policy_version: PolicyVersion(2),
            token_ids: std::iter::once(1).chain(tokens.iter().map(|t| t.0)).collect(),
            loss_mask: std::iter::once(false).chain(tokens.iter().map(|t| t.1.is_some())).collect(),
            log_probs: std::iter::once(0.0).chain(tokens.iter().map(|t| t.1.unwrap_or(0.0))).collect(),
            messages: vec![Message { role: Role::Tool, content: "é\n".into(), tool: Some("t".into()) }],
            outcome: Outcome::Finished { reason: FinishReason::MaxTurns },
            reward: Reward { value: 0.1, parts: [("acc".to_owned(), 1.0)].into() },
            timings: Timings { turns: 2, generate_seconds: 0.5, ..Timings::default() },
        }
    }

    proptest! {
        #[test]
        fn a_trajectory_survives_the_wire(
            tokens in prop::collection::vec((any::<u32>(), prop::option::of(-20.0f32..=0.0)), 0..50)
        ) {
            let before = trajectory(tokens);
            let after = Trajectory::try_from(pb::Trajectory::from(&before)).unwrap();
            prop_assert_eq!(before, after);
        }
    }

    #[test]
    fn every_finish_reason_survives_the_wire() {
        use FinishReason::{MaxModelLen, MaxTurns, NoToolCalls, Terminal, Timeout};
        for reason in [Terminal, NoToolCalls, MaxTurns, MaxModelLen, Timeout] {
            let before = Trajectory { outcome: Outcome::Finished { reason }, ..trajectory(Vec::new()) };
            let sent = pb::Trajectory::from(&before);
            assert_eq!(sent.finish_reason, reason.name());
            assert_eq!(Trajectory::try_from(sent).unwrap(), before);
        }
    }

    #[test]
    fn a_broken_trajectory_is_refused_with_its_token_named() {
        let mut broken = pb::Trajectory::from(&trajectory(vec![(5, Some(-0.5))]));
        broken.log_probs = pack_f32s(&[0.0, f32::NAN]);
        let error = Trajectory::try_from(broken).unwrap_err().to_string();
        assert!(error.contains("train/step 3/group 1/chain 2") && error.contains("token 1"), "{error}");
    }

    #[test]
    fn chunks_put_together_are_the_message() {
        let message: Vec<u8> = (0..CHUNK_BYTES * 2 + 7).map(|i| i as u8).collect();
        let parts: Vec<pb::Chunk> = chunks(message.clone()).collect();
        assert_eq!(parts.iter().map(|c| c.last).collect::<Vec<_>>(), [false, false, true]);
        assert_eq!(parts.into_iter().flat_map(|c| c.data).collect::<Vec<_>>(), message);
        assert_eq!(chunks(Vec::new()).count(), 1);
    }
}
