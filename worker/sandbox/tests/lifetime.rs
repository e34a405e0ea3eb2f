//! Zygotes die and are replaced; nothing outlives its owner.

mod common;

use std::io::{BufRead, BufReader};
use std::os::fd::OwnedFd;
use std::process::Stdio;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use agentfly_sandbox::{Sandbox, SandboxConfig, SandboxError, Snippet, Status};
use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::process::{Pid, PidfdFlags, Signal};

/// The tests look at this process's children: one at a time.
static ALONE: Mutex<()> = Mutex::new(());

fn alone() -> std::sync::MutexGuard<'static, ()> {
    ALONE.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

/// The process that this one has started: the zygote, or its warden.
fn only_child() -> u32 {
    let children = common::children(std::process::id());
    assert_eq!(children.len(), 1, "{children:?}");
    children[0]
}

/// The process whose children are snippets and sessions.
fn only_zygote() -> u32 {
    common::zygote_of(only_child())
}

fn pid(id: u32) -> Pid {
    Pid::from_raw(id.cast_signed()).expect("a process id is positive")
}

fn open(process: u32) -> OwnedFd {
    rustix::process::pidfd_open(pid(process), PidfdFlags::empty()).expect("it runs")
}

fn wait_for_end(process: u32, handle: &OwnedFd) {
    let mut polled = [PollFd::new(handle, PollFlags::IN)];
    let ended = rustix::event::poll(&mut polled, Some(&Timespec { tv_sec: 20, tv_nsec: 0 })).expect("polls");
    assert_eq!(ended, 1, "process {process} has not ended");
}

#[test]
fn a_killed_zygote_is_replaced_by_the_next_call() {
    let _alone = alone();
    let sandbox = common::start(&[]);
    let (first, child) = (only_zygote(), only_child());
    let handle = open(child);
    rustix::process::kill_process(pid(first), Signal::KILL).expect("killed");
    wait_for_end(child, &handle); // a signal takes a moment, and until then the zygote may still take a call
    assert_eq!(common::run(&sandbox, "print(1)").stdout, "1\n");
    assert_ne!(only_zygote(), first, "the first one is reaped and a second one serves");
}

#[test]
fn a_waiting_process_that_is_killed_is_replaced_and_none_waits_for_nothing() {
    if !common::in_namespaces() {
        return; // there the limit of tasks, and so what to wait for, changes from call to call
    }
    let _alone = alone();
    let sandbox = common::start(&[]);
    let zygote = only_zygote();
    for round in 0..3 {
        for _ in 0..2 {
            assert_eq!(common::run(&sandbox, "print(1)").stdout, "1\n", "round {round}");
        }
        let deadline = Instant::now() + Duration::from_secs(20);
        let waiting = loop {
            if let Some(process) = common::ready(zygote) {
                break process;
            }
            assert!(Instant::now() < deadline, "no process waits after two equal calls");
        };
        let handle = open(waiting);
        rustix::process::kill_process(pid(waiting), Signal::KILL).expect("killed");
        wait_for_end(waiting, &handle);
    }
    assert_eq!(common::run(&sandbox, "print(2)").stdout, "2\n");
}

#[test]
fn a_snippet_whose_zygote_dies_is_a_fault_and_not_an_outcome() {
    let _alone = alone();
    let sandbox = common::start(&[]);
    let zygote = only_zygote();
    std::thread::scope(|scope| {
        let call = scope.spawn(|| sandbox.run(&Snippet { code: "while True: pass", seed: 0, limits: None }));
        let deadline = Instant::now() + Duration::from_secs(20);
        while common::at_work(zygote).is_empty() && Instant::now() < deadline {
            std::thread::yield_now();
        }
        rustix::process::kill_process(pid(zygote), Signal::KILL).expect("killed");
        let answer = call.join().expect("no panic");
        // Killed within the fork itself the snippet was started again, on a fresh zygote.
        let ended = |s: &Status| *s == Status::Timeout;
        assert!(
            matches!(&answer, Err(SandboxError::ZygoteLost))
                || answer.as_ref().is_ok_and(|o| ended(&o.status)),
            "{answer:?}"
        );
    });
    assert_eq!(common::run(&sandbox, "print(2)").stdout, "2\n");
}

#[test]
fn a_zygote_retires_after_its_number_of_snippets() {
    let _alone = alone();
    let sandbox = Sandbox::start(SandboxConfig { restart_after: 3, ..common::config(&[]) }).expect("starts");
    let first = only_zygote();
    for n in 0..6 {
        assert_eq!(common::run(&sandbox, &format!("print({n})")).stdout, format!("{n}\n"));
    }
    assert_ne!(only_zygote(), first);
    drop(sandbox);
    assert_eq!(common::children(std::process::id()), [0_u32; 0]);
}

#[test]
fn descriptors_do_not_pile_up() {
    let _alone = alone();
    let sandbox = common::start(&[]);
    let open = || std::fs::read_dir("/proc/self/fd").expect("open descriptors").count();
    let before = open();
    for _ in 0..40 {
        common::run(&sandbox, "print(1)");
    }
    assert_eq!(open(), before);
}

#[test]
fn an_owner_killed_with_sigkill_leaves_no_process_and_no_file() {
    let _alone = alone();
    let mut owner =
        common::again("own_a_sandbox_until_killed").stdout(Stdio::piped()).spawn().expect("starts");
    let lines = BufReader::new(owner.stdout.take().expect("piped")).lines();
    let line = lines
        .map_while(Result::ok)
        .find_map(|line| line.split_once("processes ").map(|(_, rest)| rest.to_owned()));
    let processes: Vec<u32> = line
        .expect("the owner tells its processes")
        .split(' ')
        .map(|id| id.parse().expect("a number"))
        .collect();
    assert!(processes.len() >= 6, "a zygote and a snippet's four: {processes:?}");
    let handles: Vec<_> = processes.iter().map(|id| open(*id)).collect();
    let directory = processes.last().and_then(|snippet| common::directory_of(*snippet));
    if !common::in_namespaces() {
        // With its warden, which would have cleaned: then that is the zygote's to do.
        rustix::process::kill_process(pid(processes[0]), Signal::KILL).expect("killed");
    }
    owner.kill().expect("killed");
    owner.wait().expect("reaped");
    for (process, handle) in processes.iter().zip(&handles) {
        wait_for_end(*process, handle);
    }
    assert!(!directory.is_some_and(|path| path.exists()), "its directory is left");
}

#[test]
fn a_session_survives_its_zygote_s_retirement_and_not_its_death() {
    let _alone = alone();
    let config = SandboxConfig { restart_after: 3, ..common::config(&[]) };
    let sandbox = Sandbox::start(config).expect("starts");
    let turn = |code: &str| {
        sandbox.turn("long", &Snippet { code, seed: 0, limits: None }).expect("the sandbox works")
    };
    turn("x = 5");
    let (of_session, child) = (only_zygote(), only_child());
    let handle = open(child);
    for _ in 0..5 {
        common::run(&sandbox, "print(1)");
    }
    assert_eq!(turn("print(x)").outcome.stdout, "5\n");
    rustix::process::kill_process(pid(of_session), Signal::KILL).expect("killed");
    wait_for_end(child, &handle);
    let next = turn("print('x' in globals())");
    assert_eq!((next.outcome.stdout.as_str(), next.restarted), ("False\n", true), "{next:?}");
}

#[test]
fn a_session_ends_with_its_owner_s_word_and_with_the_pool() {
    let _alone = alone();
    let sandbox = common::start(&[]);
    let zygote = only_zygote();
    for name in ["a", "b", "c"] {
        let code = "import subprocess\nsubprocess.Popen(['/bin/sleep', '60'])\nx = 1";
        sandbox.turn(name, &Snippet { code, seed: 0, limits: None }).expect("the sandbox works");
    }
    assert_eq!(common::at_work(zygote).len(), 3);
    sandbox.end_session("a");
    assert_eq!(common::at_work(zygote).len(), 2, "a session outlived its end");
    drop(sandbox);
    assert_eq!(common::children(std::process::id()), [0_u32; 0]);
}

/// What a snippet has started when its zygote, or the warden of that, is killed.
#[test]
fn a_killed_zygote_or_warden_leaves_no_process_and_no_file() {
    let _alone = alone();
    for whom in [only_zygote as fn() -> u32, only_child] {
        let sandbox = common::start(&[]);
        let zygote = only_zygote();
        std::thread::scope(|scope| {
            let limits =
                Some(agentfly_sandbox::Limits { wall: Duration::from_secs(60), ..Default::default() });
            let code = "import os, time\nopen('file', 'w').write('x')\nos.fork()\nos.fork()\ntime.sleep(60)";
            let call = scope.spawn(|| sandbox.run(&Snippet { code, seed: 0, limits }));
            let made = four_of(zygote);
            let handles: Vec<_> = made.iter().map(|id| open(*id)).collect();
            let directory = common::directory_of(made[0]);
            rustix::process::kill_process(pid(whom()), Signal::KILL).expect("killed");
            for (process, handle) in made.iter().zip(&handles) {
                wait_for_end(*process, handle);
            }
            assert!(matches!(call.join().expect("no panic"), Err(SandboxError::ZygoteLost)));
            assert!(!directory.is_some_and(|path| path.exists()), "its directory is left");
        });
        drop(sandbox);
        assert_eq!(common::children(std::process::id()), [0_u32; 0]);
    }
}

/// The four processes of a snippet that forks twice.
fn four_of(zygote: u32) -> Vec<u32> {
    let deadline = Instant::now() + Duration::from_secs(20);
    loop {
        let below = common::descendants(zygote);
        if below.len() == 4 {
            return below;
        }
        assert!(Instant::now() < deadline, "the snippet has not made its processes: {below:?}");
    }
}

#[test]
fn all_of_this_holds_without_namespaces() {
    let _alone = alone();
    common::all_again_without_namespaces();
}

#[test]
#[ignore = "run by the test above, which kills it"]
fn own_a_sandbox_until_killed() {
    let sandbox = common::start(&[]);
    let zygote = only_zygote();
    std::thread::scope(|scope| {
        let limits = Some(agentfly_sandbox::Limits { wall: Duration::from_secs(60), ..Default::default() });
        let code = "import os, time\nos.fork()\nos.fork()\ntime.sleep(60)";
        scope.spawn(|| sandbox.run(&Snippet { code, seed: 0, limits }));
        let below = four_of(zygote);
        let all: Vec<_> = [only_child(), zygote].into_iter().chain(below).map(|id| id.to_string()).collect();
        println!("processes {}", all.join(" "));
    });
}

#[test]
fn an_interpreter_that_is_not_there_or_cannot_import_is_named() {
    let missing = Sandbox::start(SandboxConfig::new("/nowhere/bin/python")).expect_err("missing").to_string();
    assert!(missing.contains("/nowhere/bin/python") && missing.contains("make setup"), "{missing}");
    let _alone = alone();
    let unknown = Sandbox::start(common::config(&["no_such_module"])).expect_err("cannot import").to_string();
    assert!(unknown.contains("ModuleNotFoundError: No module named 'no_such_module'"), "{unknown}");
    assert_eq!(common::children(std::process::id()), [0_u32; 0], "the failed zygote is reaped");
}
