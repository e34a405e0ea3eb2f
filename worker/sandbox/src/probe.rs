//! Which protection this node offers. The strongest tier that works is used; with none, nothing runs.
//!
//! A tier is proven, not guessed from versions or settings: the pool starts a zygote on it and runs a first snippet
//! through every layer. What is here chooses the candidate and explains a refusal.

use std::fmt;
use std::fs;
use std::io;

use serde::{Deserialize, Serialize};

use crate::error::SandboxError;

/// How snippets are isolated. In JSON: `root`, `user_namespaces`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Tier {
    /// Started by root: the jail is built with root's rights, then a user that owns nothing enters it.
    Root,
    /// Started by an ordinary user: the jail is built inside a user namespace.
    UserNamespaces,
}

impl fmt::Display for Tier {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Root => "root",
            Self::UserNamespaces => "user_namespaces",
        })
    }
}

/// Who runs, and therefore which tier is tried.
pub(crate) fn candidate() -> Tier {
    if rustix::process::geteuid().is_root() { Tier::Root } else { Tier::UserNamespaces }
}

/// User and group of the `index`-th zygote.
///
/// On the root tier each zygote is a user of its own, far above the ids that distributions give out, so that no file
/// and no process of the node belongs to it. A container that maps few ids gets `nobody` instead.
pub(crate) fn identity(tier: Tier, index: usize) -> (u32, u32) {
    const FIRST: u32 = 1_879_048_192; // 0x7000_0000
    const NOBODY: u32 = 65_534;
    match tier {
        Tier::UserNamespaces => (rustix::process::geteuid().as_raw(), rustix::process::getegid().as_raw()),
        Tier::Root => {
            let wanted = FIRST + u32::try_from(index).unwrap_or(0);
            let mapped = |path: &str| fs::read_to_string(path).is_ok_and(|map| maps(&map, wanted));
            if mapped("/proc/self/uid_map") && mapped("/proc/self/gid_map") {
                (wanted, wanted)
            } else {
                (NOBODY, NOBODY)
            }
        }
    }
}

/// Does an id map (`inside outside count` on each line) hold this inside id?
fn maps(map: &str, id: u32) -> bool {
    map.lines().any(|line| {
        let numbers: Vec<u64> = line.split_whitespace().filter_map(|n| n.parse().ok()).collect();
        matches!(numbers.as_slice(), [first, _, count] if (*first..first.saturating_add(*count)).contains(&u64::from(id)))
    })
}

/// Turns the kernel's refusal of the first zygote into what to do about it; other errors pass unchanged.
pub(crate) fn explain(tier: Tier, error: SandboxError) -> SandboxError {
    let denied = |e: &io::Error| {
        matches!(
            e.raw_os_error(),
            Some(libc::EPERM | libc::EACCES | libc::ENOSPC | libc::EINVAL | libc::ENOSYS | libc::EUSERS)
        )
    };
    match &error {
        SandboxError::System { source, .. } | SandboxError::Jail { source, .. } if denied(source) => {}
        SandboxError::Setup(_) => {}
        _ => return error,
    }
    let advice = match tier {
        Tier::Root => {
            "root lacks CAP_SYS_ADMIN here, as in most containers. Run the worker as an ordinary user where \
                       user namespaces are allowed, or give the container CAP_SYS_ADMIN"
        }
        Tier::UserNamespaces => {
            "user namespaces are refused to ordinary users. Allow them (sysctl user.max_user_namespaces=15000; \
                                 on Ubuntu also kernel.apparmor_restrict_unprivileged_userns=0; in a container a seccomp profile that \
                                 allows unshare and mount), or start the worker as root"
        }
    };
    SandboxError::Unsupported(format!("{error}. {advice}{}", settings()))
}

/// The settings of this node that usually decide it.
fn settings() -> String {
    let paths = [
        "/proc/sys/user/max_user_namespaces",
        "/proc/sys/kernel/unprivileged_userns_clone",
        "/proc/sys/kernel/apparmor_restrict_unprivileged_userns",
    ];
    let found: Vec<_> = paths
        .iter()
        .filter_map(|path| fs::read_to_string(path).ok().map(|value| format!("{path} is {}", value.trim())))
        .collect();
    if found.is_empty() { String::new() } else { format!(". Here {}", found.join(", ")) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_id_outside_a_container_s_map_is_not_used() {
        assert!(maps("         0          0 4294967295\n", 1_879_048_192));
        assert!(!maps("         0     100000      65536\n", 1_879_048_192));
        assert!(maps("0 100000 65536\n", 65_534));
        assert!(!maps("1000 1000 1\n", 0) && !maps("", 0));
    }

    #[test]
    fn a_refusal_says_what_to_do_and_other_errors_stay_what_they_are() {
        let refused =
            SandboxError::System { what: "clone".into(), source: io::Error::from_raw_os_error(libc::EPERM) };
        let text = explain(Tier::UserNamespaces, refused).to_string();
        assert!(
            text.contains("none is run without isolation") && text.contains("max_user_namespaces"),
            "{text}"
        );
        let lost = explain(Tier::Root, SandboxError::ZygoteLost);
        assert!(matches!(lost, SandboxError::ZygoteLost));
    }
}
