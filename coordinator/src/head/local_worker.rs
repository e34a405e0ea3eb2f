//! The head's own worker: a child process that joins like any other, and dies with the head.
//!
//! It is started through `coordinator run-bound`, which asks the kernel to end it when the head ends, however
//! that happens. It gets the token in its environment, never on its command line.

use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use tokio::process::{Child, Command};
use tokio::time::Instant;

use crate::client::TOKEN;
use crate::failure::Failure;
use crate::process;
use crate::runtime_dir::HeadFile;

/// Lines of the worker's log that an error shows.
const LAST_WORDS: usize = 12;
/// How long a worker that ended stays away at first; doubled each time it ends again soon, …
const FIRST_PAUSE: Duration = Duration::from_secs(1);
/// … up to this.
const LONGEST_PAUSE: Duration = Duration::from_secs(60);
/// One that lived so long has recovered.
const RECOVERED_AFTER: Duration = Duration::from_secs(120);

/// What the worker offers.
#[derive(Debug, Clone)]
pub struct WorkerOptions {
    /// Its program.
    pub program: PathBuf,
    /// The coordinator's program, which binds it to the head's life.
    pub binder: PathBuf,
    /// CPU cores for its ranks and tools; unset takes what the machine has.
    pub num_cpus: Option<u32>,
    /// Its devices.
    pub devices: Devices,
}

/// What a worker offers to ranks.
#[derive(Debug, Clone, Copy)]
pub enum Devices {
    /// So many of each.
    Each {
        /// GPUs.
        gpus: u32,
        /// Seats for CPU ranks.
        cpu_ranks: u32,
    },
    /// GPUs where the worker can use as many, else seats for CPU ranks: only it knows its libtorch.
    Ranks(u32),
}

impl WorkerOptions {
    /// The worker beside this program, or the one that `AGENTFLY_WORKER` names.
    ///
    /// # Errors
    /// When there is none.
    pub fn beside_this_program(num_cpus: Option<u32>, devices: Devices) -> Result<Self, Failure> {
        let binder = std::env::current_exe().map_err(Failure::us)?;
        let named = std::env::var_os("AGENTFLY_WORKER").map(PathBuf::from);
        let program = named.unwrap_or_else(|| binder.with_file_name("worker"));
        if !program.is_file() {
            return Err(Failure::operator(anyhow::anyhow!(
                "there is no worker program at {}; build it (`cargo build`), or name it by AGENTFLY_WORKER=…",
                program.display()
            )));
        }
        Ok(Self { program, binder, num_cpus, devices })
    }
}

/// The running worker.
pub(super) struct LocalWorker {
    options: WorkerOptions,
    head: HeadFile,
    child: Child,
    started: Instant,
    pause: Duration,
    log: PathBuf,
}

impl LocalWorker {
    /// Its log.
    pub(super) fn log(&self) -> &Path {
        &self.log
    }

    /// Starts it; it joins on its own.
    ///
    /// # Errors
    /// When its log cannot be made or the program not be started.
    pub(super) fn start(options: &WorkerOptions, head: &HeadFile, state_dir: &Path) -> anyhow::Result<Self> {
        let logs = state_dir.join("logs");
        std::fs::create_dir_all(&logs)?;
        let log = logs.join(format!("worker-{}.log", head.pid));
        let out = std::fs::File::create(&log)?;
        let child = spawn(options, head, out)?;
        let (options, head) = (options.clone(), head.clone());
        Ok(Self { options, head, child, started: Instant::now(), pause: FIRST_PAUSE, log })
    }

    /// Starts it again after it has ended, at the end of the pause that its record asks for. Cancel safe: nothing
    /// is started before the pause is over.
    ///
    /// # Errors
    /// When its log cannot be opened or the program not be started; it may be called again.
    pub(super) async fn start_again(&mut self) -> anyhow::Result<()> {
        let pause = match self.started.elapsed() >= RECOVERED_AFTER {
            true => FIRST_PAUSE,
            false => self.pause,
        };
        self.pause = (pause * 2).min(LONGEST_PAUSE);
        self.started = Instant::now();
        tokio::time::sleep(pause).await;
        let out = std::fs::File::options().append(true).create(true).open(&self.log)?;
        self.child = spawn(&self.options, &self.head, out)?;
        self.started = Instant::now();
        Ok(())
    }

    /// Returns when it has ended, with its last words.
    pub(super) async fn failed(&mut self) -> Failure {
        let status = match self.child.wait().await {
            Ok(status) => status,
            Err(error) => {
                return Failure::us(anyhow::Error::from(error).context("could not wait for the worker"));
            }
        };
        let whose = Failure::whose_of(status);
        Failure {
            whose,
            error: anyhow::anyhow!("the head's own worker ended ({status}){}", self.last_words()),
        }
    }

    /// It did not join in time.
    pub(super) fn silent(&self, waited: Duration) -> Failure {
        Failure::us(anyhow::anyhow!(
            "the head's own worker did not join within {waited:?}{}",
            self.last_words()
        ))
    }

    fn last_words(&self) -> String {
        match process::last_lines(&self.log, LAST_WORDS).as_slice() {
            [] => format!(" and said nothing; its log is {}", self.log.display()),
            lines => format!(":\n  {}", lines.join("\n  ")),
        }
    }

    /// Waits for its end, then forces it.
    pub(super) async fn end(mut self, grace: Duration) {
        if tokio::time::timeout(grace, self.child.wait()).await.is_err() {
            tracing::warn!("the head's own worker did not leave within {grace:?}; ending it");
            if let Err(error) = self.child.kill().await {
                tracing::error!(%error, "could not end the head's own worker");
            }
        }
    }
}

fn spawn(options: &WorkerOptions, head: &HeadFile, out: std::fs::File) -> anyhow::Result<Child> {
    let mut command = Command::new(&options.binder);
    command
        .arg("run-bound")
        .arg(std::process::id().to_string())
        .arg(&options.program)
        .args(["--join", &head.address]);
    match options.devices {
        Devices::Each { gpus, cpu_ranks } => {
            command.args(["--num-gpus", &gpus.to_string()]);
            command.args(["--num-cpu-ranks", &cpu_ranks.to_string()]);
        }
        Devices::Ranks(ranks) => {
            command.args(["--num-ranks", &ranks.to_string()]);
        }
    }
    if let Some(cpus) = options.num_cpus {
        command.args(["--num-cpus", &cpus.to_string()]);
    }
    command
        .env(TOKEN, &head.token)
        .stdin(Stdio::null())
        .stdout(out.try_clone()?)
        .stderr(out)
        // A Ctrl-C on the terminal is for the head, which ends its worker in order.
        .process_group(0)
        .kill_on_drop(true);
    Ok(command.spawn()?)
}
