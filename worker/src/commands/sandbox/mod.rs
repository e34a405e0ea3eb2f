//! `worker sandbox`: the sandbox by itself, without a coordinator, for any program that has to run a model's Python.

mod run;
mod serve;

use std::path::PathBuf;
use std::time::Duration;

use agentfly_sandbox::{Limits, SandboxConfig, Tier};

use crate::rank::python::interpreter;

/// Arguments of `worker sandbox`.
#[derive(Debug, clap::Args)]
pub struct SandboxArgs {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, clap::Subcommand)]
enum Command {
    /// Run Python files, each in a fresh sandbox or as turns of one session
    #[command(after_help = run::EXAMPLES)]
    Run(run::RunArgs),
    /// Serve AgentFly's code interpreter over HTTP: POST /exec {"code"}, GET /health
    #[command(after_help = serve::EXAMPLES)]
    Serve(serve::ServeArgs),
}

/// How snippets run, and their limits.
#[derive(Debug, clap::Args)]
struct PoolArgs {
    /// How to isolate: root, user_namespaces or landlock; refuses where that cannot be had [default: the strongest that can]
    #[arg(long, value_name = "TIER")]
    tier: Option<Tier>,
    /// Wall-clock time of a snippet, in seconds, at most 60
    #[arg(long, value_name = "SECONDS", default_value_t = 5.0)]
    wall: f64,
    /// CPU time of all its processes, in seconds
    #[arg(long, value_name = "SECONDS", default_value_t = 10.0)]
    cpu: f64,
    /// Memory of all its processes, in MiB
    #[arg(long, value_name = "MIB", default_value_t = 512)]
    memory_mb: u32,
    /// Its processes and threads
    #[arg(long, value_name = "N", default_value_t = 32)]
    tasks: u32,
    /// What is kept of its output, in KiB; more ends it
    #[arg(long, value_name = "KIB", default_value_t = 64)]
    output_kb: u32,
    /// Its /tmp, in MiB
    #[arg(long, value_name = "MIB", default_value_t = 64)]
    tmp_mb: u32,
    /// Show the value of a last line that is an expression
    #[arg(long)]
    echo_last: bool,
    /// Modules that snippets find imported, by commas; "" for none [default: none for run, numpy,sympy for serve]
    #[arg(long, value_name = "MODULES", value_delimiter = ',')]
    preload: Option<Vec<String>>,
    /// bin/python of the environment [default: AGENTFLY_SANDBOX_PYTHON, else third_party/sandbox-venv of `make setup`]
    #[arg(long, value_name = "FILE")]
    python: Option<PathBuf>,
}

impl PoolArgs {
    /// The pool's configuration; what is out of range is refused by the pool, by name and value.
    fn config(&self, slots: usize, preload: &[&str]) -> anyhow::Result<SandboxConfig> {
        let seconds = |name: &str, given: f64| {
            Duration::try_from_secs_f64(given)
                .map_err(|e| anyhow::anyhow!("--{name} {given}: {e}; expected seconds, as 5 or 0.5"))
        };
        let limits = Limits {
            wall: seconds("wall", self.wall)?,
            cpu: seconds("cpu", self.cpu)?,
            memory_bytes: u64::from(self.memory_mb) << 20,
            tasks: self.tasks,
            output_bytes: (self.output_kb as usize) << 10,
            tmp_bytes: u64::from(self.tmp_mb) << 20,
            file_bytes: u64::from(self.tmp_mb) << 20,
            ..Limits::default()
        };
        let python = self.python.clone().map_or_else(interpreter, Ok)?;
        let default = || preload.iter().map(|module| (*module).to_owned()).collect();
        Ok(SandboxConfig {
            slots,
            tier: self.tier,
            limits,
            echo_last: self.echo_last,
            preload: match &self.preload {
                Some(given) => given.iter().filter(|module| !module.is_empty()).cloned().collect(),
                None => default(),
            },
            ..SandboxConfig::new(python)
        })
    }
}

/// Does what was asked; the exit code is the snippet's, where one snippet is run and its output shown.
///
/// # Errors
/// A file that cannot be read, a setting out of range, a machine that cannot isolate snippets.
pub fn run(args: &SandboxArgs) -> anyhow::Result<u8> {
    match &args.command {
        Command::Run(args) => run::run(args),
        Command::Serve(args) => serve::run(args).map(|()| 0),
    }
}
