//! Every attack of `tests/abuse`, as the user who runs the tests and as one without privileges, with namespaces and without.
//!
//! The attacks are harmless even if the sandbox failed: they open for writing without writing, and every loop ends.

mod common;

use std::collections::BTreeMap;
use std::net::TcpListener;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::path::Path;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use agentfly_sandbox::{Limits, Outcome, Sandbox, SandboxError, Snippet, Status, Tier};
use serde::Deserialize;

#[derive(Deserialize)]
struct Suite {
    cases: Vec<Case>,
}

/// One attack; the fields are those of `abuse.json`.
#[derive(Clone, Deserialize)]
struct Case {
    name: String,
    file: String,
    outcome: String,
    must: Vec<String>,
    must_not: Vec<String>,
    max_wall_s: f64,
    setup: Option<String>,
    /// What differs where a snippet sees the node's files and processes without being able to touch them.
    landlock: Option<OnLandlock>,
    /// Why it is no attack as a turn of a session.
    not_as_turn: Option<String>,
    /// The one tier that it is for.
    tier: Option<Tier>,
}

#[derive(Clone, Deserialize)]
struct OnLandlock {
    outcome: Option<String>,
    must: Option<Vec<String>>,
    /// Why it says nothing there.
    not_run: Option<String>,
}

const CANARY: &str = "CANARY-env";

#[test]
fn no_attack_gets_out_as_the_user_of_these_tests() {
    finish(&mut common::again("attack"));
}

#[test]
fn no_attack_gets_out_as_a_user_without_privileges() {
    match common::again_as_nobody("attack") {
        Ok(mut command) => drop(finish(&mut command)),
        Err(reason) => println!("NOT RUN as a second user: {reason}"),
    }
}

#[test]
fn no_attack_gets_out_without_namespaces() {
    finish(common::without_namespaces(&mut common::again("attack")));
    match common::again_as_nobody("attack") {
        Ok(mut command) => drop(finish(common::without_namespaces(&mut command))),
        Err(reason) => println!("NOT RUN as a second user: {reason}"),
    }
}

#[test]
fn a_node_that_refuses_namespaces_gets_the_next_tier() {
    match common::again_where_namespaces_are_off("attack") {
        Ok(mut command) => {
            let text = finish(&mut command);
            assert!(text.contains("on the landlock tier") || text.contains("NOT RUN"), "{text}");
        }
        Err(reason) => println!("NOT RUN where namespaces are off: {reason}"),
    }
}

fn finish(command: &mut std::process::Command) -> String {
    let output = command.env("WANDB_API_KEY", CANARY).output().expect("the test program starts");
    let text = common::text(&output);
    print!("{text}");
    assert!(output.status.success(), "{text}");
    assert!(text.contains("attacks held") || text.contains("NOT RUN"), "the attacks did not run:\n{text}");
    text
}

#[test]
#[ignore = "run by the tests above, in processes with secrets in their environment"]
fn attack() {
    assert_eq!(std::env::var("WANDB_API_KEY").as_deref(), Ok(CANARY), "there must be a secret to steal");
    // Another test process may hold the same names: then its listener is the one to be reached.
    let _listener = TcpListener::bind("127.0.0.1:18999");
    let _socket = SocketAddr::from_abstract_name("canary").and_then(|name| UnixDatagram::bind_addr(&name));
    let sandbox = match Sandbox::start(common::config(&[])) {
        Err(SandboxError::Unsupported(reason)) => {
            println!("NOT RUN: this node refuses the sandbox to this user: {reason}");
            return;
        }
        other => other.expect("the sandbox starts"),
    };
    let suite = std::fs::read_to_string(folder().join("abuse.json")).expect("abuse.json");
    let suite: Suite = serde_json::from_str(&suite).expect("abuse.json has the fields above");
    let cases: Vec<_> = suite.cases.iter().filter_map(|case| on_tier(case, sandbox.tier())).collect();
    let (queue, failures) = (Mutex::new(cases.iter()), Mutex::new(BTreeMap::new()));
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                loop {
                    let case = queue.lock().expect("no panic under the lock").next();
                    let Some(case) = case else { return };
                    if let Err(reason) = hold(&sandbox, case) {
                        failures.lock().expect("no panic under the lock").insert(&case.name, reason);
                    }
                }
            });
        }
    });
    let failures = failures.into_inner().expect("no panic under the lock");
    assert!(failures.is_empty(), "on the {} tier: {failures:#?}", sandbox.tier());
    let tier = sandbox.tier();
    nothing_is_left(sandbox);
    println!("{} attacks held on the {tier} tier", cases.len());
}

/// The directory that a warden was given for its zygote, from its command line.
fn home_of(warden: u32) -> Option<String> {
    let words = std::fs::read_to_string(format!("/proc/{warden}/cmdline")).unwrap_or_default();
    let program = words.split('\0').find(|word| word.ends_with("/programs/warden.py"))?;
    program.strip_suffix("/programs/warden.py").map(str::to_owned)
}

/// The case as it is for a tier, if it is for that one.
fn on_tier(case: &Case, tier: Tier) -> Option<Case> {
    let mut case = case.clone();
    if case.tier.is_some_and(|only| only != tier) {
        return None;
    }
    if let Some(here) = case.landlock.take().filter(|_| tier == Tier::Landlock) {
        if let Some(reason) = here.not_run {
            println!("{} NOT RUN on the {tier} tier: {reason}", case.name);
            return None;
        }
        case.outcome = here.outcome.unwrap_or(case.outcome);
        case.must = here.must.unwrap_or(case.must);
    }
    Some(case)
}

fn folder() -> &'static Path {
    Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/abuse"))
}

fn hold(sandbox: &Sandbox, case: &Case) -> Result<(), String> {
    let source =
        |file: &str| std::fs::read_to_string(folder().join(file)).map_err(|e| format!("{file}: {e}"));
    if let Some(setup) = &case.setup {
        common::run(sandbox, &source(setup)?);
    }
    let started = Instant::now();
    // Filling the memory takes time: on a busy machine it must not be the clock that ends it.
    let patience = Duration::from_secs(if case.outcome == "killed:mem" { 40 } else { 5 });
    let limits = Some(Limits { wall: patience, ..Limits::default() });
    let code = source(&case.file)?;
    let outcome = sandbox.run(&Snippet { code: &code, seed: 1, limits }).map_err(|e| e.to_string())?;
    let seconds = started.elapsed().as_secs_f64();
    judge(case, &outcome, seconds - patience.as_secs_f64() + 5.0)
        .map_err(|reason| format!("{reason}: {outcome:?}"))?;
    let next = common::run(sandbox, "print(1+1)");
    if next.stdout != "2\n" {
        return Err(format!("the next snippet does not work: {next:?}"));
    }
    if case.not_as_turn.is_some() { Ok(()) } else { hold_as_turn(sandbox, case, &code) }
}

/// The same attack as a turn of a session, whose state before it must be there after it, or be known to be lost.
fn hold_as_turn(sandbox: &Sandbox, case: &Case, code: &str) -> Result<(), String> {
    let turn = |code: &str| {
        let limits = Some(Limits { wall: Duration::from_secs(2), ..Limits::default() });
        sandbox.turn(&case.name, &Snippet { code, seed: 1, limits }).map_err(|e| e.to_string())
    };
    turn("x = 41")?;
    let attack = turn(code)?;
    let next = turn("print(x + 1 if 'x' in globals() else 'lost')")?;
    sandbox.end_session(&case.name);
    let output = format!("{}{}", attack.outcome.stdout, attack.outcome.stderr);
    if let Some(escape) = case.must_not.iter().find(|text| output.contains(text.as_str())) {
        return Err(format!("as a turn: {escape:?} happened: {attack:?}"));
    }
    // A turn that is kept may have done anything to its own state, even to what would answer.
    let answers =
        if next.restarted { next.outcome.stdout == "lost\n" } else { next.outcome.stdout == "42\n" };
    if answers || attack.kept {
        Ok(())
    } else {
        Err(format!("the turn after it: {next:?}, after {attack:?}"))
    }
}

fn judge(case: &Case, outcome: &Outcome, seconds: f64) -> Result<(), String> {
    let fits = match case.outcome.as_str() {
        "any" => true,
        "ok" => outcome.status == Status::Ok,
        "error" => outcome.status == Status::Error,
        "killed:mem" => outcome.status == Status::Memory,
        "killed:wall" => outcome.status == Status::Timeout,
        "any_killed" => !matches!(outcome.status, Status::Ok | Status::Error),
        other => {
            return Err(format!("abuse.json knows an outcome that this test does not: {other}"));
        }
    };
    if !fits {
        return Err(format!("the outcome is not {}", case.outcome));
    }
    let output = format!("{}{}", outcome.stdout, outcome.stderr);
    if let Some(missing) = case.must.iter().find(|text| !output.contains(text.as_str())) {
        return Err(format!("{missing:?} is missing"));
    }
    if let Some(escape) = case.must_not.iter().find(|text| output.contains(text.as_str())) {
        return Err(format!("{escape:?} happened"));
    }
    // Others may be using this machine: a snippet that needed no limit gets some of their time on top.
    if seconds > case.max_wall_s + 4.0 { Err(format!("it took {seconds:.1} s")) } else { Ok(()) }
}

/// The zygote is process 1 of its pid namespace: every orphan of a snippet would be found below it.
fn nothing_is_left(sandbox: Sandbox) {
    let me = std::process::id();
    for zygote in common::children(me).into_iter().map(common::zygote_of) {
        assert_eq!(common::at_work(zygote), [0_u32; 0], "an orphan or a zombie is left");
    }
    let homes: Vec<String> = common::children(me).into_iter().filter_map(home_of).collect();
    assert!(common::in_namespaces() || !homes.is_empty() || sandbox.tier() != Tier::Landlock);
    drop(sandbox);
    assert_eq!(common::children(me), [0_u32; 0], "a zygote outlived its pool");
    let left = std::fs::read_dir(std::env::temp_dir()).expect("a directory for temporary files");
    let left: Vec<String> = left.flatten().map(|entry| entry.path().to_string_lossy().into_owned()).collect();
    let of_ours = |path: &String| homes.iter().any(|home| path.starts_with(home.as_str()));
    assert!(!left.iter().any(of_ours), "files are left of {homes:?}");
    let mounts = std::fs::read_to_string("/proc/self/mounts").expect("mounts");
    assert!(!mounts.contains("nr_inodes=4096"), "a mount is left:\n{mounts}");
}
