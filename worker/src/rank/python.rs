//! The sandbox as the agent's Python: blocking calls on blocking threads, outcomes in the agent's words.

use std::path::PathBuf;
use std::sync::Arc;

use agentfly_agent::tools::{InfraError, PythonRunner, RunOutput, RunStatus};
use agentfly_common::config::Config;
use agentfly_sandbox::{Limits, Sandbox, SandboxConfig, Snippet, Status};
use anyhow::Context as _;

/// What snippets and rewards import most, loaded once per warm interpreter.
const PRELOADED: [&str; 4] = ["numpy", "sympy", "math_verify", "latex2sympy2_extended"];

/// Where the sandbox's interpreter is looked for: the environment, the working folder, beside the program.
fn interpreter() -> anyhow::Result<PathBuf> {
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
pub(super) struct SandboxPython(Arc<Sandbox>);

impl SandboxPython {
    /// Starts the pool with a job's limits; `threads` bounds how many snippets run at once by default.
    ///
    /// # Errors
    /// When there is no interpreter, or this machine cannot isolate one.
    pub(super) fn start(config: &Config, threads: u32) -> anyhow::Result<Self> {
        let limits = Limits {
            wall: config.sandbox.wall(),
            memory_bytes: config.sandbox.memory_bytes(),
            ..Limits::default()
        };
        let slots = config.sandbox.slots.unwrap_or(threads.max(1).saturating_mul(2));
        let sandbox = Sandbox::start(SandboxConfig {
            slots: slots as usize,
            limits,
            preload: PRELOADED.map(str::to_owned).to_vec(),
            ..SandboxConfig::new(interpreter()?)
        })?;
        Ok(Self(Arc::new(sandbox)))
    }
}

#[async_trait::async_trait]
impl PythonRunner for SandboxPython {
    async fn run(&self, code: &str, seed: u64) -> Result<RunOutput, InfraError> {
        let (sandbox, code) = (self.0.clone(), code.to_owned());
        let fault = |cause: String| InfraError { cause };
        let run = move || sandbox.run(&Snippet { code: &code, seed, limits: None });
        let outcome = tokio::task::spawn_blocking(run)
            .await
            .map_err(|error| fault(error.to_string()))?
            .map_err(|error| fault(error.to_string()))?;
        let status = match outcome.status {
            Status::Ok => RunStatus::Success,
            Status::Error => RunStatus::Error { message: last_line(&outcome.stderr) },
            Status::Timeout => RunStatus::TimedOut,
            Status::Memory => RunStatus::MemoryExceeded,
            Status::OutputLimit => {
                RunStatus::Error { message: "OutputLimit: too much was printed".to_owned() }
            }
            Status::Killed => RunStatus::Error { message: "Killed: the process was killed".to_owned() },
        };
        Ok(RunOutput { status, stdout: outcome.stdout, stderr: outcome.stderr })
    }
}

/// A traceback ends with `TypeName: message`.
fn last_line(stderr: &str) -> String {
    stderr.lines().rev().find(|line| !line.trim().is_empty()).unwrap_or("exited with an error").to_owned()
}
