//! The scheduler's handle: what sessions, people and the stopping head may ask of it. Hides the channel.

use std::collections::BTreeMap;

use agentfly_common::telemetry::spans::Gathered;
use agentfly_common::trajectory::Trajectory;
use agentfly_proto::v1 as pb;
use tokio::sync::{mpsc, oneshot, watch};

use super::sessions::Outbox;
use crate::core::event::{Event, JobId, JobSpec, NodeFacts, NodeId, RankId};
use crate::failure::{Failure, Outcome};
use crate::submission::Submission;

/// What the scheduler is told.
pub(super) enum Message {
    NodeJoined {
        node: NodeId,
        facts: NodeFacts,
        outbox: Outbox<pb::NodeCommand>,
        reply: oneshot::Sender<u64>,
    },
    NodeHeard {
        node: NodeId,
        session: u64,
        memory_used_bytes: u64,
    },
    NodeLeft {
        node: NodeId,
        session: u64,
        cause: String,
    },
    RankJoined {
        rank: RankId,
        outbox: Outbox<pb::RankCommand>,
        reply: oneshot::Sender<Result<u64, String>>,
    },
    RankLeft {
        rank: RankId,
        session: u64,
    },
    Said(Box<Event>),
    Traced {
        rank: RankId,
        gathered: Gathered,
    },
    Uploaded {
        rank: RankId,
        shard: u64,
        trajectory: Box<Trajectory>,
        taken: oneshot::Sender<bool>,
    },
    MaySubmit {
        spec: Box<JobSpec>,
        reply: oneshot::Sender<Outcome>,
    },
    Submit {
        submission: Box<Submission>,
        reply: oneshot::Sender<Outcome<JobId>>,
    },
    Cancel {
        job: JobId,
        why: String,
        reply: oneshot::Sender<bool>,
    },
    /// What each open job is doing.
    Details(oneshot::Sender<BTreeMap<JobId, String>>),
    Nodes(oneshot::Sender<Vec<pb::NodeInfo>>),
    Drain {
        why: String,
        done: oneshot::Sender<()>,
    },
    Dismiss {
        why: String,
    },
}

/// The scheduler has ended.
#[derive(Debug, Clone, Copy, thiserror::Error)]
#[error("the head is stopping")]
pub struct Gone;

impl From<Gone> for tonic::Status {
    fn from(gone: Gone) -> Self {
        Self::unavailable(gone.to_string())
    }
}

/// A cheap handle to the scheduler.
#[derive(Clone)]
pub struct SchedulerHandle {
    inbox: mpsc::Sender<Message>,
    nodes_alive: watch::Receiver<usize>,
}

impl SchedulerHandle {
    pub(super) fn new(inbox: mpsc::Sender<Message>, nodes_alive: watch::Receiver<usize>) -> Self {
        Self { inbox, nodes_alive }
    }

    async fn tell(&self, message: Message) -> Result<(), Gone> {
        self.inbox.send(message).await.map_err(|_| Gone)
    }

    async fn ask<T>(&self, message: impl FnOnce(oneshot::Sender<T>) -> Message) -> Result<T, Gone> {
        let (reply, answer) = oneshot::channel();
        self.tell(message(reply)).await?;
        answer.await.map_err(|_| Gone)
    }

    /// A node opened a session; returns its number.
    ///
    /// # Errors
    /// When the head is stopping.
    pub async fn node_joined(
        &self,
        node: NodeId,
        facts: NodeFacts,
        outbox: Outbox<pb::NodeCommand>,
    ) -> Result<u64, Gone> {
        self.ask(|reply| Message::NodeJoined { node, facts, outbox, reply }).await
    }

    /// A node's heartbeat.
    ///
    /// # Errors
    /// When the head is stopping.
    pub async fn node_heard(&self, node: NodeId, session: u64, memory_used_bytes: u64) -> Result<(), Gone> {
        self.tell(Message::NodeHeard { node, session, memory_used_bytes }).await
    }

    /// A node's session ended.
    ///
    /// # Errors
    /// When the head is stopping.
    pub async fn node_left(&self, node: NodeId, session: u64, cause: String) -> Result<(), Gone> {
        self.tell(Message::NodeLeft { node, session, cause }).await
    }

    /// A rank opened a session; returns its number, or why it may not.
    ///
    /// # Errors
    /// When the head is stopping.
    pub async fn rank_joined(
        &self,
        rank: RankId,
        outbox: Outbox<pb::RankCommand>,
    ) -> Result<Result<u64, String>, Gone> {
        self.ask(|reply| Message::RankJoined { rank, outbox, reply }).await
    }

    /// A rank's session ended.
    ///
    /// # Errors
    /// When the head is stopping.
    pub async fn rank_left(&self, rank: RankId, session: u64) -> Result<(), Gone> {
        self.tell(Message::RankLeft { rank, session }).await
    }

    /// A fact about a rank.
    ///
    /// # Errors
    /// When the head is stopping.
    pub async fn said(&self, event: Event) -> Result<(), Gone> {
        self.tell(Message::Said(Box::new(event))).await
    }

    /// What a rank did, for the trace of its job.
    ///
    /// # Errors
    /// When the head is stopping.
    pub async fn traced(&self, rank: RankId, gathered: Gathered) -> Result<(), Gone> {
        self.tell(Message::Traced { rank, gathered }).await
    }

    /// A chain arrived. Returns when it was taken: whether it was there already.
    ///
    /// # Errors
    /// When the head is stopping.
    pub async fn uploaded(&self, rank: RankId, shard: u64, trajectory: Trajectory) -> Result<bool, Gone> {
        let trajectory = Box::new(trajectory);
        self.ask(|taken| Message::Uploaded { rank, shard, trajectory, taken }).await
    }

    /// Whether a job would be taken now, before its folder is opened.
    ///
    /// # Errors
    /// Why not: the head is stopping, too many jobs are open, or the cluster could never hold it.
    pub async fn may_submit(&self, spec: JobSpec) -> Outcome {
        let spec = Box::new(spec);
        self.ask(|reply| Message::MaySubmit { spec, reply }).await.map_err(Failure::outside)?
    }

    /// Queues a job.
    ///
    /// # Errors
    /// When it cannot run here, or the head is stopping.
    pub async fn submit(&self, submission: Submission) -> Outcome<JobId> {
        let submission = Box::new(submission);
        self.ask(|reply| Message::Submit { submission, reply }).await.map_err(Failure::outside)?
    }

    /// Cancels a job; false when no such job is open.
    ///
    /// # Errors
    /// When the head is stopping.
    pub async fn cancel(&self, job: JobId, why: String) -> Result<bool, Gone> {
        self.ask(|reply| Message::Cancel { job, why, reply }).await
    }

    /// What each open job is doing right now, in words.
    ///
    /// # Errors
    /// When the head is stopping.
    pub async fn details(&self) -> Result<BTreeMap<JobId, String>, Gone> {
        self.ask(Message::Details).await
    }

    /// All nodes, for people.
    ///
    /// # Errors
    /// When the head is stopping.
    pub async fn nodes(&self) -> Result<Vec<pb::NodeInfo>, Gone> {
        self.ask(Message::Nodes).await
    }

    /// Cancels all jobs, takes no new ones, and returns when none is left.
    ///
    /// # Errors
    /// When the scheduler has ended already.
    pub async fn drain(&self, why: String) -> Result<(), Gone> {
        self.ask(|done| Message::Drain { why, done }).await
    }

    /// Tells all nodes to leave.
    ///
    /// # Errors
    /// When the scheduler has ended already.
    pub async fn dismiss(&self, why: String) -> Result<(), Gone> {
        self.tell(Message::Dismiss { why }).await
    }

    /// Returns when at least `count` nodes are there.
    ///
    /// # Errors
    /// When the head is stopping.
    pub async fn until_nodes(&self, count: usize) -> Result<(), Gone> {
        self.nodes_alive.clone().wait_for(|&alive| alive >= count).await.map(drop).map_err(|_| Gone)
    }

    /// Returns when no node is left.
    ///
    /// # Errors
    /// When the scheduler has ended already.
    pub async fn until_no_nodes(&self) -> Result<(), Gone> {
        self.nodes_alive.clone().wait_for(|&alive| alive == 0).await.map(drop).map_err(|_| Gone)
    }

    /// Nodes with an open session.
    #[must_use]
    pub fn nodes_alive(&self) -> usize {
        *self.nodes_alive.borrow()
    }
}
