//! The door to the sandbox: Python code in, what happened out.
//!
//! The worker implements [`PythonRunner`] with its sandbox; `code_interpreter` and the rewards call it. What
//! must stay true: code that fails is a [`RunOutput`]; an [`InfraError`] says the sandbox itself failed.

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
}

/// The sandbox could not run the code at all.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("the Python sandbox failed: {cause}")]
pub struct InfraError {
    /// What happened.
    pub cause: String,
}

/// Runs Python, each call in a fresh process with one namespace, within the sandbox's limits of time and memory.
#[async_trait]
pub trait PythonRunner: Send + Sync {
    /// Runs `code` with its random generators seeded by `seed`.
    ///
    /// # Errors
    /// Only when the sandbox itself failed; whatever the code does is a [`RunOutput`].
    async fn run(&self, code: &str, seed: u64) -> Result<RunOutput, InfraError>;
}
