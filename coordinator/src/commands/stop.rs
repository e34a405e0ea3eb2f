//! `coordinator stop`: ends the running head and waits until it is gone. Never fails when nothing runs.

use std::process::ExitCode;
use std::time::Duration;

use rustix::process::Signal;
use serde::Serialize;

use crate::cli::ShowArgs;
use crate::client::Client;
use crate::commands::print_json;
use crate::failure::{Failure, Outcome};
use crate::process::Watched;
use crate::runtime_dir::{HeadFile, RuntimeDir};

/// A head stops within a second, on a loaded machine within some 25 s; then it is asked by signal, then ended
/// by force.
const GRACE: Duration = Duration::from_secs(30);
/// From one step to the next.
const NEXT: Duration = Duration::from_secs(5);

/// For `--json`.
#[derive(Debug, Serialize)]
struct Stopped {
    /// A head was running.
    was_running: bool,
    /// Its process; unknown of a head elsewhere.
    pid: Option<u32>,
    /// It had to be ended by force.
    by_force: bool,
}

pub(super) async fn run(args: ShowArgs) -> Outcome<ExitCode> {
    if let Some(address) = &args.address {
        Client::need(Some(address)).await?.shutdown("coordinator stop").await?;
        if args.json {
            print_json(&Stopped { was_running: true, pid: None, by_force: false })?;
        } else {
            println!("the head at {address} is stopping");
        }
        return Ok(ExitCode::SUCCESS);
    }
    let runtime_dir = RuntimeDir::from_environment().map_err(Failure::operator)?;
    // A damaged head.json names no head that could be stopped.
    let stopped = match runtime_dir.read_head() {
        Ok(Some(head)) => stop(&runtime_dir, &head).await?,
        _ => Stopped { was_running: false, pid: None, by_force: false },
    };
    if args.json {
        print_json(&stopped)?;
    } else {
        println!("{}", in_words(&stopped));
    }
    Ok(ExitCode::SUCCESS)
}

fn in_words(stopped: &Stopped) -> String {
    match (stopped.pid, stopped.by_force) {
        (None, _) => "no head is running".to_owned(),
        (Some(pid), false) => format!("the head (pid {pid}) has stopped"),
        (Some(pid), true) => format!("the head (pid {pid}) did not stop in time and was ended by force"),
    }
}

async fn stop(runtime_dir: &RuntimeDir, head: &HeadFile) -> Outcome<Stopped> {
    let mut stopped = Stopped { was_running: false, pid: None, by_force: false };
    // The pid may be another program's by now: only one that answers with our token is asked to stop.
    // The head of a `train` is that command itself: a signal cancels its job as Ctrl-C does.
    let asked = match Client::to(head).await {
        Ok(mut client) if !head.for_one_job => client.shutdown("coordinator stop").await.is_ok(),
        _ => false,
    };
    if let Some(process) = Watched::open(head.pid).map_err(Failure::us)?
        && (asked || is_coordinator(head.pid))
    {
        stopped = Stopped { was_running: true, pid: Some(head.pid), by_force: false };
        let first = if asked { GRACE } else { Duration::ZERO };
        let ended = |within| process.ended_within(within);
        if !ended(first).await.map_err(Failure::us)? {
            process.signal(Signal::TERM).map_err(Failure::operator)?;
            let patience = if head.for_one_job { GRACE } else { NEXT };
            if !ended(patience).await.map_err(Failure::us)? {
                stopped.by_force = true;
                process.signal(Signal::KILL).map_err(Failure::operator)?;
                if !ended(NEXT).await.map_err(Failure::us)? {
                    let text = format!("the head (pid {}) does not end, not even by force", head.pid);
                    return Err(Failure::outside(anyhow::anyhow!(text)));
                }
            }
        }
    }
    runtime_dir.remove_head(head.pid).map_err(Failure::operator)?;
    Ok(stopped)
}

/// Whether the process calls itself a coordinator.
fn is_coordinator(pid: u32) -> bool {
    std::fs::read_to_string(format!("/proc/{pid}/comm")).is_ok_and(|name| name.trim() == "coordinator")
}
