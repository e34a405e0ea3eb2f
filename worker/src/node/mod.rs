//! The node: joins a coordinator, starts and watches one rank per device, and says what became of each.
//!
//! Called by `worker --join`. Invariants:
//! - a rank never outlives its node (death signal set by the rank itself, process groups at a normal stop);
//! - every end of a rank is reported once, with exit code or signal and its last words;
//! - when the coordinator is gone the node stops its ranks and ends.

mod facts;
mod supervisor;

use std::time::Duration;

use agentfly_common::shutdown::{CancellationToken, stop_signal};
use agentfly_proto::v1::{
    NodeCommand, NodeHeartbeat, NodeMessage, Welcome, node_command::Kind as Command,
    node_message::Kind as Say,
};
use anyhow::{Context as _, bail};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;

use crate::connection::Connection;
pub use facts::{DeviceRequest, NodeOptions};
use supervisor::Supervisor;

/// Messages waiting to be sent to the coordinator.
const OUTBOX: usize = 256;
/// How long the coordinator may take to welcome a node.
const WELCOME_DEADLINE: Duration = Duration::from_secs(20);
/// How long ranks get to end by themselves when the node stops.
const STOP_GRACE: Duration = Duration::from_secs(3);

/// Joins, works until told to stop, and leaves nothing behind.
///
/// # Errors
/// When the devices asked for are not there, the coordinator cannot be reached or refuses, or it is lost.
pub async fn run(options: NodeOptions) -> anyhow::Result<()> {
    let hello = facts::hello(&options)?; // before dialling: a missing device is the operator's to fix
    let connection = Connection::dial(&options.join, options.token.expose()).await?;
    let (outbox, messages) = mpsc::channel(OUTBOX);
    outbox.send(NodeMessage { kind: Some(Say::Hello(hello)) }).await.context("the outbox is open")?;
    let mut cluster = connection.cluster();
    let late = || format!("{} did not welcome this worker within {WELCOME_DEADLINE:?}", options.join);
    let opening = cluster.node_session(ReceiverStream::new(messages));
    let mut commands = tokio::time::timeout(WELCOME_DEADLINE, opening)
        .await
        .with_context(late)?
        .map_err(|status| anyhow::anyhow!("{} refused this worker: {}", options.join, status.message()))?
        .into_inner();
    let first = tokio::time::timeout(WELCOME_DEADLINE, commands.message()).await.with_context(late)?;
    let welcome = match first.map(|m| m.and_then(|m| m.kind)) {
        Ok(Some(Command::Welcome(welcome))) => welcome,
        Ok(_) => {
            bail!("{} did not answer with a welcome; is it a coordinator of this version?", options.join)
        }
        Err(status) => bail!("{} refused this worker: {}", options.join, status.message()),
    };
    tracing::info!(coordinator = options.join, "joined");

    let mut supervisor = Supervisor::new(options.clone(), outbox.clone());
    let stop = CancellationToken::new();
    let beats = tokio::spawn(heartbeat(outbox, welcome, stop.clone()));
    let ended = tokio::select! {
        signal = stop_signal() => Ok(format!("{} received", signal?)),
        ended = obey(&mut commands, &mut supervisor) => ended,
    };
    stop.cancel();
    supervisor.stop_all(STOP_GRACE).await;
    beats.abort(); // a send waits for as long as the session is stuck
    match ended {
        Ok(why) => {
            tracing::info!(why, "worker ends");
            Ok(())
        }
        Err(error) => Err(error),
    }
}

/// Carries out commands until told to leave; an ended stream means that the coordinator is lost.
async fn obey(
    commands: &mut tonic::Streaming<NodeCommand>,
    supervisor: &mut Supervisor,
) -> anyhow::Result<String> {
    loop {
        let message = commands.message().await.map_err(|status| {
            anyhow::anyhow!("the session with the coordinator broke: {}", status.message())
        })?;
        let Some(message) = message else { bail!("the coordinator closed the session without a word") };
        match message.kind {
            Some(Command::StartRank(start)) => supervisor.start(start).await,
            Some(Command::StopRanks(stop)) => supervisor.stop_job(&stop).await,
            Some(Command::Leave(leave)) => return Ok(leave.why),
            Some(Command::Welcome(_)) | None => tracing::warn!("a command that is not for now was ignored"),
        }
    }
}

/// Says that the node lives, until stopped.
async fn heartbeat(outbox: mpsc::Sender<NodeMessage>, welcome: Welcome, stop: CancellationToken) {
    let mut system = sysinfo::System::new();
    let every = Duration::from_secs_f64(welcome.heartbeat_seconds.clamp(0.1, 60.0));
    let mut ticks = tokio::time::interval(every);
    while stop.run_until_cancelled(ticks.tick()).await.is_some() {
        system.refresh_memory();
        let beat = NodeHeartbeat {
            memory_used_bytes: system.used_memory(),
            load_1m: sysinfo::System::load_average().one,
        };
        if outbox.send(NodeMessage { kind: Some(Say::Heartbeat(beat)) }).await.is_err() {
            return; // the session is gone; `obey` sees it too
        }
    }
}
