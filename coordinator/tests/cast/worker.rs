//! The fake node: joins, starts fake ranks as tasks, reports their exits, leaves when told.

use std::collections::HashMap;
use std::time::Duration;

use agentfly_coordinator::api::auth::ShowToken;
use agentfly_proto::v1::{self as pb, node_command, node_message};
use pb::cluster_client::ClusterClient;
use tokio::sync::mpsc;
use tokio::task::{AbortHandle, JoinHandle, JoinSet};
use tokio_stream::wrappers::ReceiverStream;
use tonic::service::interceptor::InterceptedService;
use tonic::transport::{Channel, Endpoint};

use super::rank::FakeRank;
use super::{DEADLINE, World};

pub(super) type Connection = InterceptedService<Channel, ShowToken>;

/// A node with CPU seats.
pub(crate) struct FakeWorker {
    task: JoinHandle<()>,
}

impl FakeWorker {
    /// Joins with `seats` CPU seats.
    pub(crate) async fn join(world: &World, seats: u32) -> Self {
        Self::start(world, seats, true).await
    }

    /// Its ranks prepare, but never answer a rollout.
    pub(crate) async fn join_without_generating(world: &World, seats: u32) -> Self {
        Self::start(world, seats, false).await
    }

    async fn start(world: &World, seats: u32, generates: bool) -> Self {
        let channel =
            Endpoint::from_shared(format!("http://{}", world.address())).unwrap().connect().await.unwrap();
        let connection = InterceptedService::new(channel, ShowToken::new(&world.token()).unwrap());
        let (said, outbound) = mpsc::channel(64);
        let devices = (0..seats).map(|index| pb::Device { kind: "cpu".into(), index }).collect();
        let hello = pb::NodeHello {
            node_id: "fake-node".into(),
            hostname: "localhost".into(),
            pid: std::process::id(),
            cpus: 2,
            memory_bytes: 1 << 30,
            devices,
            version: agentfly_coordinator::VERSION.into(),
            address: "127.0.0.1".into(),
        };
        say(&said, node_message::Kind::Hello(hello)).await;
        let mut cluster = ClusterClient::new(connection.clone());
        let session = cluster.node_session(ReceiverStream::new(outbound));
        let mut commands = tokio::time::timeout(DEADLINE, session).await.unwrap().unwrap().into_inner();
        let first = commands.message().await.unwrap().unwrap().kind;
        assert!(matches!(first, Some(node_command::Kind::Welcome(_))), "{first:?}");
        let mut node = Node { said, connection, generates, ranks: JoinSet::new(), running: HashMap::new() };
        let task = tokio::spawn(async move { node.live(&mut commands).await });
        Self { task }
    }

    /// Waits until it was told to leave; fails when one of its ranks failed.
    pub(crate) async fn has_left(self) {
        tokio::time::timeout(DEADLINE, self.task).await.expect("it was not told to leave").unwrap();
    }

    /// Its machine is gone.
    pub(crate) fn vanish(self) {
        self.task.abort();
    }
}

struct Node {
    said: mpsc::Sender<pb::NodeMessage>,
    connection: Connection,
    generates: bool,
    ranks: JoinSet<pb::RankId>,
    running: HashMap<(String, u32), AbortHandle>,
}

impl Node {
    async fn live(&mut self, commands: &mut tonic::Streaming<pb::NodeCommand>) {
        let mut beat = tokio::time::interval(Duration::from_secs(1));
        loop {
            tokio::select! {
                _ = beat.tick() => {
                    let beat = pb::NodeHeartbeat { memory_used_bytes: 1 << 20, load_1m: 0.5 };
                    say(&self.said, node_message::Kind::Heartbeat(beat)).await;
                }
                Some(ended) = self.ranks.join_next() => match ended {
                    Ok(rank) => self.exited(rank).await,
                    Err(error) => assert!(error.is_cancelled(), "{error}"),
                },
                command = commands.message() => match command {
                    Ok(Some(command)) => if self.obey(command.kind.unwrap()).await { return },
                    Ok(None) | Err(_) => return,
                },
            }
        }
    }

    /// Returns true when it is to leave.
    async fn obey(&mut self, command: node_command::Kind) -> bool {
        match command {
            node_command::Kind::StartRank(start) => {
                let id = start.rank.unwrap();
                assert!(start.log_file.ends_with(&format!("rank_{}.log", id.rank)), "{}", start.log_file);
                let rank = FakeRank::new(id.clone(), self.connection.clone(), self.generates);
                let seat = (id.job_id.clone(), id.rank);
                let task = self.ranks.spawn(async move {
                    rank.live().await;
                    id
                });
                self.running.insert(seat, task);
            }
            node_command::Kind::StopRanks(stop) => {
                let seats: Vec<_> =
                    self.running.keys().filter(|(job, _)| *job == stop.job_id).cloned().collect();
                for seat in seats {
                    self.running.remove(&seat).unwrap().abort();
                    let rank = pb::RankId { job_id: seat.0, rank: seat.1, incarnation: 1 };
                    self.exited(rank).await;
                }
            }
            node_command::Kind::Leave(_) => return true,
            node_command::Kind::Welcome(_) => panic!("a second welcome"),
        }
        false
    }

    async fn exited(&mut self, rank: pb::RankId) {
        self.running.remove(&(rank.job_id.clone(), rank.rank));
        let exited =
            pb::RankExited { rank: Some(rank), exit_code: Some(0), signal: None, log_tail: Vec::new() };
        say(&self.said, node_message::Kind::RankExited(exited)).await;
    }
}

/// A head that is gone hears nothing: that is the end of the story, not an error.
async fn say(said: &mpsc::Sender<pb::NodeMessage>, kind: node_message::Kind) {
    let _ = said.send(pb::NodeMessage { kind: Some(kind) }).await;
}
