//! What the sandbox's tests share: the interpreter, a pool, and running a test again as another process or user.

#![allow(dead_code, reason = "each test program uses a part of it")]

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use agentfly_sandbox::{Outcome, Sandbox, SandboxConfig, SandboxError, Snippet, Tier};

/// The interpreter that the tests run on: `AGENTFLY_SANDBOX_PYTHON`, or the environment that `make setup` makes.
pub fn python() -> PathBuf {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    let python = std::env::var_os("AGENTFLY_SANDBOX_PYTHON")
        .map_or_else(|| root.join("third_party/sandbox-venv/bin/python"), PathBuf::from);
    assert!(
        python.exists(),
        "{} does not exist: run `make setup` (or deploy/scripts/setup_python.sh), or set AGENTFLY_SANDBOX_PYTHON",
        python.display()
    );
    python
}

/// The tier to test, instead of the strongest one: in the processes that [`again_on`] starts.
const TIER: &str = "AGENTFLY_SANDBOX_TEST_TIER";

pub fn tier() -> Option<Tier> {
    std::env::var(TIER).ok().map(|name| name.parse().expect("a tier's name"))
}

/// Whether snippets have namespaces of their own here.
pub fn in_namespaces() -> bool {
    tier() != Some(Tier::Landlock)
}

/// This whole test program once more, on the landlock tier. Its tests that run it again do nothing there.
pub fn all_again_without_namespaces() {
    if tier().is_some() {
        return;
    }
    let here = Sandbox::start(SandboxConfig { tier: Some(Tier::Landlock), ..config(&[]) });
    if let Err(SandboxError::Unsupported(reason)) = here {
        println!("NOT RUN without namespaces: {reason}");
        return;
    }
    drop(here);
    let mut command = Command::new(std::env::current_exe().expect("a test program has a path"));
    let output = command.env(TIER, "landlock").output().expect("the test program starts");
    let text = text(&output);
    assert!(output.status.success() && text.contains("test result: ok"), "on the landlock tier:\n{text}");
}

/// A command that [`again`] made, on the landlock tier.
pub fn without_namespaces(command: &mut Command) -> &mut Command {
    command.env(TIER, "landlock")
}

pub fn config(preload: &[&str]) -> SandboxConfig {
    SandboxConfig {
        tier: tier(),
        slots: 4,
        preload: preload.iter().map(|m| (*m).to_owned()).collect(),
        ..SandboxConfig::new(python())
    }
}

pub fn start(preload: &[&str]) -> Sandbox {
    Sandbox::start(config(preload)).expect("the sandbox starts")
}

pub fn run(sandbox: &Sandbox, code: &str) -> Outcome {
    sandbox.run(&Snippet { code, seed: 1, limits: None }).expect("the sandbox works")
}

/// Children of a process, by its threads.
pub fn children(process: u32) -> Vec<u32> {
    let Ok(threads) = fs::read_dir(format!("/proc/{process}/task")) else {
        return Vec::new();
    };
    threads
        .flatten()
        .map(|thread| fs::read_to_string(thread.path().join("children")).unwrap_or_default())
        .flat_map(|line| line.split_whitespace().filter_map(|id| id.parse().ok()).collect::<Vec<_>>())
        .collect()
}

fn name_of(process: u32) -> String {
    fs::read_to_string(format!("/proc/{process}/comm")).unwrap_or_default().trim().to_owned()
}

/// The children of a zygote that serve a call: not the one that waits for its request, or is being made for that.
pub fn at_work(zygote: u32) -> Vec<u32> {
    let waits = |child: &u32| ["sandbox-ready", "sandbox-zygote"].contains(&name_of(*child).as_str());
    children(zygote).into_iter().filter(|child| !waits(child)).collect()
}

/// The child of a zygote that waits for its request.
pub fn ready(zygote: u32) -> Option<u32> {
    children(zygote).into_iter().find(|child| name_of(*child) == "sandbox-ready")
}

/// A call's processes: a zygote's children, theirs, and so on.
pub fn descendants(zygote: u32) -> Vec<u32> {
    let mut found = at_work(zygote);
    let mut next = 0;
    while let Some(process) = found.get(next).copied() {
        next += 1;
        found.extend(children(process));
    }
    found
}

/// The zygote that a child of this process is, or has started as its warden.
pub fn zygote_of(child: u32) -> u32 {
    if in_namespaces() { child } else { *children(child).first().expect("a warden has a zygote") }
}

/// The directory on the node that a snippet runs in, and everything of its zygote with it, where it has no namespaces.
pub fn directory_of(process: u32) -> Option<PathBuf> {
    let own = fs::read_link(format!("/proc/{process}/cwd")).expect("it runs");
    if in_namespaces() { None } else { own.parent().map(Path::to_owned) }
}

/// This test program, to run one ignored test in a process of its own.
pub fn again(test: &str) -> Command {
    let mut command = Command::new(std::env::current_exe().expect("a test program has a path"));
    command.args(["--exact", test, "--ignored", "--nocapture"]);
    command
}

/// As [`again`], but as the user 65534. `Err` says why that is not possible here.
///
/// The interpreter may lie below a directory that only root may enter. In a mount namespace of the test's own an empty
/// directory takes that one's place, with nothing in it but the paths needed.
pub fn again_as_nobody(test: &str) -> Result<Command, String> {
    if fs::read_to_string("/proc/self/status").is_ok_and(|s| !s.contains("\nUid:\t0\t0\t")) {
        return Err("only root can become another user".into());
    }
    for tool in ["unshare", "setpriv"] {
        if Command::new(tool).arg("--version").output().is_err() {
            return Err(format!("the program {tool} (util-linux) is missing"));
        }
    }
    let program = std::env::current_exe().expect("a test program has a path");
    let venv = python().parent().and_then(Path::parent).expect("bin/python").canonicalize().expect("exists");
    let interpreter = python().canonicalize().expect("exists");
    let prefix = interpreter.parent().and_then(Path::parent).expect("bin/python").to_owned();
    let target = program.parent().expect("has a directory").to_owned();
    let closed: Vec<PathBuf> =
        [&venv, &prefix, &target].into_iter().filter_map(|path| first_closed(path)).collect();
    let script = r#"
        set -e
        mount -t tmpfs none /mnt
        count=0
        for path in "$VENV" "$PREFIX" "$TARGET"; do
            count=$((count + 1)); mkdir /mnt/$count; mount --rbind "$path" /mnt/$count
        done
        for directory in "$@"; do mount -t tmpfs -o mode=0755 none "$directory"; done
        count=0
        for path in "$VENV" "$PREFIX" "$TARGET"; do
            count=$((count + 1))
            [ -e "$path" ] || { mkdir -p "$path"; mount --rbind /mnt/$count "$path"; }
        done
        exec setpriv --reuid 65534 --regid 65534 --clear-groups -- "$PROGRAM" --exact "$TEST" --ignored --nocapture
    "#;
    let mut command = Command::new("unshare");
    command.args(["--mount", "sh", "-c", script, "sh"]).args(closed);
    command
        .env("VENV", venv)
        .env("PREFIX", prefix)
        .env("TARGET", target)
        .env("PROGRAM", program)
        .env("TEST", test);
    command.env("AGENTFLY_SANDBOX_PYTHON", python().canonicalize_parent());
    Ok(command)
}

/// As [`again_as_nobody`], in a user namespace in which nobody may make another one. `Err` says why that is not possible.
pub fn again_where_namespaces_are_off(test: &str) -> Result<Command, String> {
    let within = again_as_nobody(test)?;
    let mut command = Command::new("unshare");
    command.args(["--user", "--map-users=0,0,65536", "--map-groups=0,0,65536", "sh", "-c"]);
    command.args(["echo 0 > /proc/sys/user/max_user_namespaces && exec \"$@\"", "sh"]);
    command.arg(within.get_program()).args(within.get_args());
    for (name, value) in within.get_envs() {
        match value {
            Some(value) => command.env(name, value),
            None => command.env_remove(name),
        };
    }
    let probe = Command::new("unshare").args(["--user", "--map-users=0,0,65536", "true"]).output();
    if !probe.is_ok_and(|output| output.status.success()) {
        return Err("this unshare cannot map all users (util-linux 2.38)".into());
    }
    Ok(command)
}

/// The topmost directory on the way to `path` that others may not enter.
fn first_closed(path: &Path) -> Option<PathBuf> {
    let mut above: Vec<_> = path.ancestors().collect();
    above.reverse();
    let open = |d: &Path| fs::metadata(d).is_ok_and(|m| m.permissions().mode() & 0o001 != 0);
    above.into_iter().find(|directory| !open(directory)).map(Path::to_owned)
}

trait CanonicalParent {
    fn canonicalize_parent(&self) -> PathBuf;
}

impl CanonicalParent for PathBuf {
    /// Absolute, but with its last symlink kept: `bin/python` tells which environment it belongs to.
    fn canonicalize_parent(&self) -> PathBuf {
        let parent = self.parent().expect("has a parent").canonicalize().expect("exists");
        parent.join(self.file_name().expect("has a name"))
    }
}

pub fn text(output: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}
