//! The programs as a user runs them: `coordinator` and `worker` as processes, in a folder of their own.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Output, Stdio};
use std::time::Duration;

use anyhow::{Context as _, bail};
use rustix::process::{Pid, Signal, kill_process};
use tokio::process::Command;

use crate::tree::root;

/// A folder with its own runtime directory, so that tests never see each other's heads.
pub struct Playground {
    dir: tempfile::TempDir,
}

impl Playground {
    /// A new, empty one.
    ///
    /// # Errors
    /// When no temporary folder can be made, or the programs were not built.
    pub fn new() -> anyhow::Result<Self> {
        for name in ["coordinator", "worker"] {
            let path = program(name);
            anyhow::ensure!(path.exists(), "{} is missing: run `make test`, which builds it", path.display());
        }
        // Whatever loses its parent becomes a child of this process: nothing that was started escapes a look.
        rustix::process::set_child_subreaper(Some(rustix::process::getpid()))?;
        let dir = tempfile::Builder::new().prefix("agentfly-test-").tempdir()?;
        std::fs::create_dir(dir.path().join("runtime"))?;
        Ok(Self { dir })
    }

    /// Processes started from here, at whatever remove, that still run.
    #[must_use]
    pub fn leftovers(&self) -> Vec<u32> {
        descendants_of(std::process::id())
    }

    /// Processes of this playground that were started as `program argument …`, oldest first.
    #[must_use]
    pub fn processes(&self, name: &str, argument: &str) -> Vec<u32> {
        let wanted = program(name).display().to_string();
        let mut found = processes_naming(&self.path().display().to_string());
        found.retain(|pid| {
            let line = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            let mut words = line.split(|&byte| byte == 0);
            words.next() == Some(wanted.as_bytes()) && words.next() == Some(argument.as_bytes())
        });
        found.sort_unstable();
        found
    }

    /// Starts a head in the background, with a worker for two CPU ranks, on free ports.
    ///
    /// # Errors
    /// When it does not come up.
    pub async fn start_head(&self) -> anyhow::Result<Ran> {
        let args = [
            "--head",
            "--port",
            "0",
            "--http-port",
            "0",
            "--num-gpus",
            "0",
            "--num-cpu-ranks",
            "2",
            "--detach",
        ];
        self.succeed("coordinator", &args, Duration::from_secs(90)).await
    }

    /// What a command with `--json` prints.
    ///
    /// # Errors
    /// When it fails or prints no JSON.
    pub async fn ask(&self, args: &[&str]) -> anyhow::Result<serde_json::Value> {
        let ran = self.succeed("coordinator", args, Duration::from_secs(30)).await?;
        Ok(serde_json::from_str(&ran.stdout)?)
    }

    /// Where it is.
    #[must_use]
    pub fn path(&self) -> &Path {
        self.dir.path()
    }

    /// A program, not yet started: in this folder, with this runtime directory.
    #[must_use]
    pub fn command(&self, name: &str, args: &[&str]) -> Command {
        let mut command = Command::new(program(name));
        command
            .args(args)
            .current_dir(self.path())
            .env("AGENTFLY_RUNTIME_DIR", self.path().join("runtime"))
            .env("AGENTFLY_SANDBOX_PYTHON", root().join("third_party/sandbox-venv/bin/python"))
            .env("OMP_NUM_THREADS", "1")
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .kill_on_drop(true);
        command
    }

    /// Runs a program to its end.
    ///
    /// # Errors
    /// When it does not end within `deadline`; what it printed by then is lost with it.
    pub async fn run(&self, name: &str, args: &[&str], deadline: Duration) -> anyhow::Result<Ran> {
        let output = tokio::time::timeout(deadline, self.command(name, args).output())
            .await
            .with_context(|| format!("`{name} {}` did not end within {deadline:?}", args.join(" ")))??;
        Ok(Ran::from(output))
    }

    /// Runs a program that must succeed, and gives what it printed.
    ///
    /// # Errors
    /// When it fails or does not end in time; with everything it said.
    pub async fn succeed(&self, name: &str, args: &[&str], deadline: Duration) -> anyhow::Result<Ran> {
        let ran = self.run(name, args, deadline).await?;
        if ran.code != Some(0) {
            bail!("`{name} {}` ended with {:?}:\n{}\n{}", args.join(" "), ran.code, ran.stdout, ran.stderr);
        }
        Ok(ran)
    }
}

impl Drop for Playground {
    /// A story that failed leaves no head behind to disturb the next.
    fn drop(&mut self) {
        for pid in self.leftovers() {
            if let Some(pid) = i32::try_from(pid).ok().and_then(Pid::from_raw) {
                // One that has ended meanwhile needs nothing.
                let _ = kill_process(pid, Signal::KILL);
            }
        }
    }
}

/// A program that ended.
#[derive(Debug)]
pub struct Ran {
    /// Its exit code; `None` when a signal ended it.
    pub code: Option<i32>,
    /// What it printed.
    pub stdout: String,
    /// What it complained of.
    pub stderr: String,
}

impl From<Output> for Ran {
    fn from(output: Output) -> Self {
        Self {
            code: output.status.code(),
            stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
            stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
        }
    }
}

/// A program of this build: beside the test's own `deps` folder.
#[must_use]
pub fn program(name: &str) -> PathBuf {
    let own = std::env::current_exe().unwrap_or_default();
    let profile = own.parent().and_then(Path::parent).map(Path::to_path_buf).unwrap_or_default();
    profile.join(name)
}

/// The living processes below `ancestor`: those that ended and were not waited for do not count.
fn descendants_of(ancestor: u32) -> Vec<u32> {
    let mut children: BTreeMap<u32, Vec<(u32, bool)>> = BTreeMap::new();
    for pid in all_processes() {
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        // `pid (name) state parent …`, and a name may hold anything.
        let Some((_, after_name)) = stat.rsplit_once(')') else { continue };
        let mut fields = after_name.split_whitespace();
        let (state, parent) = (fields.next(), fields.next().and_then(|field| field.parse().ok()));
        if let Some(parent) = parent {
            children.entry(parent).or_default().push((pid, state != Some("Z")));
        }
    }
    let (mut found, mut ancestors) = (Vec::new(), vec![ancestor]);
    while let Some(parent) = ancestors.pop() {
        for (pid, lives) in children.remove(&parent).unwrap_or_default() {
            ancestors.push(pid);
            found.extend(lives.then_some(pid));
        }
    }
    found
}

fn all_processes() -> Vec<u32> {
    let Ok(entries) = std::fs::read_dir("/proc") else { return Vec::new() };
    entries.flatten().filter_map(|e| e.file_name().to_string_lossy().parse().ok()).collect()
}

/// The ids of this machine's other processes whose command line or environment contains `needle`.
fn processes_naming(needle: &str) -> Vec<u32> {
    let mut found = all_processes();
    found.retain(|pid| {
        let line = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        let environment = std::fs::read(format!("/proc/{pid}/environ")).unwrap_or_default();
        let holds = |bytes: &[u8]| String::from_utf8_lossy(bytes).contains(needle);
        *pid != std::process::id() && (holds(&line) || holds(&environment))
    });
    found
}
