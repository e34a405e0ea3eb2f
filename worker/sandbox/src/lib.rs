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
//! **The attacker** is the snippet. It may contain anything, including native code through `ctypes`, and it gains from
//! every hole: during training a policy finds the ones that pay.
//!
//! **Promised**, on every tier:
//! - It reads no file of the node but the system's `/usr`, the interpreter and its packages, and writes only to a `/tmp`
//!   and `/dev/shm` of its own, which end with it.
//! - It sees no environment variable, descriptor, process, network or socket of the node, nor anything of another
//!   snippet; the warm process it starts from has never held another snippet's code or output.
//! - It holds no privilege, never runs as the node's user 0, and can make no namespace, mount, raw or network socket,
//!   nor trace a process or load a program into the kernel: an allowlist of system calls decides.
//! - It takes no more time, memory, processes, output or disk than its [`Limits`]; memory is sampled, so a burst may
//!   pass its limit for some tens of milliseconds, within the address-space limit of each process.
//! - When it ends, when it is killed and when this program is killed (SIGKILL too), none of its processes, mounts or
//!   files stay.
//!
//! **Not promised.** The kernel is shared: a hole in it that the allowed calls can reach is a way out, and caches and
//! timing can leak between processes on one machine. For openly hostile tenants give each its own virtual machine.
//! World-readable files below `/usr` can be read, so keep no secret there. A snippet's result is its author's
//! word: a program that checks answers should be run as a snippet of its own, never inside the one it checks.
//! On a kernel without Landlock the layers below still stand, and a warning is logged.
//!
//! # Sessions
//!
//! [`Sandbox::turn`] runs a snippet as the next turn of a session: it finds the variables of the turns before it, and one
//! that fails or is ended leaves them as they were. A session is one trajectory's; its state is its author's word as much
//! as a snippet's result is.
//!
//! # Layers
//!
//! `pool` (slots, zygotes, retries) → `supervise` (one snippet: time, memory, output) or `sessions` (which session) +
//! `session` (one turn) → `zygote` + `protocol` (the warm process and its messages) → `spawn` + `jail` (namespaces, file
//! system, user) → `python/zygote.py` (forks) → `python/isolation.py` (namespaces, limits, Landlock, `seccomp`'s programs)
//! → `python/script.py` (the code), in a session by way of `python/session.py`. `probe` names the [`Tier`]; a node with
//! none is refused.

mod capture;
mod error;
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
