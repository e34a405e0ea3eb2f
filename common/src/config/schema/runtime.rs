//! `sandbox.*` and `cluster.*`: keys of this project's own, for what AgentFly left to containers and Ray.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::config::checks::Checks;

/// `sandbox.*`: limits of one tool call. Read by the worker's sandbox.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Sandbox {
    /// Wall-clock limit.
    pub wall_seconds: u64,
    /// Memory limit in MiB.
    pub memory_mb: u64,
    /// Calls at the same time on a worker; `None` is one a CPU.
    pub slots: Option<u32>,
}

impl Sandbox {
    pub(crate) fn check(&self, checks: &mut Checks) {
        checks.at_least_one("sandbox.wall_seconds", self.wall_seconds);
        // Python with numpy and sympy loaded needs some 100 MiB itself.
        checks.that("sandbox.memory_mb", self.memory_mb >= 128, "expected at least 128 MiB");
        checks.that("sandbox.slots", self.slots != Some(0), "expected at least 1, or null");
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

/// `cluster.*`: when a worker counts as lost. Read by the head.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Cluster {
    /// Between two heartbeats.
    pub heartbeat_seconds: u64,
    /// Silence after which a worker's work is given to others.
    pub lease_seconds: u64,
}

impl Cluster {
    pub(crate) fn check(&self, checks: &mut Checks) {
        checks.at_least_one("cluster.heartbeat_seconds", self.heartbeat_seconds);
        let (lease, heartbeat) = (self.lease_seconds, self.heartbeat_seconds);
        if heartbeat.saturating_mul(3) > lease {
            checks.impossible(
                format!(
                    "cluster.lease_seconds={lease} forgives fewer than two lost heartbeats of \
                     cluster.heartbeat_seconds={heartbeat}"
                ),
                "raise the lease to at least three heartbeats",
            );
        }
    }

    /// `heartbeat_seconds` as a duration.
    #[must_use]
    pub fn heartbeat(&self) -> Duration {
        Duration::from_secs(self.heartbeat_seconds)
    }

    /// `lease_seconds` as a duration.
    #[must_use]
    pub fn lease(&self) -> Duration {
        Duration::from_secs(self.lease_seconds)
    }
}
