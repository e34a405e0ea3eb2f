//! `sandbox.*`: keys of this project's own, for what AgentFly left to containers.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::config::checks::Checks;
use crate::config::choices::SandboxTier;

/// The sandbox ends every call by then, whatever is asked for.
const MOST_WALL_SECONDS: u64 = 60;

/// The sandbox has no more.
const MOST_SLOTS: u32 = 1024;
const MOST_CPU_SECONDS: u64 = 3600;
const MOST_TASKS: u32 = 4096;
const MOST_OUTPUT_KB: u64 = 64 << 10;
const MOST_TMP_MB: u64 = 1 << 20;

/// `sandbox.*`: how a tool call runs, and its limits. Read by the worker's sandbox.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Sandbox {
    /// The isolation that must be there.
    pub tier: SandboxTier,
    /// Wall-clock limit.
    pub wall_seconds: u64,
    /// CPU time limit of all its processes; `None` is `wall_seconds`, ten at least.
    pub cpu_seconds: Option<u64>,
    /// Memory limit in MiB.
    pub memory_mb: u64,
    /// Processes and threads together.
    pub tasks: u32,
    /// Output that is kept, in KiB; more ends the call.
    pub output_kb: u64,
    /// Size of its `/tmp`, and of its largest file, in MiB.
    pub tmp_mb: u64,
    /// Calls at the same time on a rank; `None` is two per CPU thread of the rank.
    pub slots: Option<u32>,
    /// The calls of a chain share their variables and files.
    pub stateful: bool,
    /// What a call printed is shown also where it failed or was ended.
    pub partial_output: bool,
    /// The value of a last line that is an expression is shown.
    pub echo_last: bool,
    /// With `stateful`: chains whose state is kept between their calls, on a rank.
    pub idle_sessions: u32,
    /// With `stateful`: MiB that these may hold together.
    pub idle_sessions_mb: u64,
}

impl Sandbox {
    pub(crate) fn check(&self, checks: &mut Checks) {
        checks.that(
            "sandbox.wall_seconds",
            (1..=MOST_WALL_SECONDS).contains(&self.wall_seconds),
            format!("expected 1 to {MOST_WALL_SECONDS}"),
        );
        // Python with numpy and sympy loaded needs some 100 MiB itself.
        checks.that("sandbox.memory_mb", self.memory_mb >= 128, "expected at least 128 MiB");
        let cpu = self.cpu_seconds.is_none_or(|seconds| (1..=MOST_CPU_SECONDS).contains(&seconds));
        checks.that("sandbox.cpu_seconds", cpu, format!("expected 1 to {MOST_CPU_SECONDS}, or null"));
        let tasks = (1..=MOST_TASKS).contains(&self.tasks);
        checks.that("sandbox.tasks", tasks, format!("expected 1 to {MOST_TASKS}"));
        let output = (1..=MOST_OUTPUT_KB).contains(&self.output_kb);
        checks.that("sandbox.output_kb", output, format!("expected 1 to {MOST_OUTPUT_KB}"));
        let tmp = (1..=MOST_TMP_MB).contains(&self.tmp_mb);
        checks.that("sandbox.tmp_mb", tmp, format!("expected 1 to {MOST_TMP_MB}"));
        let slots = self.slots.is_none_or(|slots| (1..=MOST_SLOTS).contains(&slots));
        checks.that("sandbox.slots", slots, format!("expected 1 to {MOST_SLOTS}, or null"));
    }

    /// `idle_sessions_mb` in bytes.
    #[must_use]
    pub fn idle_session_bytes(&self) -> u64 {
        self.idle_sessions_mb.saturating_mul(1 << 20)
    }

    /// `wall_seconds` as a duration.
    #[must_use]
    pub fn wall(&self) -> Duration {
        Duration::from_secs(self.wall_seconds)
    }

    /// `memory_mb` in bytes.
    #[must_use]
    pub fn memory_bytes(&self) -> u64 {
        self.memory_mb.saturating_mul(1 << 20)
    }
}
