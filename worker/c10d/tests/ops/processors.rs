//! The same stories on the instruction sets that this machine's processor also has: oneDNN, whose micro-kernel does
//! the products, takes another one where the environment says so, and sums in another order. Where it has none for
//! bf16, or none at all, libtorch's operators take over.

use std::env;
use std::process::{Command, Stdio};
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

/// oneDNN's names: products of bf16 pairs without tiles (what AMD has), AVX-512 without bf16, and AVX2.
const OTHERS: [&str; 3] = ["AVX512_CORE_BF16", "AVX512_CORE", "AVX2"];
const SETTING: &str = "ONEDNN_MAX_CPU_ISA";
const DEADLINE: Duration = Duration::from_secs(300);

#[test]
fn other_processors_tell_the_same_stories() {
    if env::var_os(SETTING).is_some() {
        return; // this is one of them
    }
    for name in OTHERS {
        let mut tests = Command::new(env::current_exe().unwrap());
        tests
            .env(SETTING, name)
            .args(["--skip", "other_processors", "--test-threads", "2"])
            .stdin(Stdio::null());
        let (sender, ended) = mpsc::channel();
        thread::spawn(move || sender.send(tests.output()));
        let output =
            ended.recv_timeout(DEADLINE).unwrap_or_else(|_| panic!("{name} took over {DEADLINE:?}")).unwrap();
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(
            output.status.success(),
            "with {SETTING}={name}:\n{text}{}",
            String::from_utf8_lossy(&output.stderr)
        );
        assert!(text.contains(" passed") && !text.contains(" 0 passed"), "no test ran:\n{text}");
    }
}
