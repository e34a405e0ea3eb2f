//! Which protection this node offers. The strongest tier that works is used; with none, nothing runs.
//!
//! A tier is proven, not guessed from versions or settings: the pool starts a zygote on it and runs a first snippet
//! through every layer. What is here chooses the candidate and explains a refusal.

use std::fmt;
use std::fs;
use std::io;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::error::SandboxError;
use crate::seccomp::Around;

/// How snippets are isolated, the strongest first. In JSON and settings: `root`, `user_namespaces`, `landlock`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Tier {
    /// Started by root: the jail is built with root's rights, then a user that owns nothing enters it.
    Root,
    /// Started by an ordinary user: the jail is built inside a user namespace.
    UserNamespaces,
    /// Neither is possible: Landlock, system call filters and resource limits alone. A snippet sees that the node's files
    /// and processes exist, and can open or touch none of them.
    Landlock,
}

impl Tier {
    /// Every tier, the strongest first.
    pub const ALL: [Self; 3] = [Self::Root, Self::UserNamespaces, Self::Landlock];

    /// Whether snippets get namespaces of their own.
    pub(crate) fn has_namespaces(self) -> bool {
        self != Self::Landlock
    }

    /// What a snippet's system calls could reach.
    pub(crate) fn around(self) -> Around {
        if self.has_namespaces() {
            Around::Namespaces
        } else {
            Around::Node { signals: landlock_version() >= FIRST_LANDLOCK_OF_SIGNALS }
        }
    }
}

impl fmt::Display for Tier {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Root => "root",
            Self::UserNamespaces => "user_namespaces",
            Self::Landlock => "landlock",
        })
    }
}

impl FromStr for Tier {
    type Err = SandboxError;

    fn from_str(text: &str) -> Result<Self, SandboxError> {
        Self::ALL.into_iter().find(|tier| tier.to_string() == text).ok_or_else(|| {
            SandboxError::Config(format!("tier {text:?} is none of root, user_namespaces, landlock"))
        })
    }
}

/// The tiers that whoever runs this may try, the strongest first.
pub(crate) fn candidates() -> [Tier; 2] {
    let first = if rustix::process::geteuid().is_root() { Tier::Root } else { Tier::UserNamespaces };
    [first, Tier::Landlock]
}

/// Refuses a tier that whoever runs this cannot have, before anything is started.
///
/// # Errors
/// [`SandboxError::Unsupported`], with who must do what.
pub(crate) fn check(tier: Tier) -> Result<(), SandboxError> {
    let root = rustix::process::geteuid().is_root();
    let refused = |reason: &str| Err(SandboxError::Unsupported(format!("tier {tier}: {reason}")));
    match tier {
        Tier::Root if !root => refused("this is not root; start it as root, or take another tier"),
        Tier::UserNamespaces if root => refused("this is root, whose tiers are root and landlock"),
        Tier::Landlock if landlock_version() < LEAST_LANDLOCK => refused(&format!(
            "it takes Landlock's version {LEAST_LANDLOCK} (Linux 6.2); this kernel has {}",
            match landlock_version() {
                ..1 => "none, or it is switched off".to_owned(),
                version => format!("version {version}"),
            }
        )),
        _ => Ok(()),
    }
}

/// The first version that controls every way to change a file's content (truncate).
const LEAST_LANDLOCK: i64 = 3;
const FIRST_LANDLOCK_OF_SIGNALS: i64 = 6;

/// What this kernel's Landlock can do; below 1 there is none.
pub(crate) fn landlock_version() -> i64 {
    const VERSION: libc::c_int = 1; // LANDLOCK_CREATE_RULESET_VERSION
    // SAFETY: with this flag the call reads no memory and returns a number.
    unsafe {
        libc::syscall(libc::SYS_landlock_create_ruleset, std::ptr::null::<libc::c_void>(), 0_usize, VERSION)
    }
}

/// User and group of the `index`-th zygote.
///
/// Started by root, each zygote is a user of its own, far above the ids that distributions give out, so that no file
/// and no process of the node belongs to it. A container that maps few ids gets `nobody` instead. Started by an ordinary
/// user, it stays that one.
pub(crate) fn identity(index: usize) -> (u32, u32) {
    const FIRST: u32 = 1_879_048_192; // 0x7000_0000
    const NOBODY: u32 = 65_534;
    let user = rustix::process::geteuid();
    if !user.is_root() {
        return (user.as_raw(), rustix::process::getegid().as_raw());
    }
    let wanted = FIRST + u32::try_from(index).unwrap_or(0);
    let mapped = |path: &str| fs::read_to_string(path).is_ok_and(|map| maps(&map, wanted));
    if mapped("/proc/self/uid_map") && mapped("/proc/self/gid_map") {
        (wanted, wanted)
    } else {
        (NOBODY, NOBODY)
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
        Tier::Landlock => {
            "the kernel refused a part of it: a container's seccomp profile, or a root that may not become another user"
        }
    };
    let settings = if tier.has_namespaces() { settings() } else { String::new() };
    SandboxError::Unsupported(format!("tier {tier}: {error}. {advice}{settings}"))
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
