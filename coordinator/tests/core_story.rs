//! Stories of single jobs: what the core decides, in order, and in which words it fails.
#![allow(clippy::unwrap_used, reason = "helpers of tests fail by panicking")]

mod core_world;
#[path = "core_story/strangers.rs"]
mod strangers;
#[path = "core_story/waits.rs"]
mod waits;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

use agentfly_common::error::Whose;
use agentfly_common::ids::{ChainKey, PolicyVersion, Purpose};
use agentfly_common::trajectory::{FinishReason, Outcome, Trajectory};
use agentfly_coordinator::core::event::{CoreFault, Event, JobState, RankId, ResumePoint};
use agentfly_coordinator::data::Cursor;
use core_world::{Temper, World, chain, config, job, settings};

const LONG: Duration = Duration::from_secs(2000);

/// Compares with `tests/golden/<name>`; `UPDATE_GOLDEN=1` rewrites the file, and the diff shows the change.
fn assert_golden(name: &str, got: &str) {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(name);
    if std::env::var_os("UPDATE_GOLDEN").is_some() {
        return std::fs::write(&path, got).unwrap();
    }
    let want = std::fs::read_to_string(&path).unwrap_or_default();
    assert!(
        want == got,
        "{} differs; if that is meant, run with UPDATE_GOLDEN=1 and read the diff\n{got}",
        path.display()
    );
}

fn two_ranks(overrides: &[&str]) -> agentfly_common::config::Config {
    config(&[&["trainer.n_gpus_per_node=2"], overrides].concat())
}

#[test]
fn two_ranks_train_three_steps() {
    let mut world = World::new(1, Temper::default());
    world.add_node("node-a", 2);
    let config = two_ranks(&["trainer.val_before_train=True", "trainer.test_freq=2", "trainer.save_freq=2"]);
    world.submit("job-1", job(config, 2));
    world.run(LONG);
    let without_progress = |line: &&String| !line.contains("Rollout of") && !line.contains("Validation of");
    let lines: Vec<String> = world.lines.iter().filter(without_progress).cloned().collect();
    assert_golden("core_happy_story.txt", &(lines.join("\n") + "\n"));
}

#[test]
fn a_rank_that_dies_is_named_with_its_last_words_and_the_others_are_stopped() {
    let mut world = World::new(1, Temper { slowness: 4.0, ..Temper::default() });
    world.add_node("node-a", 2);
    world.submit("job-1", job(two_ranks(&[]), 0));
    let rank = RankId { job: "job-1".to_owned(), rank: 1, incarnation: 1 };
    let cause = "was ended by signal 9; its last words: loading the model".to_owned();
    world.apply(Event::RankExited { rank, cause });
    world.run(LONG);
    let end = &world.ended["job-1"];
    assert_eq!(end.state, JobState::Failed);
    assert_eq!(
        end.detail,
        "rank 1 on node node-a is gone: was ended by signal 9; its last words: loading the model"
    );
    assert!(
        world.lines.iter().any(|line| line.starts_with("stop ranks of job-1 on node-a")),
        "{:?}",
        world.lines
    );
}

#[test]
fn who_is_waited_for_is_named_with_what_it_does() {
    let mut world = World::new(1, Temper { hang: 1.0, ..Temper::default() });
    world.add_node("node-a", 1);
    world.submit("job-1", job(config(&["trainer.n_gpus_per_node=1"]), 0));
    world.run(LONG);
    assert_eq!(
        world.ended["job-1"].detail,
        "starting took longer than trainer.startup_timeout_seconds=60: waiting for rank 0 to join; it has been in \
         all_reduce for 65 s (last heard 65 s ago)"
    );
}

#[test]
fn the_next_job_starts_when_seats_are_free_and_one_that_cannot_fit_holds_up_nobody() {
    let mut world = World::new(1, Temper { slowness: 2.0, ..Temper::default() });
    world.add_node("node-a", 2);
    world.submit("large", job(config(&["trainer.n_gpus_per_node=4"]), 0));
    world.submit("first", job(two_ranks(&[]), 0));
    world.submit("second", job(two_ranks(&[]), 0));
    world.run(LONG);
    let of = |start: &str| world.lines.iter().position(|line| line.starts_with(start)).unwrap();
    assert!(of("first ended Finished") < of("start second/0"), "{:#?}", world.lines);
    assert!(of("large is Queued: waiting for nodes: 4 ranks need 4 CPU seats") < of("start first/0"));
    assert_eq!(world.ended["second"].state, JobState::Finished);
    let end = &world.ended["large"];
    assert_eq!((end.state, end.fault.as_ref().unwrap().whose), (JobState::Failed, Whose::Outside));
    assert_eq!(
        end.detail,
        "queued without a place for longer than trainer.startup_timeout_seconds=60: waiting for nodes: 4 ranks need 4 \
         CPU seats and the cluster has 2 (node-a has 2); start workers with 2 more, or lower trainer.n_gpus_per_node × \
         trainer.nnodes"
    );
}

#[test]
fn a_queued_job_waits_for_other_jobs_without_limit_and_for_a_node_anew_each_time_it_leaves() {
    let mut world = World::new(1, Temper { hang: 1.0, ..Temper::default() });
    let node = "node-a".to_owned();
    world.add_node(&node, 2);
    let forever = two_ranks(&["trainer.startup_timeout_seconds=100000"]);
    world.submit("holds the seats", job(forever.clone(), 0));
    world.submit("next", job(forever, 0));
    world.submit("queued", job(two_ranks(&[]), 0));
    let wait = |world: &mut World, seconds| {
        world.now += Duration::from_secs(seconds);
        world.apply(Event::NodeHeard { node: node.clone() });
        world.apply(Event::Tick);
    };
    wait(&mut world, 1000);
    assert!(world.ended.is_empty(), "others have the seats: {:?}", world.ended);
    for ended in [1, 2] {
        world.apply(Event::NodeLeft { node: node.clone(), cause: "its session ended".to_owned() });
        world.now += Duration::from_secs(50);
        world.apply(Event::Tick);
        world.add_node(&node, 2);
        wait(&mut world, 5);
        assert_eq!(world.ended.len(), ended, "only jobs that ran on the node: {:?}", world.ended);
    }
    assert!(world.lines.iter().any(|line| line.starts_with("start queued/0")), "{:#?}", world.lines);
}

#[test]
fn a_queued_job_whose_node_is_gone_for_good_ends() {
    let mut world = World::new(1, Temper { hang: 1.0, ..Temper::default() });
    world.add_node("node-a", 2);
    world.submit("first", job(two_ranks(&[]), 0));
    world.submit("second", job(two_ranks(&[]), 0));
    world.apply(Event::NodeLeft { node: "node-a".to_owned(), cause: "its session ended".to_owned() });
    assert_eq!(world.ended.len(), 1, "the first job was there: {:?}", world.ended);
    for _ in 0..2 {
        assert!(!world.ended.contains_key("second"));
        world.now += Duration::from_secs(31);
        world.apply(Event::Tick);
    }
    let detail = &world.ended["second"].detail;
    assert!(
        detail.contains("2 ranks need 2 CPU seats and the cluster has 0 (no node has joined)"),
        "{detail}"
    );
}

#[test]
fn a_resumed_job_goes_on_where_the_checkpoint_stands() {
    let resume = |step| {
        let cursor = Cursor { epoch: 0, position: 2 };
        let (dir, weights_hash) = ("global_step_1".into(), "saved".to_owned());
        Some(ResumePoint { dir, step, policy_version: PolicyVersion(step), weights_hash, cursor })
    };
    let mut world = World::new(1, Temper::default());
    world.add_node("node-a", 2);
    world.state.apply(world.now, Event::Tick);
    let mut spec = job(config(&["trainer.n_gpus_per_node=1", "trainer.total_training_steps=3"]), 0);
    spec.resume = resume(3);
    let done = world
        .state
        .apply(world.now, Event::JobSubmitted { job: "done".to_owned(), spec: Box::new(spec.clone()) });
    let done = format!("{done:?}");
    assert!(
        done.contains("Finished") && done.contains("nothing left to do: the run already has its 3 steps"),
        "{done}"
    );

    spec.resume = resume(1);
    let started =
        world.state.apply(world.now, Event::JobSubmitted { job: "more".to_owned(), spec: Box::new(spec) });
    assert!(format!("{started:?}").contains("StartRank"), "{started:?}");
    let rank = RankId { job: "more".to_owned(), rank: 0, incarnation: 1 };
    let prepare = format!("{:?}", world.state.apply(world.now, Event::RankJoined { rank: rank.clone() }));
    assert!(prepare.contains("global_step_1") && prepare.contains("PolicyVersion(1)"), "{prepare}");
    let ready = Event::RankReady {
        rank: rank.clone(),
        policy_version: PolicyVersion(1),
        weights_hash: "saved".to_owned(),
    };
    let rollout = format!("{:?}", world.state.apply(world.now, ready));
    assert!(rollout.contains("step: 2") && rollout.contains("groups: [(0, 2), (1, 3)]"), "{rollout}");
}

#[test]
fn a_resumed_job_whose_weights_are_not_those_that_were_saved_fails_and_names_both() {
    let mut world = World::new(1, Temper { hang: 1.0, ..Temper::default() });
    world.add_node("node-a", 1);
    let mut spec = job(config(&["trainer.n_gpus_per_node=1"]), 0);
    spec.resume = Some(ResumePoint {
        dir: "global_step_1".into(),
        step: 1,
        policy_version: PolicyVersion(1),
        weights_hash: "saved".to_owned(),
        cursor: Cursor::default(),
    });
    world.submit("job-1", spec);
    let rank = RankId { job: "job-1".to_owned(), rank: 0, incarnation: 1 };
    world.apply(Event::RankJoined { rank: rank.clone() });
    let (policy_version, weights_hash) = (PolicyVersion(1), "loaded".to_owned());
    world.apply(Event::RankReady { rank, policy_version, weights_hash });
    let failed = world.lines.iter().find(|line| line.contains("Error")).unwrap();
    assert!(failed.contains("the ranks attest loaded, the checkpoint says saved"), "{failed}");
    assert!(!world.lines.iter().any(|line| line.contains("<- rollout")), "{:#?}", world.lines);
}

/// Two ranks that have attested their weights and roll out; they answer nothing by themselves.
fn two_ranks_roll_out() -> (World, [RankId; 2]) {
    let mut world = World::new(1, Temper { hang: 1.0, ..Temper::default() });
    world.add_node("node-a", 2);
    world.submit("job-1", job(two_ranks(&[]), 0));
    let ranks = [0, 1].map(|rank| RankId { job: "job-1".to_owned(), rank, incarnation: 1 });
    for rank in &ranks {
        world.apply(Event::RankJoined { rank: rank.clone() });
    }
    world.apply(Event::StoreOpened { rank: ranks[0].clone(), host: "h".to_owned(), port: 1 });
    for rank in &ranks {
        let (rank, policy_version, weights_hash) = (rank.clone(), PolicyVersion(0), "loaded".to_owned());
        world.apply(Event::RankReady { rank, policy_version, weights_hash });
    }
    world.silent.clear();
    (world, ranks)
}

fn collective_fails(world: &mut World, rank: &RankId) {
    let message = "all_reduce: connection closed by peer".to_owned();
    let fault = CoreFault { whose: Whose::Outside, message };
    world.apply(Event::RankFailed { rank: rank.clone(), fault });
}

#[test]
fn the_death_of_a_rank_is_the_cause_of_the_collective_that_failed_before_it_was_heard() {
    let (mut world, [zero, one]) = two_ranks_roll_out();
    collective_fails(&mut world, &zero);
    world.apply(Event::RankExited { rank: zero, cause: "ended with exit code 75".to_owned() });
    world.now += Duration::from_secs(1);
    world.apply(Event::Tick);
    assert!(!world.lines.iter().any(|line| line.contains("Error")), "undecided: {:#?}", world.lines);
    world.apply(Event::RankExited { rank: one, cause: "was killed (signal 9; out of memory?)".to_owned() });
    assert_eq!(
        world.ended["job-1"].detail,
        "rank 1 on node node-a is gone: was killed (signal 9; out of memory?); with it, rank 0 on node node-a \
         failed: all_reduce: connection closed by peer"
    );
}

#[test]
fn a_collective_that_failed_for_no_other_reason_is_the_cause_itself() {
    let (mut world, [zero, one]) = two_ranks_roll_out();
    collective_fails(&mut world, &zero);
    collective_fails(&mut world, &one);
    world.now += Duration::from_secs(2);
    world.apply(Event::Tick);
    world.run(LONG);
    let detail = &world.ended["job-1"].detail;
    assert_eq!(detail, "rank 0 on node node-a failed: all_reduce: connection closed by peer");
}

#[test]
fn a_rank_whose_heartbeats_stop_is_named_long_before_the_deadline_of_its_work() {
    let (mut world, [_, one]) = two_ranks_roll_out();
    let began = world.now;
    world.silent.insert(one);
    world.run(LONG);
    let detail = &world.ended["job-1"].detail;
    assert!(detail.starts_with("rank 1 on node node-a has been silent for 3"), "{detail}");
    assert!(detail.contains("; is it stopped or hung?"), "{detail}");
    assert!(world.now - began < Duration::from_secs(60), "the rollout's own deadline is 60 s");
}

/// The only rank of `job-1` has sampled its chains and trains on them.
fn one_rank_trains(config: agentfly_common::config::Config) -> (World, RankId) {
    let mut world = World::new(1, Temper { hang: 1.0, ..Temper::default() });
    world.add_node("node-a", 1);
    world.submit("job-1", job(config, 0));
    let rank = RankId { job: "job-1".to_owned(), rank: 0, incarnation: 1 };
    world.apply(Event::RankJoined { rank: rank.clone() });
    let loaded = PolicyVersion(0);
    world.apply(Event::RankReady {
        rank: rank.clone(),
        policy_version: loaded,
        weights_hash: "loaded".to_owned(),
    });
    for (group, index) in [(0, 0), (0, 1), (1, 0), (1, 1)] {
        let key = ChainKey { purpose: Purpose::Train, step: 1, group, chain: index };
        let trajectory = Box::new(chain(key, loaded));
        world.apply(Event::TrajectoryArrived { rank: rank.clone(), shard: 1, trajectory });
    }
    world.apply(Event::RolloutDone { rank: rank.clone(), shard: 1, metrics: BTreeMap::new() });
    world.silent.clear();
    (world, rank)
}

/// Tells the core that the only rank of `job-1` attests these weights after step 1.
fn step_one_ends_with(config: agentfly_common::config::Config, weights_hash: &str) -> World {
    let (mut world, rank) = one_rank_trains(config);
    let (policy_version, weights_hash) = (PolicyVersion(1), weights_hash.to_owned());
    world.apply(Event::TrainDone { rank, step: 1, policy_version, weights_hash, metrics: BTreeMap::new() });
    world
}

#[test]
fn an_update_that_changes_nothing_is_a_fault_unless_the_learning_rate_is_zero() {
    let one_rank = "trainer.n_gpus_per_node=1";
    let mut world = step_one_ends_with(config(&[one_rank]), "loaded");
    world.run(LONG);
    let end = &world.ended["job-1"];
    assert!(end.detail.starts_with("step 1: the update changed nothing"), "{}", end.detail);
    assert_eq!((end.steps_done, end.policy_version), (0, PolicyVersion(0)), "the step does not count");

    let world = step_one_ends_with(config(&[one_rank, "actor_rollout_ref.actor.optim.lr=0"]), "loaded");
    let said = world.lines.iter().find(|line| line.contains("Warn")).unwrap();
    assert!(said.contains("unchanged, because the learning rate is 0 (1 such steps so far)"), "{said}");
    assert!(world.lines.iter().any(|line| line.starts_with("job-1 finished step 1")), "{:#?}", world.lines);
}

#[test]
fn a_training_step_and_a_checkpoint_that_take_too_long_name_their_key() {
    let (mut world, _) =
        one_rank_trains(config(&["trainer.n_gpus_per_node=1", "trainer.train_timeout_seconds=300"]));
    world.run(LONG);
    let (detail, since) = (&world.ended["job-1"].detail, world.now);
    assert!(detail.starts_with("step 1: waiting for rank 0 to finish training; it "), "{detail}");
    assert!(detail.ends_with("; trainer.train_timeout_seconds=300 is over"), "{detail}");
    assert!(since > Duration::from_secs(300) && since < Duration::from_secs(330), "{since:?}");

    let last = [
        "trainer.n_gpus_per_node=1",
        "trainer.total_training_steps=1",
        "trainer.checkpoint_timeout_seconds=200",
    ];
    let mut world = step_one_ends_with(config(&last), "trained");
    world.silent.clear();
    world.run(LONG);
    let detail = &world.ended["job-1"].detail;
    assert!(
        detail.starts_with("step 1: waiting for rank 0 to write its part of the checkpoint; it "),
        "{detail}"
    );
    let end = "; trainer.checkpoint_timeout_seconds=200 is over: is the disk full or slow?";
    assert!(detail.ends_with(end), "{detail}");
    assert!(world.now > Duration::from_secs(200), "{:?}", world.now);
}

/// Chains of which these have no sampled token, and ended so, arrive in step 1.
fn nothing_is_sampled(of: &[(u32, u32)], reason: FinishReason) -> World {
    let (mut world, ranks) = two_ranks_roll_out();
    for (group, rank) in [0, 1].into_iter().zip(&ranks) {
        let shard = u64::from(group) + 1;
        for index in 0..2 {
            let key = ChainKey { purpose: Purpose::Train, step: 1, group, chain: index };
            let mut trajectory = Box::new(chain(key, PolicyVersion(0)));
            if of.contains(&(group, index)) {
                trajectory.loss_mask.fill(false);
                trajectory.log_probs.fill(0.0);
                trajectory.outcome = Outcome::Finished { reason };
            }
            world.apply(Event::TrajectoryArrived { rank: rank.clone(), shard, trajectory });
        }
        rollout_done(&mut world, rank, shard);
    }
    world
}

#[test]
fn a_step_whose_prompts_all_fill_the_window_is_the_operators_and_trains_nothing() {
    let all = [(0, 0), (0, 1), (1, 0), (1, 1)];
    let mut world = nothing_is_sampled(&all, FinishReason::MaxModelLen);
    world.run(LONG);
    let end = &world.ended["job-1"];
    assert_eq!((end.state, end.fault.as_ref().unwrap().whose), (JobState::Failed, Whose::Operator));
    assert_eq!(
        end.detail,
        "step 1: none of its 4 chains has a sampled token, so there is nothing to train on: the prompts of 4 leave no \
         room for a turn within actor_rollout_ref.rollout.max_model_len (unset: the model's window); raise that, or \
         shorten the questions in data.train_files or agent.system_prompt"
    );
    assert!(!world.lines.iter().any(|line| line.contains("<- train")), "{:#?}", world.lines);
    let kept = |line: &String| line == "job-1 keep Train 1: 0.0@row0 0.1@row0 1.0@row1 1.1@row1";
    assert!(world.lines.iter().any(kept), "the chains can be looked at, unjudged: {:#?}", world.lines);

    let mut world = nothing_is_sampled(&all, FinishReason::Terminal);
    world.run(LONG);
    assert_eq!(world.ended["job-1"].fault.as_ref().unwrap().whose, Whose::Us, "no prompt was too long");
}

#[test]
fn a_step_with_some_prompts_that_fill_the_window_says_how_many() {
    let warned = |world: &World| -> Vec<String> {
        world.lines.iter().filter(|line| line.contains("no room for a turn")).cloned().collect()
    };
    let world = nothing_is_sampled(&[(0, 0), (0, 1), (1, 1)], FinishReason::MaxModelLen);
    assert_eq!(
        warned(&world),
        ["job-1 Warn: step 1: 3 of 4 chains have a prompt that leaves no room for a turn within \
          actor_rollout_ref.rollout.max_model_len (unset: the model's window); nothing is learned from them"]
    );
    assert!(world.lines.iter().any(|line| line == "job-1/0 <- train step=1 policy=0"), "{:#?}", world.lines);
    assert_eq!(warned(&nothing_is_sampled(&[], FinishReason::MaxModelLen)), Vec::<String>::new());
}

fn arrives(world: &mut World, rank: &RankId, shard: u64, chain: (u32, u32), fault: Option<&str>) {
    let finished = Outcome::Finished { reason: FinishReason::Terminal };
    let fault = fault.map(|cause| Outcome::InfrastructureFault { cause: cause.to_owned() });
    arrives_as(world, rank, shard, chain, fault.unwrap_or(finished));
}

fn arrives_as(world: &mut World, rank: &RankId, shard: u64, (group, index): (u32, u32), outcome: Outcome) {
    let key = ChainKey { purpose: Purpose::Train, step: 1, group, chain: index };
    let trajectory = Box::new(Trajectory { outcome, ..chain(key, PolicyVersion(0)) });
    world.apply(Event::TrajectoryArrived { rank: rank.clone(), shard, trajectory });
}

fn rollout_done(world: &mut World, rank: &RankId, shard: u64) {
    world.apply(Event::RolloutDone { rank: rank.clone(), shard, metrics: BTreeMap::new() });
}

#[test]
fn a_group_whose_chain_failed_for_no_fault_of_its_own_is_asked_again_elsewhere() {
    let (mut world, ranks) = two_ranks_roll_out();
    let [zero, one] = &ranks;
    arrives(&mut world, zero, 1, (0, 0), Some("the tool pool died"));
    arrives(&mut world, zero, 1, (0, 1), None);
    rollout_done(&mut world, zero, 1);
    assert!(world.lines.iter().any(|line| line == "job-1/1 <- rollout shard=3 step=1 policy=0 2x[(0, 0)]"));
    for index in 0..2 {
        arrives(&mut world, one, 2, (1, index), None);
        arrives(&mut world, one, 3, (0, index), None);
    }
    rollout_done(&mut world, one, 2);
    assert!(!world.lines.iter().any(|line| line.contains("<- train")), "shard 3 is not done");
    rollout_done(&mut world, one, 3);
    assert!(world.lines.iter().any(|line| line == "job-1/0 <- train step=1 policy=0"), "{:#?}", world.lines);
}

#[test]
fn a_chain_that_ran_out_of_its_own_time_counts_and_is_not_asked_again() {
    let (mut world, ranks) = two_ranks_roll_out();
    for (group, rank) in [0, 1].into_iter().zip(&ranks) {
        let shard = u64::from(group) + 1;
        arrives_as(&mut world, rank, shard, (group, 0), Outcome::Finished { reason: FinishReason::Timeout });
        arrives(&mut world, rank, shard, (group, 1), None);
        rollout_done(&mut world, rank, shard);
    }
    assert!(!world.lines.iter().any(|line| line.contains("rollout shard=3")), "{:#?}", world.lines);
    assert!(world.lines.iter().any(|line| line == "job-1/0 <- train step=1 policy=0"), "{:#?}", world.lines);
}

#[test]
fn what_is_asked_again_gets_the_rest_of_the_steps_time() {
    let (mut world, ranks) = two_ranks_roll_out();
    let [zero, one] = &ranks;
    let began = world.now;
    for index in 0..2 {
        arrives(&mut world, one, 2, (1, index), None);
    }
    rollout_done(&mut world, one, 2);
    world.now += Duration::from_secs(28);
    arrives(&mut world, zero, 1, (0, 0), Some("the tool pool died"));
    arrives(&mut world, zero, 1, (0, 1), None);
    rollout_done(&mut world, zero, 1);
    assert!(world.lines.iter().any(|line| line.contains("job-1/1 <- rollout shard=3")), "{:#?}", world.lines);
    world.run(LONG);
    let detail = &world.ended["job-1"].detail;
    assert!(detail.ends_with("trainer.rollout_timeout_seconds=60 is over"), "{detail}");
    let late = world.now - began;
    let most =
        Duration::from_secs(60) + settings().answer_margin + settings().stop_grace + settings().stop_margin;
    assert!(
        late <= most + Duration::from_secs(5),
        "{late:?} after the step began, at most {most:?} and a tick"
    );
}
