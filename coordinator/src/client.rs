//! A client of a running head: found by `head.json` or by an address, with the token.

use std::time::Duration;

use agentfly_proto::v1::{self as pb, jobs_client::JobsClient};
use tonic::service::interceptor::InterceptedService;
use tonic::transport::{Channel, Endpoint};

use crate::api::auth::ShowToken;
use crate::failure::{Failure, Outcome};
use crate::runtime_dir::{HeadFile, RuntimeDir};

/// To reach a head.
const CONNECT_DEADLINE: Duration = Duration::from_secs(5);
/// For an answer.
const ANSWER_DEADLINE: Duration = Duration::from_secs(120);
/// A job's summary and configuration come in one message.
const MESSAGE_BYTES: usize = 16 << 20;

/// The environment variable that holds the token of a head elsewhere.
pub const TOKEN: &str = "AGENTFLY_TOKEN";

/// A connection to a head.
#[derive(Clone)]
pub struct Client {
    jobs: JobsClient<InterceptedService<Channel, ShowToken>>,
}

impl Client {
    /// Connects to `address` (`host:port`).
    ///
    /// # Errors
    /// When nobody answers there.
    pub async fn connect(address: &str, token: &str) -> Outcome<Self> {
        let no_address = |e: &dyn std::fmt::Display| {
            Failure::operator(anyhow::anyhow!("{address} is no address of a head ({e}); write host:port"))
        };
        let endpoint = Endpoint::from_shared(format!("http://{address}")).map_err(|e| no_address(&e))?;
        let endpoint = endpoint.connect_timeout(CONNECT_DEADLINE).tcp_nodelay(true);
        let endpoint = endpoint
            .http2_keep_alive_interval(Duration::from_secs(10))
            .keep_alive_timeout(Duration::from_secs(20));
        let channel = endpoint.connect().await.map_err(|e| {
            let text =
                format!("no head answers at {address}; is it running? (`coordinator --head` starts one)");
            Failure::outside(anyhow::Error::from(e).context(text))
        })?;
        let show = ShowToken::new(token).map_err(|e| {
            Failure::operator(
                anyhow::Error::from(e).context("the token holds characters that no token of a head has"),
            )
        })?;
        let jobs = JobsClient::with_interceptor(channel, show).max_decoding_message_size(MESSAGE_BYTES);
        Ok(Self { jobs })
    }

    /// Connects to a head that was found.
    ///
    /// # Errors
    /// As [`Self::connect`].
    pub async fn to(head: &HeadFile) -> Outcome<Self> {
        Self::connect(&head.address, &head.token).await
    }

    /// Finds the head: at `address` with the token of `AGENTFLY_TOKEN`, or of `head.json` if that is the one; else
    /// the one of `head.json`. `None` when no head is running and none was named.
    ///
    /// # Errors
    /// When the runtime folder cannot be used or the head does not answer.
    pub async fn find(address: Option<&str>) -> Outcome<Option<Self>> {
        let known =
            RuntimeDir::from_environment().and_then(|dir| dir.running_head()).map_err(Failure::operator)?;
        let Some(address) = address else {
            return match known {
                Some(head) => Self::to(&head).await.map(Some),
                None => Ok(None),
            };
        };
        let of_known = known.filter(|head| head.address == address).map(|head| head.token);
        let token = std::env::var(TOKEN).ok().or(of_known).ok_or_else(|| {
            Failure::operator(anyhow::anyhow!(
                "the head at {address} wants its token; set {TOKEN} to the token in its head.json"
            ))
        })?;
        Self::connect(address, &token).await.map(Some)
    }

    /// Finds the head or says that there is none.
    ///
    /// # Errors
    /// As [`Self::find`], and when no head is running.
    pub async fn need(address: Option<&str>) -> Outcome<Self> {
        let none =
            || Failure::operator(anyhow::anyhow!("no head is running; start one with `coordinator --head`"));
        Self::find(address).await?.ok_or_else(none)
    }

    fn request<T>(message: T) -> tonic::Request<T> {
        let mut request = tonic::Request::new(message);
        request.set_timeout(ANSWER_DEADLINE);
        request
    }

    /// Queues a job. The head reads the data sets and every byte of a checkpoint that is resumed first, which
    /// takes as long as they are large: there is no deadline, and the connection's keep-alive notices a head that
    /// is gone.
    ///
    /// # Errors
    /// What the head says.
    pub async fn submit(&mut self, config_json: String, working_dir: String) -> Outcome<pb::JobInfo> {
        let request = pb::SubmitRequest { config_json, working_dir };
        Ok(self.jobs.submit(request).await?.into_inner())
    }

    /// All jobs, oldest first.
    ///
    /// # Errors
    /// What the head says.
    pub async fn list(&mut self) -> Outcome<Vec<pb::JobInfo>> {
        Ok(self.jobs.list(Self::request(pb::ListRequest {})).await?.into_inner().jobs)
    }

    /// One job.
    ///
    /// # Errors
    /// What the head says, also that there is no such job.
    pub async fn show(&mut self, job_id: String) -> Outcome<pb::JobInfo> {
        Ok(self.jobs.show(Self::request(pb::JobRef { job_id })).await?.into_inner())
    }

    /// Ends a job.
    ///
    /// # Errors
    /// What the head says, also that there is no such job.
    pub async fn cancel(&mut self, job_id: String) -> Outcome<pb::JobInfo> {
        Ok(self.jobs.cancel(Self::request(pb::JobRef { job_id })).await?.into_inner())
    }

    /// A job's events after `after_sequence`, then new ones until it ends. The stream has no deadline: the
    /// connection's keep-alive notices a head that is gone.
    ///
    /// # Errors
    /// What the head says.
    pub async fn watch(
        &mut self,
        job_id: String,
        after_sequence: u64,
    ) -> Outcome<tonic::Streaming<pb::JobEvent>> {
        Ok(self.jobs.watch(pb::WatchRequest { job_id, after_sequence }).await?.into_inner())
    }

    /// All nodes.
    ///
    /// # Errors
    /// What the head says.
    pub async fn nodes(&mut self) -> Outcome<Vec<pb::NodeInfo>> {
        Ok(self.jobs.nodes(Self::request(pb::NodesRequest {})).await?.into_inner().nodes)
    }

    /// The head.
    ///
    /// # Errors
    /// What the head says.
    pub async fn status(&mut self) -> Outcome<pb::StatusReply> {
        Ok(self.jobs.status(Self::request(pb::StatusRequest {})).await?.into_inner())
    }

    /// Asks the head to stop; it goes on stopping after it answered.
    ///
    /// # Errors
    /// What the head says.
    pub async fn shutdown(&mut self, why: &str) -> Outcome {
        let request = pb::ShutdownRequest { why: why.to_owned() };
        self.jobs.shutdown(Self::request(request)).await?;
        Ok(())
    }
}
