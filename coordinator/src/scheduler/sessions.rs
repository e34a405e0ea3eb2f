//! Open sessions: who is connected, and their outboxes. What nodes and ranks *are* is the core's to know.
//!
//! Owned by the scheduler. Outboxes are bounded; what does not fit waits here for a while, in order, and a peer
//! that takes nothing for [`STUCK`] is given up: its stream is closed, which both sides notice.

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use agentfly_proto::v1 as pb;
use tokio::sync::mpsc;
use tonic::Status;

use crate::core::event::{Moment, NodeId, RankId};

/// Commands in a session's channel.
pub const OUTBOX: usize = 64;
/// Commands that wait behind a full channel.
const OVERFLOW: usize = 1024;
/// A peer that takes no command for so long is lost.
const STUCK: Duration = Duration::from_secs(10);

/// The sending end of a session.
pub type Outbox<T> = mpsc::Sender<Result<T, Status>>;

/// One open session.
#[derive(Debug)]
struct Peer<T> {
    /// Tells this session from an earlier one of the same node or rank.
    session: u64,
    outbox: Outbox<T>,
    waiting: VecDeque<T>,
    full_since: Option<Moment>,
}

impl<T> Peer<T> {
    fn new(session: u64, outbox: Outbox<T>) -> Self {
        Self { session, outbox, waiting: VecDeque::new(), full_since: None }
    }

    fn send(&mut self, now: Moment, command: T) {
        self.waiting.push_back(command);
        self.flush(now);
    }

    /// Moves what fits into the channel.
    fn flush(&mut self, now: Moment) {
        while let Some(command) = self.waiting.pop_front() {
            match self.outbox.try_send(Ok(command)) {
                Ok(()) => self.full_since = None,
                Err(mpsc::error::TrySendError::Full(Ok(command))) => {
                    self.waiting.push_front(command);
                    self.full_since.get_or_insert(now);
                    return;
                }
                // The session is closing; its end is reported by the one who reads it.
                Err(_) => return self.waiting.clear(),
            }
        }
        self.full_since = None;
    }

    fn is_stuck(&self, now: Moment) -> bool {
        self.waiting.len() > OVERFLOW
            || self.full_since.is_some_and(|since| now.saturating_sub(since) > STUCK)
    }
}

#[derive(Debug)]
struct Node {
    peer: Peer<pb::NodeCommand>,
    memory_used_bytes: u64,
}

/// Who is gone because they took no commands.
#[derive(Debug, PartialEq, Eq)]
pub enum Stuck {
    /// A node.
    Node(NodeId),
    /// A rank.
    Rank(RankId),
}

/// All open sessions.
#[derive(Debug, Default)]
pub struct Sessions {
    nodes: BTreeMap<NodeId, Node>,
    ranks: BTreeMap<RankId, Peer<pb::RankCommand>>,
    opened: u64,
}

impl Sessions {
    /// A node opened a session; an older one of the same node is closed. Returns the session's number.
    pub fn node_joined(&mut self, node: NodeId, outbox: Outbox<pb::NodeCommand>) -> u64 {
        self.opened += 1;
        self.nodes.insert(node, Node { peer: Peer::new(self.opened, outbox), memory_used_bytes: 0 });
        self.opened
    }

    /// A node was heard; false when this is not its open session.
    pub fn node_heard(&mut self, node: &str, session: u64, memory_used_bytes: Option<u64>) -> bool {
        let Some(found) = self.nodes.get_mut(node).filter(|found| found.peer.session == session) else {
            return false;
        };
        found.memory_used_bytes = memory_used_bytes.unwrap_or(found.memory_used_bytes);
        true
    }

    /// A node's session ended; false when this is not its open session, and then nothing changed.
    pub fn node_left(&mut self, node: &str, session: u64) -> bool {
        let open = self.nodes.get(node).is_some_and(|found| found.peer.session == session);
        if open {
            self.nodes.remove(node);
        }
        open
    }

    /// A rank opened a session.
    pub fn rank_joined(&mut self, rank: RankId, outbox: Outbox<pb::RankCommand>) -> u64 {
        self.opened += 1;
        self.ranks.insert(rank, Peer::new(self.opened, outbox));
        self.opened
    }

    /// A rank's session ended.
    pub fn rank_left(&mut self, rank: &RankId, session: u64) {
        if self.ranks.get(rank).is_some_and(|found| found.session == session) {
            self.ranks.remove(rank);
        }
    }

    /// Commands a node; false when it has no session.
    pub fn to_node(&mut self, now: Moment, node: &str, kind: pb::node_command::Kind) -> bool {
        let found = self.nodes.get_mut(node);
        found.map(|node| node.peer.send(now, pb::NodeCommand { kind: Some(kind) })).is_some()
    }

    /// Commands every node.
    pub fn to_all_nodes(&mut self, now: Moment, kind: &pb::node_command::Kind) {
        for node in self.nodes.values_mut() {
            node.peer.send(now, pb::NodeCommand { kind: Some(kind.clone()) });
        }
    }

    /// Commands a rank; false when it has no session.
    pub fn to_rank(&mut self, now: Moment, rank: &RankId, kind: pb::rank_command::Kind) -> bool {
        let found = self.ranks.get_mut(rank);
        found.map(|peer| peer.send(now, pb::RankCommand { kind: Some(kind) })).is_some()
    }

    /// Sends what waited, and closes the sessions of those who take nothing.
    pub fn tick(&mut self, now: Moment) -> Vec<Stuck> {
        self.nodes.values_mut().for_each(|node| node.peer.flush(now));
        self.ranks.values_mut().for_each(|peer| peer.flush(now));
        let nodes = self.nodes.iter().filter(|(_, node)| node.peer.is_stuck(now));
        let ranks = self.ranks.iter().filter(|(_, peer)| peer.is_stuck(now));
        let stuck: Vec<_> = nodes
            .map(|(name, _)| Stuck::Node(name.clone()))
            .chain(ranks.map(|(r, _)| Stuck::Rank(r.clone())))
            .collect();
        for gone in &stuck {
            match gone {
                Stuck::Node(name) => drop(self.nodes.remove(name)),
                Stuck::Rank(rank) => drop(self.ranks.remove(rank)),
            }
        }
        stuck
    }

    /// Nodes with an open session.
    #[must_use]
    pub fn nodes_alive(&self) -> usize {
        self.nodes.len()
    }

    /// Ranks with an open session.
    #[must_use]
    pub fn ranks_alive(&self) -> usize {
        self.ranks.len()
    }

    /// Memory in use on a node, as it last said.
    #[must_use]
    pub fn memory_used_bytes(&self, node: &str) -> u64 {
        self.nodes.get(node).map_or(0, |found| found.memory_used_bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use pb::node_command::Kind;

    fn leave(n: usize) -> Kind {
        Kind::Leave(pb::Leave { why: n.to_string() })
    }

    #[test]
    fn commands_keep_their_order_behind_a_full_outbox() {
        let mut sessions = Sessions::default();
        let (outbox, mut inbox) = mpsc::channel(2);
        sessions.node_joined("n".into(), outbox);
        for n in 0..5 {
            assert!(sessions.to_node(Moment::ZERO, "n", leave(n)));
        }
        let mut got = Vec::new();
        for second in 1..=3 {
            while let Ok(Ok(pb::NodeCommand { kind: Some(Kind::Leave(leave)) })) = inbox.try_recv() {
                got.push(leave.why);
            }
            assert_eq!(sessions.tick(Duration::from_secs(second)), []);
        }
        assert_eq!(got, ["0", "1", "2", "3", "4"]);
    }

    #[test]
    fn a_node_that_takes_nothing_is_given_up_and_its_stream_closed() {
        let mut sessions = Sessions::default();
        let (outbox, mut inbox) = mpsc::channel(1);
        let session = sessions.node_joined("n".into(), outbox);
        sessions.to_node(Moment::ZERO, "n", leave(0));
        sessions.to_node(Moment::ZERO, "n", leave(1));
        assert_eq!(sessions.tick(STUCK), []);
        assert_eq!(sessions.tick(STUCK + Duration::from_secs(1)), [Stuck::Node("n".into())]);
        assert!(inbox.try_recv().is_ok());
        assert_eq!(inbox.try_recv().unwrap_err(), mpsc::error::TryRecvError::Disconnected);
        assert!(!sessions.node_left("n", session), "it was reported once already");
        assert_eq!(sessions.nodes_alive(), 0);
    }

    #[test]
    fn the_end_of_an_older_session_does_not_touch_the_newer_one() {
        let mut sessions = Sessions::default();
        let open = |sessions: &mut Sessions| sessions.node_joined("n".into(), mpsc::channel(1).0);
        let (old, new) = (open(&mut sessions), open(&mut sessions));
        assert!(!sessions.node_left("n", old));
        assert!(!sessions.node_heard("n", old, None));
        assert!(sessions.node_heard("n", new, Some(7)));
        assert_eq!(sessions.nodes_alive(), 1);
        assert!(sessions.node_left("n", new));
        assert_eq!(sessions.nodes_alive(), 0);
    }
}
