//! Who has to act on an error: it decides the log level, the retry and the exit code, in one place.

use serde::{Deserialize, Serialize};

/// Who must act.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Whose {
    /// The person at the keyboard: settings, data, disk space.
    Operator,
    /// Something outside: the network, a machine. Trying again may help.
    Outside,
    /// This program: a bug to report.
    Us,
}

impl Whose {
    /// The process exit code (BSD `sysexits`: usage 64, unavailable 69, software 70).
    #[must_use]
    pub fn exit_code(self) -> u8 {
        match self {
            Self::Operator => 64,
            Self::Outside => 69,
            Self::Us => 70,
        }
    }
}
