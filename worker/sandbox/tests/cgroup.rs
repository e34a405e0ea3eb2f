//! The cgroup that limits a pool in addition, where one is delegated: for this it takes a system with cgroup v2 alone.
//!
//! To see it run, as root in a shell: make `service/main` below `/sys/fs/cgroup`, write `+memory +pids` to the
//! `cgroup.subtree_control` of the root, the shell's number to `service/main/cgroup.procs`, and set the attribute
//! `user.delegate` of `service` to `1`.

mod common;

use std::fs;
use std::path::PathBuf;

use agentfly_sandbox::{Limits, Sandbox, SandboxConfig, Snippet, Status};

/// This pool's cgroup.
fn of_this_pool() -> Option<PathBuf> {
    let own = fs::read_to_string("/proc/self/cgroup").expect("Linux tells it");
    let own = PathBuf::from(own.lines().find_map(|line| line.strip_prefix("0::/"))?);
    let above = PathBuf::from("/sys/fs/cgroup").join(own.parent()?);
    let name = format!("agentfly-sandbox-{}-", std::process::id());
    let entries = fs::read_dir(above).ok()?.flatten();
    entries.map(|entry| entry.path()).find(|path| path.to_string_lossy().contains(&name))
}

#[test]
fn a_pool_in_a_delegated_cgroup_is_limited_as_a_whole() {
    let mib = 1 << 20;
    let limits = Limits { memory_bytes: 64 * mib, ..Limits::default() };
    let config =
        SandboxConfig { slots: 1, limits, idle_sessions: 0, idle_session_bytes: 0, ..common::config(&[]) };
    let sandbox = Sandbox::start(config).expect("starts");
    let Some(cgroup) = of_this_pool() else {
        println!("NOT RUN: no cgroup is delegated to this program (see the top of this file)");
        return;
    };
    let read = |file: &str| fs::read_to_string(cgroup.join(file)).expect("a file of the cgroup");
    let number = |file: &str| read(file).trim().parse::<u64>().expect("a number");
    assert_eq!(number("memory.max"), (64 + 64 + 16 + 512) * mib);
    let zygote = common::zygote_of(common::children(std::process::id())[0]);
    assert!(read("cgroup.procs").lines().any(|process| process == zygote.to_string()), "the zygote is in it");
    // Faster than a sample: many processes fill their memory at once.
    let burst = "import os\nfor _ in range(24):\n    if os.fork() == 0:\n        b = b'1' * (200 << 20)\n        os._exit(0)\n\
                 while True: pass";
    let outcome = common::run(&sandbox, burst);
    assert_ne!(outcome.status, Status::Ok, "{outcome:?}");
    assert!(number("memory.peak") <= number("memory.max"), "{} bytes", number("memory.peak"));
    assert_eq!(common::run(&sandbox, "print(2)").stdout, "2\n", "the pool goes on");
    let turn = sandbox.turn("s", &Snippet { code: "x = 1", seed: 0, limits: None }).expect("works");
    assert!(turn.kept, "{turn:?}");
    drop(sandbox);
    assert!(!cgroup.exists(), "the cgroup is left");
    println!("limited by {}", cgroup.display());
}
