//! What a person gets wrong is said at once, with the value and what to do, before any work starts.
#![allow(clippy::unwrap_used, reason = "a story that cannot go on fails here")]

use std::time::Duration;

use agentfly_tests::cluster::{Playground, Ran};
use agentfly_tests::job::settings;

const SOON: Duration = Duration::from_secs(30);

/// The job with these settings must be refused; what was said.
async fn refused(more: &[&str]) -> String {
    let playground = Playground::new().unwrap();
    let all = settings(more);
    let args: Vec<&str> = all.iter().map(String::as_str).collect();
    let Ran { code, stderr, .. } = playground.run("coordinator", &args, SOON).await.unwrap();
    assert!(code.is_some_and(|code| code != 0), "it was not refused: {stderr}");
    assert!(!playground.path().join("runs").exists(), "something was started");
    stderr
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
async fn a_row_without_an_answer_is_named_by_file_row_and_field() {
    let playground = Playground::new().unwrap();
    let file = playground.path().join("bad.json");
    std::fs::write(&file, r#"[{"question":"1+1?","answer":"2"},{"question":"2+2?"}]"#).unwrap();
    let said = refused(&[&format!("data.train_files={}", file.display())]).await;
    assert_says(&said, &["bad.json", "row 2", "answer"]);
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
