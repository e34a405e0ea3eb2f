//! The gRPC services, a thin file each: check, translate, hand over to the scheduler.
//!
//! All share one port and one token. Nothing is decided here.

pub mod auth;
mod cluster;
mod jobs;
mod trajectories;

use std::future::Future;
use std::time::Duration;

use agentfly_proto::v1::cluster_server::ClusterServer;
use agentfly_proto::v1::jobs_server::JobsServer;
use agentfly_proto::v1::trajectories_server::TrajectoriesServer;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tonic::service::interceptor::InterceptedService;
use tonic::transport::server::TcpIncoming;

use crate::feed::Feeds;
use crate::journal::Journal;
use crate::scheduler::SchedulerHandle;
use crate::shelf::Shelf;

/// A session's first message must come within this.
const HELLO_DEADLINE: Duration = Duration::from_secs(10);
/// Largest message taken, bytes: a resolved configuration or a chunk is far smaller.
const MESSAGE_BYTES: usize = 16 << 20;

/// What the services work with.
#[derive(Clone)]
pub struct Services {
    /// The one that decides.
    pub scheduler: SchedulerHandle,
    /// What watchers read.
    pub journal: Journal,
    /// What watchers wait on.
    pub feeds: Feeds,
    /// Where shards lie.
    pub shelf: Shelf,
    /// The head, for `status`.
    pub identity: Identity,
    /// Ends the sessions.
    pub stop: CancellationToken,
    /// Asks the head to stop.
    pub stop_head: CancellationToken,
    /// Session tasks.
    pub tasks: TaskTracker,
}

/// Who this head is.
#[derive(Debug, Clone)]
pub struct Identity {
    /// gRPC address.
    pub address: String,
    /// HTTP address.
    pub http_address: String,
    /// When it began.
    pub began: tokio::time::Instant,
    /// What nodes are told about heartbeats.
    pub heartbeat: Duration,
    /// And about silence.
    pub lease: Duration,
}

/// Serves everything on `listener` until `services.stop`.
pub fn serve(
    listener: TcpListener,
    services: Services,
    token: &str,
) -> impl Future<Output = anyhow::Result<()>> + Send + 'static {
    let bearer = auth::Bearer::new(token);
    let stop = services.stop.clone();
    let cluster = ClusterServer::new(services.clone()).max_decoding_message_size(MESSAGE_BYTES);
    let trajectories = TrajectoriesServer::new(services.clone()).max_decoding_message_size(MESSAGE_BYTES);
    let jobs = JobsServer::new(services).max_decoding_message_size(MESSAGE_BYTES);
    let server = tonic::transport::Server::builder()
        .http2_keepalive_interval(Some(Duration::from_secs(10)))
        .http2_keepalive_timeout(Some(Duration::from_secs(20)))
        .add_service(InterceptedService::new(cluster, bearer.clone()))
        .add_service(InterceptedService::new(trajectories, bearer.clone()))
        .add_service(InterceptedService::new(jobs, bearer));
    async move {
        let incoming = TcpIncoming::from(listener).with_nodelay(Some(true));
        Ok(server.serve_with_incoming_shutdown(incoming, stop.cancelled_owned()).await?)
    }
}
