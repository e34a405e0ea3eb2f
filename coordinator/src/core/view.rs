//! Nodes and jobs as they are, for `status`, `nodes` and `jobs`. A copy: whoever holds one holds nothing up.

use std::time::Duration;

use agentfly_common::ids::PolicyVersion;

use super::event::{Device, JobId, JobState, Moment, NodeFacts, NodeId, RankId};
use super::fleet::{Fleet, Node};
use super::job::{Job, Rank};

/// Everything.
#[derive(Debug, Clone, Default)]
pub struct View {
    /// By name.
    pub nodes: Vec<NodeView>,
    /// Oldest first.
    pub jobs: Vec<JobView>,
}

/// One node.
#[derive(Debug, Clone)]
pub struct NodeView {
    /// Its name.
    pub node: NodeId,
    /// What it said of itself.
    pub facts: NodeFacts,
    /// Why it is lost; `None` while it lives.
    pub lost: Option<String>,
    /// Since it was last heard.
    pub silent: Duration,
    /// Ranks on it.
    pub ranks: Vec<RankView>,
}

/// One rank.
#[derive(Debug, Clone)]
pub struct RankView {
    /// Which.
    pub rank: RankId,
    /// Where.
    pub node: NodeId,
    /// On what.
    pub device: Device,
    /// What it last said it does; empty before it says anything.
    pub activity: String,
    /// For how long it has done that.
    pub activity_for: Duration,
}

/// One job.
#[derive(Debug, Clone)]
pub struct JobView {
    /// Which.
    pub job: JobId,
    /// Where it stands.
    pub state: JobState,
    /// What it is doing, or why it ended.
    pub detail: String,
    /// Steps done.
    pub steps_done: u64,
    /// Its last step.
    pub total_steps: u64,
    /// Weights all its ranks hold.
    pub policy_version: PolicyVersion,
    /// Ranks it has or will have.
    pub world_size: u32,
    /// Ranks it has now.
    pub ranks: Vec<RankView>,
}

pub(super) fn of<'a>(now: Moment, fleet: &Fleet, jobs: impl Iterator<Item = &'a Job>) -> View {
    let jobs: Vec<JobView> = jobs.map(|job| of_job(now, job)).collect();
    let nodes = fleet.nodes.iter().map(|(id, node)| of_node(now, id, node, &jobs)).collect();
    View { nodes, jobs }
}

fn of_node(now: Moment, id: &NodeId, node: &Node, jobs: &[JobView]) -> NodeView {
    let ranks = jobs.iter().flat_map(|job| &job.ranks).filter(|rank| rank.node == *id).cloned().collect();
    let silent = now.saturating_sub(node.heard);
    NodeView { node: id.clone(), facts: node.facts.clone(), lost: node.lost.clone(), silent, ranks }
}

fn of_job(now: Moment, job: &Job) -> JobView {
    JobView {
        job: job.id.clone(),
        state: job.state(),
        detail: job.detail(),
        steps_done: job.steps_done,
        total_steps: job.plan.total_steps,
        policy_version: job.policy_version,
        world_size: job.plan.world_size,
        ranks: job.living_ranks().map(|rank| of_rank(now, rank)).collect(),
    }
}

fn of_rank(now: Moment, rank: &Rank) -> RankView {
    let (activity, since) = rank.activity.clone().unwrap_or((String::new(), rank.heard));
    let activity_for = now.saturating_sub(since);
    RankView { rank: rank.id.clone(), node: rank.node.clone(), device: rank.device, activity, activity_for }
}
