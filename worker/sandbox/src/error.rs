//! Faults of the sandbox itself. A snippet's failure is never one of these: it is an [`crate::Outcome`].

use std::io;
use std::path::PathBuf;
use std::time::Duration;

/// Why the sandbox could not start or could not run a snippet.
#[derive(Debug, thiserror::Error)]
pub enum SandboxError {
    /// A setting is out of range.
    #[error("sandbox configuration: {0}")]
    Config(String),
    /// The interpreter is missing or is not usable.
    #[error("sandbox interpreter {path}: {reason}")]
    Interpreter {
        /// The configured path.
        path: PathBuf,
        /// What is wrong, and what to do.
        reason: String,
    },
    /// This node cannot protect itself from a snippet, so none is run.
    #[error("this node cannot isolate snippets, and none is run without isolation: {0}")]
    Unsupported(String),
    /// A step of building the jail failed.
    #[error("sandbox jail: {step} failed: {source}")]
    Jail {
        /// The step, with its paths.
        step: String,
        /// The kernel's answer.
        source: io::Error,
    },
    /// The zygote did not become ready.
    #[error("sandbox zygote did not start: {reason}{log}")]
    ZygoteStart {
        /// What was waited for, and how it ended.
        reason: String,
        /// The end of its own error output, on lines of its own; empty if it wrote nothing.
        log: String,
    },
    /// The zygote ended while a snippet ran; the next call starts a fresh one.
    #[error(
        "sandbox zygote ended while the snippet ran; the snippet's result is lost, and the next call starts a fresh zygote"
    )]
    ZygoteLost,
    /// The zygote could not isolate this snippet, so it was not run.
    #[error("sandbox could not isolate the snippet, which was not run: {0}")]
    Setup(String),
    /// Every slot stayed busy.
    #[error(
        "all {slots} sandbox slots stayed busy for {waited:?} (queue_timeout); raise slots, or send fewer calls at once"
    )]
    Busy {
        /// Slots of the pool.
        slots: usize,
        /// How long the call waited.
        waited: Duration,
    },
    /// A system call of the supervisor failed.
    #[error("sandbox supervisor: {what}: {source}")]
    System {
        /// What was attempted.
        what: String,
        /// The kernel's answer.
        source: io::Error,
    },
}

/// For `map_err`: names what was attempted.
pub(crate) fn system<E: Into<io::Error>>(what: &str) -> impl FnOnce(E) -> SandboxError {
    move |source| SandboxError::System { what: what.to_owned(), source: source.into() }
}
