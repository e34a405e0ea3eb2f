//! What a snippet may use, and how a pool is configured.
//!
//! Read by the pool's owner, by [`crate::Sandbox::run`] and, as numbers in a request, by the zygote's child, which
//! turns most of them into rlimits. Every limit must be enforced by the kernel or by the supervisor outside the
//! snippet, never by code that the snippet could change.

use std::path::PathBuf;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::error::SandboxError;
use crate::probe::Tier;

const MIB: u64 = 1 << 20;

/// What one snippet may use. The defaults suit short programs written by a model.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Limits {
    /// Wall-clock time from the start of the snippet; at most 60 s. Serialised as `{secs, nanos}`.
    pub wall: Duration,
    /// CPU time of the whole process tree.
    pub cpu: Duration,
    /// Memory of the whole process tree beyond the warm image that it shares with its zygote, in bytes.
    pub memory_bytes: u64,
    /// Processes and threads together.
    pub tasks: u32,
    /// Standard output and standard error together, in bytes; the head is kept, and more ends the snippet.
    pub output_bytes: usize,
    /// Size of the private `/tmp`, in bytes.
    pub tmp_bytes: u64,
    /// Largest file, in bytes.
    pub file_bytes: u64,
    /// Open file descriptors of each process.
    pub open_files: u32,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            wall: Duration::from_secs(5),
            cpu: Duration::from_secs(10),
            memory_bytes: 512 * MIB,
            tasks: 32,
            output_bytes: 64 << 10,
            tmp_bytes: 64 * MIB,
            file_bytes: 64 * MIB,
            open_files: 128,
        }
    }
}

impl Limits {
    /// The longest wall time a snippet may be given.
    pub const MAX_WALL: Duration = Duration::from_secs(60);

    /// Checks that every limit is one the sandbox can keep.
    ///
    /// # Errors
    /// [`SandboxError::Config`] naming the limit, its value and the allowed range.
    pub fn check(&self) -> Result<(), SandboxError> {
        let range = |name: &str, value: u64, low: u64, high: u64| {
            if (low..=high).contains(&value) {
                return Ok(());
            }
            Err(SandboxError::Config(format!("{name} is {value}; it must lie between {low} and {high}")))
        };
        let milliseconds = |d: Duration| u64::try_from(d.as_millis()).unwrap_or(u64::MAX);
        let max_wall = milliseconds(Self::MAX_WALL);
        range("limits.wall in milliseconds", milliseconds(self.wall), 10, max_wall)?;
        range("limits.cpu in milliseconds", milliseconds(self.cpu), 1, 3_600_000)?;
        range("limits.memory_bytes", self.memory_bytes, 16 * MIB, 1 << 40)?;
        range("limits.tasks", u64::from(self.tasks), 1, 4096)?;
        range("limits.output_bytes", self.output_bytes as u64, 1, 64 * MIB)?;
        range("limits.tmp_bytes", self.tmp_bytes, 4096, 1 << 40)?;
        range("limits.file_bytes", self.file_bytes, 4096, 1 << 40)?;
        range("limits.open_files", u64::from(self.open_files), 16, 65_536)
    }
}

/// How a pool is built.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SandboxConfig {
    /// `bin/python` of a virtual environment (or any interpreter, 3.11 or newer).
    pub python: PathBuf,
    /// The isolation to use, or refuse to start; `None` takes the strongest that this node offers.
    pub tier: Option<Tier>,
    /// Snippets that may run at once.
    pub slots: usize,
    /// Limits of a snippet that brings none of its own.
    pub limits: Limits,
    /// Modules that every snippet finds already imported.
    pub preload: Vec<String>,
    /// Snippets after which a zygote is replaced by a fresh one (all its children share one address layout).
    pub restart_after: u64,
    /// How long a call may wait for a free slot.
    pub queue_timeout: Duration,
    /// Print the value of a last line that is an expression, as at a prompt.
    pub echo_last: bool,
    /// Sessions that are kept between their turns; beyond that the least recently used lose their state.
    pub idle_sessions: usize,
    /// Memory that they may hold together, in bytes, beyond the warm image.
    pub idle_session_bytes: u64,
}

impl SandboxConfig {
    /// Slots by the number of CPUs, the default limits, numpy and sympy preloaded.
    #[must_use]
    pub fn new(python: impl Into<PathBuf>) -> Self {
        Self {
            python: python.into(),
            tier: None,
            slots: std::thread::available_parallelism().map_or(2, usize::from),
            limits: Limits::default(),
            preload: vec!["numpy".into(), "sympy".into()],
            restart_after: 5_000,
            queue_timeout: Duration::from_secs(120),
            echo_last: false,
            idle_sessions: 256,
            idle_session_bytes: 2048 * MIB,
        }
    }

    pub(crate) fn check(&self) -> Result<(), SandboxError> {
        if !(1..=1024).contains(&self.slots) {
            return Err(SandboxError::Config(format!(
                "slots is {}; it must lie between 1 and 1024",
                self.slots
            )));
        }
        if self.restart_after == 0 {
            return Err(SandboxError::Config("restart_after is 0; it must be at least 1".into()));
        }
        let identifier =
            |s: &str| !s.is_empty() && s.chars().all(|c| c.is_alphanumeric() || c == '_' || c == '.');
        if let Some(module) = self.preload.iter().find(|m| !identifier(m)) {
            return Err(SandboxError::Config(format!("preload names {module:?}, which is no module name")));
        }
        self.limits.check()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_that_cannot_be_kept_are_refused_by_name_and_value() {
        Limits::default().check().expect("the defaults are valid");
        let hour = Limits { wall: Duration::from_secs(3600), ..Limits::default() };
        let text = hour.check().expect_err("an hour is too long").to_string();
        assert!(text.contains("limits.wall") && text.contains("3600000") && text.contains("60000"), "{text}");
        assert!(Limits { memory_bytes: 1, ..Limits::default() }.check().is_err());
        assert!(Limits { tasks: 0, ..Limits::default() }.check().is_err());
    }

    #[test]
    fn a_module_name_cannot_smuggle_code_into_the_zygote() {
        let config =
            SandboxConfig { preload: vec!["os; print(1)".into()], ..SandboxConfig::new("/usr/bin/python3") };
        assert!(config.check().expect_err("not a module").to_string().contains("os; print(1)"));
    }

    #[test]
    fn limits_left_out_of_a_file_keep_their_defaults() {
        let limits: Limits = serde_json::from_str(r#"{"tasks": 7}"#).expect("a partial table is valid");
        assert_eq!(limits, Limits { tasks: 7, ..Limits::default() });
        assert!(
            serde_json::from_str::<Limits>(r#"{"taks": 7}"#).is_err(),
            "a misspelt limit must not be ignored"
        );
    }
}
