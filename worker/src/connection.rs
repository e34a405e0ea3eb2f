//! The way to the coordinator: dialling with retries, and the token on every call.
//!
//! Used by the node's and the ranks' sessions.

use std::time::Duration;

use agentfly_proto::v1::{cluster_client::ClusterClient, trajectories_client::TrajectoriesClient};
use anyhow::Context as _;
use backon::{ExponentialBuilder, Retryable as _};
use tonic::metadata::{Ascii, MetadataValue};
use tonic::service::Interceptor;
use tonic::service::interceptor::InterceptedService;
use tonic::transport::{Channel, Endpoint};
use tonic::{Request, Status};

/// How long a worker keeps trying to reach a coordinator before it gives up.
pub const DIAL_DEADLINE: Duration = Duration::from_secs(30);
/// Largest message taken: a rollout shard carries its data rows.
const MESSAGE_BYTES: usize = 64 << 20;
/// How long one attempt may take.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// A peer that answers no HTTP/2 ping for this long is gone.
const KEEP_ALIVE: Duration = Duration::from_secs(10);

/// Puts `authorization: Bearer …` on each call.
#[derive(Clone)]
pub struct BearerToken(MetadataValue<Ascii>);

impl Interceptor for BearerToken {
    fn call(&mut self, mut request: Request<()>) -> Result<Request<()>, Status> {
        request.metadata_mut().insert("authorization", self.0.clone());
        Ok(request)
    }
}

/// A connection to a coordinator.
#[derive(Clone)]
pub struct Connection {
    channel: InterceptedService<Channel, BearerToken>,
    address: String,
}

impl Connection {
    /// Dials `address` (`host:port`) until it answers, at most [`DIAL_DEADLINE`].
    ///
    /// # Errors
    /// When the address is malformed or nothing answered in time; names the address and the last cause.
    pub async fn dial(address: &str, token: &str) -> anyhow::Result<Self> {
        let mut bearer: MetadataValue<Ascii> = format!("Bearer {token}")
            .parse()
            .context("the join token has characters a header cannot carry")?;
        bearer.set_sensitive(true);
        let endpoint = Endpoint::from_shared(format!("http://{address}"))
            .with_context(|| format!("{address} is not a host:port"))?
            .connect_timeout(CONNECT_TIMEOUT)
            .tcp_nodelay(true)
            .http2_keep_alive_interval(KEEP_ALIVE)
            .keep_alive_while_idle(true);
        let attempts = ExponentialBuilder::default()
            .with_min_delay(Duration::from_millis(50))
            .with_max_delay(Duration::from_secs(2))
            .without_max_times();
        let dialled = (|| endpoint.connect()).retry(attempts);
        let channel = match tokio::time::timeout(DIAL_DEADLINE, dialled).await {
            Ok(channel) => channel.with_context(|| format!("could not connect to {address}"))?,
            Err(_) => anyhow::bail!(
                "no coordinator answered at {address} within {} s; is `coordinator --head` running there?",
                DIAL_DEADLINE.as_secs()
            ),
        };
        let channel = InterceptedService::new(channel, BearerToken(bearer));
        Ok(Self { channel, address: address.to_owned() })
    }

    /// Where it leads.
    #[must_use]
    pub fn address(&self) -> &str {
        &self.address
    }

    /// Sessions.
    #[must_use]
    pub fn cluster(&self) -> ClusterClient<InterceptedService<Channel, BearerToken>> {
        ClusterClient::new(self.channel.clone()).max_decoding_message_size(MESSAGE_BYTES)
    }

    /// Trajectories up, training shards down.
    #[must_use]
    pub fn trajectories(&self) -> TrajectoriesClient<InterceptedService<Channel, BearerToken>> {
        TrajectoriesClient::new(self.channel.clone())
    }
}
