//! The same stories on the instruction sets that this machine's processor also has: oneDNN, whose micro-kernel does
//! the products, takes another one where the environment says so, and sums in another order. Where it has none for
//! bf16, or none at all, libtorch's operators take over.

use std::env;
use std::io::Read as _;
use std::process::{Command, Stdio};
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

/// oneDNN's names of products of bf16 pairs without tiles (what AMD has), of AVX-512 without bf16, and of AVX2; and bf16
/// multiplied in f32, or not.
const OTHERS: [&[(&str, &str)]; 5] = [
    &[("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_BF16"), (IN_F32, "0")],
    &[("ONEDNN_MAX_CPU_ISA", "AVX512_CORE"), (IN_F32, "0")],
    &[("ONEDNN_MAX_CPU_ISA", "AVX2")],
    &[("ONEDNN_MAX_CPU_ISA", "AVX512_CORE"), (IN_F32, "1")],
    &[(IN_F32, "1")],
];
const IN_F32: &str = "AGENTFLY_BF16_IN_F32";
/// Set where this is one of them.
const OTHER: &str = "AGENTFLY_OTHER_PROCESSOR";
const DEADLINE: Duration = Duration::from_secs(300);

#[test]
fn other_processors_tell_the_same_stories() {
    if env::var_os(OTHER).is_some() {
        return;
    }
    for settings in OTHERS {
        let mut tests = Command::new(env::current_exe().unwrap())
            .envs(settings.iter().copied())
            .env(OTHER, "1")
            .args(["--skip", "other_processors", "--test-threads", "2"])
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut told = tests.stdout.take().unwrap();
        let (sender, ended) = mpsc::channel();
        thread::spawn(move || {
            let mut text = String::new();
            let read = told.read_to_string(&mut text).map(|_| text);
            sender.send(read)
        });
        let text = ended.recv_timeout(DEADLINE).map(Result::unwrap).inspect_err(|_| tests.kill().unwrap());
        let status = tests.wait().unwrap();
        let text = text.unwrap_or_else(|_| panic!("{settings:?} took over {DEADLINE:?}"));
        assert!(status.success(), "with {settings:?}, {status}:\n{text}");
        assert!(text.contains(" passed") && !text.contains(" 0 passed"), "no test ran:\n{text}");
    }
}
