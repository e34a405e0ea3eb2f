//! The same stories on the instruction sets that this machine's processor also has: oneDNN, whose micro-kernel does
//! the products, takes another one where the environment says so, and sums in another order. Where it has none for
//! bf16, or none at all, libtorch's operators take over.

use std::env;
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
        let mut tests = Command::new(env::current_exe().unwrap());
        tests
            .envs(settings.iter().copied())
            .env(OTHER, "1")
            .args(["--skip", "other_processors", "--test-threads", "2"])
            .stdin(Stdio::null());
        let (sender, ended) = mpsc::channel();
        thread::spawn(move || sender.send(tests.output()));
        let output = ended
            .recv_timeout(DEADLINE)
            .unwrap_or_else(|_| panic!("{settings:?} took over {DEADLINE:?}"))
            .unwrap();
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(
            output.status.success(),
            "with {settings:?}:\n{text}{}",
            String::from_utf8_lossy(&output.stderr)
        );
        assert!(text.contains(" passed") && !text.contains(" 0 passed"), "no test ran:\n{text}");
    }
}
