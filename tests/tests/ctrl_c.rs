//! Ctrl-C frees everything, in the middle of work, and a second start works at once.
#![allow(clippy::unwrap_used, reason = "a story that cannot go on fails here")]

use std::time::Duration;

use agentfly_tests::cluster::Playground;
use agentfly_tests::job::settings;
use rustix::process::{Pid, Signal, kill_process};
use tokio::io::{AsyncBufReadExt as _, BufReader};

#[tokio::test]
async fn ctrl_c_in_the_middle_of_training_leaves_nothing_behind() {
    let playground = Playground::new().unwrap();
    let all = settings(&["trainer.total_training_steps=40", "trainer.val_before_train=False"]);
    let args: Vec<&str> = all.iter().map(String::as_str).collect();
    let mut job = playground.command("coordinator", &args).spawn().unwrap();
    let mut lines = BufReader::new(job.stdout.take().unwrap()).lines();
    let first_step = async {
        while let Some(line) = lines.next_line().await.unwrap() {
            if line.contains("step 1") {
                return line;
            }
        }
        panic!("it ended before its first step");
    };
    tokio::time::timeout(Duration::from_secs(180), first_step).await.unwrap();
    let pid = Pid::from_raw(i32::try_from(job.id().unwrap()).unwrap()).unwrap();
    kill_process(pid, Signal::INT).unwrap();
    let status = tokio::time::timeout(Duration::from_secs(20), job.wait()).await.unwrap().unwrap();
    assert_eq!(status.code(), Some(130));
    let left = playground.leftovers();
    assert!(left.is_empty(), "still running: {left:?}");
    let runtime = std::fs::read_dir(playground.path().join("runtime")).unwrap().flatten();
    let files: Vec<_> = runtime.map(|entry| entry.file_name()).filter(|name| name == "head.json").collect();
    assert!(files.is_empty(), "the head's address is still there");
    playground.succeed("coordinator", &["stop"], Duration::from_secs(20)).await.unwrap();
}
