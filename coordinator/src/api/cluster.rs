//! `Cluster`: the sessions of nodes and ranks. The first message says who it is; then reports go to the
//! scheduler and commands come from it.

use agentfly_common::telemetry::names;
use agentfly_common::wire::{gathered_from, unix_micros};
use agentfly_proto::v1::{self as pb, cluster_server::Cluster, node_message, rank_message};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};

use super::{HELLO_DEADLINE, Services};
use crate::core::event::{Event, RankId};
use crate::scheduler::sessions::OUTBOX;
use crate::scheduler::{SchedulerHandle, wire};

#[tonic::async_trait]
impl Cluster for Services {
    type NodeSessionStream = ReceiverStream<Result<pb::NodeCommand, Status>>;
    type RankSessionStream = ReceiverStream<Result<pb::RankCommand, Status>>;

    async fn node_session(
        &self,
        request: Request<Streaming<pb::NodeMessage>>,
    ) -> Result<Response<Self::NodeSessionStream>, Status> {
        let mut inbound = request.into_inner();
        let Some(node_message::Kind::Hello(hello)) = first(&mut inbound).await?.kind else {
            return Err(Status::invalid_argument("the first message of a node's session must be NodeHello"));
        };
        if hello.version != crate::VERSION {
            return Err(Status::failed_precondition(format!(
                "node {} runs version {}, this head {}; install the same version on both",
                hello.node_id,
                hello.version,
                crate::VERSION
            )));
        }
        let facts = wire::facts_from(&hello).map_err(Status::invalid_argument)?;
        let (outbox, commands) = mpsc::channel(OUTBOX);
        let welcome = pb::Welcome {
            heartbeat_seconds: self.identity.heartbeat.as_secs_f64(),
            lease_seconds: self.identity.lease.as_secs_f64(),
        };
        let welcome = pb::NodeCommand { kind: Some(pb::node_command::Kind::Welcome(welcome)) };
        outbox.send(Ok(welcome)).await.map_err(|_| Status::internal("a new channel is closed"))?;
        tracing::info!(
            node = hello.node_id,
            host = hello.hostname,
            devices = hello.devices.len(),
            "a node joined"
        );
        let session = self.scheduler.node_joined(hello.node_id.clone(), facts, outbox).await?;
        let (scheduler, stop, node) = (self.scheduler.clone(), self.stop.clone(), hello.node_id);
        self.tasks.spawn(async move {
            let reading = read_node(&mut inbound, &scheduler, &node, session);
            let cause =
                stop.run_until_cancelled(reading).await.unwrap_or_else(|| "the head is stopping".to_owned());
            tracing::info!(node, cause, "a node's session ended");
            // One way out, however it ended; a scheduler that is gone needs no telling.
            let _ = scheduler.node_left(node, session, cause).await;
        });
        Ok(Response::new(ReceiverStream::new(commands)))
    }

    async fn rank_session(
        &self,
        request: Request<Streaming<pb::RankMessage>>,
    ) -> Result<Response<Self::RankSessionStream>, Status> {
        let mut inbound = request.into_inner();
        let Some(rank_message::Kind::Hello(pb::RankHello { rank: Some(rank), .. })) =
            first(&mut inbound).await?.kind
        else {
            return Err(Status::invalid_argument("the first message of a rank's session must be RankHello"));
        };
        let rank = wire::rank_from(rank);
        let (outbox, commands) = mpsc::channel(OUTBOX);
        let session =
            self.scheduler.rank_joined(rank.clone(), outbox).await?.map_err(Status::failed_precondition)?;
        let (scheduler, stop) = (self.scheduler.clone(), self.stop.clone());
        self.tasks.spawn(async move {
            stop.run_until_cancelled(read_rank(&mut inbound, &scheduler, &rank)).await;
            let _ = scheduler.rank_left(rank, session).await;
        });
        Ok(Response::new(ReceiverStream::new(commands)))
    }
}

/// The first message of a session, within [`HELLO_DEADLINE`].
async fn first<T>(inbound: &mut Streaming<T>) -> Result<T, Status> {
    let late = || Status::deadline_exceeded(format!("no first message within {HELLO_DEADLINE:?}"));
    let message = tokio::time::timeout(HELLO_DEADLINE, inbound.message()).await.map_err(|_| late())??;
    message.ok_or_else(|| Status::invalid_argument("the session ended before its first message"))
}

/// Passes on what a node says; returns why its session ended.
async fn read_node(
    inbound: &mut Streaming<pb::NodeMessage>,
    scheduler: &SchedulerHandle,
    node: &str,
    session: u64,
) -> String {
    loop {
        let kind = match inbound.message().await {
            Ok(Some(message)) => message.kind,
            Ok(None) => return "it left".to_owned(),
            Err(status) => return format!("its connection broke: {}", status.message()),
        };
        let told = match kind {
            Some(node_message::Kind::Heartbeat(beat)) => {
                scheduler.node_heard(node.to_owned(), session, beat.memory_used_bytes).await
            }
            Some(node_message::Kind::RankExited(exited)) => match exited.rank.clone() {
                Some(rank) => {
                    let cause = wire::exit_cause(&exited);
                    scheduler.said(Event::RankExited { rank: wire::rank_from(rank), cause }).await
                }
                None => return "it reported the exit of a rank without naming it".to_owned(),
            },
            Some(node_message::Kind::Hello(_)) | None => return "it sent a message out of place".to_owned(),
        };
        if told.is_err() {
            return "the head is stopping".to_owned();
        }
    }
}

/// Passes on what a rank says until its session ends.
async fn read_rank(inbound: &mut Streaming<pb::RankMessage>, scheduler: &SchedulerHandle, rank: &RankId) {
    let mut isolation = None;
    loop {
        match inbound.message().await {
            Ok(Some(pb::RankMessage { kind: Some(rank_message::Kind::Spans(spans)) })) => {
                let gathered = gathered_from(spans, unix_micros());
                if scheduler.traced(rank.clone(), gathered).await.is_err() {
                    return;
                }
            }
            Ok(Some(pb::RankMessage { kind: Some(kind) })) => {
                if let rank_message::Kind::Ready(ready) = &kind {
                    isolation.get_or_insert_with(|| Isolation::counted(&ready.sandbox_tier));
                }
                let Some(event) = rank_event(rank.clone(), kind) else {
                    return tracing::warn!(?rank, "a rank sent a message out of place");
                };
                if scheduler.said(event).await.is_err() {
                    return;
                }
            }
            Ok(Some(pb::RankMessage { kind: None })) => {
                return tracing::warn!(?rank, "a rank sent an empty message");
            }
            Ok(None) => return,
            Err(status) => return tracing::debug!(?rank, "a rank's connection broke: {}", status.message()),
        }
    }
}

/// A ready rank in the gauge of how ranks isolate code, for as long as its session lasts.
struct Isolation(metrics::Gauge);

impl Isolation {
    fn counted(tier: &str) -> Self {
        // A label's values are few and fixed, whatever a rank sends.
        let known = ["root", "user_namespaces", "landlock"].into_iter().find(|known| *known == tier);
        let gauge = metrics::gauge!(names::SANDBOX_RANKS, "tier" => known.unwrap_or("unknown"));
        gauge.increment(1.0);
        Self(gauge)
    }
}

impl Drop for Isolation {
    fn drop(&mut self) {
        self.0.decrement(1.0);
    }
}

/// What a rank said, as an event; `None` for a second hello, a port that is none, and spans, which are no fact.
fn rank_event(rank: RankId, kind: rank_message::Kind) -> Option<Event> {
    use rank_message::Kind;
    Some(match kind {
        Kind::Hello(_) | Kind::Spans(_) => return None,
        Kind::Heartbeat(beat) => {
            Event::RankHeard { rank, activity: beat.activity, activity_seconds: beat.activity_seconds }
        }
        Kind::StoreOpened(store) => {
            Event::StoreOpened { rank, host: store.host, port: u16::try_from(store.port).ok()? }
        }
        Kind::Ready(ready) => Event::RankReady {
            rank,
            policy_version: agentfly_common::ids::PolicyVersion(ready.policy_version),
            weights_hash: ready.weights_hash,
        },
        Kind::RolloutDone(done) => {
            Event::RolloutDone { rank, shard: done.shard_id, metrics: done.metrics.into_iter().collect() }
        }
        Kind::TrainDone(done) => Event::TrainDone {
            rank,
            step: done.step,
            policy_version: agentfly_common::ids::PolicyVersion(done.policy_version),
            weights_hash: done.weights_hash,
            metrics: done.metrics.into_iter().collect(),
        },
        Kind::CheckpointWritten(written) => {
            Event::CheckpointWritten { rank, step: written.step, files: written.files }
        }
        Kind::Failed(fault) => Event::RankFailed { rank, fault: wire::fault_from(fault) },
    })
}
