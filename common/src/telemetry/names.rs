//! Every metric of `/metrics`: its name, its kind, and what it means, in this one file.
//!
//! Names are `agentfly_<part>_<what>[_<unit>][_total]`, seconds and bytes only. Labels are small fixed sets,
//! never a job, a chain or an error text. `describe` is called once, when a program installs its recorder.
//! The figures of a training step keep verl's names in `metrics.jsonl`; here they are gauges of the newest step.

use metrics::{Unit, describe_counter, describe_gauge, describe_histogram};

/// Nodes whose session is open.
pub const NODES_ALIVE: &str = "agentfly_cluster_nodes_alive";
/// Ranks whose session is open.
pub const RANKS_ALIVE: &str = "agentfly_cluster_ranks_alive";
/// Ranks that are ready and run code, by how they isolate it. Label `tier`: root, user_namespaces, landlock.
pub const SANDBOX_RANKS: &str = "agentfly_cluster_sandbox_ranks";
/// Node sessions that ended, whatever the reason.
pub const NODES_LEFT: &str = "agentfly_cluster_nodes_left_total";
/// Calls refused for a missing or wrong token.
pub const CALLS_REFUSED: &str = "agentfly_api_calls_refused_total";
/// Jobs not yet over. Label `state`: queued, running.
pub const JOBS: &str = "agentfly_jobs_open";
/// Jobs that ended. Label `state`: finished, failed, cancelled.
pub const JOBS_ENDED: &str = "agentfly_jobs_ended_total";
/// Chains received. Label `purpose`: train, validation.
pub const TRAJECTORIES: &str = "agentfly_trajectories_received_total";
/// Tokens of the chains received. Label `purpose`.
pub const TRAJECTORY_TOKENS: &str = "agentfly_trajectories_tokens_total";
/// Chains that ended by a fault of the machinery and are run again.
pub const TRAJECTORY_FAULTS: &str = "agentfly_trajectories_infrastructure_faults_total";
/// Seconds from a chain's start to its end.
pub const CHAIN_SECONDS: &str = "agentfly_trajectories_chain_duration_seconds";
/// The running job's newest finished step.
pub const STEP: &str = "agentfly_training_step";
/// Mean reward of that step.
pub const REWARD: &str = "agentfly_training_reward_mean";
/// Newest validation accuracy.
pub const VALIDATION: &str = "agentfly_training_validation_accuracy";
/// Seconds a training step took.
pub const STEP_SECONDS: &str = "agentfly_training_step_duration_seconds";
/// Checkpoints committed.
pub const CHECKPOINTS: &str = "agentfly_checkpoints_committed_total";
/// Seconds from the last rank's file to the rename.
pub const COMMIT_SECONDS: &str = "agentfly_checkpoints_commit_duration_seconds";
/// Events the scheduler has taken.
pub const EVENTS: &str = "agentfly_scheduler_events_total";
/// Seconds the scheduler spends on one event, its decisions included.
pub const EVENT_SECONDS: &str = "agentfly_scheduler_event_duration_seconds";
/// Metric lines a sink could not write.
pub const SINK_FAILURES: &str = "agentfly_sinks_failures_total";

/// Tells the recorder what each metric is.
pub fn describe() {
    describe_gauge!(NODES_ALIVE, "Nodes whose session is open");
    describe_gauge!(RANKS_ALIVE, "Ranks whose session is open");
    describe_gauge!(SANDBOX_RANKS, "Ready ranks by how they isolate code (root, user_namespaces, landlock)");
    describe_counter!(NODES_LEFT, "Node sessions that ended, whatever the reason");
    describe_counter!(CALLS_REFUSED, "gRPC calls refused for a missing or wrong token");
    describe_gauge!(JOBS, "Jobs not yet over, by state (queued, running)");
    describe_counter!(JOBS_ENDED, "Jobs that ended, by state (finished, failed, cancelled)");
    describe_counter!(TRAJECTORIES, "Chains received, by purpose (train, validation)");
    describe_counter!(TRAJECTORY_TOKENS, "Tokens of the chains received, by purpose");
    describe_counter!(TRAJECTORY_FAULTS, "Chains that ended by a fault of the machinery and are run again");
    describe_histogram!(CHAIN_SECONDS, Unit::Seconds, "From a chain's start to its end");
    describe_gauge!(STEP, "Newest finished step of the running job");
    describe_gauge!(REWARD, "Mean reward of the newest finished step");
    describe_gauge!(VALIDATION, "Newest validation accuracy (mean@1)");
    describe_histogram!(STEP_SECONDS, Unit::Seconds, "Time of a training step, all phases");
    describe_counter!(CHECKPOINTS, "Checkpoints committed");
    describe_histogram!(COMMIT_SECONDS, Unit::Seconds, "Hashing, syncing and renaming a checkpoint");
    describe_counter!(EVENTS, "Events the scheduler has taken");
    describe_histogram!(EVENT_SECONDS, Unit::Seconds, "Time of one event, its decisions included");
    describe_counter!(SINK_FAILURES, "Metric lines that a sink could not write");
}
