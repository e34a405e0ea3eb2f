//! `coordinator train`: check everything, find or start a head, submit, watch, and say what came of it.

use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use agentfly_common::config::{Config, Notice};
use agentfly_common::model_dir::ModelConfig;
use agentfly_proto::v1 as pb;
use pb::job_event::Kind;

use super::head::default_state_dir;
use super::progress::Display;
use super::show::{CANCEL_DEADLINE, exit_of, still_there};
use super::signals::Signals;
use super::tables::{change, duration, figure, table};
use super::{CANCELLED, settings};
use crate::cli::TrainArgs;
use crate::client::Client;
use crate::failure::{Failure, Outcome};
use crate::head::{Devices, Head, HeadOptions, WorkerOptions};
use crate::memory_check::{check_nodes, plan_here};
use crate::runtime_dir::RuntimeDir;
use crate::store::summary::Summary;
use crate::submission::{Examined, complete, examine, with_absolute_paths};

pub(super) async fn run(args: TrainArgs) -> Outcome<ExitCode> {
    let resolved = settings(&args.settings)?;
    let here = std::env::current_dir().map_err(Failure::operator)?;
    let config = with_absolute_paths(resolved.config, &here);
    let examined = tokio::task::spawn_blocking(move || examine(config)).await.map_err(Failure::us)??;
    let Examined { config, model, plan, .. } = examined;
    introduce(&config, &resolved.notices, &plan.in_words());

    let mut running = find(&args).await?;
    match &mut running {
        Some(client) => check_nodes(&config, &model, &client.nodes().await?)?,
        None => check_here(&config, &model)?,
    }
    let config = tokio::task::spawn_blocking(move || complete(config)).await.map_err(Failure::us)??;
    let signals = Signals::listen();
    let head = match running {
        Some(client) => return submit(client, &config, &here, args.detach, &signals).await,
        None if args.detach => {
            return Err(Failure::operator(anyhow::anyhow!(
                "--detach needs a head that goes on; start one with `coordinator --head --detach`"
            )));
        }
        None => tokio::select! {
            head = start_head(&config) => head?,
            // What was started so far ends with the half-made head.
            signal = signals.nth(1) => return signal.map(|_| ExitCode::from(CANCELLED)),
        },
    };
    let outcome = match head.client().await {
        Ok(client) => submit(client, &config, &here, false, &signals).await,
        Err(failure) => Err(failure),
    };
    let leftovers = head.leftovers();
    let stopped = tokio::select! {
        stopped = head.stop("the job is over") => stopped,
        // Children die with this process: the kernel sees to it.
        _ = signals.nth(2) => return Ok(ExitCode::from(CANCELLED)),
    };
    // How the job ended counts; a head that was late or left its file behind does not change that.
    if let Err(failure) = stopped {
        tracing::warn!("{failure}");
    }
    tidy(&leftovers, outcome.is_ok());
    outcome
}

/// Removes what a head for one job wrote for itself, but its worker's log after a failure: of that it says where it lies.
fn tidy(leftovers: &[PathBuf], went_well: bool) {
    for path in leftovers {
        if !went_well && path.is_file() {
            eprintln!("log: {}", path.display());
            continue;
        }
        let removed = match path.is_dir() {
            true => std::fs::remove_dir_all(path),
            false => std::fs::remove_file(path),
        };
        if let Err(error) = removed {
            tracing::warn!(path = %path.display(), %error, "could not be removed");
        }
    }
}

/// The head that was named, or the running one unless it lives for a job of its own.
async fn find(args: &TrainArgs) -> Outcome<Option<Client>> {
    if args.address.is_none() {
        let dir = RuntimeDir::from_environment().map_err(Failure::operator)?;
        if dir.running_head().map_err(Failure::operator)?.is_none_or(|head| head.for_one_job) {
            return Ok(None);
        }
    }
    Client::find(args.address.as_deref()).await
}

fn introduce(config: &Config, notices: &[Notice], plan: &[String]) {
    let trainer = &config.trainer;
    println!(
        "{}/{}: {}",
        trainer.project_name,
        trainer.experiment_name,
        config.actor_rollout_ref.model.path.display()
    );
    plan.iter().for_each(|words| println!("  {words}"));
    for notice in notices {
        println!("  accepted, no effect: {}={} ({})", notice.key, notice.value, notice.why);
    }
}

/// Says what a rank will hold on this machine, or refuses what does not fit.
fn check_here(config: &Config, model: &ModelConfig) -> Outcome {
    if let Some(plan) = plan_here(config, model, config.world_size()) {
        let plan = plan.map_err(Failure::operator)?;
        plan.in_words().iter().for_each(|words| println!("  {words}"));
    }
    Ok(())
}

/// A head with a worker for this job alone, on free ports.
async fn start_head(config: &Config) -> Outcome<Head> {
    let ranks = config.world_size();
    let worker = WorkerOptions::beside_this_program(None, Devices::Ranks(ranks))?;
    println!("no head is running: starting one for this job, with a worker for {ranks} ranks");
    if config.trainer.nnodes > 1 {
        println!(
            "  trainer.nnodes={}: without a head of its own the cluster is this machine, and all ranks share it; start \
             `coordinator --head` and `worker --join` on the others to spread them",
            config.trainer.nnodes
        );
    }
    let options = HeadOptions {
        ip: IpAddr::from([127, 0, 0, 1]),
        port: 0,
        http_port: 0,
        allow_remote: false,
        worker: Some(worker),
        state_dir: default_state_dir(),
        runtime_dir: RuntimeDir::from_environment().map_err(Failure::operator)?,
        for_one_job: true,
    };
    Head::start(options).await
}

/// Submits a job and follows it to its end, unless it is to run on its own.
async fn submit(
    mut client: Client,
    config: &Config,
    here: &Path,
    detach: bool,
    signals: &Signals,
) -> Outcome<ExitCode> {
    let config_json = serde_json::to_string(config).map_err(Failure::us)?;
    // Verifying a large checkpoint takes its time; what is submitted after all ends with the head, or is told.
    let job = tokio::select! {
        job = client.submit(config_json, here.to_string_lossy().into_owned()) => job?,
        signal = signals.nth(1) => {
            println!("{}: submitting was given up; `coordinator jobs` shows whether it was queued", signal?);
            return Ok(ExitCode::from(CANCELLED));
        }
    };
    if detach {
        println!("{} is {}; follow it with `coordinator job logs {}`", job.job_id, job.state, job.job_id);
        return Ok(ExitCode::SUCCESS);
    }
    println!("{} in {}", job.job_id, job.run_dir);
    follow(&mut client, &job, signals).await
}

/// Watches a job to its end; the first Ctrl-C cancels it, the second leaves at once.
async fn follow(client: &mut Client, job: &pb::JobInfo, signals: &Signals) -> Outcome<ExitCode> {
    let mut display = Display::new();
    display.begin(job.step, job.total_steps);
    let mut events = client.watch(job.job_id.clone(), 0).await?;
    let first = tokio::select! {
        ended = until_ended(&mut events, &mut display) => Some(ended?),
        signal = signals.nth(1) => {
            display.line(&format!("{}: cancelling {}; once more leaves at once", signal?, job.job_id));
            None
        }
    };
    let ended = match first {
        Some(ended) => ended,
        None => {
            client.cancel(job.job_id.clone()).await?;
            let ending = tokio::time::timeout(CANCEL_DEADLINE, until_ended(&mut events, &mut display));
            tokio::select! {
                ended = ending => ended.map_err(|_| still_there(&job.job_id))??,
                _ = signals.nth(2) => return Ok(ExitCode::from(CANCELLED)),
            }
        }
    };
    display.end();
    if let Ok(summary) = serde_json::from_str::<Summary>(&ended.summary_json) {
        conclude(&summary);
    }
    exit_of(&ended)
}

async fn until_ended(
    events: &mut tonic::Streaming<pb::JobEvent>,
    display: &mut Display,
) -> Outcome<pb::Ended> {
    let lost = |status: tonic::Status| match status.code() {
        tonic::Code::Unavailable | tonic::Code::Unknown | tonic::Code::Internal => {
            Failure::outside(anyhow::anyhow!(
                "the head is gone ({}); start the job again: it resumes from its last checkpoint",
                status.message()
            ))
        }
        _ => Failure::from(status),
    };
    while let Some(event) = events.message().await.map_err(lost)? {
        display.show(&event);
        if let Some(Kind::Ended(ended)) = event.kind {
            return Ok(ended);
        }
    }
    Err(Failure::outside(anyhow::anyhow!(
        "the head ended before the job did; start the job again: it resumes"
    )))
}

/// What came of it.
fn conclude(summary: &Summary) {
    let mut rows = table(&["", "before", "after", "change"]);
    let mut row = |name: &str, before: Option<f64>, after: Option<f64>| {
        rows.add_row([name.to_owned(), figure(before), figure(after), change(before, after)]);
    };
    row("validation accuracy", summary.val_before, summary.val_after);
    row("reward, first and last ten steps", summary.reward_first_ten_steps, summary.reward_last_ten_steps);
    println!("{rows}");
    let (steps, seconds) = (summary.steps, duration(summary.seconds));
    println!("{steps} steps in {seconds}, seed {}, policy version {}", summary.seed, summary.policy_version);
    if let Some(checkpoint) = &summary.checkpoint_path {
        println!("checkpoint:   {}", checkpoint.display());
    }
    println!("reward curve: {}", summary.run_dir.join("reward_curve.svg").display());
    println!("summary:      {}", summary.run_dir.join("summary.json").display());
}
