//! The sandbox as the agent's Python: blocking calls on blocking threads, outcomes in the agent's words.
//!
//! What must stay true: whoever waits for a sandbox waits here, as a future that can be dropped, and not on a
//! blocking thread; so nothing that nobody waits for is ever run, and the sandbox's own queue stays empty.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use agentfly_agent::tools::{InfraError, PythonRunner, PythonSlot, RunLimits, RunOutput, RunStatus, Snippet};
use agentfly_common::config::{Config, Sandbox as SandboxSettings, SandboxTier};
use agentfly_common::ids::ChainKey;
use agentfly_sandbox::{Limits, Outcome, Sandbox, SandboxConfig, Status, Tier, Turn};
use anyhow::Context as _;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::task::JoinSet;

/// What snippets and rewards import most, loaded once per warm interpreter.
const PRELOADED: [&str; 4] = ["numpy", "sympy", "math_verify", "latex2sympy2_extended"];

/// Where the sandbox's interpreter is looked for: the environment, the working folder, beside the program.
pub(crate) fn interpreter() -> anyhow::Result<PathBuf> {
    const RELATIVE: &str = "third_party/sandbox-venv/bin/python";
    if let Some(given) = std::env::var_os("AGENTFLY_SANDBOX_PYTHON") {
        return Ok(given.into());
    }
    let program = std::env::current_exe().context("this program's own path is unknown")?;
    let mut folders: Vec<PathBuf> = std::env::current_dir().into_iter().collect();
    folders.extend(program.ancestors().map(PathBuf::from));
    folders.iter().map(|folder| folder.join(RELATIVE)).find(|python| python.exists()).with_context(|| {
        format!("the sandbox's Python ({RELATIVE}) is not there; `make setup` makes it, or name one in AGENTFLY_SANDBOX_PYTHON")
    })
}

/// [`PythonRunner`] over a [`Sandbox`].
pub(super) struct SandboxPython {
    sandbox: Arc<Sandbox>,
    /// What runs get that bring no limits of their own.
    limits: Limits,
    /// As many as the sandbox has slots.
    permits: Arc<Semaphore>,
    /// Where sessions are ended: that waits until their processes are gone.
    blocking: tokio::runtime::Handle,
}

impl SandboxPython {
    /// Starts the pool with a job's limits; `threads` bounds how many snippets run at once by default.
    ///
    /// # Errors
    /// When there is no interpreter, or this machine cannot isolate one; outside of a Tokio runtime.
    pub(super) fn start(config: &Config, threads: u32) -> anyhow::Result<Self> {
        let limits = limits_of_calls(&config.sandbox);
        let slots = config.sandbox.slots.unwrap_or(threads.max(1).saturating_mul(2)) as usize;
        let sandbox = Sandbox::start(SandboxConfig {
            slots,
            tier: tier(config.sandbox.tier),
            limits: limits.clone(),
            preload: PRELOADED.map(str::to_owned).to_vec(),
            echo_last: config.sandbox.echo_last,
            idle_sessions: config.sandbox.idle_sessions as usize,
            idle_session_bytes: config.sandbox.idle_session_bytes(),
            ..SandboxConfig::new(interpreter()?)
        })?;
        let blocking = tokio::runtime::Handle::try_current().context("the sandbox serves async callers")?;
        let permits = Arc::new(Semaphore::new(slots));
        Ok(Self { sandbox: Arc::new(sandbox), limits, permits, blocking })
    }

    /// How it isolates code.
    pub(super) fn tier(&self) -> Tier {
        self.sandbox.tier()
    }
}

/// The sandbox's word for the settings'; `None` is the strongest that works.
fn tier(wanted: SandboxTier) -> Option<Tier> {
    match wanted {
        SandboxTier::Auto => None,
        SandboxTier::Root => Some(Tier::Root),
        SandboxTier::UserNamespaces => Some(Tier::UserNamespaces),
        SandboxTier::Landlock => Some(Tier::Landlock),
    }
}

/// The limits of tool calls.
fn limits_of_calls(settings: &SandboxSettings) -> Limits {
    let wall = settings.wall();
    // Code that computes all the time must be able to reach its wall limit.
    let cpu = settings.cpu_seconds.map_or(wall.max(Limits::default().cpu), Duration::from_secs);
    let tmp_bytes = settings.tmp_mb.saturating_mul(1 << 20);
    Limits {
        tasks: settings.tasks,
        output_bytes: usize::try_from(settings.output_kb).unwrap_or(usize::MAX).saturating_mul(1 << 10),
        tmp_bytes,
        file_bytes: tmp_bytes,
        ..limits(RunLimits { wall, cpu, memory_bytes: settings.memory_bytes() })
    }
}

/// The sandbox's limits, the agent's among them.
fn limits(run: RunLimits) -> Limits {
    Limits { wall: run.wall, cpu: run.cpu, memory_bytes: run.memory_bytes, ..Limits::default() }
}

/// A slot of the sandbox that is free for this run.
struct FreeSlot {
    sandbox: Arc<Sandbox>,
    limits: Limits,
    permit: OwnedSemaphorePermit,
}

fn fault(cause: impl std::fmt::Display) -> InfraError {
    InfraError { cause: cause.to_string() }
}

#[async_trait::async_trait]
impl PythonRunner for SandboxPython {
    async fn admit(&self) -> Result<Box<dyn PythonSlot>, InfraError> {
        let permit = self.permits.clone().acquire_owned().await.map_err(fault)?;
        Ok(Box::new(FreeSlot { sandbox: self.sandbox.clone(), limits: self.limits.clone(), permit }))
    }

    fn end_session(&self, chain: &ChainKey) {
        let (sandbox, name) = (self.sandbox.clone(), chain.to_string());
        self.blocking.spawn_blocking(move || sandbox.end_session(&name));
    }
}

#[async_trait::async_trait]
impl PythonSlot for FreeSlot {
    async fn run(self: Box<Self>, snippet: Snippet<'_>) -> Result<RunOutput, InfraError> {
        let Self { sandbox, limits: of_the_settings, permit } = *self;
        let (code, seed, session) = (snippet.code.to_owned(), snippet.seed, snippet.session);
        let limits = snippet.limits.map_or(of_the_settings, limits);
        let run = move || {
            let _until_it_ends = permit;
            let snippet = agentfly_sandbox::Snippet { code: &code, seed, limits: Some(limits) };
            match session {
                Some(chain) => sandbox.turn(&chain.to_string(), &snippet),
                None => {
                    let outcome = sandbox.run(&snippet)?;
                    Ok(Turn { outcome, kept: false, restarted: false })
                }
            }
        };
        // Dropping a set takes back what no thread has begun.
        let mut blocking = JoinSet::new();
        blocking.spawn_blocking(run);
        let ended = blocking.join_next().await.ok_or_else(|| fault("no run was started"))?;
        let Turn { outcome, restarted, .. } = ended.map_err(fault)?.map_err(fault)?;
        let status = status_of(&outcome);
        Ok(RunOutput { status, stdout: outcome.stdout, stderr: outcome.stderr, restarted })
    }
}

/// How a run ended, in the agent's words.
pub(crate) fn status_of(outcome: &Outcome) -> RunStatus {
    let error = |message: &str| RunStatus::Error { message: message.to_owned() };
    match outcome.status {
        Status::Ok => RunStatus::Success,
        Status::Error => error(outcome.last_line_of_stderr()),
        Status::Timeout => RunStatus::TimedOut,
        Status::Memory => RunStatus::MemoryExceeded,
        Status::OutputLimit => error("OutputLimit: too much was printed"),
        Status::Killed => error("Killed: the process was killed"),
    }
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use agentfly_agent::rewards::JUDGE_LIMITS;
    use agentfly_common::ids::Purpose;

    use super::*;

    fn config(settings: &[&str]) -> Config {
        let given = ["data.train_files=x.json", "actor_rollout_ref.model.path=m", "sandbox.slots=1"];
        let all: Vec<String> = given.iter().chain(settings).map(|text| (*text).to_owned()).collect();
        agentfly_common::config::resolve(&all, None, []).unwrap().config
    }

    fn python(wall_seconds: u64) -> SandboxPython {
        let config = config(&[&format!("sandbox.wall_seconds={wall_seconds}")]);
        SandboxPython::start(&config, 1).expect("`make setup` was run, and this machine isolates snippets")
    }

    async fn run(python: &SandboxPython, code: &str, limits: Option<RunLimits>) -> RunOutput {
        python.admit().await.unwrap().run(Snippet { code, seed: 0, limits, session: None }).await.unwrap()
    }

    #[tokio::test]
    async fn a_queued_snippet_whose_caller_is_gone_never_runs_and_delays_nobody() {
        let python = Arc::new(python(2));
        let looping = run(&python, "while True: pass", None);
        let gone = async {
            let twenty = (0..20).map(|_| run(&python, "while True: pass", None));
            let queued = tokio::time::timeout(Duration::from_millis(200), futures::future::join_all(twenty));
            assert!(queued.await.is_err(), "one slot, and it is taken");
        };
        let (looped, ()) = tokio::join!(looping, gone);
        assert_eq!(looped.status, RunStatus::TimedOut);
        let began = Instant::now();
        assert_eq!(run(&python, "print(1)", None).await.stdout, "1\n");
        assert!(began.elapsed() < Duration::from_secs(2), "{:?}: before it others ran", began.elapsed());
    }

    #[tokio::test]
    async fn the_judges_limits_are_its_own() {
        let python = python(1);
        let nap = "import time; time.sleep(1.5); print(1)";
        assert_eq!(run(&python, nap, None).await.status, RunStatus::TimedOut);
        assert_eq!(run(&python, nap, Some(JUDGE_LIMITS)).await.status, RunStatus::Success);
    }

    #[tokio::test]
    async fn a_chain_s_turns_share_their_variables_until_it_ends() {
        let python = python(5);
        let chain = |chain| ChainKey { purpose: Purpose::Train, step: 1, group: 0, chain };
        let turn = async |of, code| {
            let snippet = Snippet { code, seed: 0, limits: None, session: Some(chain(of)) };
            python.admit().await.unwrap().run(snippet).await.unwrap()
        };
        assert_eq!(turn(0, "x = 41").await.status, RunStatus::Success);
        let failed = turn(0, "x = 0\n1 / 0").await.status;
        assert_eq!(failed, RunStatus::Error { message: "ZeroDivisionError: division by zero".to_owned() });
        assert_eq!(turn(1, "print('x' in globals())").await.stdout, "False\n", "another chain's");
        assert_eq!(turn(0, "print(x + 1)").await.stdout, "42\n");
        python.end_session(&chain(0));
        while python.sandbox.idle_sessions() > 1 {
            tokio::task::yield_now().await;
        }
        let fresh = turn(0, "print('x' in globals())").await;
        assert_eq!((fresh.stdout.as_str(), fresh.restarted), ("False\n", false), "the chain was run again");
    }

    #[tokio::test]
    async fn computing_all_the_time_reaches_the_wall_limit() {
        assert_eq!(python(60).limits.cpu, Duration::from_secs(60));
        assert_eq!(python(1).limits.cpu, Limits::default().cpu);
    }

    #[test]
    fn the_limits_of_calls_are_those_of_the_settings_and_otherwise_the_sandbox_s_own() {
        let of = |settings: &[&str]| limits_of_calls(&config(settings).sandbox);
        let wall = Duration::from_secs(10);
        assert_eq!(of(&[]), Limits { wall, memory_bytes: 1 << 30, ..Limits::default() });
        let given =
            of(&["sandbox.cpu_seconds=3", "sandbox.tasks=7", "sandbox.output_kb=1", "sandbox.tmp_mb=2"]);
        let tmp_bytes = 2 << 20;
        let expected = Limits {
            wall,
            cpu: Duration::from_secs(3),
            memory_bytes: 1 << 30,
            tasks: 7,
            output_bytes: 1024,
            tmp_bytes,
            file_bytes: tmp_bytes,
            ..Limits::default()
        };
        assert_eq!(given, expected);
    }
}
