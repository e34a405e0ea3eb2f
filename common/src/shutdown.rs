//! Stopping: one token for the process, tasks with names, phases with a deadline.
//!
//! Used by the coordinator, the node and the rank. A task that fails takes its process with it: nothing runs
//! on with a part missing.

use std::future::Future;
use std::time::Duration;

pub use tokio_util::sync::CancellationToken;
pub use tokio_util::task::TaskTracker;

/// Spawns a named task; when it fails, the failure is logged and `root` is cancelled.
pub fn spawn(
    tasks: &TaskTracker,
    name: &'static str,
    root: &CancellationToken,
    work: impl Future<Output = anyhow::Result<()>> + Send + 'static,
) {
    let root = root.clone();
    tasks.spawn(async move {
        if let Err(error) = work.await {
            tracing::error!(task = name, error = format!("{error:#}"), "task failed, stopping");
            root.cancel();
        }
    });
}

/// The exit code a shell shows for a program whose reader went away (128 + SIGPIPE).
const READER_GONE: i32 = 141;

/// Ends quietly when whoever reads this program's output is gone (`… | head`): `println!` panics then, and a
/// backtrace would help nobody.
pub fn end_quietly_on_closed_pipe() {
    let usual = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        let text = panic.payload().downcast_ref::<String>();
        if text.is_some_and(|text| text.starts_with("failed printing to") && text.contains("Broken pipe")) {
            std::process::exit(READER_GONE);
        }
        usual(panic);
    }));
}

/// Waits for the first of Ctrl-C, SIGTERM and SIGHUP (a closed terminal), and says which.
///
/// # Errors
/// When the process may not install signal handlers.
pub async fn stop_signal() -> std::io::Result<&'static str> {
    use tokio::signal::unix::{SignalKind, signal};
    let mut terminate = signal(SignalKind::terminate())?;
    let mut hang_up = signal(SignalKind::hangup())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    Ok(tokio::select! {
        _ = interrupt.recv() => "Ctrl-C",
        _ = terminate.recv() => "SIGTERM",
        _ = hang_up.recv() => "SIGHUP",
    })
}

/// Stops one phase: no new tasks, all told to stop, all waited for.
///
/// # Errors
/// The number of tasks that did not stop within `grace`.
pub async fn stop_phase(
    phase: &'static str,
    stop: &CancellationToken,
    tasks: &TaskTracker,
    grace: Duration,
) -> Result<(), usize> {
    tasks.close();
    stop.cancel();
    if tokio::time::timeout(grace, tasks.wait()).await.is_err() {
        let left = tasks.len();
        tracing::error!(phase, left, ?grace, "tasks did not stop in time");
        return Err(left);
    }
    Ok(())
}
