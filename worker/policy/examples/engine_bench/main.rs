//! Our side of `make bench-engine`: one process that measures what it is asked to, over the crate's public API.
//!
//! `deploy/bench/bench_engine.py` starts one or several of it beside the peers. Each reads requests from its
//! standard input, one JSON object a line, and answers each with one line; it ends with its input. The model is
//! loaded and warm between requests. What must stay true: the process has a rank's environment and set-up, and
//! the clock runs over the same calls that a rank makes.

mod gemm;
mod grpo;
mod learner;
mod multi_turn;
mod rollout;
mod work;

use std::path::PathBuf;

use agentfly_policy::environment::with_environment_for_libtorch;
use agentfly_policy::model::Decoder;
use agentfly_policy::placement::{self, Dtype, Place};
use anyhow::Context as _;
use clap::{Args, Parser, Subcommand, ValueEnum};
use tch::Device;

use work::{Share, Work};

/// Measures the rollout engine and the learner. Requests come in on standard input, answers go out, as JSON lines.
///
/// Try: echo '{"batch": 16, "new_tokens": 128, "seed": 0}' | engine_bench rollout --model DIR --work FILE
#[derive(Debug, Parser)]
struct Cli {
    #[command(subcommand)]
    what: What,
}

#[derive(Debug, Subcommand)]
enum What {
    /// Generation of a batch: `{"batch", "new_tokens", "seed"}`.
    Rollout(EngineArgs),
    /// Chains whose turns a tool interrupts: `{"chains", "turns", "new_tokens", "tool_seconds", "seed"}`.
    MultiTurn(EngineArgs),
    /// A training step on given rows: `{"rows", "tokens", "seed"}`.
    Learner(LearnerArgs),
    /// Generation, rewards and a training step: `{"completions", "new_tokens", "seed"}`.
    Grpo(GrpoArgs),
    /// The fastest matrix product: `{"seconds"}` for each shape.
    Gemm(Machine),
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum DtypeArg {
    F32,
    Bf16,
}

impl From<DtypeArg> for Dtype {
    fn from(arg: DtypeArg) -> Self {
        match arg {
            DtypeArg::F32 => Self::F32,
            DtypeArg::Bf16 => Self::Bf16,
        }
    }
}

/// How the machine is used.
#[derive(Debug, Args)]
struct Machine {
    /// Numbers of weights and activations
    #[arg(long, default_value = "bf16")]
    dtype: DtypeArg,
    /// Threads of this process
    #[arg(long, default_value_t = 1)]
    threads: u32,
    /// Where the model computes: cpu or cuda:N
    #[arg(long, default_value = "cpu", env = "BENCH_DEVICE")]
    device: Place,
}

/// A model, and the part of the work that is this process's.
#[derive(Debug, Args)]
struct ModelArgs {
    #[command(flatten)]
    machine: Machine,
    /// A Hugging Face directory
    #[arg(long)]
    model: PathBuf,
    /// This process's number among those that share the work
    #[arg(long, default_value_t = 0)]
    rank: usize,
    /// Processes that share the work
    #[arg(long, default_value_t = 1)]
    ranks: usize,
}

impl ModelArgs {
    fn open(&self) -> anyhow::Result<Decoder> {
        anyhow::ensure!(self.rank < self.ranks, "--rank {} must be below --ranks {}", self.rank, self.ranks);
        placement::set_up(self.machine.threads, self.machine.device)?;
        placement::open(&self.model, self.machine.dtype.into(), self.machine.device)
            .with_context(|| format!("loading {}", self.model.display()))
    }

    fn share(&self) -> Share {
        Share { rank: self.rank, ranks: self.ranks }
    }
}

#[derive(Debug, Args)]
struct EngineArgs {
    #[command(flatten)]
    model: ModelArgs,
    /// What `bench_work` made: prompts and observations as token ids
    #[arg(long)]
    work: PathBuf,
    /// Chains whose keys and values this process holds at a time
    #[arg(long, default_value_t = 64)]
    slots: usize,
    /// Largest length of a chain in tokens
    #[arg(long, default_value_t = 256)]
    window: usize,
}

#[derive(Debug, Args)]
struct LearnerArgs {
    #[command(flatten)]
    model: ModelArgs,
    /// Where the ranks meet: a free port of this machine, the same for all
    #[arg(long, default_value_t = 0)]
    store_port: u16,
    /// Tokens of a micro-batch (default: the learner's)
    #[arg(long)]
    micro_tokens: Option<usize>,
}

#[derive(Debug, Args)]
struct GrpoArgs {
    #[command(flatten)]
    learner: LearnerArgs,
    /// What `bench_work` made
    #[arg(long)]
    work: PathBuf,
    /// Largest length of a chain in tokens
    #[arg(long, default_value_t = 256)]
    window: usize,
}

fn main() -> anyhow::Result<()> {
    with_environment_for_libtorch()?;
    match Cli::parse().what {
        What::Rollout(args) => {
            let (decoder, work) = (args.model.open()?, Work::read(&args.work)?);
            rollout::serve(&decoder, &work, &args)
        }
        What::MultiTurn(args) => {
            let (decoder, work) = (args.model.open()?, Work::read(&args.work)?);
            multi_turn::serve(&decoder, &work, &args)
        }
        What::Learner(args) => learner::serve(args.model.open()?, &args),
        What::Grpo(args) => {
            let (decoder, work) = (args.learner.model.open()?, Work::read(&args.work)?);
            grpo::serve(decoder, &work, &args)
        }
        What::Gemm(machine) => {
            placement::set_up(machine.threads, machine.device)?;
            let device = match machine.device {
                Place::Cpu => Device::Cpu,
                Place::Cuda(index) => Device::Cuda(index),
            };
            gemm::serve(machine.dtype, device)
        }
    }
}
