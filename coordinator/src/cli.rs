//! The command line. One page: what can be asked, and nothing about how it is done.

use std::net::IpAddr;
use std::path::PathBuf;

use clap::{Args, Parser, Subcommand};

/// Trains language-model agents with reinforcement learning.
#[derive(Debug, Parser)]
#[command(version, args_conflicts_with_subcommands = true, arg_required_else_help = true, after_help = EXAMPLES)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Option<Command>,
    /// The head's options.
    #[command(flatten)]
    pub head: HeadArgs,
}

const EXAMPLES: &str = "\
Examples:
  coordinator --head --num-cpus 2 --num-cpu-ranks 2 --detach
  coordinator train agent.num_chains=8 trainer.total_training_steps=40
  coordinator job logs job-1
  coordinator stop";

const SETTINGS: &str = "\
The settings of most jobs:
  actor_rollout_ref.model.path=DIR     the Hugging Face model to train
  data.train_files=FILE                questions and answers: a JSON list or JSON Lines
  data.val_files=FILE                  the same, for validation
  data.train_batch_size=16             questions a step
  agent.num_chains=8                   chains for each question: the group of GRPO
  agent.agent_type=code agent.tools=[code_interpreter] agent.reward_name=math_reward_format
  actor_rollout_ref.actor.optim.lr=1e-6
  trainer.n_gpus_per_node=2            ranks: GPUs, or CPU ranks on a machine without
  trainer.total_training_steps=40 trainer.save_freq=10

`coordinator explain` lists all of them as they are resolved; deploy/default.toml says what each means.
The same keys go into a file (--config run.toml) or the environment, with __ for each dot:
  AGENTFLY_AGENT__NUM_CHAINS=8 coordinator train …
Defaults give way to the file, the file to the environment, the environment to KEY=VALUE.";

/// What a head is started with.
#[derive(Debug, Clone, Args)]
pub struct HeadArgs {
    /// Start a head: it holds the cluster and the jobs, and stays in the foreground without --detach
    #[arg(long, required = true)]
    pub head: bool,
    /// Address to listen on; beyond the loopback only with --allow-remote
    #[arg(long, value_name = "IP", default_value = "127.0.0.1")]
    pub node_ip_address: IpAddr,
    /// gRPC port for workers and commands; 0 takes any free one
    #[arg(long, default_value_t = 6379)]
    pub port: u16,
    /// HTTP port on the loopback for /metrics and /api; 0 takes any free one
    #[arg(long, default_value_t = 8265)]
    pub http_port: u16,
    /// CPU cores for the local worker's ranks and tools; unset takes all
    #[arg(long, value_name = "N")]
    pub num_cpus: Option<u32>,
    /// GPUs of the local worker, one rank each
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub num_gpus: u32,
    /// Ranks that the local worker may run on CPUs
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub num_cpu_ranks: u32,
    /// Go to the background once the head answers
    #[arg(long)]
    pub detach: bool,
    /// Folder of the journal and logs [default: ./.agentfly]
    #[arg(long, value_name = "DIR")]
    pub state_dir: Option<PathBuf>,
    /// Start no worker here; others join with `worker --join HOST:PORT`
    #[arg(long)]
    pub no_local_worker: bool,
    /// Listen beyond the loopback, without encryption
    #[arg(long)]
    pub allow_remote: bool,
    /// Set by --detach on the process it starts
    #[arg(long, hide = true)]
    pub detached_child: bool,
}

/// Everything but starting a head.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Run a training job and show how it goes; starts a head for its length when none is running
    #[command(after_help = SETTINGS)]
    Train(TrainArgs),
    /// Print the resolved settings and the batch arithmetic in words
    #[command(after_help = SETTINGS)]
    Explain(SettingsArgs),
    /// Show whether a head runs and what it does
    Status(ShowArgs),
    /// List the nodes and their ranks
    Nodes(ShowArgs),
    /// List the jobs, ended ones too
    Jobs(ShowArgs),
    /// Show, follow or cancel one job
    #[command(subcommand)]
    Job(JobCommand),
    /// Stop the running head and its jobs; does nothing when none runs
    Stop(ShowArgs),
    /// Become a program that ends when the process PARENT ends
    #[command(hide = true)]
    RunBound {
        /// Whose life it is bound to.
        parent: u32,
        /// What to run.
        program: PathBuf,
        /// Its arguments.
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        arguments: Vec<String>,
    },
}

/// Settings of a job.
#[derive(Debug, Clone, Args)]
pub struct SettingsArgs {
    /// Settings in AgentFly's and verl's names
    #[arg(value_name = "KEY=VALUE")]
    pub overrides: Vec<String>,
    /// A .toml or .json file of settings, below the environment and KEY=VALUE
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
}

/// Of `train`.
#[derive(Debug, Clone, Args)]
pub struct TrainArgs {
    /// The job.
    #[command(flatten)]
    pub settings: SettingsArgs,
    /// The head to run it on; unset takes the running one
    #[arg(long, value_name = "HOST:PORT")]
    pub address: Option<String>,
    /// Queue the job on the running head and return
    #[arg(long)]
    pub detach: bool,
}

/// Of the commands that show something.
#[derive(Debug, Clone, Args)]
pub struct ShowArgs {
    /// Print JSON
    #[arg(long)]
    pub json: bool,
    /// The head to ask; unset takes the running one
    #[arg(long, value_name = "HOST:PORT")]
    pub address: Option<String>,
}

/// `job …`.
#[derive(Debug, Subcommand)]
pub enum JobCommand {
    /// Show a job's state, summary and settings
    Show(JobArgs),
    /// Print a job's events, then new ones until it ends
    Logs(JobArgs),
    /// End a job
    Cancel(JobArgs),
}

/// Of the commands about one job.
#[derive(Debug, Clone, Args)]
pub struct JobArgs {
    /// The job's name, as in `coordinator jobs`
    #[arg(value_name = "ID")]
    pub id: String,
    /// How to show it.
    #[command(flatten)]
    pub show: ShowArgs,
}
