//! What a well-meaning program finds, what each limit does, and what cannot be read.

mod common;

use std::sync::OnceLock;
use std::time::Duration;

use agentfly_sandbox::{Limits, Outcome, Sandbox, Snippet, Status};

fn sandbox() -> &'static Sandbox {
    static SHARED: OnceLock<Sandbox> = OnceLock::new();
    SHARED.get_or_init(|| common::start(&["numpy"]))
}

fn run(code: &str) -> Outcome {
    common::run(sandbox(), code)
}

fn limited(code: &str, limits: Limits) -> Outcome {
    sandbox().run(&Snippet { code, seed: 1, limits: Some(limits) }).expect("the sandbox works")
}

#[test]
fn functions_see_imports_globals_and_each_other_and_recursion_works() {
    let outcome = run("import math\nfrom dataclasses import dataclass\nscale = 10\n\n\
         @dataclass\nclass Point:\n    x: int\n\n\
         def even(n):\n    return True if n == 0 else odd(n - 1)\n\n\
         def odd(n):\n    return False if n == 0 else even(n - 1)\n\n\
         def fact(n):\n    return 1 if n < 2 else n * fact(n - 1)\n\n\
         def area(r):\n    return round(scale * math.pi * r)\n\n\
         if __name__ == '__main__':\n    print(even(100), fact(20), area(2), [fact(i) for i in range(4)], Point(3))\n");
    assert_eq!(outcome.stderr, "");
    assert_eq!(outcome.stdout, "True 2432902008176640000 63 [1, 1, 2, 6] Point(x=3)\n");
    assert_eq!((outcome.status, outcome.exit_code), (Status::Ok, Some(0)));
}

#[test]
fn nothing_of_one_snippet_reaches_the_next() {
    run("secret = 1\nimport builtins, json\nbuiltins.leak = 1\njson.leak = 1\nopen('leak', 'w').write('1')");
    let next = run("import builtins, json, os\n\
         print('secret' in globals(), hasattr(builtins, 'leak'), hasattr(json, 'leak'), os.listdir())");
    assert_eq!(next.stdout, "False False False []\n");
}

#[test]
fn text_survives_in_any_script_and_both_streams_are_apart() {
    let outcome = run("import sys\nprint('π ≈ 3.14159, 数学, 🦀')\nprint('Σ', file=sys.stderr)");
    assert_eq!(outcome.stdout, "π ≈ 3.14159, 数学, 🦀\n");
    assert_eq!(outcome.stderr, "Σ\n");
}

#[test]
fn a_traceback_shows_the_snippet_alone_with_its_lines() {
    let outcome = run("def f(x):\n    return 1 / x\nf(0)\n");
    assert_eq!((outcome.status, outcome.exit_code), (Status::Error, Some(1)));
    let lines: Vec<_> =
        outcome.stderr.lines().map(str::trim).filter(|line| !line.starts_with(['^', '~'])).collect();
    assert_eq!(
        lines,
        [
            "Traceback (most recent call last):",
            "File \"<snippet>\", line 3, in <module>",
            "f(0)",
            "File \"<snippet>\", line 2, in f",
            "return 1 / x",
            "ZeroDivisionError: division by zero",
        ]
    );
    let syntax = run("x = = 1");
    assert!(syntax.stderr.trim_start().starts_with("File \"<snippet>\", line 1"), "{}", syntax.stderr);
    assert!(syntax.stderr.ends_with("SyntaxError: invalid syntax\n"), "{}", syntax.stderr);
    let deep = run("def f(): f()\nf()");
    assert!(deep.stderr.contains("RecursionError") && deep.stderr.len() < 2000, "{}", deep.stderr);
}

#[test]
fn sys_exit_and_crashes_give_their_codes() {
    let end = |code: &str| {
        let outcome = run(code);
        (outcome.status, outcome.exit_code, outcome.stdout + &outcome.stderr)
    };
    assert_eq!(end("print('a'); exit()"), (Status::Ok, Some(0), "a\n".into()));
    assert_eq!(end("import sys; sys.exit(3)"), (Status::Error, Some(3), String::new()));
    assert_eq!(end("raise SystemExit('bye')"), (Status::Error, Some(1), "bye\n".into()));
    assert_eq!(end("import ctypes; ctypes.string_at(0)"), (Status::Error, Some(-11), String::new()));
}

#[test]
fn threads_and_exit_hooks_end_as_in_a_script() {
    let outcome = run("import atexit, threading\natexit.register(print, 'last')\n\
         threading.Thread(target=lambda: print('thread')).start()");
    assert_eq!((outcome.status, outcome.stdout.as_str()), (Status::Ok, "thread\nlast\n"));
}

#[test]
fn a_program_may_start_programs() {
    let outcome =
        run("import subprocess, sys\nprint(subprocess.run(['/bin/echo', 'hi'], capture_output=True).stdout)");
    assert_eq!(outcome.stdout, "b'hi\\n'\n", "{}", outcome.stderr);
    let outcome = run("import multiprocessing as mp\ndef f(x, out): out.send(x * x)\n\
         if __name__ == '__main__':\n    here, there = mp.Pipe()\n    p = mp.Process(target=f, args=(3, there))\n    \
         p.start(); print(here.recv()); p.join()");
    assert_eq!(outcome.stdout, "9\n", "{}", outcome.stderr);
    if !common::in_namespaces() {
        return; // its locks lie in /dev/shm, which is the node's
    }
    let outcome = run("from multiprocessing import Pool\ndef f(x): return x * x\n\
         if __name__ == '__main__':\n    with Pool(2) as p: print(p.map(f, [1, 2, 3]))");
    assert_eq!(outcome.stdout, "[1, 4, 9]\n", "{}", outcome.stderr);
}

#[test]
fn a_timeout_keeps_what_was_printed() {
    let limits = Limits { wall: Duration::from_millis(400), ..Limits::default() };
    let outcome = limited("print('first')\nwhile True: pass", limits);
    assert_eq!(
        (outcome.status, outcome.exit_code, outcome.stdout.as_str()),
        (Status::Timeout, None, "first\n")
    );
    assert!((0.4..10.0).contains(&outcome.seconds), "{}", outcome.seconds);
}

#[test]
fn the_cpu_limit_is_a_timeout_too() {
    let limits = Limits { wall: Duration::from_secs(30), cpu: Duration::from_secs(1), ..Limits::default() };
    let outcome = limited("while True: pass", limits);
    assert_eq!((outcome.status, outcome.exit_code), (Status::Timeout, None));
    assert!(outcome.seconds < 20.0, "the wall limit must not be what ended it");
}

#[test]
fn memory_is_limited_over_the_tree_and_its_peak_is_told() {
    let outcome = run("x = bytearray(100 << 20)\nfor i in range(0, len(x), 4096): x[i] = 1\nprint(len(x))");
    assert_eq!(outcome.status, Status::Ok);
    assert!((100 << 20..200 << 20).contains(&outcome.peak_bytes), "{} bytes", outcome.peak_bytes);
    let outcome = run(
        "import os, time\nfor _ in range(8):\n    if os.fork() == 0:\n        x = b'1' * (100 << 20)\n        \
         time.sleep(60)\ntime.sleep(60)",
    );
    assert_eq!((outcome.status, outcome.exit_code), (Status::Memory, None));
    assert!(outcome.peak_bytes > 512 << 20, "{} bytes", outcome.peak_bytes);
    let single = run("x = []\nwhile True: x.append(b'1' * (1 << 20))");
    assert!(single.status == Status::Memory || single.stderr.contains("MemoryError"), "{single:?}");
}

#[test]
fn output_is_kept_from_the_head_and_more_ends_the_snippet() {
    let limits = Limits { output_bytes: 1000, ..Limits::default() };
    let endless = limited("while True: print('ab')", limits.clone());
    assert_eq!(
        (endless.status, endless.exit_code, endless.output_truncated),
        (Status::OutputLimit, None, true)
    );
    assert_eq!(endless.stdout, "ab\n".repeat(334)[..1000]);
    let exact = limited("import sys\nprint('a' * 499)\nprint('b' * 499, file=sys.stderr)", limits.clone());
    assert_eq!((exact.status, exact.output_truncated), (Status::Ok, false));
    let one_more = limited("import sys\nprint('a' * 500)\nprint('b' * 499, file=sys.stderr)", limits);
    assert_eq!((one_more.status, one_more.stdout.len() + one_more.stderr.len()), (Status::OutputLimit, 1000));
}

#[test]
fn equal_seeds_give_equal_numbers_in_any_order_and_others_differ() {
    let code = "import random, numpy\nprint(random.random(), numpy.random.rand(), {'a', 'b', 'c', 'd'})";
    let draw = |seed| {
        let outcome = sandbox().run(&Snippet { code, seed, limits: None }).expect("the sandbox works");
        assert_eq!(outcome.status, Status::Ok, "{}", outcome.stderr);
        outcome.stdout
    };
    let (first, other, again) = (draw(7), draw(7 + (1 << 32)), draw(7));
    assert_eq!(first, again);
    assert_ne!(first, other);
}

#[test]
fn numpy_random_is_there_however_it_is_asked_for_and_seeded() {
    let drawn = run("import numpy as np\nprint(np.random.rand())").stdout;
    let other = Snippet { code: "import numpy as np\nprint(np.random.rand())", seed: 99, limits: None };
    assert_ne!(sandbox().run(&other).expect("the sandbox works").stdout, drawn, "another seed");
    for code in [
        "import numpy.random\nprint(numpy.random.rand())",
        "from numpy.random import rand\nprint(rand())",
        "from numpy import random as r\nprint(r.rand())",
        "import importlib\nprint(importlib.import_module('numpy.random').rand())",
        "import numpy.random.mtrand as m\nprint(m.rand())",
        "import numpy as np, pickle\nprint(pickle.loads(pickle.dumps(np.random.RandomState())) and np.random.rand())",
    ] {
        let outcome = run(code);
        assert_eq!(outcome.stdout, drawn, "{code}: {}", outcome.stderr);
    }
    let whole = "import numpy as np, sys\nr = np.random\n\
         print(r is sys.modules['numpy.random'], r.__spec__.loader is r.__loader__, r.__file__[-18:], r.default_rng(0).integers(9))";
    assert_eq!(run(whole).stdout, "True True random/__init__.py 7\n");
}

#[test]
fn a_look_for_numpy_random_does_not_lose_its_seed() {
    let look = "import importlib.util, numpy as np\nimportlib.util.find_spec('numpy.random')\nprint(np.random.rand())";
    assert_eq!(run(look).stdout, run("import numpy as np\nprint(np.random.rand())").stdout);
}

#[test]
fn the_time_of_children_whose_end_is_ignored_counts() {
    let code = "import os, signal, time\nsignal.signal(signal.SIGCHLD, signal.SIG_IGN)\nwhile True:\n    \
                if os.fork() == 0:\n        began = time.process_time()\n        \
                while time.process_time() < began + 0.3: pass\n        os._exit(0)\n    time.sleep(0.3)";
    let limits = Limits { wall: Duration::from_secs(20), cpu: Duration::from_secs(1), ..Limits::default() };
    let outcome = limited(code, limits);
    assert_eq!(outcome.status, Status::Timeout, "{outcome:?}");
    assert!(outcome.seconds < 15.0, "the CPU limit ends it, not the clock: {outcome:?}");
}

#[test]
fn a_program_that_holds_much_may_start_others_and_is_not_counted_twice() {
    let code = "import subprocess\nheld = b'1' * (300 << 20)\nfor _ in range(60): subprocess.run(['/bin/true'])\nprint(len(held))";
    let limits = Limits { wall: Duration::from_secs(30), ..Limits::default() };
    let outcome = limited(code, limits);
    assert_eq!((outcome.status, outcome.stdout.as_str()), (Status::Ok, "314572800\n"), "{outcome:?}");
}

#[test]
fn a_fork_of_the_program_s_own_draws_other_random_numbers_as_ever() {
    let code = "import os, random\nread, write = os.pipe()\nif os.fork() == 0:\n    os.write(write, repr(random.random()).encode())\n    \
                os._exit(0)\nprint(float(os.read(read, 99)) == random.random())";
    assert_eq!(run(code).stdout, "False\n");
}

#[test]
fn a_byte_order_mark_is_no_part_of_the_code() {
    assert_eq!(run("\u{feff}print(1)").stdout, "1\n");
}

#[test]
fn each_snippet_has_the_limits_that_it_was_given_and_no_earlier_one_s() {
    let files = |limits: Limits| {
        let code = "import resource\nprint(resource.getrlimit(resource.RLIMIT_NOFILE)[0])";
        limited(code, limits).stdout
    };
    for open_files in [64, 64, 64, 32, 64, 48, 48, 48, 64] {
        assert_eq!(files(Limits { open_files, ..Limits::default() }), format!("{open_files}\n"));
    }
}

#[test]
fn the_secrets_of_the_owner_cannot_be_read() {
    let mut file = std::env::temp_dir();
    file.push(format!("agentfly-canary-{}", std::process::id()));
    std::fs::write(&file, "CANARY-file").expect("writes");
    let code = format!(
        "import glob, os\n\
         def is_open(fd):\n    try: os.fstat(fd)\n    except OSError: return False\n    return True\n\
         paths = [{file:?}, {here:?}, '/proc/1/environ', '/proc/self/environ', '/proc/1/root{file}', '/etc/shadow', '/proc/sys']\n\
         paths += glob.glob('/proc/[0-9]*/environ') + glob.glob('/proc/[0-9]*/cmdline')\n\
         for path in paths:\n    try: print('read', path, open(path, 'rb').read())\n    except OSError: pass\n\
         print('who', os.getuid())\n\
         print('descriptors', sorted(fd for fd in range(64) if is_open(fd)))\n\
         print('environment', *sorted(os.environ))\n\
         if os.path.exists('/proc/self/fd') and {in_namespaces}: print('processes', len(glob.glob('/proc/[0-9]*')))\n",
        here = file!(),
        file = file.display(),
        in_namespaces = if common::in_namespaces() { "True" } else { "False" },
    );
    let outcome = run(&code);
    std::fs::remove_file(&file).expect("removes");
    assert_eq!(outcome.status, Status::Ok, "{}", outcome.stderr);
    for secret in ["CANARY", "CARGO", "RUST", "shadow", "/proc/sys", env!("CARGO_MANIFEST_DIR")] {
        assert!(!outcome.stdout.contains(secret), "{secret} was read:\n{}", outcome.stdout);
    }
    let said = |what: &str| outcome.stdout.lines().find_map(|line| line.strip_prefix(what)).map(str::trim);
    assert_ne!(said("who"), Some("0"), "the snippet must not be user 0");
    assert_eq!(said("descriptors"), Some("[0, 1, 2]"));
    assert!(said("environment").is_some_and(|names| names.starts_with("HOME LANG")), "{}", outcome.stdout);
    assert_eq!(said("processes"), common::in_namespaces().then_some("1"));
}

#[test]
fn answers_are_checked_in_the_same_sandbox() {
    let checker = common::start(&["sympy", "math_verify"]);
    let outcome = common::run(
        &checker,
        "from math_verify import parse, verify\n\
         print(verify(parse(r'$\\frac{2}{4}$'), parse('$0.5$')), verify(parse('$x+1$'), parse('$1+x$')), verify(parse('$3$'), parse('$4$')))",
    );
    assert_eq!(outcome.stdout, "True True False\n", "{}", outcome.stderr);
}

#[test]
fn more_calls_than_slots_wait_their_turn() {
    std::thread::scope(|scope| {
        let calls: Vec<_> =
            (0..12).map(|n| scope.spawn(move || run(&format!("print({n} * {n})")).stdout)).collect();
        for (n, call) in calls.into_iter().enumerate() {
            assert_eq!(call.join().expect("no panic"), format!("{}\n", n * n));
        }
    });
}

#[test]
fn the_last_expression_is_shown_where_that_is_asked_for() {
    let config = agentfly_sandbox::SandboxConfig { echo_last: true, ..common::config(&[]) };
    let prompt = Sandbox::start(config).expect("starts");
    for (code, shown) in [
        ("x = 20\nx + 1", "21\n"),
        ("'é'", "'é'\n"),
        ("None", ""),
        ("print(1); 2", "1\n2\n"),
        ("x = 1", ""),
        ("", ""),
        ("def f():\n    return 3\nf()", "3\n"),
    ] {
        assert_eq!(common::run(&prompt, code).stdout, shown, "{code:?}");
        let silent = run(code).stdout;
        assert_eq!(silent, if code.starts_with("print") { "1\n" } else { "" }, "{code:?}, not asked for");
    }
    assert!(common::run(&prompt, "x = 1\n1 / 0").stderr.contains("line 2, in <module>"));
    let shown = prompt.turn("s", &Snippet { code: "x = [1]\nx", seed: 0, limits: None }).expect("works");
    assert_eq!(shown.outcome.stdout, "[1]\n");
    let shown = prompt.turn("s", &Snippet { code: "x * 2", seed: 0, limits: None }).expect("works");
    assert_eq!(shown.outcome.stdout, "[1, 1]\n");
}

#[test]
fn all_of_this_holds_without_namespaces() {
    common::all_again_without_namespaces();
}
