//! The door to the sandbox: Python code in, what happened out.
//!
//! The worker implements [`PythonRunner`] with its sandbox; `code_interpreter` and the rewards call it. What
//! must stay true: code that fails is a [`RunOutput`]; an [`InfraError`] says the sandbox itself failed; many
//! callers at once make a queue and never a fault.

use std::time::Duration;

use agentfly_common::ids::ChainKey;
use async_trait::async_trait;

/// How a run of Python ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum RunStatus {
    /// It ran to its end.
    Success,
    /// It raised, or exited with a code other than 0: `TypeName: message`.
    Error {
        /// `TypeName: message`, without a traceback.
        message: String,
    },
    /// It used up its wall-clock or CPU time.
    TimedOut,
    /// It wanted more memory than it may have.
    MemoryExceeded,
}

/// What a run of Python left behind.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RunOutput {
    /// How it ended.
    pub status: RunStatus,
    /// Standard output, cut by the sandbox's own limit.
    pub stdout: String,
    /// Standard error, cut by the sandbox's own limit.
    pub stderr: String,
    /// Of a session: its state was lost before this run, which began it anew.
    pub restarted: bool,
}

/// The sandbox could not run the code at all.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("the Python sandbox failed: {cause}")]
pub struct InfraError {
    /// What happened.
    pub cause: String,
}

/// What a run may use.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RunLimits {
    /// Wall-clock time.
    pub wall: Duration,
    /// CPU time.
    pub cpu: Duration,
    /// Memory.
    pub memory_bytes: u64,
}

/// A program to run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Snippet<'a> {
    /// Python source.
    pub code: &'a str,
    /// Seeds its random generators.
    pub seed: u64,
    /// Limits of its own; `None` for those that the settings give the policy's code (`sandbox.*`).
    pub limits: Option<RunLimits>,
    /// The chain whose session it is a turn of: it finds the variables of the turns before it. `None` for a fresh process.
    pub session: Option<ChainKey>,
}

/// Runs Python, each run in a process of its own with one namespace, within limits of time and memory.
#[async_trait]
pub trait PythonRunner: Send + Sync {
    /// Waits until a sandbox is free, as long as that takes: the caller's deadline bounds it, and its clock stands
    /// still. Dropping the future leaves the queue.
    ///
    /// # Errors
    /// The sandbox itself failed.
    async fn admit(&self) -> Result<Box<dyn PythonSlot>, InfraError>;

    /// Ends a chain's session, if it has one; a turn that runs ends by its limits, and the session with it. Does not wait.
    fn end_session(&self, _chain: &ChainKey) {}
}

/// A free sandbox, held for one run.
#[async_trait]
pub trait PythonSlot: Send {
    /// Runs the snippet; it ends by its limits. Dropping the future does not stop what has begun: the sandbox stays
    /// taken until then.
    ///
    /// # Errors
    /// Only when the sandbox itself failed; whatever the code does is a [`RunOutput`].
    async fn run(self: Box<Self>, snippet: Snippet<'_>) -> Result<RunOutput, InfraError>;
}
