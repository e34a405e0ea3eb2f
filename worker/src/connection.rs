//! The way to the coordinator: dialling with retries, and the token on every call.
//!
//! Used by the node's and the ranks' sessions.

use std::net::UdpSocket;
use std::path::{Path, PathBuf};
use std::time::Duration;

use agentfly_common::secret::Secret;
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
        let mut told = false;
        let dialled = (|| endpoint.connect()).retry(attempts).notify(|error, _| {
            if !std::mem::replace(&mut told, true) {
                let seconds = DIAL_DEADLINE.as_secs();
                tracing::warn!("no coordinator answers at {address} yet ({error}); trying for {seconds} s");
            }
        });
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

/// The join token: of a file that was named (bare, or a head's `head.json`), else of the environment, else of
/// a head on this machine.
///
/// # Errors
/// The file that cannot be read; or that there is none, and where it was looked for.
pub fn join_token(file: Option<&Path>) -> anyhow::Result<Secret> {
    if let Some(file) = file {
        let text = std::fs::read_to_string(file)
            .with_context(|| format!("the token file {} cannot be read", file.display()))?;
        return Ok(token_in(&text));
    }
    if let Ok(token) = std::env::var("AGENTFLY_TOKEN") {
        return Ok(Secret::new(token));
    }
    let local = runtime_dir().join("head.json");
    std::fs::read_to_string(&local).map(|text| token_in(&text)).map_err(|_| {
        anyhow::anyhow!(
            "no join token: no head runs on this machine ({} is not there). On the head's machine that file holds \
             it; bring it here and give --token-file FILE, or set AGENTFLY_TOKEN",
            local.display()
        )
    })
}

/// A token, bare or as a head's file holds it.
fn token_in(text: &str) -> Secret {
    let head: Option<serde_json::Value> = serde_json::from_str(text).ok();
    let token = head.as_ref().and_then(|head| head.get("token")?.as_str());
    Secret::new(token.unwrap_or(text.trim()))
}

/// Where a head of this user keeps its file; the coordinator's `runtime_dir` says why these places.
fn runtime_dir() -> PathBuf {
    if let Some(dir) = std::env::var_os("AGENTFLY_RUNTIME_DIR") {
        return dir.into();
    }
    match std::env::var_os("XDG_RUNTIME_DIR") {
        Some(dir) => Path::new(&dir).join("agentfly"),
        None => PathBuf::from(format!("/tmp/agentfly-{}", rustix::process::getuid().as_raw())),
    }
}

/// The address of the interface that leads to the coordinator: where its other ranks can reach this machine.
///
/// # Errors
/// When there is no way to the coordinator's address.
pub fn own_address_towards(coordinator: &str) -> anyhow::Result<String> {
    // Connecting a UDP socket sends nothing; it only asks the kernel for the route.
    let route = UdpSocket::bind("0.0.0.0:0").and_then(|socket| {
        socket.connect(coordinator)?;
        socket.local_addr()
    });
    let local = route.with_context(|| format!("no route to {coordinator}; is it host:port?"))?;
    Ok(local.ip().to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_is_read_bare_or_from_a_heads_file() {
        assert_eq!(token_in("abc\n").expose(), "abc");
        assert_eq!(token_in(r#"{"pid": 1, "token": "xyz"}"#).expose(), "xyz");
    }

    #[test]
    fn the_way_to_a_local_head_is_the_loopback() {
        assert_eq!(own_address_towards("127.0.0.1:6379").unwrap(), "127.0.0.1");
        assert!(own_address_towards("nonsense").is_err());
    }
}
