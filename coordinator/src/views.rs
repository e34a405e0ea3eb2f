//! What `--json` and the HTTP API print: stable names, whatever the wire or the core call them.

use agentfly_proto::v1 as pb;
use serde::Serialize;

/// A head.
#[derive(Debug, Serialize)]
pub struct StatusView {
    /// False when no head runs; then the rest is empty.
    pub running: bool,
    /// Crate version.
    pub version: String,
    /// Process.
    pub pid: u32,
    /// gRPC, `host:port`.
    pub address: String,
    /// HTTP, `host:port`.
    pub http_address: String,
    /// Since it started.
    pub uptime_seconds: f64,
    /// Nodes with an open session.
    pub nodes_alive: u32,
    /// Jobs that wait.
    pub jobs_queued: u32,
    /// Jobs that run.
    pub jobs_running: u32,
    /// The first of those.
    pub running_job: Option<String>,
}

impl From<pb::StatusReply> for StatusView {
    fn from(s: pb::StatusReply) -> Self {
        Self {
            running: true,
            version: s.version,
            pid: s.pid,
            address: s.address,
            http_address: s.http_address,
            uptime_seconds: s.uptime_seconds,
            nodes_alive: s.nodes_alive,
            jobs_queued: s.jobs_queued,
            jobs_running: s.jobs_running,
            running_job: (!s.running_job.is_empty()).then_some(s.running_job),
        }
    }
}

impl StatusView {
    /// No head runs.
    #[must_use]
    pub fn none() -> Self {
        Self { running: false, version: crate::VERSION.to_owned(), ..Self::from(pb::StatusReply::default()) }
    }
}

/// A job.
#[derive(Debug, Serialize)]
pub struct JobView {
    /// Its name.
    pub job_id: String,
    /// queued, starting, running, stopping, finished, failed, cancelled.
    pub state: String,
    /// `trainer.project_name`.
    pub project: String,
    /// `trainer.experiment_name`.
    pub experiment: String,
    /// Training steps done.
    pub step: u64,
    /// Its last step.
    pub total_steps: u64,
    /// Ranks it runs on.
    pub ranks: u32,
    /// Seconds since 1970.
    pub submitted_unix_seconds: f64,
    /// Since it left the queue.
    pub seconds: f64,
    /// Its folder.
    pub run_dir: String,
    /// What it is doing, or why it ended.
    pub detail: String,
    /// `summary.json`, when it ended.
    pub summary: Option<serde_json::Value>,
    /// The resolved configuration; in `job show` only.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub config: Option<serde_json::Value>,
}

impl JobView {
    /// Without the configuration, for lists.
    #[must_use]
    pub fn brief(job: pb::JobInfo) -> Self {
        Self {
            job_id: job.job_id,
            state: job.state,
            project: job.project,
            experiment: job.experiment,
            step: job.step,
            total_steps: job.total_steps,
            ranks: job.ranks,
            submitted_unix_seconds: job.submitted_unix_seconds,
            seconds: job.seconds,
            run_dir: job.run_dir,
            detail: job.detail,
            summary: serde_json::from_str(&job.summary_json).ok(),
            config: None,
        }
    }

    /// With the configuration.
    #[must_use]
    pub fn full(job: pb::JobInfo) -> Self {
        let config = serde_json::from_str(&job.config_json).ok();
        Self { config, ..Self::brief(job) }
    }
}

/// A node.
#[derive(Debug, Serialize)]
pub struct NodeView {
    /// Its name.
    pub node_id: String,
    /// Its host.
    pub hostname: String,
    /// alive or lost.
    pub state: String,
    /// Cores.
    pub cpus: u32,
    /// Seats for CPU ranks.
    pub cpu_ranks: u32,
    /// GPUs.
    pub gpus: u32,
    /// Memory.
    pub memory_bytes: u64,
    /// Of which used.
    pub memory_used_bytes: u64,
    /// Since it was last heard.
    pub silent_seconds: f64,
    /// Ranks on it.
    pub ranks: Vec<RankView>,
}

/// A rank.
#[derive(Debug, Serialize)]
pub struct RankView {
    /// Its job.
    pub job_id: String,
    /// 0-based.
    pub rank: u32,
    /// Counts restarts.
    pub incarnation: u32,
    /// What it does.
    pub activity: String,
    /// For how long.
    pub activity_seconds: f64,
}

impl From<pb::NodeInfo> for NodeView {
    fn from(node: pb::NodeInfo) -> Self {
        let rank = |info: pb::RankInfo| {
            let rank = info.rank.unwrap_or_default();
            RankView {
                job_id: rank.job_id,
                rank: rank.rank,
                incarnation: rank.incarnation,
                activity: info.activity,
                activity_seconds: info.activity_seconds,
            }
        };
        Self {
            node_id: node.node_id,
            hostname: node.hostname,
            state: node.state,
            cpus: node.cpus,
            cpu_ranks: node.cpu_ranks,
            gpus: node.gpus,
            memory_bytes: node.memory_bytes,
            memory_used_bytes: node.memory_used_bytes,
            silent_seconds: node.silent_seconds,
            ranks: node.ranks.into_iter().map(rank).collect(),
        }
    }
}
