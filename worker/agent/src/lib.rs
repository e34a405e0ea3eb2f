//! The agent loop: one prompt becomes one finished chain of turns, tool calls and a reward.
//!
//! The worker calls [`chain::run_chain`] with a generator (the rollout engine) and a Python runner (the
//! sandbox); nothing here links libtorch or opens a socket. What must stay true: ids that the policy sampled
//! are never re-tokenised, a fault of the machinery is never a reward of 0, and text that came from a data row,
//! a tool or the policy can never become a special token of the prompt.
#![forbid(unsafe_code)]

pub mod agents;
pub mod chain;
pub mod clock;
pub mod rewards;
pub mod template;
#[cfg(test)]
mod test_support;
pub mod tokenizer;
pub mod tools;
