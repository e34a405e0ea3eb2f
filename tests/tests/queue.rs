//! A head with more jobs than seats: who waits is told why, can be cancelled, and what cannot run leaves nothing.
#![allow(clippy::unwrap_used, reason = "a story that cannot go on fails here")]

use std::time::Duration;

use agentfly_tests::cluster::{Playground, Ran};
use agentfly_tests::job::settings;

const SOON: Duration = Duration::from_secs(60);

/// Submits a job and leaves it to the head.
async fn submit(playground: &Playground, experiment: &str, more: &[&str]) -> Ran {
    let name = format!("trainer.experiment_name={experiment}");
    let mut all = settings(&[&["trainer.total_training_steps=40", name.as_str()], more].concat());
    all.push("--detach".to_owned());
    let args: Vec<&str> = all.iter().map(String::as_str).collect();
    playground.run("coordinator", &args, SOON).await.unwrap()
}

/// What `job show` says of a job's state and doing.
async fn shown(playground: &Playground, job: &str) -> (String, String) {
    let job = playground.ask(&["job", "show", job, "--json"]).await.unwrap();
    (job["state"].as_str().unwrap().to_owned(), job["detail"].as_str().unwrap().to_owned())
}

#[tokio::test]
async fn jobs_wait_for_seats_are_cancelled_and_are_refused_without_a_trace() {
    let playground = Playground::new().unwrap();
    playground.start_head().await.unwrap();
    let runs = playground.path().join("runs/test");

    let refused = submit(&playground, "large", &["trainer.n_gpus_per_node=4"]).await;
    assert_ne!(refused.code, Some(0), "{}", refused.stdout);
    assert!(refused.stderr.contains("4 ranks need 4 CPU seats"), "{}", refused.stderr);
    assert!(!runs.exists(), "a job that was refused left its folder");

    assert_eq!(submit(&playground, "first", &[]).await.code, Some(0));
    assert_eq!(submit(&playground, "second", &[]).await.code, Some(0));
    let (state, detail) = shown(&playground, "job-2").await;
    assert_eq!(state, "queued");
    assert!(detail.contains("waiting for devices: 0 of 2"), "{detail}");

    // What a job does right now, not what it last announced: the first chains of its validation arrive.
    let mut look = tokio::time::interval(Duration::from_millis(200));
    let chains_arrive = async {
        while !shown(&playground, "job-1").await.1.starts_with("step 0 of 40: validation, ") {
            look.tick().await;
        }
    };
    tokio::time::timeout(SOON, chains_arrive).await.unwrap();

    // Cancelling waits for the end, of one that waits and of one that runs.
    for job in ["job-2", "job-1"] {
        let ran = playground.succeed("coordinator", &["job", "cancel", job], SOON).await.unwrap();
        assert!(ran.stdout.starts_with(&format!("{job} is cancelled")), "{}", ran.stdout);
        assert_eq!(shown(&playground, job).await.0, "cancelled");
    }
    assert!(playground.processes("worker", "rank").is_empty(), "ranks of a cancelled job");

    playground.succeed("coordinator", &["stop"], Duration::from_secs(30)).await.unwrap();
    let left = playground.leftovers();
    assert!(left.is_empty(), "still running: {left:?}");
}
