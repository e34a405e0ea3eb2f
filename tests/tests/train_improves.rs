//! The main job, whole: from a JSON file of questions to a better model, through real processes; then a
//! resume, a score of the checkpoint from outside, and what the run left for people.
#![allow(clippy::unwrap_used, reason = "a story that cannot go on fails here")]

use std::io::Write as _;
use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use agentfly_tests::cluster::Playground;
use agentfly_tests::job::{json, json_lines, settings};
use agentfly_tests::trace::Trace;
use serde_json::Value;

/// Generous: a loaded machine of two cores.
const LONG: Duration = Duration::from_secs(540);

fn number(summary: &Value, field: &str) -> f64 {
    summary[field].as_f64().unwrap_or_else(|| panic!("{field} is no number in {summary}"))
}

async fn train(playground: &Playground, more: &[&str]) -> String {
    let all = settings(more);
    let args: Vec<&str> = all.iter().map(String::as_str).collect();
    playground.succeed("coordinator", &args, LONG).await.unwrap().stdout
}

#[tokio::test]
async fn a_job_makes_the_model_better_and_resumes() {
    let playground = Playground::new().unwrap();
    let run = playground.path().join("runs/test/run");
    train(&playground, &["trainer.total_training_steps=40"]).await;

    let summary = json(&run.join("summary.json")).unwrap();
    let (before, after) = (number(&summary, "val_before"), number(&summary, "val_after"));
    assert!(after >= before + 0.4, "validation accuracy went from {before} to {after}");
    assert_eq!(summary["steps"], 40);
    let metrics = json_lines(&run.join("metrics.jsonl")).unwrap();
    let steps = metrics.iter().filter(|line| line.get("critic/score/mean").is_some());
    assert_eq!(steps.count(), 40);
    let gap = |line: &Value| line.get("training/rollout_probs_diff_max").and_then(Value::as_f64);
    let gaps: Vec<f64> = metrics.iter().filter_map(gap).collect();
    assert_eq!(gaps.len(), 40);
    assert!(gaps.iter().all(|gap| *gap < 1e-3), "rollout and learner disagree: {gaps:?}");
    assert!(std::fs::read_to_string(run.join("reward_curve.svg")).unwrap().contains("<svg"));
    for name in
        ["config.json", "trajectories/step_000040.jsonl.zst", "trajectories/val_step_000000.jsonl.zst"]
    {
        assert!(run.join(name).exists(), "{name} is missing");
    }
    assert_traces(&run.join("trace"));
    let checkpoint = Path::new(summary["checkpoint_path"].as_str().unwrap()).to_path_buf();
    assert_scores(&playground, &checkpoint.join("huggingface")).await;

    train(&playground, &["trainer.total_training_steps=41"]).await;
    let resumed = json(&run.join("summary.json")).unwrap();
    assert_eq!((resumed["steps"].as_u64(), resumed["resumed_after_step"].as_u64()), (Some(41), Some(40)));
    assert_nothing_runs(&playground);
}

/// Every step left a trace that nests and leaves little of its time unexplained.
fn assert_traces(traces: &Path) {
    assert_eq!(std::fs::read_dir(traces).unwrap().count(), 41, "40 steps and what came before");
    for step in [1, 20, 40] {
        let trace = Trace::read(&traces.join(format!("step_{step:06}.json"))).unwrap();
        assert_eq!(trace.overlap(), None, "step {step}");
        let whole = trace.find("coordinator", &format!("step {step}")).unwrap();
        for (process, name) in [
            ("coordinator", "rollout"),
            ("coordinator", "advantages and shards"),
            ("coordinator", "train"),
            ("coordinator", "keep the chains"),
            ("rank 0", "rollout"),
            ("rank 1", "prefill and decode"),
            ("rank 0", "decode"),
            ("rank 1", "wait for the engine"),
            ("rank 0", "generate"),
            ("rank 0", "code_interpreter"),
            ("rank 1", "reward"),
            ("rank 0", "upload"),
            ("rank 1", "fetch the batch"),
            ("rank 0", "reference"),
            ("rank 1", "old log-probs"),
            ("rank 0", "forward and backward"),
            ("rank 1", "sum the gradients"),
            ("rank 0", "optimizer"),
            ("rank 1", "gather the weights"),
            ("rank 0", "hash the weights"),
        ] {
            assert!(trace.find(process, name).is_some(), "step {step} shows no `{name}` of {process}");
        }
        let phases = trace.covered(whole, |span| span.lane == "job" && span.name != whole.name);
        let ranks = trace.covered(whole, |span| span.process != "coordinator");
        assert!(phases > 0.999 && ranks > 0.9, "step {step}: {phases} of it in phases, {ranks} on ranks");
    }
    let last = Trace::read(&traces.join("step_000040.json")).unwrap();
    for (process, name) in [
        ("coordinator", "validation"),
        ("coordinator", "commit the checkpoint"),
        ("rank 0", "write the model"),
        ("rank 1", "write the optimizer's state"),
    ] {
        assert!(last.find(process, name).is_some(), "the last step shows no `{name}` of {process}");
    }
    let start = Trace::read(&traces.join("start.json")).unwrap();
    for name in ["load the model", "start the sandbox", "join the group", "validation"] {
        assert!(start.find("rank 1", name).is_some(), "the start shows no `{name}`");
    }
}

/// `worker score` reads the checkpoint and gives log-probs: none for the first id, then numbers ≤ 0.
async fn assert_scores(playground: &Playground, model: &Path) {
    let model = model.display().to_string();
    let mut scorer = playground.command("worker", &["score", "--model", &model]);
    let child = scorer.stdin(Stdio::from(line_of("{\"ids\":[5,9,200,17]}\n"))).output();
    let output = tokio::time::timeout(Duration::from_secs(60), child).await.unwrap().unwrap();
    let scored: Value = serde_json::from_slice(&output.stdout).unwrap();
    let log_probs = scored["logprobs"].as_array().unwrap();
    assert_eq!((log_probs.len(), &log_probs[0]), (4, &Value::Null));
    assert!(log_probs[1..].iter().all(|l| l.as_f64().is_some_and(|l| l.is_finite() && l <= 0.0)), "{scored}");
}

fn line_of(text: &str) -> std::fs::File {
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(text.as_bytes()).unwrap();
    std::io::Seek::rewind(&mut file).unwrap();
    file
}

/// No process of the playground is left.
fn assert_nothing_runs(playground: &Playground) {
    let left = playground.leftovers();
    assert!(left.is_empty(), "still running: {left:?}");
}

#[tokio::test]
async fn with_a_learning_rate_of_zero_nothing_is_learned() {
    let playground = Playground::new().unwrap();
    let more =
        ["actor_rollout_ref.actor.optim.lr=0", "trainer.total_training_steps=3", "data.val_max_samples=64"];
    train(&playground, &more).await;
    let summary = json(&playground.path().join("runs/test/run/summary.json")).unwrap();
    // The same weights answer the same; a tie broken otherwise in another batch may turn one of the 64.
    let change = number(&summary, "val_after") - number(&summary, "val_before");
    assert!(change.abs() <= 1.0 / 64.0 + 1e-9, "accuracy changed by {change} without learning");
    assert_nothing_runs(&playground);
}

#[tokio::test]
async fn a_rank_alone_trains_as_well() {
    let playground = Playground::new().unwrap();
    let more = [
        "trainer.n_gpus_per_node=1",
        "trainer.total_training_steps=1",
        "trainer.val_before_train=False",
        "data.train_batch_size=4",
        "actor_rollout_ref.actor.ppo_mini_batch_size=4",
        "data.val_max_samples=4",
    ];
    // Its first command comes as soon as it says that it is ready: a rank that is not quite is found by some.
    for experiment in ["first", "second", "third"] {
        let name = format!("trainer.experiment_name={experiment}");
        train(&playground, &[&more[..], &[&name]].concat()).await;
        let summary = json(&playground.path().join(format!("runs/test/{experiment}/summary.json"))).unwrap();
        assert_eq!((summary["steps"].as_u64(), summary["policy_version"].as_u64()), (Some(1), Some(1)));
    }
    assert_nothing_runs(&playground);
}
