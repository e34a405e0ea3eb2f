//! Ranks as child processes: started, watched to their end, reported with their last words.

use std::collections::{BTreeMap, VecDeque};
use std::os::unix::process::ExitStatusExt as _;
use std::process::{ExitStatus, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use agentfly_policy::environment::missing_for_libtorch;
use agentfly_proto::v1::{NodeMessage, RankExited, RankId, StartRank, StopRanks, node_message::Kind as Say};
use rustix::process::{Pid, Signal, kill_process_group};
use tokio::io::{AsyncBufReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::process::{Child, Command};
use tokio::sync::{mpsc, watch};

use super::NodeOptions;
use crate::gpu::CUDA_ORDER;

/// Lines kept of what a rank said last.
const LAST_WORDS: usize = 30;

/// How long the coordinator may take to take the report of a rank's end.
const REPORT_DEADLINE: Duration = Duration::from_secs(30);

/// All ranks of this node.
pub(super) struct Supervisor {
    options: NodeOptions,
    outbox: mpsc::Sender<NodeMessage>,
    ranks: BTreeMap<(String, u32, u32), Rank>,
}

/// A running rank, seen from its node.
struct Rank {
    pid: Option<Pid>,
    ended: watch::Receiver<bool>,
}

impl Supervisor {
    pub(super) fn new(options: NodeOptions, outbox: mpsc::Sender<NodeMessage>) -> Self {
        Self { options, outbox, ranks: BTreeMap::new() }
    }

    /// Starts a rank's process and a task that watches it. A failure to start is reported as an exit.
    pub(super) async fn start(&mut self, start: StartRank) {
        self.ranks.retain(|_, rank| !*rank.ended.borrow());
        let Some(id) = start.rank.clone() else {
            tracing::warn!("a StartRank without a rank was ignored");
            return;
        };
        match self.spawn(&id, &start) {
            Ok(child) => {
                let pid = child.id().and_then(|pid| i32::try_from(pid).ok()).and_then(Pid::from_raw);
                let (end, ended) = watch::channel(false);
                self.ranks.insert((id.job_id.clone(), id.rank, id.incarnation), Rank { pid, ended });
                tokio::spawn(watch_rank(id, child, start.log_file, self.outbox.clone(), end));
            }
            Err(error) => {
                let log_tail = vec![format!("could not start the rank's process: {error:#}")];
                let exited = RankExited { rank: Some(id), exit_code: None, signal: None, log_tail };
                report(&self.outbox, exited).await;
            }
        }
    }

    fn spawn(&self, id: &RankId, start: &StartRank) -> anyhow::Result<Child> {
        let device = start.device.clone().unwrap_or_default();
        let mut command = Command::new(std::env::current_exe()?);
        command
            .arg("rank")
            .args(["--coordinator", &self.options.join])
            .args(["--job", &id.job_id])
            .args(["--rank", &id.rank.to_string()])
            .args(["--incarnation", &id.incarnation.to_string()])
            .args(["--device", &format!("{}:{}", device.kind, device.index)])
            .args(["--threads", &start.threads.max(1).to_string()])
            .args(["--ranks-on-node", &start.ranks_on_node.max(1).to_string()])
            .args(["--address", &self.options.address])
            .args(["--parent-pid", &std::process::id().to_string()])
            .env("AGENTFLY_TOKEN", self.options.token.expose())
            .env("OMP_NUM_THREADS", start.threads.max(1).to_string())
            .env(CUDA_ORDER.0, CUDA_ORDER.1)
            .envs(missing_for_libtorch())
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .process_group(0) // the terminal's Ctrl-C is the coordinator's to handle
            .kill_on_drop(true);
        Ok(command.spawn()?)
    }

    /// Ends the ranks of one job: they were told through their own session; here by signal.
    pub(super) async fn stop_job(&mut self, stop: &StopRanks) {
        let of_job = self.ranks.iter().filter(|(key, _)| key.0 == stop.job_id).map(|(_, rank)| rank);
        end(of_job, Duration::from_secs_f64(stop.grace_seconds.clamp(0.0, 60.0))).await;
    }

    /// Ends every rank.
    pub(super) async fn stop_all(&mut self, grace: Duration) {
        end(self.ranks.values(), grace).await;
    }
}

/// SIGTERM, a grace period for all together, SIGKILL for whoever is left.
async fn end(ranks: impl Iterator<Item = &Rank>, grace: Duration) {
    let ranks: Vec<&Rank> = ranks.filter(|rank| !*rank.ended.borrow()).collect();
    signal_all(&ranks, Signal::TERM);
    let all_ended = async {
        for rank in &ranks {
            let _ = rank.ended.clone().wait_for(|ended| *ended).await;
        }
    };
    if tokio::time::timeout(grace, all_ended).await.is_err() {
        signal_all(&ranks, Signal::KILL);
        for rank in &ranks {
            // SIGKILL cannot be refused; a second is for the kernel to take the memory back.
            let mut ended = rank.ended.clone();
            let _ = tokio::time::timeout(Duration::from_secs(1), ended.wait_for(|ended| *ended)).await;
        }
    }
}

fn signal_all(ranks: &[&Rank], signal: Signal) {
    for pid in ranks.iter().filter(|rank| !*rank.ended.borrow()).filter_map(|rank| rank.pid) {
        let _ = kill_process_group(pid, signal); // gone already is what we want
    }
}

/// Follows a rank to its end and reports it.
async fn watch_rank(
    id: RankId,
    mut child: Child,
    log_file: String,
    outbox: mpsc::Sender<NodeMessage>,
    end: watch::Sender<bool>,
) {
    let last_words = Arc::new(Mutex::new(VecDeque::new()));
    let reader = child
        .stderr
        .take()
        .map(|stderr| tokio::spawn(keep_words(BufReader::new(stderr), log_file, last_words.clone())));
    let status = child.wait().await;
    end.send_replace(true);
    if let Some(reader) = reader {
        // A grandchild may hold the pipe open; what was said by now is what counts.
        let _ = tokio::time::timeout(Duration::from_millis(500), reader).await;
    }
    let log_tail = last_words.lock().unwrap_or_else(PoisonError::into_inner).drain(..).collect();
    let status = status.unwrap_or_else(|_| ExitStatus::from_raw(0xff00));
    let (exit_code, signal) = (status.code(), status.signal());
    tracing::info!(job = id.job_id, rank = id.rank, ?exit_code, ?signal, "a rank ended");
    let exited = RankExited { rank: Some(id), exit_code, signal, log_tail };
    report(&outbox, exited).await;
}

/// Tells the coordinator of a rank's end; a session that is gone or stuck is the node's loop's to notice.
async fn report(outbox: &mpsc::Sender<NodeMessage>, exited: RankExited) {
    let message = NodeMessage { kind: Some(Say::RankExited(exited)) };
    if let Err(error) = outbox.send_timeout(message, REPORT_DEADLINE).await {
        tracing::warn!(%error, "the coordinator could not be told of a rank's end");
    }
}

/// Copies a rank's log to its file and keeps the last lines.
async fn keep_words(
    stderr: BufReader<tokio::process::ChildStderr>,
    log_file: String,
    last_words: Arc<Mutex<VecDeque<String>>>,
) {
    let mut file = open_log(&log_file).await;
    let (mut stderr, mut bytes) = (stderr, Vec::new());
    // Bytes, not text: a line that is not UTF-8 must not close the pipe under the rank.
    while stderr.read_until(b'\n', &mut bytes).await.is_ok_and(|read| read > 0) {
        let line = String::from_utf8_lossy(&bytes).trim_end().to_owned();
        bytes.clear();
        if let Some(open) = &mut file
            && open.write_all(format!("{line}\n").as_bytes()).await.is_err()
        {
            tracing::warn!(log_file, "a rank's log could not be written; only its last lines are kept");
            file = None;
        }
        let mut kept = last_words.lock().unwrap_or_else(PoisonError::into_inner);
        if kept.len() == LAST_WORDS {
            kept.pop_front();
        }
        kept.push_back(line);
    }
    if let Some(mut open) = file {
        let _ = open.flush().await;
    }
}

async fn open_log(path: &str) -> Option<tokio::fs::File> {
    if path.is_empty() {
        return None;
    }
    let opened = tokio::fs::OpenOptions::new().create(true).append(true).open(path).await;
    if let Err(error) = &opened {
        tracing::warn!(path, %error, "a rank's log file could not be opened; only its last lines are kept");
    }
    opened.ok()
}
