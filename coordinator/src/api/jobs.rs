//! `Jobs`: for people and tools. Reads come from the journal, changes go to the scheduler.

use std::path::Path;

use agentfly_common::config::Config;
use agentfly_proto::v1::{self as pb, job_event, jobs_server::Jobs};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status};

use super::Services;
use crate::failure::Failure;
use crate::journal::JournalError;
use crate::submission::Proposal;

/// Events on their way to a watcher.
const EVENTS_AHEAD: usize = 64;
/// Events read from the journal at once.
const PAGE: u32 = 256;

fn failed(error: JournalError) -> Status {
    Status::from(&Failure::us(error))
}

async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Result<T, Status> {
    tokio::task::spawn_blocking(work).await.map_err(|e| Status::internal(e.to_string()))
}

impl Services {
    fn job(&self, id: &str) -> Result<pb::JobInfo, Status> {
        let unknown = || Status::not_found(format!("there is no job {id}; `coordinator jobs` lists them"));
        self.journal.job(id).map_err(failed)?.ok_or_else(unknown)
    }

    /// What the journal says of jobs, with what those that are open are doing right now.
    async fn live(&self, mut jobs: Vec<pb::JobInfo>) -> Vec<pb::JobInfo> {
        // A scheduler that has ended knows of no open job: the journal has the last word.
        let mut details = self.scheduler.details().await.unwrap_or_default();
        for job in &mut jobs {
            if let Some(detail) = details.remove(&job.job_id) {
                job.detail = detail;
            }
        }
        jobs
    }

    /// All jobs, for gRPC and HTTP.
    pub async fn job_list(&self) -> Result<Vec<pb::JobInfo>, JournalError> {
        Ok(self.live(self.journal.jobs()?).await)
    }

    /// Status of this head, for gRPC and HTTP.
    pub fn status_reply(&self) -> Result<pb::StatusReply, JournalError> {
        let jobs = self.journal.jobs()?;
        let queued = jobs.iter().filter(|job| job.state == "queued").count();
        let running: Vec<_> = jobs.iter().filter(|job| is_running(&job.state)).collect();
        Ok(pb::StatusReply {
            version: crate::VERSION.to_owned(),
            pid: std::process::id(),
            address: self.identity.address.clone(),
            http_address: self.identity.http_address.clone(),
            uptime_seconds: self.identity.began.elapsed().as_secs_f64(),
            nodes_alive: u32::try_from(self.scheduler.nodes_alive()).unwrap_or(u32::MAX),
            jobs_queued: u32::try_from(queued).unwrap_or(u32::MAX),
            jobs_running: u32::try_from(running.len()).unwrap_or(u32::MAX),
            running_job: running.first().map(|job| job.job_id.clone()).unwrap_or_default(),
        })
    }
}

fn is_running(state: &str) -> bool {
    matches!(state, "starting" | "running" | "stopping")
}

#[tonic::async_trait]
impl Jobs for Services {
    type WatchStream = ReceiverStream<Result<pb::JobEvent, Status>>;

    async fn submit(&self, request: Request<pb::SubmitRequest>) -> Result<Response<pb::JobInfo>, Status> {
        let pb::SubmitRequest { config_json, working_dir } = request.into_inner();
        let config: Config = serde_json::from_str(&config_json)
            .map_err(|e| Status::invalid_argument(format!("the job's configuration cannot be read: {e}")))?;
        let refused = |failure: Failure| Status::from(&failure);
        let checked = blocking(move || Proposal::check(config, Path::new(&working_dir)));
        let proposal = checked.await?.map_err(refused)?;
        self.scheduler.may_submit(proposal.spec().clone()).await.map_err(refused)?;
        let submission = blocking(move || proposal.open()).await?.map_err(refused)?;
        let id = self.scheduler.submit(submission).await.map_err(refused)?;
        Ok(Response::new(self.job(&id)?))
    }

    async fn list(&self, _: Request<pb::ListRequest>) -> Result<Response<pb::ListReply>, Status> {
        Ok(Response::new(pb::ListReply { jobs: self.job_list().await.map_err(failed)? }))
    }

    async fn show(&self, request: Request<pb::JobRef>) -> Result<Response<pb::JobInfo>, Status> {
        let job = self.job(&request.into_inner().job_id)?;
        self.live(vec![job]).await.pop().map(Response::new).ok_or_else(|| Status::internal("a job vanished"))
    }

    async fn watch(&self, request: Request<pb::WatchRequest>) -> Result<Response<Self::WatchStream>, Status> {
        let pb::WatchRequest { job_id, after_sequence } = request.into_inner();
        self.job(&job_id)?;
        let (out, stream) = mpsc::channel(EVENTS_AHEAD);
        let services = self.clone();
        self.tasks.spawn(async move {
            tokio::select! {
                () = services.stop.cancelled() => {}
                () = out.closed() => {}
                result = pump(&services, &job_id, after_sequence, &out) => {
                    if let Err(error) = result {
                        // A watcher that is gone needs no error.
                        let _ = out.send(Err(failed(error))).await;
                    }
                }
            }
        });
        Ok(Response::new(ReceiverStream::new(stream)))
    }

    async fn cancel(&self, request: Request<pb::JobRef>) -> Result<Response<pb::JobInfo>, Status> {
        let id = request.into_inner().job_id;
        self.job(&id)?;
        self.scheduler.cancel(id.clone(), "by its user".to_owned()).await?;
        Ok(Response::new(self.job(&id)?))
    }

    async fn nodes(&self, _: Request<pb::NodesRequest>) -> Result<Response<pb::NodesReply>, Status> {
        Ok(Response::new(pb::NodesReply { nodes: self.scheduler.nodes().await? }))
    }

    async fn status(&self, _: Request<pb::StatusRequest>) -> Result<Response<pb::StatusReply>, Status> {
        self.status_reply().map(Response::new).map_err(failed)
    }

    async fn shutdown(
        &self,
        request: Request<pb::ShutdownRequest>,
    ) -> Result<Response<pb::ShutdownReply>, Status> {
        tracing::info!(why = request.into_inner().why, "asked to stop");
        self.stop_head.cancel();
        Ok(Response::new(pb::ShutdownReply {}))
    }
}

/// Sends a job's events from the journal, then new ones as they are appended, until the last.
async fn pump(
    services: &Services,
    job: &str,
    mut after: u64,
    out: &mpsc::Sender<Result<pb::JobEvent, Status>>,
) -> Result<(), JournalError> {
    let mut feed = services.feeds.watch(job);
    let mut progress_seen = 0;
    loop {
        loop {
            let events = services.journal.events_after(job, after, PAGE)?;
            if events.is_empty() {
                break;
            }
            for event in events {
                after = event.sequence;
                let last = matches!(event.kind, Some(job_event::Kind::Ended(_)));
                if out.send(Ok(event)).await.is_err() || last {
                    return Ok(());
                }
            }
        }
        let Some(marks) = &mut feed else { return Ok(()) };
        let news = marks.wait_for(|m| m.sequence > after || m.progress_count > progress_seen || m.over).await;
        // The feed is closed after the last event is in the journal: read once more.
        let Ok(mark) = news.map(|mark| mark.clone()) else {
            feed = None;
            continue;
        };
        if mark.over {
            feed = None;
            continue;
        }
        if mark.progress_count > progress_seen {
            progress_seen = mark.progress_count;
            let kind = mark.progress.map(job_event::Kind::Progress);
            // Progress is not in the journal: it carries the number of the event before it.
            let event = pb::JobEvent { sequence: after, unix_seconds: crate::clock::unix_seconds(), kind };
            if out.send(Ok(event)).await.is_err() {
                return Ok(());
            }
        }
    }
}
