//! What the shell's stories need: a head in a folder of its own, and a worker that plays its part.
//!
//! The head is the real one: sockets, core, journal, recorder. The worker speaks the real protocol and invents
//! its chains.

mod rank;
mod worker;

use std::net::IpAddr;
use std::path::PathBuf;
use std::time::Duration;

use agentfly_common::config::resolve;
use agentfly_coordinator::client::Client;
use agentfly_coordinator::head::{Head, HeadOptions};
use agentfly_coordinator::runtime_dir::RuntimeDir;
use agentfly_proto::v1 as pb;
use pb::job_event::Kind;
use tempfile::TempDir;

pub(crate) use worker::FakeWorker;

/// Nothing here takes a second; a hang is a failure with a name.
pub(crate) const DEADLINE: Duration = Duration::from_secs(60);

/// A head, and a folder with a model's files and questions.
pub(crate) struct World {
    folder: TempDir,
    head: Head,
}

impl World {
    pub(crate) async fn start() -> Self {
        Self::start_after(|_| ()).await
    }

    /// A head that finds its state folder as `before` left it.
    pub(crate) async fn start_after(before: impl FnOnce(&std::path::Path)) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let tiny = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy/models/tiny");
        std::os::unix::fs::symlink(tiny, folder.path().join("model")).unwrap();
        for (file, rows) in [("train.json", 4), ("val.json", 2)] {
            let rows: Vec<_> = (0..rows)
                .map(|i| serde_json::json!({"id": format!("q{i}"), "question": format!("{i} + 1?"), "answer": "1"}))
                .collect();
            std::fs::write(folder.path().join(file), serde_json::to_vec(&rows).unwrap()).unwrap();
        }
        before(&folder.path().join("state"));
        let head = Self::head_in(&folder).await;
        Self { folder, head }
    }

    async fn head_in(folder: &TempDir) -> Head {
        let options = HeadOptions {
            ip: IpAddr::from([127, 0, 0, 1]),
            port: 0,
            http_port: 0,
            allow_remote: false,
            worker: None,
            state_dir: folder.path().join("state"),
            runtime_dir: RuntimeDir::open(&folder.path().join("runtime")).unwrap(),
            for_one_job: false,
        };
        Head::start(options).await.unwrap()
    }

    /// Stops the head and starts another one in the same folder.
    pub(crate) async fn restart(self) -> Self {
        self.head.stop("the test restarts it").await.unwrap();
        let head = Self::head_in(&self.folder).await;
        Self { folder: self.folder, head }
    }

    /// Stops the head; fails when anything did not stop in time or was left behind.
    pub(crate) async fn stop(self) {
        self.head.stop("the test is over").await.unwrap();
        let runtime = RuntimeDir::open(&self.folder.path().join("runtime")).unwrap();
        assert_eq!(runtime.read_head().unwrap(), None, "head.json is left behind");
    }

    pub(crate) fn address(&self) -> String {
        self.head.file().address.clone()
    }

    /// The answer of the head's web server, its header included.
    pub(crate) async fn get(&self, path: &str) -> String {
        use tokio::io::{AsyncReadExt, AsyncWriteExt};
        let address = self.head.file().http_address.clone();
        let mut stream = tokio::net::TcpStream::connect(&address).await.unwrap();
        let request = format!("GET {path} HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n");
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut answer = String::new();
        tokio::time::timeout(DEADLINE, stream.read_to_string(&mut answer)).await.unwrap().unwrap();
        answer
    }

    pub(crate) fn token(&self) -> String {
        self.head.file().token.clone()
    }

    pub(crate) async fn client(&self) -> Client {
        self.head.client().await.unwrap()
    }

    pub(crate) fn dir(&self) -> String {
        self.folder.path().to_string_lossy().into_owned()
    }

    pub(crate) fn run_dir(&self) -> PathBuf {
        self.folder.path().join("runs/story/one")
    }

    /// Two steps of two prompts, two chains each, on two ranks, and whatever is set on top. Paths are relative.
    pub(crate) fn config_json(&self, more: &[&str]) -> String {
        let settings = [
            "data.train_files=train.json",
            "data.val_files=val.json",
            "data.train_batch_size=2",
            "agent.num_chains=2",
            "actor_rollout_ref.model.path=model",
            "trainer.n_gpus_per_node=2",
            "trainer.total_training_steps=2",
            "trainer.project_name=story",
            "trainer.experiment_name=one",
            "trainer.startup_timeout_seconds=20",
        ];
        let settings: Vec<String> = settings.iter().chain(more).map(|&setting| setting.to_owned()).collect();
        serde_json::to_string(&resolve(&settings, None, []).unwrap().config).unwrap()
    }

    /// All events of a job, its end included; progress is left out.
    pub(crate) async fn events_until_ended(&self, job: &str) -> Vec<pb::JobEvent> {
        self.events_until(job, |kind| matches!(kind, Kind::Ended(_))).await
    }

    /// Waits until the job says that it is in this state.
    pub(crate) async fn until_state(&self, job: &str, state: &str) {
        self.events_until(job, |kind| matches!(kind, Kind::State(changed) if changed.state == state)).await;
    }

    async fn events_until(&self, job: &str, last: impl Fn(&Kind) -> bool) -> Vec<pb::JobEvent> {
        let mut seen = Vec::new();
        let watching = async {
            let mut events = self.client().await.watch(job.to_owned(), 0).await.unwrap();
            while let Some(event) = events.message().await.unwrap() {
                let Some(kind) = &event.kind else { continue };
                let (is_last, is_progress) = (last(kind), matches!(kind, Kind::Progress(_)));
                if !is_progress {
                    seen.push(event);
                }
                if is_last {
                    return;
                }
            }
            panic!("the events of {job} ended too soon");
        };
        if tokio::time::timeout(DEADLINE, watching).await.is_err() {
            panic!("{job} did not come so far within {DEADLINE:?}: {seen:#?}");
        }
        seen
    }
}
