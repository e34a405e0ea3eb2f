//! What a person gets wrong is said at once, with the value and what to do, before any work starts.
#![allow(clippy::unwrap_used, reason = "a story that cannot go on fails here")]

use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use agentfly_tests::cluster::{Playground, Ran};
use agentfly_tests::job::{json, settings};
use agentfly_tests::tree::root;
use tokio::io::AsyncWriteExt as _;

const SOON: Duration = Duration::from_secs(30);

/// The job with these settings must be refused; what was said.
async fn refused(more: &[&str]) -> String {
    refused_in(&Playground::new().unwrap(), more).await
}

async fn refused_in(playground: &Playground, more: &[&str]) -> String {
    let all = settings(more);
    let args: Vec<&str> = all.iter().map(String::as_str).collect();
    let Ran { code, stdout, stderr } = playground.run("coordinator", &args, SOON).await.unwrap();
    assert!(code.is_some_and(|code| code != 0), "it was not refused: {stderr}");
    assert!(!stdout.contains("starting"), "a head was started: {stdout}");
    assert!(!playground.path().join("runs").exists(), "something was started");
    let started = std::fs::read_dir(playground.path().join("runtime")).unwrap().count();
    assert_eq!(started, 0, "a head was there");
    stderr
}

/// What is said of a job on the tiny model after `change` in a copy of its folder.
async fn refused_model(more: &[&str], change: impl FnOnce(&Path)) -> String {
    let playground = Playground::new().unwrap();
    let model = playground.path().join("model");
    std::fs::create_dir(&model).unwrap();
    for entry in std::fs::read_dir(root().join("deploy/models/tiny")).unwrap() {
        let entry = entry.unwrap();
        std::fs::copy(entry.path(), model.join(entry.file_name())).unwrap();
    }
    change(&model);
    let mut all = vec!["actor_rollout_ref.model.path=model", "agent.model_name_or_path=model"];
    all.extend(more);
    refused_in(&playground, &all).await
}

/// `worker score` on the tiny model with this on its standard input.
async fn score(lines: &str) -> Ran {
    let playground = Playground::new().unwrap();
    let model = root().join("deploy/models/tiny").display().to_string();
    let mut command = playground.command("worker", &["score", "--model", &model]);
    let mut child = command.stdin(Stdio::piped()).spawn().unwrap();
    // The worker may be gone before it read everything: what it said of that is what counts.
    let _gone = child.stdin.take().unwrap().write_all(lines.as_bytes()).await;
    tokio::time::timeout(SOON, child.wait_with_output()).await.unwrap().unwrap().into()
}

#[track_caller]
fn assert_says(said: &str, words: &[&str]) {
    for word in words {
        assert!(said.contains(word), "{word:?} is not in: {said}");
    }
}

#[tokio::test]
async fn an_unknown_key_is_answered_with_the_nearest_known_one() {
    assert_says(
        &refused(&["trainer.total_training_step=3"]).await,
        &["total_training_step", "total_training_steps"],
    );
}

#[tokio::test]
async fn a_batch_that_does_not_divide_is_explained_with_its_numbers() {
    let said = refused(&["actor_rollout_ref.actor.ppo_mini_batch_size=100"]).await;
    assert_says(&said, &["100", "128"]);
}

#[tokio::test]
async fn a_model_that_is_not_there_is_named() {
    let said =
        refused(&["actor_rollout_ref.model.path=/nowhere/model", "agent.model_name_or_path=/nowhere/model"])
            .await;
    assert_says(&said, &["/nowhere/model"]);
}

#[tokio::test]
async fn a_weights_file_that_was_cut_short_is_named_before_anything_starts() {
    let said = refused_model(&[], |model| {
        let file = std::fs::OpenOptions::new().write(true).open(model.join("model.safetensors")).unwrap();
        file.set_len(file.metadata().unwrap().len() - 4).unwrap();
    });
    assert_says(&said.await, &["model/model.safetensors: is cut short: tensor `"]);
}

#[tokio::test]
async fn a_tensor_that_is_missing_is_named_with_its_shape_before_anything_starts() {
    let said = refused_model(&[], |model| {
        // One block more than the weights have.
        let mut config = json(&model.join("config.json")).unwrap();
        config["num_hidden_layers"] = 5.into();
        std::fs::write(model.join("config.json"), config.to_string()).unwrap();
    });
    assert_says(&said.await, &["tensor `model.layers.4.input_layernorm.weight` [128] is missing"]);
}

#[tokio::test]
async fn an_architecture_that_is_not_supported_is_named_with_those_that_are() {
    let said = refused_model(&[], |model| {
        let mut config = json(&model.join("config.json")).unwrap();
        config["architectures"] = serde_json::json!(["GemmaForCausalLM"]);
        std::fs::write(model.join("config.json"), config.to_string()).unwrap();
    });
    assert_says(&said.await, &["GemmaForCausalLM", "not supported", "Qwen2ForCausalLM"]);
}

#[tokio::test]
async fn chains_longer_than_the_model_was_trained_for_are_refused_with_both_numbers() {
    let said = refused_model(&["actor_rollout_ref.rollout.max_model_len=4096"], |_| ()).await;
    assert_says(&said, &["max_model_len=4096", "trained for 1024 tokens", "max_position_embeddings"]);
}

#[tokio::test]
async fn ids_that_cannot_be_scored_are_refused_by_line_with_both_numbers() {
    let long = vec!["1"; 1025].join(",");
    for (line, words) in [
        (r#"{"ids":[1,896]}"#.to_owned(), ["id 896", "vocabulary's 896"]),
        (format!(r#"{{"ids":[{long}]}}"#), ["1025", "1024"]),
        (r#"{"ids":[1,-1]}"#.to_owned(), ["ids", "-1"]),
    ] {
        let ran = score(&format!("{{\"ids\":[1,2,3]}}\n\n{line}\n")).await;
        assert!(ran.code.is_some_and(|code| code != 0), "{}", ran.stdout);
        assert_says(&ran.stderr, &["line 3"]);
        assert_says(&ran.stderr, &words);
        assert_eq!(ran.stdout.lines().count(), 1, "the line before was scored: {}", ran.stdout);
    }
}

#[tokio::test]
async fn a_prompt_that_leaves_no_room_for_an_answer_is_refused_with_both_numbers() {
    let playground = Playground::new().unwrap();
    let model = root().join("deploy/models/tiny").display().to_string();
    let prompt = "1 + 2 = ? ".repeat(400);
    let args = ["generate", "--model", &model, "--prompt", &prompt];
    let ran = playground.run("worker", &args, SOON).await.unwrap();
    assert!(ran.code.is_some_and(|code| code != 0), "{}", ran.stdout);
    assert_says(&ran.stderr, &["the prompt has ", "trained for 1024", "shorten the prompt"]);
}

#[tokio::test]
async fn a_row_without_an_answer_is_named_by_file_row_and_field() {
    let playground = Playground::new().unwrap();
    let file = playground.path().join("bad.json");
    std::fs::write(&file, r#"[{"question":"1+1?","answer":"2"},{"question":"2+2?"}]"#).unwrap();
    let said = refused(&[&format!("data.train_files={}", file.display())]).await;
    assert_says(&said, &["bad.json", "row 2", "answer"]);
}

#[tokio::test]
async fn what_cannot_fit_this_machine_is_refused_with_the_numbers() {
    let told = refused(&["actor_rollout_ref.actor.ppo_max_token_len_per_gpu=1000000000"]).await;
    assert_says(
        &told,
        &["not enough memory", "which 2 ranks share", "1000000000 tokens", "What fits: leave"],
    );
}

#[tokio::test]
async fn more_gpus_than_there_are_are_refused_with_the_numbers() {
    let playground = Playground::new().unwrap();
    let ran = playground
        .run("coordinator", &["--head", "--port", "0", "--http-port", "0", "--num-gpus", "8"], SOON)
        .await;
    let Ran { code, stderr, .. } = ran.unwrap();
    assert_ne!(code, Some(0));
    assert_says(&stderr, &["--num-gpus 8"]);
}

#[tokio::test]
async fn stop_never_fails_when_nothing_runs() {
    let playground = Playground::new().unwrap();
    playground.succeed("coordinator", &["stop"], SOON).await.unwrap();
    let ran = playground.succeed("coordinator", &["status", "--json"], SOON).await.unwrap();
    assert!(ran.stdout.contains('{'), "{}", ran.stdout);
}

#[tokio::test]
async fn explain_puts_the_batch_arithmetic_in_words() {
    let playground = Playground::new().unwrap();
    let mut all = settings(&[]);
    all[0] = "explain".to_owned();
    let args: Vec<&str> = all.iter().map(String::as_str).collect();
    let ran = playground.succeed("coordinator", &args, SOON).await.unwrap();
    assert_says(&ran.stdout, &["16 prompts × 8 chains = 128 chains a step"]);
}
