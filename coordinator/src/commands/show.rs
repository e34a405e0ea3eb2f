//! `coordinator status|nodes|jobs` and `coordinator job show|logs|cancel`: tables for people, `--json` for tools.

use std::io::Write;
use std::process::ExitCode;
use std::time::Duration;

use agentfly_proto::v1 as pb;
use pb::job_event::Kind;
use serde_json::json;

use crate::cli::{JobArgs, JobCommand, ShowArgs};
use crate::client::Client;
use crate::commands::print_json;
use crate::commands::tables::{duration, gib, table};
use crate::failure::{Failure, Outcome};
use crate::sinks::console::{step_line, validation_line};
use crate::views::{JobView, NodeView, StatusView};

/// After a cancelling everything must be freed within this.
pub(super) const CANCEL_DEADLINE: Duration = Duration::from_secs(30);
/// Widest text in a table's cell.
const CELL_CHARACTERS: usize = 72;

pub(super) async fn status(args: ShowArgs) -> Outcome<ExitCode> {
    let Some(mut client) = Client::find(args.address.as_deref()).await? else {
        if args.json {
            print_json(&StatusView::none())?;
        } else {
            println!("no head is running; start one with `coordinator --head`");
        }
        return Ok(ExitCode::SUCCESS);
    };
    let status = StatusView::from(client.status().await?);
    if args.json {
        print_json(&status)?;
        return Ok(ExitCode::SUCCESS);
    }
    println!("head at {} (http://{}), pid {}", status.address, status.http_address, status.pid);
    println!("version {}, up {}", status.version, duration(status.uptime_seconds));
    let running = status.running_job.map(|job| format!(" ({job})")).unwrap_or_default();
    println!(
        "nodes alive: {}; jobs running: {}{running}, queued: {}",
        status.nodes_alive, status.jobs_running, status.jobs_queued
    );
    Ok(ExitCode::SUCCESS)
}

pub(super) async fn nodes(args: ShowArgs) -> Outcome<ExitCode> {
    let nodes = Client::need(args.address.as_deref()).await?.nodes().await?;
    let nodes: Vec<NodeView> = nodes.into_iter().map(NodeView::from).collect();
    if args.json {
        print_json(&nodes)?;
        return Ok(ExitCode::SUCCESS);
    }
    let mut rows = table(&["node", "state", "CPUs", "CPU ranks", "GPUs", "memory used", "heard", "ranks"]);
    for node in nodes {
        let rank = |rank: &crate::views::RankView| {
            format!("{}/{}: {} ({})", rank.job_id, rank.rank, rank.activity, duration(rank.activity_seconds))
        };
        rows.add_row([
            format!("{}\n{}", node.node_id, node.hostname),
            node.state,
            node.cpus.to_string(),
            node.cpu_ranks.to_string(),
            node.gpus.to_string(),
            format!("{} of {}", gib(node.memory_used_bytes), gib(node.memory_bytes)),
            format!("{} ago", duration(node.silent_seconds)),
            node.ranks.iter().map(rank).collect::<Vec<_>>().join("\n"),
        ]);
    }
    println!("{rows}");
    Ok(ExitCode::SUCCESS)
}

pub(super) async fn jobs(args: ShowArgs) -> Outcome<ExitCode> {
    let jobs = Client::need(args.address.as_deref()).await?.list().await?;
    let jobs: Vec<JobView> = jobs.into_iter().map(JobView::brief).collect();
    if args.json {
        print_json(&jobs)?;
        return Ok(ExitCode::SUCCESS);
    }
    let mut rows = table(&["job", "state", "run", "steps", "ranks", "time", "detail"]);
    for job in jobs {
        rows.add_row([
            job.job_id,
            job.state,
            format!("{}/{}", job.project, job.experiment),
            format!("{}/{}", job.step, job.total_steps),
            job.ranks.to_string(),
            duration(job.seconds),
            in_a_cell(&job.detail),
        ]);
    }
    println!("{rows}");
    Ok(ExitCode::SUCCESS)
}

/// The first line of a text, not wider than a table can bear; `job show` has the rest.
fn in_a_cell(text: &str) -> String {
    let first = text.lines().next().unwrap_or_default();
    match first.char_indices().nth(CELL_CHARACTERS) {
        Some((end, _)) => format!("{}…", &first[..end]),
        None if first.len() < text.len() => format!("{first} …"),
        None => first.to_owned(),
    }
}

pub(super) async fn job(command: JobCommand) -> Outcome<ExitCode> {
    match command {
        JobCommand::Show(args) => {
            let job = client(&args).await?.show(args.id).await?;
            show_job(job, args.show.json)
        }
        JobCommand::Cancel(args) => cancel(&args).await,
        JobCommand::Logs(args) => logs(&args).await,
    }
}

async fn client(args: &JobArgs) -> Outcome<Client> {
    Client::need(args.show.address.as_deref()).await
}

/// Cancels a job and waits until it is over.
async fn cancel(args: &JobArgs) -> Outcome<ExitCode> {
    let mut client = client(args).await?;
    client.cancel(args.id.clone()).await?;
    let mut events = client.watch(args.id.clone(), 0).await?;
    let over = async {
        while let Some(event) = events.message().await? {
            if matches!(event.kind, Some(Kind::Ended(_))) {
                break;
            }
        }
        Outcome::Ok(())
    };
    let Ok(over) = tokio::time::timeout(CANCEL_DEADLINE, over).await else {
        return Err(still_there(&args.id));
    };
    over?;
    let job = JobView::brief(client.show(args.id.clone()).await?);
    match args.show.json {
        true => print_json(&job)?,
        false => println!("{} is {} ({})", job.job_id, job.state, in_a_cell(&job.detail)),
    }
    Ok(ExitCode::SUCCESS)
}

/// What is said of a job that outlives its cancelling.
pub(super) fn still_there(job: &str) -> Failure {
    let text =
        format!("{job} did not end within {CANCEL_DEADLINE:?} of its cancelling; `coordinator stop` ends it");
    Failure::us(anyhow::anyhow!(text))
}

fn show_job(job: pb::JobInfo, as_json: bool) -> Outcome<ExitCode> {
    let job = JobView::full(job);
    if as_json {
        print_json(&job)?;
        return Ok(ExitCode::SUCCESS);
    }
    let mut rows = table(&["job", &job.job_id]);
    rows.add_row(["state", &format!("{}: {}", job.state, job.detail)]);
    rows.add_row(["run", &format!("{}/{}", job.project, job.experiment)]);
    rows.add_row(["steps", &format!("{} of {}", job.step, job.total_steps)]);
    rows.add_row(["ranks", &job.ranks.to_string()]);
    rows.add_row(["time", &duration(job.seconds)]);
    rows.add_row(["folder", &job.run_dir]);
    for (name, value) in job.summary.iter().filter_map(|summary| summary.as_object()).flatten() {
        if !["job_id", "state", "detail", "project", "experiment", "run_dir"].contains(&name.as_str()) {
            rows.add_row([name, &value.to_string()]);
        }
    }
    println!("{rows}");
    println!("settings: {}/config.json, or `coordinator job show {} --json`", job.run_dir, job.job_id);
    Ok(ExitCode::SUCCESS)
}

async fn logs(args: &JobArgs) -> Outcome<ExitCode> {
    let mut events = client(args).await?.watch(args.id.clone(), 0).await?;
    while let Some(event) = events.message().await? {
        let line = match args.show.json {
            true => event_json(&event).map(|json| json.to_string()),
            false => event_line(&event),
        };
        if let Some(line) = line
            && writeln!(std::io::stdout(), "{line}").is_err()
        {
            // Whoever read our output has enough.
            return Ok(ExitCode::SUCCESS);
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// An event in a line; progress within a step has none.
pub(super) fn event_line(event: &pb::JobEvent) -> Option<String> {
    let text = match event.kind.as_ref()? {
        Kind::State(changed) => stated(&changed.state, &changed.detail),
        Kind::Step(report) => {
            let metrics = report.metrics.clone().into_iter().collect();
            format!("step {}/{}  {}", report.step, report.total_steps, step_line(&metrics))
        }
        Kind::Validation(report) => {
            let metrics = report.metrics.clone().into_iter().collect();
            format!("validation after step {}: {}", report.step, validation_line(&metrics))
        }
        Kind::Log(line) if line.level == "info" => line.text.clone(),
        Kind::Log(line) => format!("{}: {}", line.level, line.text),
        Kind::Ended(ended) => stated(&ended.state, &ended.detail),
        Kind::Progress(_) => return None,
    };
    Some(format!("{}  {text}", clock_time(event.unix_seconds)))
}

/// `12:34:56` UTC.
fn clock_time(unix_seconds: f64) -> String {
    let since = std::time::Duration::try_from_secs_f64(unix_seconds).unwrap_or_default();
    let time = humantime::format_rfc3339_seconds(std::time::UNIX_EPOCH + since).to_string();
    time.get(11..19).unwrap_or_default().to_owned()
}

fn event_json(event: &pb::JobEvent) -> Option<serde_json::Value> {
    let (kind, mut fields) = match event.kind.as_ref()? {
        Kind::State(changed) => ("state", json!({"state": changed.state, "detail": changed.detail})),
        Kind::Step(r) => {
            ("step", json!({"step": r.step, "total_steps": r.total_steps, "metrics": sorted(&r.metrics)}))
        }
        Kind::Validation(r) => ("validation", json!({"step": r.step, "metrics": sorted(&r.metrics)})),
        Kind::Progress(p) => {
            ("progress", json!({"phase": p.phase, "step": p.step, "done": p.done, "total": p.total}))
        }
        Kind::Log(line) => ("log", json!({"level": line.level, "text": line.text})),
        Kind::Ended(ended) => {
            let summary: Option<serde_json::Value> = serde_json::from_str(&ended.summary_json).ok();
            ("ended", json!({"state": ended.state, "detail": ended.detail, "summary": summary}))
        }
    };
    let fields = fields.as_object_mut()?;
    let mut all = serde_json::Map::new();
    all.insert("sequence".to_owned(), event.sequence.into());
    all.insert("time".to_owned(), event.unix_seconds.into());
    all.insert("kind".to_owned(), kind.into());
    all.append(fields);
    Some(all.into())
}

fn sorted(metrics: &std::collections::HashMap<String, f64>) -> std::collections::BTreeMap<&String, f64> {
    metrics.iter().map(|(name, value)| (name, *value)).collect()
}

/// A job's last event as the outcome of a command that waited for it.
pub(super) fn exit_of(ended: &pb::Ended) -> Outcome<ExitCode> {
    match (ended.state.as_str(), &ended.fault) {
        ("finished", _) => Ok(ExitCode::SUCCESS),
        ("cancelled", _) => Ok(ExitCode::from(super::CANCELLED)),
        (_, Some(fault)) => Err(Failure {
            whose: fault.whose().into(),
            error: anyhow::anyhow!("the job failed: {}", fault.message),
        }),
        (_, None) => Err(Failure::us(anyhow::anyhow!("the job failed: {}", ended.detail))),
    }
}

/// `state: detail`, without saying the state twice.
fn stated(state: &str, detail: &str) -> String {
    if detail.starts_with(state) { detail.to_owned() } else { format!("{state}: {detail}") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failure_with_many_last_words_does_not_break_the_table() {
        assert_eq!(in_a_cell("waiting for 2 CPU ranks"), "waiting for 2 CPU ranks");
        assert_eq!(in_a_cell("rank 0 failed\n  line two"), "rank 0 failed …");
        let wide = in_a_cell(&"é".repeat(300));
        assert_eq!((wide.chars().count(), wide.ends_with('…')), (CELL_CHARACTERS + 1, true));
    }
}
