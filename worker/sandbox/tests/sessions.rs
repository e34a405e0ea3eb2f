//! Turns that share a state, and what they do not share.

mod common;

use std::sync::OnceLock;
use std::time::Duration;

use agentfly_sandbox::{Limits, Sandbox, SandboxConfig, Snippet, Status, Turn};

fn sandbox() -> &'static Sandbox {
    static SHARED: OnceLock<Sandbox> = OnceLock::new();
    SHARED.get_or_init(|| common::start(&["numpy"]))
}

fn turn(session: &str, code: &str) -> Turn {
    sandbox().turn(session, &Snippet { code, seed: 7, limits: None }).expect("the sandbox works")
}

fn said(session: &str, code: &str) -> String {
    let turn = turn(session, code);
    assert_eq!((turn.outcome.status, turn.kept), (Status::Ok, true), "{turn:?}");
    turn.outcome.stdout
}

#[test]
fn variables_functions_imports_and_files_live_on() {
    let name = "live-on";
    said(name, "import math\nx = [1, 2]\ndef area(r):\n    return round(scale * math.pi * r)\nscale = 10");
    assert_eq!(said(name, "x.append(3)\nprint(area(2), x)"), "63 [1, 2, 3]\n");
    said(name, "with open('notes', 'w') as f: f.write('kept')");
    assert_eq!(
        said(name, "import os\nprint(open(os.path.join(os.environ['HOME'], 'notes')).read(), sum(x))"),
        "kept 6\n"
    );
    sandbox().end_session(name);
    let fresh = turn(name, "print('x' in globals())");
    assert_eq!((fresh.outcome.stdout.as_str(), fresh.restarted), ("False\n", false), "its owner ended it");
    sandbox().end_session(name);
}

#[test]
fn a_turn_that_fails_or_is_ended_leaves_the_state_of_the_last_good_one() {
    let name = "rolls-back";
    said(name, "x = [1]");
    for (code, status) in [
        ("x.append(2)\n1 / 0", Status::Error),
        ("x.append(2)\nimport os\nos.kill(os.getpid(), 11)", Status::Error),
        ("x.append(2)\nimport sys\nsys.exit(3)", Status::Error),
        ("x.append(2)\nwhile True: pass", Status::Timeout),
        ("x.append(2)\nwhile True: print('y' * 1000)", Status::OutputLimit),
        ("x.append(2)\nb = bytearray(700 << 20)\nprint(len(b))", Status::Error),
        ("x.append(2)\nimport os\nwhile True:\n    if os.fork() == 0: b = b'1' * (150 << 20)", Status::Error),
    ] {
        let limits = Some(Limits { wall: Duration::from_secs(2), ..Limits::default() });
        let ended = sandbox().turn(name, &Snippet { code, seed: 0, limits }).expect("the sandbox works");
        assert!(!ended.kept && !ended.restarted, "{code}: {ended:?}");
        let memory = [Status::Memory, Status::Error, Status::Timeout].contains(&ended.outcome.status);
        assert!(ended.outcome.status == status || (code.contains("<< 20") && memory), "{code}: {ended:?}");
        let next = turn(name, "print(x)");
        assert_eq!(next.outcome.stdout, "[1]\n", "after {code}, which ended as {ended:?}: {next:?}");
    }
    sandbox().end_session(name);
}

#[test]
fn a_turn_that_ends_at_once_does_not_take_its_session_with_it() {
    let name = "at-once";
    said(name, "import os\nx = [1]");
    for round in 0..150 {
        let ended = turn(name, "os.abort()");
        assert_eq!((ended.outcome.status, ended.restarted), (Status::Error, false), "{round}: {ended:?}");
    }
    assert_eq!(said(name, "print(x)"), "[1]\n");
    sandbox().end_session(name);
}

#[test]
fn an_exception_names_the_turn_and_keeps_what_was_printed() {
    let name = "traceback";
    said(name, "def f(x):\n    return 1 / x");
    let failed = turn(name, "print('before')\nf(0)").outcome;
    assert_eq!((failed.stdout.as_str(), failed.exit_code), ("before\n", Some(1)));
    for line in ["<turn 2>\", line 2", "<turn 1>\", line 2, in f", "return 1 / x", "ZeroDivisionError"] {
        assert!(failed.stderr.contains(line), "{line} is missing in\n{}", failed.stderr);
    }
    sandbox().end_session(name);
}

#[test]
fn a_turn_s_threads_and_processes_end_with_it() {
    let name = "background";
    said(
        name,
        "import os, threading, time, subprocess\n\
         def spin():\n    while True: pass\n\
         threading.Thread(target=spin, daemon=True).start()\n\
         made = [subprocess.Popen(['/bin/sleep', '60'], start_new_session=True).pid, os.fork()]\n\
         if made[1] == 0:\n    os.setsid()\n    time.sleep(60)\n\
         read, write = os.pipe()\n\
         if os.fork() == 0:\n    orphan = os.fork()\n    \
         if orphan: os.write(write, str(orphan).encode())\n    else: time.sleep(60)\n    os._exit(0)\n\
         made.append(int(os.read(read, 20)))\n",
    );
    let alive = "def state(process):\n    try: os.kill(process, 0)\n    except ProcessLookupError: return 'gone'\n    \
                 except PermissionError: pass\n    return 'there'\n\
                 print(threading.active_count(), *map(state, made))";
    assert_eq!(said(name, alive), "1 gone gone gone\n", "not even a zombie is left");
    let waits = "p = subprocess.run(['/bin/sh', '-c', 'exit 7'])\nprint(p.returncode)";
    assert_eq!(said(name, waits), "7\n", "children are waited for as ever");
    let leaves = "before = os.getpgid(0), os.getsid(0)\nos.setsid()\nos.setpgid(0, 0)\nos.setpgid(0, os.getppid())\n\
                  print(before == (os.getpgid(0), os.getsid(0)))";
    assert_eq!(said(name, leaves), "True\n", "the group is how they are found");
    sandbox().end_session(name);
}

#[test]
fn nothing_of_one_session_is_in_another() {
    said("one", "secret = 41\nopen('secret', 'w').write('41')\nimport json\njson.leak = 1");
    let look = "import json, os\nprint('secret' in globals(), os.listdir(), hasattr(json, 'leak'))";
    assert_eq!(said("two", look), "False [] False\n");
    assert_eq!(common::run(sandbox(), look).stdout, "False [] False\n", "nor in a snippet");
    for name in ["one", "two"] {
        sandbox().end_session(name);
    }
}

#[test]
fn the_stream_of_random_numbers_goes_on_and_is_the_seed_s() {
    let draw = "import random, numpy\nprint(random.random(), numpy.random.rand())";
    let numbers = |name: &str| [said(name, draw), said(name, draw)];
    let (first, again) = (numbers("seeded-1"), numbers("seeded-2"));
    assert_eq!(first, again);
    assert_ne!(first[0], first[1]);
    for name in ["seeded-1", "seeded-2"] {
        sandbox().end_session(name);
    }
}

#[test]
fn the_first_process_of_a_session_cannot_be_reached_by_its_code() {
    let name = "pid-1";
    // The head's parent is the session's first process.
    let attack = "import os, signal, ctypes\nfirst = os.getppid()\n\
         for path in ['/proc/1/mem', '/proc/1/environ', '/proc/1/fd', '/proc/1/maps', '/proc/1/root']:\n\
         \x20   path = path.replace('/1/', f'/{first}/')\n\
         \x20   try: print('ESCAPE', path, os.listdir(path) if path.endswith('fd') else open(path, 'rb').read(16))\n\
         \x20   except OSError: pass\n\
         for number in (9, 19, 2, 15, 11):\n\
         \x20   try: os.kill(first, number)\n    except PermissionError: pass\n\
         libc = ctypes.CDLL(None, use_errno=True)\n\
         print(libc.ptrace(16, first, 0, 0))";
    let first = said(name, attack);
    assert!(!first.contains("ESCAPE") && first == "-1\n", "{first}");
    assert_eq!(said(name, "print('alive')"), "alive\n");
    sandbox().end_session(name);
}

#[test]
fn code_that_lies_to_the_session_hurts_only_itself() {
    // It finds the socket of its head and talks to the first process; what the last word is decides what follows.
    let lie = |words: &str| {
        format!(
            "import os, socket, struct, stat, time\n\
             for fd in range(3, 64):\n\
             \x20   try:\n\
             \x20       if stat.S_ISSOCK(os.fstat(fd).st_mode):\n\
             \x20           s = socket.socket(fileno=os.dup(fd))\n\
             \x20           for word in ({words}): s.send(word)\n\
             \x20   except OSError: pass\n\
             time.sleep(60)"
        )
    };
    let limits = Some(Limits { wall: Duration::from_secs(1), ..Limits::default() });
    let turn = |code: &str| {
        let snippet = Snippet { code, seed: 0, limits: limits.clone() };
        sandbox().turn("liar", &snippet).expect("whatever the code does is an outcome")
    };
    assert_eq!(turn("x = 1").outcome.status, Status::Ok);
    let junk = turn(&lie("b'x', b'x' * 300, struct.pack('<II', 77, 1)"));
    assert_eq!((junk.outcome.status, junk.kept), (Status::Timeout, false), "no word ends it: {junk:?}");
    let gone = turn(&lie("b'',"));
    assert_eq!((gone.outcome.status, gone.kept), (Status::Killed, false), "as if it had ended: {gone:?}");
    assert_eq!(turn("print(x)").outcome.stdout, "1\n", "after both the state is the last good one");
    // It says that it is done and goes on: then it is the head, and answers nothing.
    let done = turn(&lie("struct.pack('<II', 2, 0),"));
    assert_eq!((done.outcome.status, done.kept), (Status::Ok, true), "{done:?}");
    let mute = turn("print(x)");
    assert_eq!((mute.outcome.status, mute.kept), (Status::Timeout, false), "{mute:?}");
    let next = turn("print('x' in globals())");
    assert_eq!((next.outcome.stdout.as_str(), next.restarted), ("False\n", true), "{next:?}");
    assert_eq!(said("honest", "print(2)"), "2\n");
    for name in ["liar", "honest"] {
        sandbox().end_session(name);
    }
}

#[test]
fn a_stopped_head_cannot_arrange_to_go_on() {
    let name = "alarm";
    said(name, "import ctypes, os, signal, time\nlibc = ctypes.CDLL(None, use_errno=True)\nwoken = []");
    for (what, code) in [
        (
            "a child whose end is told by SIGCONT",
            "r = libc.syscall(56, signal.SIGCONT, 0, 0, 0, 0)\nif r == 0: time.sleep(60)",
        ),
        (
            "a timer",
            "t = ctypes.c_int()\nev = (ctypes.c_int * 16)(0, 0, signal.SIGCONT)\nr = libc.timer_create(1, ev, ctypes.byref(t))",
        ),
        (
            "a signal",
            "child = os.fork()\nif child == 0:\n    try: os.kill(os.getppid(), signal.SIGCONT)\n    \
                      except PermissionError: os._exit(7)\n    os._exit(0)\n\
                      r = -1 if os.waitpid(child, 0)[1] >> 8 == 7 else 0",
        ),
        ("the parent's end", "r = libc.prctl(1, signal.SIGCONT, 0, 0, 0)"),
    ] {
        if what.starts_with("a child") && cfg!(not(target_arch = "x86_64")) {
            continue; // another number
        }
        assert_eq!(said(name, &format!("{code}\nprint(r)")), "-1\n", "{what}");
    }
    sandbox().end_session(name);
}

#[test]
fn whatever_a_head_says_no_other_session_hears_it() {
    said("bystander", "x = [1]");
    for seed in 0..12 {
        // Random words of any length, some with descriptors, to whatever socket it finds, from a child of its own too.
        let babble = format!(
            "import array, os, random, socket, stat\n\
             r = random.Random({seed})\n\
             sockets = []\n\
             for fd in range(3, 64):\n\
             \x20   try:\n\
             \x20       if stat.S_ISSOCK(os.fstat(fd).st_mode): sockets.append(socket.socket(fileno=os.dup(fd)))\n\
             \x20   except OSError: pass\n\
             if r.random() < 0.5: os.fork()\n\
             for _ in range(r.randrange(400)):\n\
             \x20   word = r.randbytes(r.choice([1, 7, 8, 9, 16, 300]))\n\
             \x20   if r.random() < 0.3: word = r.randrange(4).to_bytes(4, 'little') + r.randrange(300).to_bytes(4, 'little')\n\
             \x20   rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array('i', [0, 1, 2]))] if r.random() < 0.3 else []\n\
             \x20   try:\n\
             \x20       for s in sockets: s.sendmsg([word], rights, socket.MSG_DONTWAIT)\n\
             \x20   except OSError: pass\n"
        );
        let limits = Some(Limits { wall: Duration::from_secs(1), ..Limits::default() });
        let turn = |code: &str| {
            let snippet = Snippet { code, seed: 0, limits: limits.clone() };
            sandbox().turn("babbler", &snippet).expect("whatever the code does is an outcome")
        };
        turn("y = 1");
        turn(&babble);
        let next = turn("print('still', 'y' in globals())");
        assert!(
            next.outcome.stdout.is_empty() || next.outcome.stdout.starts_with("still"),
            "{seed}: {next:?}"
        );
        sandbox().end_session("babbler");
        assert_eq!(said("bystander", "print(x)"), "[1]\n", "{seed}");
    }
    sandbox().end_session("bystander");
}

#[test]
fn too_many_sessions_lose_their_state_by_last_use_and_are_told() {
    let config = SandboxConfig { idle_sessions: 2, ..common::config(&[]) };
    let sandbox = Sandbox::start(config).expect("starts");
    let turn = |name: &str, code: &str| {
        sandbox.turn(name, &Snippet { code, seed: 0, limits: None }).expect("the sandbox works")
    };
    for name in ["a", "b", "a", "c"] {
        turn(name, "x = 1");
    }
    assert_eq!(sandbox.idle_sessions(), 2);
    let lost = turn("b", "print('x' in globals())");
    assert_eq!((lost.outcome.stdout.as_str(), lost.restarted), ("False\n", true));
    assert!(!turn("c", "print(x)").restarted);
}

#[test]
fn sessions_work_for_a_user_without_privileges() {
    match common::again_as_nobody("variables_rolled_back") {
        Ok(mut command) => {
            let output = command.output().expect("the test program starts");
            let text = common::text(&output);
            assert!(output.status.success() && text.contains("1 passed"), "{text}");
        }
        Err(reason) => println!("NOT RUN as a second user: {reason}"),
    }
}

#[test]
#[ignore = "run by the test above, as another user"]
fn variables_rolled_back() {
    said("other", "x = [1]");
    assert_eq!(turn("other", "x.append(2)\n1 / 0").outcome.status, Status::Error);
    assert_eq!(said("other", "print(x)"), "[1]\n");
}

#[test]
fn all_of_this_holds_without_namespaces() {
    common::all_again_without_namespaces();
}
