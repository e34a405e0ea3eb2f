//! A job from submission to summary over real sockets: a head with its core, journal and recorder, and a worker
//! that is played here. The fake ranks follow the protocol; they know nothing of models.
#![expect(clippy::unwrap_used, reason = "a story that cannot go on has failed")]

mod cast;

use agentfly_coordinator::journal::{Journal, NewJob};
use agentfly_proto::v1 as pb;
use cast::{FakeWorker, World};
use pb::job_event::Kind;

#[tokio::test]
async fn a_two_step_job_runs_to_its_end_and_leaves_everything_on_disk() {
    let world = World::start().await;
    let worker = FakeWorker::join(&world, 2).await;
    let mut client = world.client().await;
    let job = client.submit(world.config_json(&[]), world.dir()).await.unwrap();
    assert_eq!((job.job_id.as_str(), job.total_steps), ("job-1", 2));

    let events = world.events_until_ended("job-1").await;
    let Some(Kind::Ended(ended)) = events.last().and_then(|event| event.kind.clone()) else {
        panic!("no end")
    };
    assert_eq!(ended.state, "finished", "{}", ended.detail);
    let sequences: Vec<u64> = events.iter().map(|event| event.sequence).collect();
    assert_eq!(sequences, (1..=events.len() as u64).collect::<Vec<_>>(), "without gaps");
    let steps = events.iter().filter(|event| matches!(event.kind, Some(Kind::Step(_)))).count();
    assert_eq!(steps, 2);

    let run = world.run_dir();
    let summary: serde_json::Value =
        serde_json::from_slice(&std::fs::read(run.join("summary.json")).unwrap()).unwrap();
    assert_eq!(
        (&summary["state"], &summary["steps"], &summary["policy_version"]),
        (&"finished".into(), &2.into(), &2.into())
    );
    assert_eq!((&summary["val_before"], &summary["val_after"]), (&0.5.into(), &0.5.into()));
    assert_eq!(summary["checkpoint_path"], run.join("checkpoints/global_step_2").to_string_lossy().as_ref());
    agentfly_coordinator::store::checkpoints::verify(&run.join("checkpoints/global_step_2")).unwrap();
    for file in ["step_000001", "step_000002", "val_step_000000", "val_step_000002"] {
        assert!(run.join(format!("trajectories/{file}.jsonl.zst")).is_file(), "{file}");
    }
    assert!(run.join("reward_curve.svg").is_file() && run.join("config.json").is_file());
    for step in [1, 2] {
        let text = std::fs::read_to_string(run.join(format!("trace/step_00000{step}.json"))).unwrap();
        let trace: serde_json::Value = serde_json::from_str(&text).unwrap();
        let spans = trace["traceEvents"].as_array().unwrap().iter().filter(|event| event["ph"] == "X");
        let names = |pid: u64| {
            let of = spans.clone().filter(move |span| span["pid"] == pid);
            of.map(|span| span["name"].as_str().unwrap().to_owned()).collect::<Vec<_>>()
        };
        for (pid, expected) in [(1, "advantages and shards"), (2, "rollout"), (3, "train")] {
            assert!(names(pid).iter().any(|name| name == expected), "{pid}: {text}");
        }
        assert!(names(1).contains(&format!("step {step}")), "{text}");
        let last = spans.map(|span| span["ts"].as_u64().unwrap()).max().unwrap();
        assert!(last < 600_000_000, "a clock that is an hour off was not put right: {text}");
    }
    let jobs = client.list().await.unwrap();
    assert_eq!((jobs[0].state.as_str(), jobs[0].step), ("finished", 2));
    let metrics = world.get("/metrics").await;
    assert!(metrics.contains("agentfly_cluster_sandbox_ranks{tier=\"root\"}"), "{metrics}");
    world.stop().await;
    worker.has_left().await;
}

#[tokio::test]
async fn a_cancelled_job_ends_and_its_ranks_are_told() {
    let world = World::start().await;
    let worker = FakeWorker::join_without_generating(&world, 2).await;
    let mut client = world.client().await;
    client.submit(world.config_json(&[]), world.dir()).await.unwrap();
    world.until_state("job-1", "running").await;
    client.cancel("job-1".into()).await.unwrap();
    let events = world.events_until_ended("job-1").await;
    let Some(Kind::Ended(ended)) = events.last().and_then(|event| event.kind.clone()) else {
        panic!("no end")
    };
    assert_eq!(ended.state, "cancelled");
    world.stop().await;
    worker.has_left().await;
}

#[tokio::test]
async fn a_node_that_vanishes_fails_its_job_with_its_name() {
    let world = World::start().await;
    let worker = FakeWorker::join_without_generating(&world, 2).await;
    let mut client = world.client().await;
    client.submit(world.config_json(&[]), world.dir()).await.unwrap();
    world.until_state("job-1", "running").await;
    worker.vanish();
    let events = world.events_until_ended("job-1").await;
    let Some(Kind::Ended(ended)) = events.last().and_then(|event| event.kind.clone()) else {
        panic!("no end")
    };
    assert_eq!(ended.state, "failed");
    assert!(ended.detail.contains("fake-node"), "{}", ended.detail);
    world.stop().await;
}

#[tokio::test]
async fn nobody_gets_in_without_the_token() {
    let world = World::start().await;
    let client = agentfly_coordinator::client::Client::connect(&world.address(), "wrong").await.unwrap();
    let refused = client.clone().list().await.unwrap_err().to_string();
    assert!(refused.contains("not the token of this head"), "{refused}");
    world.stop().await;
}

#[tokio::test]
async fn a_job_that_the_cluster_cannot_hold_is_refused_at_once() {
    let world = World::start().await;
    let worker = FakeWorker::join(&world, 1).await;
    let mut client = world.client().await;
    let refused = client.submit(world.config_json(&[]), world.dir()).await.unwrap_err();
    assert_eq!(refused.whose, agentfly_common::error::Whose::Operator, "{refused}");
    assert!(client.list().await.unwrap().is_empty());
    world.stop().await;
    worker.has_left().await;
}

#[tokio::test]
async fn jobs_outlive_their_head_and_one_that_was_running_is_marked_failed() {
    let world = World::start_after(|state| {
        let journal = Journal::open(state).unwrap();
        let new_job = NewJob {
            project: "p".into(),
            experiment: "e".into(),
            run_dir: state.to_owned(),
            checkpoint_dir: state.join("none"),
            config_json: "{}".into(),
            ranks: 1,
            step: 0,
            total_steps: 9,
        };
        let id = journal.add_job(&new_job).unwrap();
        let running = pb::StateChanged { state: "running".into(), detail: String::new() };
        journal.append(&id, Kind::State(running)).unwrap();
        // Here its head is killed.
    })
    .await;
    let jobs = world.client().await.list().await.unwrap();
    assert_eq!((jobs.len(), jobs[0].state.as_str()), (1, "failed"));
    assert!(jobs[0].detail.starts_with("the head ended while it ran; start it again"), "{}", jobs[0].detail);

    let worker = FakeWorker::join(&world, 2).await;
    let mut client = world.client().await;
    let next = client.submit(world.config_json(&[]), world.dir()).await.unwrap();
    assert_eq!(next.job_id, "job-2");
    world.events_until_ended("job-2").await;
    let world = world.restart().await;
    worker.has_left().await;
    let jobs = world.client().await.list().await.unwrap();
    assert_eq!(jobs.iter().map(|job| job.state.as_str()).collect::<Vec<_>>(), ["failed", "finished"]);
    world.stop().await;
}

#[tokio::test]
async fn a_run_that_is_started_again_resumes_and_keeps_its_past() {
    let world = World::start().await;
    let _worker = FakeWorker::join(&world, 2).await;
    let mut client = world.client().await;
    client.submit(world.config_json(&[]), world.dir()).await.unwrap();
    world.events_until_ended("job-1").await;
    let metrics = world.run_dir().join("metrics.jsonl");
    let before = std::fs::read_to_string(&metrics).unwrap();

    let more = ["trainer.total_training_steps=3", "trainer.val_before_train=False"];
    client.submit(world.config_json(&more), world.dir()).await.unwrap();
    let events = world.events_until_ended("job-2").await;
    let steps = events.iter().filter_map(|event| match &event.kind {
        Some(Kind::Step(report)) => Some((report.step, report.total_steps)),
        _ => None,
    });
    assert_eq!(steps.collect::<Vec<_>>(), [(3, 3)]);
    let after = std::fs::read_to_string(&metrics).unwrap();
    assert!(after.starts_with(&before) && after.len() > before.len(), "the past is kept:\n{before}\n{after}");
    let text = std::fs::read_to_string(world.run_dir().join("summary.json")).unwrap();
    let summary: serde_json::Value = serde_json::from_str(&text).unwrap();
    assert_eq!((&summary["resumed_after_step"], &summary["policy_version"]), (&2.into(), &3.into()));

    client.submit(world.config_json(&more), world.dir()).await.unwrap();
    let end = format!("{:?}", world.events_until_ended("job-3").await.last().unwrap());
    assert!(end.contains("nothing left to do: the run already has its 3 steps"), "{end}");
    assert_eq!(std::fs::read_to_string(world.run_dir().join("summary.json")).unwrap(), text, "untouched");

    client.submit(world.config_json(&["trainer.seed=2"]), world.dir()).await.unwrap();
    let events = format!("{:?}", world.events_until_ended("job-4").await);
    assert!(events.contains("trainer.seed was 1 and is 2") && events.contains("/one.1"), "{events}");
    let old = std::fs::read_to_string(world.run_dir().with_file_name("one.1").join("summary.json")).unwrap();
    assert_eq!(old, text, "the old run is kept as it was");
    world.stop().await;
}

#[tokio::test]
async fn the_web_pages_answer_on_the_loopback() {
    let world = World::start().await;
    assert!(world.get("/healthz").await.ends_with("ok\n"));
    let metrics = world.get("/metrics").await;
    assert!(metrics.contains("# HELP agentfly_cluster_nodes_alive"), "{metrics}");
    assert!(world.get("/api/jobs").await.ends_with("[]"));
    let status = world.get("/api/status").await;
    assert!(status.contains(&world.address()) && !status.contains(&world.token()), "{status}");
    world.stop().await;
}
