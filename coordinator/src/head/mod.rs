//! The head: builds the parts, waits for its own worker, and stops everything in phases.
//!
//! Started by `coordinator --head` and, for the length of one job, by `coordinator train`.
//!
//! # Invariants
//! - **H1** `head.json` is written last: who finds it finds a head that answers.
//! - **H2** However it ends, its worker is gone, its ports are free and its `head.json` is removed.

mod local_worker;

use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use agentfly_common::shutdown::{self, CancellationToken, TaskTracker};
use agentfly_proto::v1 as pb;
use tokio::net::TcpListener;

use crate::api::{self, Identity, Services};
use crate::client::Client;
use crate::core::CoreSettings;
use crate::failure::{Failure, Outcome};
use crate::feed::Feeds;
use crate::http;
use crate::journal::{Journal, JournalError};
use crate::runtime_dir::{HeadFile, RuntimeDir, new_token};
use crate::scheduler::{Parts, Scheduler, SchedulerHandle};
use crate::shelf::Shelf;
use crate::submission::after_the_head_died;

use local_worker::LocalWorker;
pub use local_worker::{Devices, WorkerOptions};

/// Its own worker must have joined within this: it looks at its devices and warms its sandbox first.
const WORKER_JOINS: Duration = Duration::from_secs(60);
/// Jobs get so long to end when the head stops, …
const DRAIN: Duration = Duration::from_secs(10);
/// … nodes so long to leave, …
const LEAVE: Duration = Duration::from_secs(4);
/// … and the tasks of a phase so long to end.
const PHASE: Duration = Duration::from_secs(3);
/// Five may be lost before a node is.
const HEARTBEATS_A_LEASE: u32 = 6;
/// What ranks get between "end" and being ended by force; less than [`DRAIN`].
const STOP_GRACE: Duration = Duration::from_millis(2000);

/// How a head is to be started.
#[derive(Debug, Clone)]
pub struct HeadOptions {
    /// Where it listens.
    pub ip: IpAddr,
    /// gRPC port; 0 takes any.
    pub port: u16,
    /// HTTP port, always on the loopback; 0 takes any.
    pub http_port: u16,
    /// Listening beyond the loopback was asked for.
    pub allow_remote: bool,
    /// Its own worker, if it has one.
    pub worker: Option<WorkerOptions>,
    /// The journal's folder.
    pub state_dir: PathBuf,
    /// Where `head.json` goes.
    pub runtime_dir: RuntimeDir,
    /// It lives for one `coordinator train`.
    pub for_one_job: bool,
}

/// A running head.
pub struct Head {
    file: HeadFile,
    runtime_dir: RuntimeDir,
    scheduler: SchedulerHandle,
    worker: Option<LocalWorker>,
    /// The journal's folder, when it was made for this head alone.
    own_journal: Option<PathBuf>,
    /// Cancelled when the head is to stop: asked over gRPC, or because a part failed.
    root: CancellationToken,
    deciding: Phase,
    serving: Phase,
}

/// Tasks that stop together.
struct Phase {
    name: &'static str,
    stop: CancellationToken,
    tasks: TaskTracker,
}

impl Phase {
    fn new(name: &'static str) -> Self {
        Self { name, stop: CancellationToken::new(), tasks: TaskTracker::new() }
    }

    async fn end(&self) -> Result<(), usize> {
        shutdown::stop_phase(self.name, &self.stop, &self.tasks, PHASE).await
    }
}

impl Head {
    /// Starts a head and waits until it is ready: ports open, its worker joined, `head.json` written.
    ///
    /// # Errors
    /// A port in use, a head that runs already, a worker that did not start: with what to do.
    pub async fn start(options: HeadOptions) -> Outcome<Self> {
        let runtime_dir = options.runtime_dir.clone();
        let running = runtime_dir.running_head().map_err(Failure::operator)?;
        refuse(&options, running.as_ref())?;
        let grpc = bind(options.ip, options.port, "--port", running.as_ref()).await?;
        let loopback = IpAddr::from([127, 0, 0, 1]);
        let web = bind(loopback, options.http_port, "--http-port", running.as_ref()).await?;
        let (journal, own_journal) = open_journal(&options)?;
        fail_orphans(&journal).map_err(Failure::us)?;

        let local = |listener: &TcpListener| listener.local_addr().map_err(Failure::us);
        let file = HeadFile {
            pid: std::process::id(),
            address: local(&grpc)?.to_string(),
            http_address: local(&web)?.to_string(),
            token: new_token(),
            version: crate::VERSION.to_owned(),
            for_one_job: options.for_one_job,
        };
        let mut head = Self::assemble(file, runtime_dir, journal, grpc, web)?;
        head.own_journal = own_journal;
        match head.complete(&options, running.is_some()).await {
            Ok(()) => Ok(head),
            Err(failure) => {
                // The failure is what matters; what the clean-up adds is in the log.
                let _ = head.stop("the head could not start").await;
                Err(failure)
            }
        }
    }

    /// Builds the parts and sets them going.
    fn assemble(
        file: HeadFile,
        runtime_dir: RuntimeDir,
        journal: Journal,
        grpc: TcpListener,
        web: TcpListener,
    ) -> Outcome<Self> {
        let prometheus = http::metrics::recorder().map_err(Failure::us)?;
        let (deciding, serving) = (Phase::new("scheduler"), Phase::new("services"));
        let root = CancellationToken::new();
        let settings = CoreSettings { stop_grace: STOP_GRACE, ..CoreSettings::default() };
        let identity = Identity {
            address: file.address.clone(),
            http_address: file.http_address.clone(),
            began: tokio::time::Instant::now(),
            heartbeat: settings.node_lease / HEARTBEATS_A_LEASE,
            lease: settings.node_lease,
        };
        let parts = Parts {
            journal: journal.clone(),
            feeds: Feeds::default(),
            shelf: Shelf::default(),
            recorders: deciding.tasks.clone(),
        };
        let (scheduler, handle) = Scheduler::new(settings, parts.clone());
        let services = Services {
            scheduler: handle.clone(),
            journal,
            feeds: parts.feeds,
            shelf: parts.shelf,
            identity,
            stop: serving.stop.clone(),
            stop_head: root.clone(),
            tasks: serving.tasks.clone(),
        };
        shutdown::spawn(&deciding.tasks, "scheduler", &root, scheduler.run(deciding.stop.clone()));
        let sweeping = http::metrics::sweep(prometheus.clone(), serving.stop.clone());
        shutdown::spawn(&serving.tasks, "metrics sweep", &root, sweeping);
        shutdown::spawn(&serving.tasks, "http", &root, http::serve(web, services.clone(), prometheus));
        shutdown::spawn(&serving.tasks, "grpc", &root, api::serve(grpc, services, &file.token));
        Ok(Self {
            file,
            runtime_dir,
            scheduler: handle,
            worker: None,
            own_journal: None,
            root,
            deciding,
            serving,
        })
    }

    /// Starts the local worker, waits for it, and announces the head (H1).
    async fn complete(&mut self, options: &HeadOptions, another_runs: bool) -> Outcome {
        if let Some(wanted) = &options.worker {
            let worker =
                LocalWorker::start(wanted, &self.file, &options.state_dir).map_err(Failure::operator)?;
            let worker = self.worker.insert(worker);
            let joined = tokio::time::timeout(WORKER_JOINS, self.scheduler.until_nodes(1));
            tokio::select! {
                failure = worker.failed() => return Err(failure),
                joined = joined => match joined {
                    Ok(Ok(())) => {}
                    Ok(Err(gone)) => return Err(Failure::us(gone)),
                    Err(_) => return Err(worker.silent(WORKER_JOINS)),
                },
            }
        }
        if !another_runs {
            self.runtime_dir.write_head(&self.file).map_err(Failure::operator)?;
        }
        Ok(())
    }

    /// How to reach it.
    #[must_use]
    pub fn file(&self) -> &HeadFile {
        &self.file
    }

    /// What it wrote for itself alone, and nobody needs once its job has ended well: its worker's log, and its
    /// journal where another head held the common one.
    #[must_use]
    pub fn leftovers(&self) -> Vec<PathBuf> {
        let log = self.worker.as_ref().map(|worker| worker.log().to_owned());
        log.into_iter().chain(self.own_journal.clone()).collect()
    }

    /// A client of it.
    ///
    /// # Errors
    /// When it does not answer.
    pub async fn client(&self) -> Outcome<Client> {
        Client::to(&self.file).await
    }

    /// Asks it to stop, from another task.
    #[must_use]
    pub fn stopper(&self) -> CancellationToken {
        self.root.clone()
    }

    /// Waits until it is to stop. A worker of its own that ends meanwhile (killed, out of memory) takes its
    /// ranks' jobs with it, and is started again: the head and the other nodes go on.
    pub async fn until_stopped(&mut self) {
        let root = self.root.clone();
        let worker = &mut self.worker;
        let looking_after = async {
            let Some(worker) = worker else { return std::future::pending::<()>().await };
            loop {
                let failure = worker.failed().await;
                tracing::error!("{failure}; it is started again");
                while let Err(error) = worker.start_again().await {
                    tracing::error!(
                        error = format!("{error:#}"),
                        "the head's own worker could not be started"
                    );
                }
            }
        };
        tokio::select! {
            () = root.cancelled() => {}
            () = looking_after => {}
        }
    }

    /// Stops in phases: jobs are cancelled, nodes leave, the scheduler and its recorders end, the services end,
    /// `head.json` goes (H2). Mostly well below a second; on a loaded machine each phase has its grace. What is
    /// late is a warning: everything is ended by force then, and what the job came to stays true.
    ///
    /// # Errors
    /// When `head.json` cannot be removed.
    pub async fn stop(mut self, why: &str) -> Outcome {
        let mut late = Vec::new();
        if !matches!(tokio::time::timeout(DRAIN, self.scheduler.drain(why.to_owned())).await, Ok(Ok(()))) {
            late.push("jobs");
        }
        // A scheduler that has ended told its nodes already, by closing their sessions.
        let _ = self.scheduler.dismiss(why.to_owned()).await;
        if tokio::time::timeout(LEAVE, self.scheduler.until_no_nodes()).await.is_err() {
            late.push("nodes");
        }
        if let Some(worker) = self.worker.take() {
            worker.end(LEAVE).await;
        }
        for phase in [&self.deciding, &self.serving] {
            if phase.end().await.is_err() {
                late.push(phase.name);
            }
        }
        let removed = self.runtime_dir.remove_head(self.file.pid).map_err(Failure::operator);
        if !late.is_empty() {
            tracing::warn!(late = late.join(", "), "did not stop in time and was ended by force");
        }
        removed
    }
}

/// What is wrong with starting a head here at all.
fn refuse(options: &HeadOptions, running: Option<&HeadFile>) -> Outcome {
    if options.ip.is_unspecified() {
        return Err(Failure::operator(anyhow::anyhow!(
            "--node-ip-address {} is no address that others can reach: workers and ranks are told where the head is; \
             give this machine's own address on their network",
            options.ip
        )));
    }
    if !options.ip.is_loopback() && !options.allow_remote {
        return Err(Failure::operator(anyhow::anyhow!(
            "--node-ip-address {} can be reached from other machines, and the connection is not encrypted (there is \
             no TLS yet): whoever sees its traffic sees the token and can run code here. On a network that you trust, \
             add --allow-remote; else use 127.0.0.1",
            options.ip
        )));
    }
    match running {
        Some(head) if !options.for_one_job => Err(Failure::operator(anyhow::anyhow!(
            "a head is running already at {} (pid {}); use it, or stop it with `coordinator stop`",
            head.address,
            head.pid
        ))),
        _ => Ok(()),
    }
}

async fn bind(ip: IpAddr, port: u16, option: &str, running: Option<&HeadFile>) -> Outcome<TcpListener> {
    TcpListener::bind(SocketAddr::new(ip, port)).await.map_err(|error| {
        let text = match (error.kind(), running) {
            (std::io::ErrorKind::AddrInUse, Some(head)) => format!(
                "port {port} is in use; a head runs at {} (pid {}): stop it with `coordinator stop`, or give another \
                 {option} (0 takes any free one)",
                head.address, head.pid
            ),
            (std::io::ErrorKind::AddrInUse, None) => {
                format!("port {port} is in use by another program; give another {option} (0 takes any free one)")
            }
            _ => format!("could not listen on {ip}:{port} ({option})"),
        };
        Failure::operator(anyhow::Error::from(error).context(text))
    })
}

/// A head for one job goes beside the folder when another head holds it.
fn open_journal(options: &HeadOptions) -> Outcome<(Journal, Option<PathBuf>)> {
    match Journal::open(&options.state_dir) {
        Err(JournalError::Busy { path }) if options.for_one_job => {
            let own = path.join(format!("train-{}", std::process::id()));
            Ok((Journal::open(&own).map_err(Failure::operator)?, Some(own)))
        }
        journal => Ok((journal.map_err(Failure::operator)?, None)),
    }
}

/// Jobs that the last head left open have failed.
fn fail_orphans(journal: &Journal) -> Result<(), JournalError> {
    for orphan in journal.orphans()? {
        let detail = after_the_head_died(&orphan.checkpoint_dir);
        tracing::warn!(job = orphan.job, "{detail}");
        let fault = pb::Fault { whose: pb::Whose::Outside.into(), message: detail.clone() };
        let summary_json = String::new();
        let ended = pb::Ended { state: "failed".to_owned(), detail, fault: Some(fault), summary_json };
        journal.append(&orphan.job, pb::job_event::Kind::Ended(ended))?;
    }
    Ok(())
}
