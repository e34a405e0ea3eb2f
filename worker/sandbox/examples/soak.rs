//! Many thousand snippets of every kind, and then a look at what is left: `make soak-sandbox`.
//!
//! `cargo run --release -p agentfly-sandbox --example soak [snippets] [path/to/python] [tier]`. Four callers run programs that end well,
//! fail, crash, fork, loop, fill memory or print without end, and turns of sessions, some of which are ended and some
//! dropped for room; now and then a zygote is killed. Fails if a process or a zombie is left, if descriptors or mounts pile
//! up, or if memory grows.

#[path = "../tests/common/mod.rs"]
mod common;

use std::fs;
use std::process::ExitCode;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use agentfly_sandbox::{Limits, Sandbox, SandboxConfig, SandboxError, Snippet, Status};
use common::children;

/// (program, how it may end). The last ones are rare: they wait for a limit.
const PROGRAMS: &[(&str, &[Status])] = &[
    ("print(1 + 1)", &[Status::Ok]),
    ("import numpy as np\nprint(np.linalg.solve(np.eye(20), np.ones(20)).sum())", &[Status::Ok]),
    ("1 / 0", &[Status::Error]),
    ("import sys\nsys.exit(3)", &[Status::Error]),
    ("import os\nos.abort()", &[Status::Error]),
    (
        "import os, time\nfor _ in range(5):\n    if os.fork() == 0:\n        os.setsid()\n        time.sleep(60)",
        &[Status::Ok],
    ),
    ("import subprocess\nsubprocess.Popen(['/bin/sleep', '60'], start_new_session=True)", &[Status::Ok]),
    ("open('f', 'wb').write(b'x' * (1 << 20))", &[Status::Ok]),
    (
        "import threading, time\nthreading.Thread(target=time.sleep, args=(60,), daemon=True).start()",
        &[Status::Ok],
    ),
    ("while True: print('x' * 1000)", &[Status::OutputLimit]),
];
const RARE: &[(&str, &[Status])] = &[
    ("while True: pass", &[Status::Timeout]),
    ("x = []\nwhile True: x.append(b'1' * (1 << 20))", &[Status::Memory, Status::Error, Status::Timeout]),
    ("import os\nwhile True:\n    try: os.fork()\n    except OSError: pass", &[Status::Timeout]),
];
const RARE_EVERY: u64 = 500;
const KILL_EVERY: u64 = 2500;
const CALLERS: u64 = 4;
/// Of the whole tree between a twentieth of the way and the end: an allocator's slack, and no more.
const MOST_GROWTH_BYTES: u64 = 24 << 20;

/// What there is of this program and what it started.
#[derive(Debug, Clone, Copy)]
struct Look {
    resident_bytes: u64,
    descriptors: usize,
    processes: usize,
    zombies: usize,
    mounts: usize,
}

fn main() -> Result<ExitCode, SandboxError> {
    let snippets: u64 = std::env::args().nth(1).and_then(|n| n.parse().ok()).unwrap_or(20_000);
    let python = std::env::args().nth(2).unwrap_or_else(|| "third_party/sandbox-venv/bin/python".into());
    let mounts = look().mounts;
    let config = SandboxConfig {
        tier: std::env::args().nth(3).map(|tier| tier.parse()).transpose()?,
        slots: 4,
        idle_sessions: 4,
        preload: vec!["numpy".into()],
        ..SandboxConfig::new(&python)
    };
    let sandbox = Sandbox::start(config)?;
    println!("{snippets} snippets on the {} tier", sandbox.tier());
    let began = Instant::now();
    let mut early = None;
    let (mut wrong, mut lost) = (0, 0);
    let batch = snippets.div_ceil(20).max(1);
    for at in 0..20 {
        let from = at * batch;
        let ended = run(&sandbox, from, (from + batch).min(snippets));
        (wrong, lost) = (wrong + ended.wrong, lost + ended.lost);
        let seen = look();
        println!(
            "{:6} snippets, {:5.0} s: {:4} MiB, {} descriptors, {} processes, {} zombies",
            (from + batch).min(snippets),
            began.elapsed().as_secs_f64(),
            seen.resident_bytes >> 20,
            seen.descriptors,
            seen.processes,
            seen.zombies
        );
        early.get_or_insert(seen);
    }
    let (early, late) = (early.unwrap_or_else(look), look());
    drop(sandbox);
    let end = look();
    let mut faults = Vec::new();
    let mut hold = |holds: bool, what: String| {
        if !holds {
            faults.push(what)
        }
    };
    hold(wrong == 0, format!("{wrong} snippets ended in another way than they must"));
    let kills = snippets / KILL_EVERY;
    hold(
        lost <= kills * CALLERS,
        format!("{lost} snippets were lost to {kills} killed zygotes and their neighbours"),
    );
    hold(late.zombies == 0, format!("{} zombies are left", late.zombies));
    hold(
        late.descriptors <= early.descriptors + 8,
        format!("{} descriptors, {} early on", late.descriptors, early.descriptors),
    );
    hold(
        late.resident_bytes <= early.resident_bytes + MOST_GROWTH_BYTES,
        format!("{} MiB, {} early on", late.resident_bytes >> 20, early.resident_bytes >> 20),
    );
    hold(end.processes == 1, format!("{} processes outlived the pool", end.processes - 1));
    hold(end.mounts == mounts, format!("{} mounts, {mounts} before", end.mounts));
    for fault in &faults {
        println!("FAILED: {fault}");
    }
    if faults.is_empty() {
        let seconds = began.elapsed().as_secs_f64();
        println!(
            "held: {snippets} snippets in {seconds:.0} s ({:.0}/s), {lost} lost to {kills} killed zygotes",
            snippets as f64 / seconds
        );
    }
    Ok(if faults.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

struct Ended {
    wrong: u64,
    lost: u64,
}

/// Runs the snippets of these numbers, four at a time.
fn run(sandbox: &Sandbox, from: u64, to: u64) -> Ended {
    let (next, wrong, lost) = (AtomicU64::new(from), AtomicU64::new(0), AtomicU64::new(0));
    std::thread::scope(|scope| {
        for _ in 0..CALLERS {
            scope.spawn(|| {
                loop {
                    let number = next.fetch_add(1, Ordering::Relaxed);
                    if number >= to {
                        return;
                    }
                    match one(sandbox, number) {
                        Ok(true) => {}
                        Ok(false) => drop(wrong.fetch_add(1, Ordering::Relaxed)),
                        Err(error) => {
                            println!("snippet {number}: {error}");
                            lost.fetch_add(1, Ordering::Relaxed);
                        }
                    }
                }
            });
        }
    });
    Ended { wrong: wrong.into_inner(), lost: lost.into_inner() }
}

/// Runs a snippet. True if it ended as it must.
fn one(sandbox: &Sandbox, number: u64) -> Result<bool, SandboxError> {
    if number % KILL_EVERY == KILL_EVERY - 1
        && let Some(zygote) = children(std::process::id()).first()
    {
        let pid = rustix::process::Pid::from_raw(zygote.cast_signed());
        // It may be gone already.
        let _ = pid.map(|pid| rustix::process::kill_process(pid, rustix::process::Signal::KILL));
    }
    let of = |list: &'static [(&'static str, &'static [Status])], by: u64| {
        list[usize::try_from(by % list.len() as u64).unwrap_or(0)]
    };
    let (code, may) =
        if number.is_multiple_of(RARE_EVERY) { of(RARE, number / RARE_EVERY) } else { of(PROGRAMS, number) };
    let limits = Some(Limits { wall: Duration::from_secs(2), ..Limits::default() });
    let snippet = Snippet { code, seed: number, limits };
    let outcome = if number.is_multiple_of(3) {
        let name = format!("session {}", number / 3 % 16);
        let turn = sandbox.turn(&name, &snippet)?;
        if number.is_multiple_of(7) {
            sandbox.end_session(&name);
        }
        turn.outcome
    } else {
        sandbox.run(&snippet)?
    };
    let fits = may.contains(&outcome.status);
    if !fits {
        println!("snippet {number} ended as {outcome:?}");
    }
    Ok(fits)
}

fn look() -> Look {
    let mut seen = vec![std::process::id()];
    let mut next = 0;
    while let Some(process) = seen.get(next).copied() {
        next += 1;
        seen.extend(children(process));
    }
    let status = |process: &u32| fs::read_to_string(format!("/proc/{process}/status")).unwrap_or_default();
    let of = |text: &str, key: &str| {
        let line = text.lines().find(|line| line.starts_with(key));
        line.and_then(|line| line.split_whitespace().nth(1)).map(str::to_owned)
    };
    let resident = |process: &u32| {
        let text = status(process);
        ["RssAnon:", "RssShmem:"].iter().filter_map(|key| of(&text, key)?.parse::<u64>().ok()).sum::<u64>()
            << 10
    };
    Look {
        // Sessions share their zygote's pages: this program and its zygotes are what may grow.
        resident_bytes: seen.iter().take(1 + children(std::process::id()).len()).map(resident).sum(),
        descriptors: fs::read_dir("/proc/self/fd").map_or(0, Iterator::count),
        processes: seen.len(),
        zombies: seen.iter().filter(|process| of(&status(process), "State:").as_deref() == Some("Z")).count(),
        mounts: fs::read_to_string("/proc/self/mounts").map_or(0, |text| text.lines().count()),
    }
}
