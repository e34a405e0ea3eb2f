//! What the core is told and what it decides: the whole contract between the pure core and the shell.
//!
//! Facts come in as [`Event`]s stamped with the time they were seen; [`Decision`]s go out for the shell to
//! carry out in order. Nothing here knows tonic, tokio, a clock or a file.

use std::collections::BTreeMap;
use std::time::Duration;

use agentfly_common::batch::TrainShard;
use agentfly_common::config::Config;
use agentfly_common::error::Whose;
use agentfly_common::ids::{PolicyVersion, Purpose};
use agentfly_common::trajectory::Trajectory;

/// Time since the head started. The only clock the core knows; it comes in with each event.
pub type Moment = Duration;

/// A node, by the name it chose.
pub type NodeId = String;

/// A job, by the name the head gave it.
pub type JobId = String;

/// One life of one rank of one job.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RankId {
    /// Its job.
    pub job: JobId,
    /// 0-based.
    pub rank: u32,
    /// Counts restarts; what an older incarnation says is ignored.
    pub incarnation: u32,
}

/// A device a rank can own.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Device {
    /// A CPU rank's seat.
    Cpu(u32),
    /// A GPU.
    Cuda(u32),
}

/// What a node says when it joins.
#[derive(Debug, Clone, PartialEq)]
pub struct NodeFacts {
    /// For people.
    pub hostname: String,
    /// Its devices, in order.
    pub devices: Vec<Device>,
    /// CPU cores, shared by its ranks.
    pub cpus: u32,
    /// Memory, bytes.
    pub memory_bytes: u64,
}

/// Everything about a job that does not change while it runs.
#[derive(Debug, Clone)]
pub struct JobSpec {
    /// The resolved configuration.
    pub config: Config,
    /// Rows of the training set (after `train_max_samples`); rows are named by their index in it.
    pub train_rows: usize,
    /// Rows of the validation set; 0 when there is none.
    pub validation_rows: usize,
    /// The `data_source` of each validation row, which names it in metrics; rows beyond its end are of the
    /// source `unknown`.
    pub validation_sources: Vec<String>,
    /// Where a committed checkpoint says to go on, if the job resumes.
    pub resume: Option<ResumePoint>,
}

/// Where a committed checkpoint stands.
#[derive(Debug, Clone, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct ResumePoint {
    /// Its directory.
    pub dir: std::path::PathBuf,
    /// Training steps behind it.
    pub step: u64,
    /// Weights it holds.
    pub policy_version: PolicyVersion,
    /// Their hash as the ranks attested it; they must attest it again once they have loaded them.
    pub weights_hash: String,
    /// Where the data goes on.
    pub cursor: crate::data::Cursor,
}

/// A fact, as the shell saw it.
#[allow(
    missing_docs,
    reason = "fields are named after the types they hold; the variant's line says the rest"
)]
#[derive(Debug, Clone)]
pub enum Event {
    /// Time passed; sent about once a second.
    Tick,
    /// A node opened its session.
    NodeJoined { node: NodeId, facts: NodeFacts },
    /// A node was heard.
    NodeHeard { node: NodeId },
    /// A node's session ended.
    NodeLeft { node: NodeId, cause: String },
    /// A person queued a job (already checked).
    JobSubmitted { job: JobId, spec: Box<JobSpec> },
    /// A person, or a stopping head, ends a job.
    JobCancelled { job: JobId, why: String },
    /// A rank opened its session.
    RankJoined { rank: RankId },
    /// A rank was heard, and said what it does since when.
    RankHeard { rank: RankId, activity: String, activity_seconds: f64 },
    /// Rank 0 opened the rendezvous store.
    StoreOpened { rank: RankId, host: String, port: u16 },
    /// A rank holds these weights and its group stands.
    RankReady { rank: RankId, policy_version: PolicyVersion, weights_hash: String },
    /// A chain ended.
    TrajectoryArrived { rank: RankId, shard: u64, trajectory: Box<Trajectory> },
    /// A rank finished a rollout shard.
    RolloutDone { rank: RankId, shard: u64, metrics: BTreeMap<String, f64> },
    /// A rank finished a training step.
    TrainDone {
        rank: RankId,
        step: u64,
        policy_version: PolicyVersion,
        weights_hash: String,
        metrics: BTreeMap<String, f64>,
    },
    /// A rank wrote its files of a checkpoint, by their paths within the folder.
    CheckpointWritten { rank: RankId, step: u64, files: Vec<String> },
    /// The shell committed a checkpoint (manifest written, renamed), or could not.
    CheckpointCommitted { job: JobId, step: u64, result: Result<std::path::PathBuf, CoreFault> },
    /// The shell can no longer keep what a job makes: its recorder has died.
    RecorderDied { job: JobId },
    /// A rank reports its own failure.
    RankFailed { rank: RankId, fault: CoreFault },
    /// A rank's process is gone (`cause` names signal or exit code and its last words).
    RankExited { rank: RankId, cause: String },
}

/// An error with its owner.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CoreFault {
    /// Who must act.
    pub whose: Whose,
    /// What happened and what to do next.
    pub message: String,
}

/// What the shell must do, in order.
#[allow(
    missing_docs,
    reason = "fields are named after the types they hold; the variant's line says the rest"
)]
#[derive(Debug, Clone)]
pub enum Decision {
    /// Start a rank's process on a node.
    StartRank { node: NodeId, rank: RankId, device: Device, threads: u32, ranks_on_node: u32 },
    /// End all ranks of a job on a node; after `grace` by force.
    StopRanks { node: NodeId, job: JobId, grace: Duration },
    /// Give a rank something to do.
    Command { rank: RankId, command: RankCommand },
    /// The job's state changed.
    State { job: JobId, state: JobState, detail: String },
    /// Within a step: so many of so many.
    Progress { job: JobId, phase: Phase, step: u64, done: u64, total: u64 },
    /// A step's chains are complete and judged: keep them (training or validation).
    KeepTrajectories { job: JobId, purpose: Purpose, step: u64, rows: Vec<JudgedTrajectory> },
    /// Hold a rank's shard of a step until it fetches it (and drop that rank's older ones).
    OfferShard { rank: RankId, shard: Box<TrainShard> },
    /// A step ended.
    StepFinished { job: JobId, step: u64, metrics: BTreeMap<String, f64> },
    /// A validation ended.
    ValidationFinished { job: JobId, step: u64, metrics: BTreeMap<String, f64> },
    /// All ranks have written their files, by rank: write the coordinator's part and commit.
    CommitCheckpoint { job: JobId, point: CheckpointPoint, files: Vec<Vec<String>> },
    /// A line for the job's log.
    Log { job: JobId, level: Level, text: String },
    /// The job is over; no rank of it runs any more.
    Ended { job: JobId, end: JobEnd },
}

impl Event {
    /// The rank that speaks, or that is spoken of.
    #[must_use]
    pub fn rank(&self) -> Option<&RankId> {
        match self {
            Self::RankJoined { rank }
            | Self::RankHeard { rank, .. }
            | Self::StoreOpened { rank, .. }
            | Self::RankReady { rank, .. }
            | Self::TrajectoryArrived { rank, .. }
            | Self::RolloutDone { rank, .. }
            | Self::TrainDone { rank, .. }
            | Self::CheckpointWritten { rank, .. }
            | Self::RankFailed { rank, .. }
            | Self::RankExited { rank, .. } => Some(rank),
            _ => None,
        }
    }
}

/// A command to a rank; `Prepare` and the rest mirror `cluster.proto`.
#[allow(
    missing_docs,
    reason = "fields are named after the types they hold; the variant's line says the rest"
)]
#[derive(Debug, Clone, PartialEq)]
pub enum RankCommand {
    /// Load model, tokenizer, tools and reward.
    Prepare {
        world_size: u32,
        seed: u64,
        resume: Option<std::path::PathBuf>,
        policy_version: PolicyVersion,
        total_steps: u64,
    },
    /// Join the collective group.
    FormGroup { generation: u32, host: String, port: u16 },
    /// Generate chains: `(group index, row index in the data set)`; the shell attaches the rows.
    RunRollout {
        shard: u64,
        purpose: Purpose,
        step: u64,
        policy_version: PolicyVersion,
        chains: u32,
        groups: Vec<(u32, usize)>,
        deadline: Duration,
    },
    /// Fetch this step's shard, train on it, report.
    RunTrain { step: u64, policy_version: PolicyVersion },
    /// Write the files of a checkpoint; the shell makes the directory and names it.
    WriteCheckpoint { step: u64 },
    /// End.
    Stop { why: String },
}

/// A trajectory with what the coordinator found: its advantage.
#[derive(Debug, Clone)]
pub struct JudgedTrajectory {
    /// The chain.
    pub trajectory: Trajectory,
    /// Its advantage (GRPO: one number for all its tokens); `None` for validation.
    pub advantage: Option<f64>,
    /// Row of the data set it answers.
    pub row: usize,
}

/// What a checkpoint must hold beside the ranks' files.
#[derive(Debug, Clone, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct CheckpointPoint {
    /// Training steps behind it.
    pub step: u64,
    /// Weights it holds.
    pub policy_version: PolicyVersion,
    /// Their attested hash.
    pub weights_hash: String,
    /// Where the data goes on.
    pub cursor: crate::data::Cursor,
    /// The job's seed.
    pub seed: u64,
    /// Last step of the job.
    pub total_steps: u64,
}

/// Where a job stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub enum JobState {
    /// Waits for devices or for the job before it.
    Queued,
    /// Ranks start and load.
    Starting,
    /// Steps run.
    Running,
    /// Ranks are being stopped.
    Stopping,
    /// All steps done.
    Finished,
    /// Ended by a fault.
    Failed,
    /// Ended by a person.
    Cancelled,
}

/// What a running job is in the middle of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Phase {
    /// Generating training chains.
    Rollout,
    /// Updating the policy.
    Train,
    /// Generating validation chains.
    Validation,
    /// Writing a checkpoint.
    Checkpoint,
}

/// How important a line is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Level {
    /// For the record.
    Info,
    /// Someone should look.
    Warn,
    /// Something failed.
    Error,
}

/// How a job ended.
#[derive(Debug, Clone, PartialEq)]
pub struct JobEnd {
    /// `Finished`, `Failed` or `Cancelled`.
    pub state: JobState,
    /// In words.
    pub detail: String,
    /// The fault, when it failed.
    pub fault: Option<CoreFault>,
    /// Policy version at the end.
    pub policy_version: PolicyVersion,
    /// Steps done in this run and before it.
    pub steps_done: u64,
}
