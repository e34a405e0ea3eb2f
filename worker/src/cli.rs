//! The command line of `worker`.

use std::path::PathBuf;
use std::process::ExitCode;

use agentfly_common::error::Whose;
use agentfly_common::telemetry::{LogTo, init, init_gathering};
use agentfly_policy::environment::with_environment_for_libtorch;
use agentfly_proto::v1::RankId;
use clap::{Args, Parser, Subcommand};

use crate::commands::{doctor, generate, sandbox, score, warmup};
use crate::connection::{join_token, own_address_towards};
use crate::node::{DeviceRequest, NodeOptions};
use crate::process::die_with_parent;
use crate::rank::{Address, DeviceName, RankError, RankOptions};

/// A node of the cluster: generates rollouts and trains.
///
/// Join a coordinator with `worker --join host:6379`; talk to a model with `worker generate`.
#[derive(Debug, Parser)]
#[command(version, args_conflicts_with_subcommands = true, arg_required_else_help = true)]
struct Cli {
    #[command(subcommand)]
    command: Option<Command>,
    #[command(flatten)]
    join: Join,
}

#[derive(Debug, Args)]
struct Join {
    /// The coordinator to join, as host:port
    #[arg(long, value_name = "HOST:PORT")]
    join: Option<String>,
    /// GPUs to offer [default: all]
    #[arg(long)]
    num_gpus: Option<u32>,
    /// CPU ranks to offer [default: 1 where there is no GPU]
    #[arg(long)]
    num_cpu_ranks: Option<u32>,
    /// Ranks to offer: on GPUs where this program can use as many, else on CPUs
    #[arg(long, value_name = "N", conflicts_with_all = ["num_gpus", "num_cpu_ranks"])]
    num_ranks: Option<u32>,
    /// CPU cores to share among the ranks [default: all]
    #[arg(long)]
    num_cpus: Option<u32>,
    /// The address at which other ranks reach this node's ranks
    /// [default: the address from which this machine reaches the coordinator]
    #[arg(long, value_name = "IP")]
    node_ip_address: Option<String>,
    /// File with the coordinator's join token, or its head.json [default: AGENTFLY_TOKEN, else the head.json of
    /// a head on this machine]
    #[arg(long, value_name = "FILE")]
    token_file: Option<PathBuf>,
    /// End when the process with this id, which must be the parent, ends
    #[arg(long, value_name = "PID", hide = true)]
    die_with_parent: Option<u32>,
}

impl Join {
    fn devices(&self) -> DeviceRequest {
        match self.num_ranks {
            Some(ranks) => DeviceRequest::Ranks(ranks),
            None => DeviceRequest::Each { gpus: self.num_gpus, cpu_ranks: self.num_cpu_ranks },
        }
    }
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Score token ids: JSONL {"ids":[…]} on stdin, {"logprobs":[null,…]} on stdout
    Score(score::ScoreArgs),
    /// Talk to a model
    Generate(generate::GenerateArgs),
    /// Train a model on demonstrations (supervised), as a start for reinforcement learning
    Warmup(warmup::WarmupArgs),
    /// Show what this machine has, and whether a job fits its memory
    Doctor(doctor::DoctorArgs),
    /// Run Python in the sandbox, or serve it over HTTP as AgentFly's code interpreter
    Sandbox(sandbox::SandboxArgs),
    /// One device's process; started by the node
    #[command(hide = true)]
    Rank(RankArgs),
}

#[derive(Debug, Args)]
struct RankArgs {
    #[arg(long)]
    coordinator: String,
    #[arg(long)]
    job: String,
    #[arg(long)]
    rank: u32,
    #[arg(long)]
    incarnation: u32,
    #[arg(long)]
    device: DeviceName,
    #[arg(long)]
    threads: u32,
    #[arg(long)]
    ranks_on_node: u32,
    #[arg(long)]
    address: String,
    #[arg(long)]
    parent_pid: u32,
}

/// Runs the command line; errors go to stderr, whole, with what to do next.
pub fn main() -> ExitCode {
    agentfly_common::shutdown::end_quietly_on_closed_pipe();
    let cli = Cli::parse();
    let computes = matches!(cli.command, Some(Command::Score(_) | Command::Generate(_) | Command::Warmup(_)));
    let by_hand = computes || matches!(cli.command, Some(Command::Doctor(_) | Command::Sandbox(_)));
    let ready = || {
        if computes {
            with_environment_for_libtorch()?;
        }
        if !matches!(cli.command, Some(Command::Rank(_))) {
            init(LogTo::Stderr, if by_hand { "warn" } else { "info" })?;
        }
        anyhow::Ok(())
    };
    ExitCode::from(conclude(ready().and_then(|()| dispatch(cli))))
}

/// Says what went wrong, if anything; the exit code says who must act. Else it is the given one.
fn conclude(ended: anyhow::Result<u8>) -> u8 {
    let error = match ended {
        Ok(code) => return code,
        Err(error) => error,
    };
    eprintln!("error: {error:#}");
    error.downcast_ref::<RankError>().map_or(Whose::Operator, |error| error.whose).exit_code()
}

/// Does what was asked. The exit code is 0, or that of the code that `sandbox run` ran.
fn dispatch(cli: Cli) -> anyhow::Result<u8> {
    match cli.command {
        Some(Command::Score(args)) => score::run(&args).map(|()| 0),
        Some(Command::Generate(args)) => generate::run(&args).map(|()| 0),
        Some(Command::Warmup(args)) => warmup::run(&args).map(|()| 0),
        Some(Command::Doctor(args)) => doctor::run(&args).map(|()| 0),
        Some(Command::Sandbox(args)) => sandbox::run(&args),
        Some(Command::Rank(args)) => {
            die_with_parent(args.parent_pid)?;
            let spans = init_gathering(LogTo::Stderr, "info")?;
            let id = RankId { job_id: args.job, rank: args.rank, incarnation: args.incarnation };
            let options = RankOptions {
                coordinator: args.coordinator,
                token: join_token(None)?,
                id,
                device: args.device,
                threads: args.threads,
                ranks_on_node: args.ranks_on_node,
                address: Address(args.address),
                spans,
            };
            let ended = block_on(crate::rank::run(options));
            // The device thread may be in the middle of a step: leave without libtorch's destructors.
            agentfly_c10d::exit_at_once(conclude(ended.map(|()| 0)))
        }
        None => {
            if let Some(parent) = cli.join.die_with_parent {
                die_with_parent(parent)?;
            }
            let devices = cli.join.devices();
            let Some(join) = cli.join.join else {
                anyhow::bail!("--join HOST:PORT is missing: the address that `coordinator --head` printed");
            };
            let address = match cli.join.node_ip_address {
                Some(address) => address,
                None => own_address_towards(&join)?,
            };
            let options = NodeOptions {
                join,
                token: join_token(cli.join.token_file.as_deref())?,
                devices,
                cpus: cli.join.num_cpus,
                address,
            };
            block_on(crate::node::run(options)).map(|()| 0)
        }
    }
}

/// Runs a future to its end on a new runtime; what is still running then is given a second.
fn block_on(work: impl Future<Output = anyhow::Result<()>>) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    let result = runtime.block_on(work);
    runtime.shutdown_timeout(std::time::Duration::from_secs(1));
    result
}
