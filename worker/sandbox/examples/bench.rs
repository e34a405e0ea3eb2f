//! Measures the pool: `cargo run --release -p agentfly-sandbox --example bench [--json] [path/to/python]`.
//!
//! Prints, for a few programs, the latency of one caller and the throughput of four, beside what one start of a plain
//! `python3 -I` costs on the same machine at the same moment.

use std::process::Command;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use agentfly_sandbox::{Sandbox, SandboxConfig, SandboxError, Snippet, Status};

const PROGRAMS: &[(&str, &str)] = &[
    ("print(1 + 1)", "print(1 + 1)"),
    ("numpy solve", "import numpy as np\nprint(np.linalg.solve(np.eye(50), np.ones(50)).sum())"),
    ("sympy factor", "from sympy import *\nx = symbols('x')\nprint(factor(x**6 - 1))"),
    (
        "math-verify",
        "from math_verify import parse, verify\nprint(verify(parse(r'$\\frac{2}{4}$'), parse('$0.5$')))",
    ),
];

fn main() -> Result<(), SandboxError> {
    let (flags, paths): (Vec<_>, Vec<_>) = std::env::args().skip(1).partition(|word| word == "--json");
    let json = !flags.is_empty();
    let python = paths.first().cloned().unwrap_or_else(|| "third_party/sandbox-venv/bin/python".into());
    if !json {
        plain(&python);
    }
    for preload in [vec![], vec!["numpy", "sympy"], vec!["numpy", "sympy", "math_verify"]] {
        let started = Instant::now();
        let config = SandboxConfig {
            slots: 4,
            preload: preload.iter().map(|m| (*m).to_owned()).collect(),
            ..SandboxConfig::new(&python)
        };
        let sandbox = Sandbox::start(config)?;
        let seconds = started.elapsed().as_secs_f64();
        if !json {
            println!("preload {preload:?}: tier {}, started in {seconds:.2} s", sandbox.tier());
        }
        // A library that is not loaded before would be what is measured.
        let loaded = |(name, _): &&(&str, &str)| match *name {
            "print(1 + 1)" => true,
            "math-verify" => preload.contains(&"math_verify"),
            _ => !preload.is_empty(),
        };
        for (name, code) in PROGRAMS.iter().filter(loaded) {
            let (mut times, per_second) = measure(&sandbox, code)?;
            if json {
                let [p50_ms, p99_ms] = [0.5, 0.99].map(|share| milliseconds(&mut times, share));
                println!(
                    "{}",
                    serde_json::json!({"preload": preload, "program": name, "p50_ms": p50_ms, "p99_ms": p99_ms,
                        "per_second": per_second, "start_seconds": seconds, "tier": sandbox.tier()})
                );
            } else {
                println!("  {name:14} {}   4 at once {per_second:6.0}/s", spread(&mut times));
            }
        }
    }
    Ok(())
}

/// One interpreter per program, without any protection: what the pool is compared with.
fn plain(python: &str) {
    let mut times = Vec::new();
    for _ in 0..20 {
        let started = Instant::now();
        let output = Command::new(python).args(["-I", "-c", "print(1 + 1)"]).output();
        assert!(output.is_ok_and(|o| o.stdout == b"2\n"), "{python} does not work");
        times.push(started.elapsed());
    }
    println!("plain python3 -I: {}", spread(&mut times));
}

fn spread(times: &mut [Duration]) -> String {
    let [least, p50, p99] = [0.0, 0.5, 0.99].map(|share| milliseconds(times, share));
    format!("least {least:6.2}  p50 {p50:6.2}  p99 {p99:6.2} ms")
}

/// What this share of the times is below.
fn milliseconds(times: &mut [Duration], share: f64) -> f64 {
    times.sort();
    times[((times.len() - 1) as f64 * share) as usize].as_secs_f64() * 1e3
}

/// One caller's times, and how many a second four callers get.
fn measure(sandbox: &Sandbox, code: &str) -> Result<(Vec<Duration>, f64), SandboxError> {
    let mut times = Vec::new();
    for seed in 0..200 {
        times.push(once(sandbox, code, seed)?);
    }
    let (done, started) = (AtomicUsize::new(0), Instant::now());
    std::thread::scope(|scope| {
        let callers: Vec<_> = (0..4)
            .map(|_| {
                scope.spawn(|| {
                    while started.elapsed() < Duration::from_secs(3) {
                        once(sandbox, code, 0)?;
                        done.fetch_add(1, Ordering::Relaxed);
                    }
                    Ok::<(), SandboxError>(())
                })
            })
            .collect();
        callers.into_iter().try_for_each(|caller| caller.join().expect("a caller does not panic"))
    })?;
    Ok((times, done.into_inner() as f64 / started.elapsed().as_secs_f64()))
}

fn once(sandbox: &Sandbox, code: &str, seed: u64) -> Result<Duration, SandboxError> {
    let started = Instant::now();
    let outcome = sandbox.run(&Snippet { code, seed, limits: None })?;
    assert_eq!(outcome.status, Status::Ok, "{outcome:?}");
    Ok(started.elapsed())
}
