//! Measures the pool: `cargo run --release -p agentfly-sandbox --example bench [path/to/python]`.
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
    let python = std::env::args().nth(1).unwrap_or_else(|| "third_party/sandbox-venv/bin/python".into());
    plain(&python);
    for preload in [vec![], vec!["numpy", "sympy", "math_verify"]] {
        let started = Instant::now();
        let config = SandboxConfig {
            slots: 4,
            preload: preload.iter().map(|m| (*m).to_owned()).collect(),
            ..SandboxConfig::new(&python)
        };
        let sandbox = Sandbox::start(config)?;
        println!(
            "preload {preload:?}: tier {}, started in {:.2} s",
            sandbox.tier(),
            started.elapsed().as_secs_f64()
        );
        for (name, code) in PROGRAMS.iter().take(if preload.is_empty() { 1 } else { PROGRAMS.len() }) {
            measure(&sandbox, name, code)?;
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
    times.sort();
    let at = |share: f64| times[((times.len() - 1) as f64 * share) as usize].as_secs_f64() * 1e3;
    format!("least {:6.2}  p50 {:6.2}  p99 {:6.2} ms", at(0.0), at(0.5), at(0.99))
}

fn measure(sandbox: &Sandbox, name: &str, code: &str) -> Result<(), SandboxError> {
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
    let per_second = done.into_inner() as f64 / started.elapsed().as_secs_f64();
    println!("  {name:14} {}   4 at once {per_second:6.0}/s", spread(&mut times));
    Ok(())
}

fn once(sandbox: &Sandbox, code: &str, seed: u64) -> Result<Duration, SandboxError> {
    let started = Instant::now();
    let outcome = sandbox.run(&Snippet { code, seed, limits: None })?;
    assert_eq!(outcome.status, Status::Ok, "{outcome:?}");
    Ok(started.elapsed())
}
