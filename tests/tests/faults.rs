//! Processes that die in the middle of a job: who it was is said, everything else goes on, and the job resumes.
#![allow(clippy::unwrap_used, reason = "a story that cannot go on fails here")]

use std::collections::BTreeMap;
use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use agentfly_tests::cluster::Playground;
use agentfly_tests::job::{json, settings, zstd_json_lines};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, BufReader};
use tokio::process::Child;

/// Generous: a loaded machine of two cores.
const LONG: Duration = Duration::from_secs(300);

/// Six steps, a checkpoint every two, no validation.
fn six_steps(experiment: &str) -> Vec<String> {
    settings(&[
        "trainer.total_training_steps=6",
        "trainer.save_freq=2",
        "trainer.test_freq=0",
        "trainer.val_before_train=False",
        "data.val_max_samples=8",
        &format!("trainer.experiment_name={experiment}"),
    ])
}

fn kill(pid: u32) {
    let pid = Pid::from_raw(i32::try_from(pid).unwrap()).unwrap();
    kill_process(pid, Signal::KILL).unwrap();
}

/// Starts the job and returns when it has said `words`.
async fn train_until(playground: &Playground, settings: &[String], words: &str) -> Child {
    let args: Vec<&str> = settings.iter().map(String::as_str).collect();
    let mut job = playground.command("coordinator", &args).stdout(Stdio::piped()).spawn().unwrap();
    let mut lines = BufReader::new(job.stdout.take().unwrap()).lines();
    let said = async {
        while let Some(line) = lines.next_line().await.unwrap() {
            if line.contains(words) {
                // Whatever else it prints is read away, so that it never waits for a reader.
                let mut rest = lines.into_inner();
                tokio::spawn(async move { rest.read_to_end(&mut Vec::new()).await });
                return;
            }
        }
        panic!("it ended before it said `{words}`");
    };
    tokio::time::timeout(LONG, said).await.unwrap();
    job
}

/// What the job complains of when it ends, which it must, with a failure.
async fn complaint(mut job: Child) -> String {
    let mut stderr = job.stderr.take().unwrap();
    let mut text = String::new();
    let ended = async {
        stderr.read_to_string(&mut text).await.unwrap();
        job.wait().await.unwrap()
    };
    let status = tokio::time::timeout(Duration::from_secs(90), ended).await.unwrap();
    assert!(!status.success(), "it ended well");
    text
}

/// Nodes that live.
async fn alive(playground: &Playground) -> usize {
    let nodes = playground.ask(&["nodes", "--json"]).await.unwrap();
    nodes.as_array().unwrap().iter().filter(|node| node["state"] == "alive").count()
}

async fn until_a_node_lives(playground: &Playground) {
    let mut look = tokio::time::interval(Duration::from_millis(200));
    let lives = async {
        while alive(playground).await == 0 {
            look.tick().await;
        }
    };
    tokio::time::timeout(Duration::from_secs(60), lives).await.unwrap();
}

/// The token ids of each chain of a step.
fn chains(run: &Path, step: u64) -> BTreeMap<String, Value> {
    let lines = zstd_json_lines(&run.join(format!("trajectories/step_{step:06}.jsonl.zst"))).unwrap();
    let name = |line: &Value| ["row", "group", "chain"].map(|field| line[field].to_string()).join("/");
    lines.into_iter().map(|line| (name(&line), line["token_ids"].clone())).collect()
}

#[tokio::test]
async fn a_killed_rank_is_named_a_killed_worker_comes_back_and_the_job_goes_on_as_if_nothing_had_been() {
    let playground = Playground::new().unwrap();
    playground.start_head().await.unwrap();
    let run = playground.path().join("runs/test");

    // A rank dies: the job says which one and how, and the node and its other processes are fine.
    let job = train_until(&playground, &six_steps("shaken"), "step 3/6").await;
    let ranks = playground.processes("worker", "rank");
    assert_eq!(ranks.len(), 2, "{ranks:?}");
    kill(ranks[1]);
    let complaint_of_rank = complaint(job).await;
    assert!(complaint_of_rank.contains("is gone: was killed (signal 9"), "{complaint_of_rank}");
    assert_eq!(alive(&playground).await, 1);

    // The worker dies: its ranks go with it, the head lives and starts it again.
    let job = train_until(&playground, &six_steps("shaken"), "step 5/6").await;
    let workers = playground.processes("worker", "--join");
    assert_eq!(workers.len(), 1, "{workers:?}");
    kill(workers[0]);
    let complaint_of_worker = complaint(job).await;
    assert!(complaint_of_worker.contains("is lost, and rank 0, 1 with it"), "{complaint_of_worker}");
    until_a_node_lives(&playground).await;

    // The third start ends the job; an undisturbed one is the measure.
    for experiment in ["shaken", "calm"] {
        let all = six_steps(experiment);
        let args: Vec<&str> = all.iter().map(String::as_str).collect();
        playground.succeed("coordinator", &args, LONG).await.unwrap();
    }
    let summary = json(&run.join("shaken/summary.json")).unwrap();
    assert_eq!((summary["steps"].as_u64(), summary["resumed_after_step"].as_u64()), (Some(6), Some(4)));
    for step in [3, 5] {
        let (shaken, calm) = (chains(&run.join("shaken"), step), chains(&run.join("calm"), step));
        assert!(shaken.keys().eq(calm.keys()), "step {step} asked other questions");
        let same = shaken.iter().filter(|(chain, ids)| calm[*chain] == **ids).count();
        eprintln!("step {step}: {same} of {} chains are the same", shaken.len());
        // Batches form as tools answer, and another batch may round another way: a few chains may differ.
        assert!(
            same * 10 >= shaken.len() * 8,
            "step {step}: only {same} of {} chains are the same",
            shaken.len()
        );
    }

    playground.succeed("coordinator", &["stop"], Duration::from_secs(30)).await.unwrap();
    let left = playground.leftovers();
    assert!(left.is_empty(), "still running: {left:?}");
}
