//! `coordinator --head`: in the foreground until it is told to stop, or in the background with `--detach`.

use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ExitCode, Stdio};
use std::time::Duration;

use super::CANCELLED;
use super::signals::Signals;
use crate::cli::HeadArgs;
use crate::client::Client;
use crate::failure::{Failure, Outcome};
use crate::head::{Devices, Head, HeadOptions, WorkerOptions};
use crate::process;
use crate::runtime_dir::RuntimeDir;

/// A head in the background must answer within this; its worker has a minute.
const ANSWERS_WITHIN: Duration = Duration::from_secs(75);
/// Between two looks whether it answers.
const LOOK_EVERY: Duration = Duration::from_millis(100);
/// Lines of its log that an error shows.
const LAST_WORDS: usize = 15;

pub(super) async fn run(args: HeadArgs) -> Outcome<ExitCode> {
    if args.detach {
        return detach(&args).await;
    }
    if args.detached_child {
        // A process of its own session: closing the terminal does not reach it.
        rustix::process::setsid().map_err(|e| Failure::us(std::io::Error::from(e)))?;
    }
    let signals = Signals::listen();
    let mut head = tokio::select! {
        head = Head::start(options(&args)?) => head?,
        // What was started so far ends with the half-made head.
        signal = signals.nth(1) => return signal.map(|_| ExitCode::from(CANCELLED)),
    };
    println!("head ready at {} (http://{})", head.file().address, head.file().http_address);
    let why = tokio::select! {
        signal = signals.nth(1) => signal?,
        () = head.until_stopped() => "asked to stop",
    };
    tracing::info!(why, "stopping");
    head.stop(&format!("the head is stopping ({why})")).await?;
    Ok(ExitCode::SUCCESS)
}

fn options(args: &HeadArgs) -> Outcome<HeadOptions> {
    let worker = match args.no_local_worker || args.num_gpus + args.num_cpu_ranks == 0 {
        true => None,
        false => {
            let devices = Devices::Each { gpus: args.num_gpus, cpu_ranks: args.num_cpu_ranks };
            Some(WorkerOptions::beside_this_program(args.num_cpus, devices)?)
        }
    };
    Ok(HeadOptions {
        ip: args.node_ip_address,
        port: args.port,
        http_port: args.http_port,
        allow_remote: args.allow_remote,
        worker,
        state_dir: args.state_dir.clone().unwrap_or_else(default_state_dir),
        runtime_dir: RuntimeDir::from_environment().map_err(Failure::operator)?,
        for_one_job: false,
    })
}

/// The journal lies where the runs lie.
pub(super) fn default_state_dir() -> PathBuf {
    PathBuf::from(".agentfly")
}

/// Starts the same command again in the background and waits until it answers.
async fn detach(args: &HeadArgs) -> Outcome<ExitCode> {
    let runtime_dir = RuntimeDir::from_environment().map_err(Failure::operator)?;
    let state_dir = args.state_dir.clone().unwrap_or_else(default_state_dir);
    let log = state_dir.join("logs").join("head.log");
    let mut child = spawn_detached(&log)?;
    let deadline = tokio::time::Instant::now() + ANSWERS_WITHIN;
    let mut look = tokio::time::interval(LOOK_EVERY);
    loop {
        look.tick().await;
        if let Some(status) = child.try_wait().map_err(Failure::us)? {
            let whose = Failure::whose_of(status);
            return Err(Failure {
                whose,
                error: anyhow::anyhow!("the head did not start:{}", last_words(&log)),
            });
        }
        let ours =
            runtime_dir.running_head().map_err(Failure::operator)?.filter(|head| head.pid == child.id());
        if let Some(head) = ours {
            Client::to(&head).await?.status().await?;
            println!("head ready at {} (http://{}), pid {}", head.address, head.http_address, head.pid);
            println!("its log is {}; stop it with `coordinator stop`", log.display());
            return Ok(ExitCode::SUCCESS);
        }
        if tokio::time::Instant::now() > deadline {
            child.kill().and_then(|()| child.wait()).map_err(Failure::us)?;
            let text = format!("the head did not answer within {ANSWERS_WITHIN:?}:{}", last_words(&log));
            return Err(Failure::us(anyhow::anyhow!(text)));
        }
    }
}

fn spawn_detached(log: &Path) -> Outcome<Child> {
    let spawn = || -> std::io::Result<Child> {
        log.parent().map_or(Ok(()), std::fs::create_dir_all)?;
        let out = std::fs::File::create(log)?;
        let arguments = std::env::args_os().skip(1).filter(|argument| argument != "--detach");
        std::process::Command::new(std::env::current_exe()?)
            .args(arguments)
            .arg("--detached-child")
            .stdin(Stdio::null())
            .stdout(out.try_clone()?)
            .stderr(out)
            .arg0("coordinator")
            .spawn()
    };
    spawn().map_err(|e| {
        Failure::operator(anyhow::Error::from(e).context("could not start the head in the background"))
    })
}

fn last_words(log: &Path) -> String {
    match process::last_lines(log, LAST_WORDS).as_slice() {
        [] => format!(" it said nothing; its log is {}", log.display()),
        lines => {
            let plain = lines.iter().map(|line| line.strip_prefix("error: ").unwrap_or(line));
            format!("\n  {}", plain.collect::<Vec<_>>().join("\n  "))
        }
    }
}
