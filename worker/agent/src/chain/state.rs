//! What a chain does next: AgentFly's state machine, without any waiting.
//!
//! Called by [`super::run`], which does what is decided here. What must stay true: at most `max_turns`
//! generations, and never more tokens than `max_model_len`.

use agentfly_common::trajectory::FinishReason;

use crate::agents::{Parsed, Status, ToolCall};
use crate::tools::ToolStatus;

/// The limits of a chain.
#[derive(Debug, Clone, Copy)]
pub(super) struct Limits {
    pub(super) max_turns: u32,
    pub(super) max_model_len: Option<u32>,
    /// Tokens of one turn.
    pub(super) max_tokens: u32,
}

/// What follows a turn.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum AfterTurn {
    /// The chain is done.
    Finish(FinishReason),
    /// Its calls are made, in this order.
    Call(Vec<ToolCall>),
}

impl Limits {
    /// How many tokens may follow `total_tokens`.
    pub(super) fn room(&self, total_tokens: usize) -> usize {
        self.max_model_len.map_or(usize::MAX, |max| (max as usize).saturating_sub(total_tokens))
    }

    /// How many tokens the next turn may sample, or why there is none. `turns` were taken.
    pub(super) fn before_turn(&self, turns: u32, total_tokens: usize) -> Result<u32, FinishReason> {
        if turns >= self.max_turns {
            return Err(FinishReason::MaxTurns);
        }
        match u32::try_from(self.room(total_tokens)).unwrap_or(u32::MAX) {
            0 => Err(FinishReason::MaxModelLen),
            room => Ok(self.max_tokens.clamp(1, room)),
        }
    }

    /// What follows a turn that reads as `parsed`. A spent budget comes before the turn's own status.
    pub(super) fn after_turn(&self, parsed: Parsed, total_tokens: usize) -> AfterTurn {
        if self.room(total_tokens) == 0 {
            return AfterTurn::Finish(FinishReason::MaxModelLen);
        }
        if parsed.status == Status::Terminal {
            return AfterTurn::Finish(FinishReason::Terminal);
        }
        if parsed.tool_calls.is_empty() {
            return AfterTurn::Finish(FinishReason::NoToolCalls);
        }
        AfterTurn::Call(parsed.tool_calls)
    }

    /// Why the chain ends after its tools answered, if it does: the last tool's word, then the turns.
    pub(super) fn after_tools(&self, last: ToolStatus, turns: u32) -> Option<FinishReason> {
        match last {
            ToolStatus::Finish => Some(FinishReason::Terminal),
            ToolStatus::Success => (turns >= self.max_turns).then_some(FinishReason::MaxTurns),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMITS: Limits = Limits { max_turns: 2, max_model_len: Some(10), max_tokens: 4 };

    #[test]
    fn a_turn_gets_what_the_budget_leaves() {
        assert_eq!(LIMITS.before_turn(0, 3), Ok(4));
        assert_eq!(LIMITS.before_turn(1, 8), Ok(2));
        assert_eq!(LIMITS.before_turn(1, 10), Err(FinishReason::MaxModelLen));
        assert_eq!(LIMITS.before_turn(2, 3), Err(FinishReason::MaxTurns));
        let unlimited = Limits { max_model_len: None, ..LIMITS };
        assert_eq!(unlimited.before_turn(1, 1_000_000), Ok(4));
    }

    #[test]
    fn a_turn_ends_the_chain_by_budget_then_status_then_lack_of_calls() {
        let parsed = |status, calls: usize| Parsed {
            tool_calls: vec![ToolCall { name: "t".into(), arguments: serde_json::Value::Null }; calls],
            status,
        };
        let after = |p, total| LIMITS.after_turn(p, total);
        assert_eq!(after(parsed(Status::Terminal, 0), 10), AfterTurn::Finish(FinishReason::MaxModelLen));
        assert_eq!(after(parsed(Status::Terminal, 1), 5), AfterTurn::Finish(FinishReason::Terminal));
        assert_eq!(after(parsed(Status::Continue, 0), 5), AfterTurn::Finish(FinishReason::NoToolCalls));
        assert!(matches!(after(parsed(Status::Continue, 2), 5), AfterTurn::Call(c) if c.len() == 2));
        assert_eq!(LIMITS.after_tools(ToolStatus::Finish, 1), Some(FinishReason::Terminal));
        assert_eq!(LIMITS.after_tools(ToolStatus::Success, 2), Some(FinishReason::MaxTurns));
        assert_eq!(LIMITS.after_tools(ToolStatus::Success, 1), None);
    }
}
