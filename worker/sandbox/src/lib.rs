//! Runs Python that nobody has read: short programs written by a model, as if their author were hostile.
//!
//! A [`Sandbox`] keeps warm interpreters (*zygotes*) in jails and forks one per snippet into namespaces of its own.
//! The crate is usable alone: blocking calls, no runtime, no network.
//!
//! ```no_run
//! use agentfly_sandbox::{Sandbox, SandboxConfig, Snippet};
//!
//! let sandbox = Sandbox::start(SandboxConfig::new("third_party/sandbox-venv/bin/python"))?;
//! let outcome = sandbox.run(&Snippet { code: "print(6 * 7)", seed: 1, limits: None })?;
//! assert_eq!(outcome.stdout, "42\n");
//! # Ok::<(), agentfly_sandbox::SandboxError>(())
//! ```
//!
//! # Threat model
//!
//! The attacker is the snippet. What is promised against it, what is not, and how the [`Tier`]s differ is told in
//! `deploy/docs/sandbox.md`, for those who run it; the tests in `tests/` hold it to that.
//!
//! # Sessions
//!
//! [`Sandbox::turn`] runs a snippet as the next turn of a session: it finds the variables of the turns before it, and one
//! that fails or is ended leaves them as they were. A session is one trajectory's; its state is its author's word as much
//! as a snippet's result is.
//!
//! # Layers
//!
//! `probe` (which tiers a node offers) → `pool` (slots, zygotes, retries; `cgroup`, where one is delegated) → `supervise` (one snippet: time, memory, output)
//! or `sessions` (which session) + `session` (one turn) → `zygote` + `protocol` (the warm process and its messages) → `spawn`
//! with `jail` (namespaces, file system, user) or `home` (a directory, where there are no namespaces) → `python/zygote.py`
//! (forks; without namespaces below `python/warden.py`) → `python/place.py` (where a snippet runs) and `python/isolation.py`
//! (limits, Landlock, `seccomp`'s program) → `python/script.py` (the code), in a session by way of `python/session.py`.
//! `python/leftovers.py` ends what is left.

mod capture;
mod cgroup;
mod error;
mod files;
mod home;
mod interpreter;
mod jail;
mod limits;
mod outcome;
mod pool;
mod probe;
mod protocol;
mod python;
mod queue;
mod seccomp;
mod session;
mod sessions;
mod spawn;
mod supervise;
mod usage;
mod zygote;

pub use error::SandboxError;
pub use limits::{Limits, SandboxConfig};
pub use outcome::{Outcome, Status};
pub use pool::{Sandbox, Snippet, Turn};
pub use probe::Tier;
