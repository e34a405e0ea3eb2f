//! From started processes to trained steps: who must have spoken before anything goes on, who is named when it
//! takes too long, and from when on a wait counts.

use super::*;

/// Two ranks were started; nobody has spoken yet.
fn two_ranks_start() -> (World, [RankId; 2]) {
    let mut world = World::new(1, Temper { hang: 1.0, ..Temper::default() });
    world.add_node("node-a", 2);
    world.submit("job-1", job(two_ranks(&["trainer.save_freq=1"]), 0));
    (world, [0, 1].map(|rank| RankId { job: "job-1".to_owned(), rank, incarnation: 1 }))
}

/// What the core says to one event.
fn said(world: &mut World, event: Event) -> String {
    let before = world.lines.len();
    world.apply(event);
    world.lines[before..].join("\n")
}

fn joins(rank: &RankId) -> Event {
    Event::RankJoined { rank: rank.clone() }
}

fn store(rank: &RankId, port: u16) -> Event {
    Event::StoreOpened { rank: rank.clone(), host: "h".to_owned(), port }
}

fn ready(rank: &RankId, weights_hash: &str) -> Event {
    let (policy_version, weights_hash) = (PolicyVersion(0), weights_hash.to_owned());
    Event::RankReady { rank: rank.clone(), policy_version, weights_hash }
}

fn heartbeat(rank: &RankId) -> Event {
    Event::RankHeard { rank: rank.clone(), activity: "load".to_owned(), activity_seconds: 0.0 }
}

/// Time passes in which the node and these ranks are heard.
fn pass(world: &mut World, seconds: u64, ranks: &[RankId]) {
    for _ in 0..seconds {
        world.now += Duration::from_secs(1);
        world.apply(Event::NodeHeard { node: "node-a".to_owned() });
        for rank in ranks {
            world.apply(heartbeat(rank));
        }
        world.apply(Event::Tick);
    }
}

fn detail(world: &World) -> String {
    world.state.view().jobs[0].detail.clone()
}

#[test]
fn the_group_forms_once_all_have_joined_and_rank_zero_opened_the_store_in_either_order() {
    let formed = "job-1/0 <- form group 1 at h:4000\njob-1/1 <- form group 1 at h:4000";
    let (mut world, [zero, one]) = two_ranks_start();
    world.apply(joins(&zero));
    assert_eq!(said(&mut world, store(&zero, 4000)), "", "rank 1 is not there yet");
    assert!(said(&mut world, joins(&one)).ends_with(formed));

    let (mut world, [zero, one]) = two_ranks_start();
    world.apply(joins(&zero));
    world.apply(joins(&one));
    assert!(said(&mut world, store(&one, 1)).contains("ignored an opened store from rank 1"));
    assert_eq!(said(&mut world, store(&zero, 4000)), formed);
    assert!(said(&mut world, store(&zero, 5000)).contains("ignored an opened store from rank 0"));
}

#[test]
fn a_rank_alone_forms_no_group() {
    let mut world = World::new(1, Temper { hang: 1.0, ..Temper::default() });
    world.add_node("node-a", 1);
    world.submit("job-1", job(config(&["trainer.n_gpus_per_node=1"]), 0));
    let rank = RankId { job: "job-1".to_owned(), rank: 0, incarnation: 1 };
    world.apply(joins(&rank));
    assert!(!said(&mut world, store(&rank, 1)).contains("form group"));
    assert!(said(&mut world, ready(&rank, "loaded")).contains("<- rollout shard=1 step=1"));
}

#[test]
fn readiness_counts_once_and_only_after_the_group_stands() {
    let (mut world, [zero, one]) = two_ranks_start();
    world.apply(joins(&zero));
    assert!(said(&mut world, ready(&zero, "loaded")).contains("ignored its readiness from rank 0"));
    world.apply(joins(&one));
    assert!(said(&mut world, ready(&one, "loaded")).contains("ignored its readiness from rank 1"));
    world.apply(store(&zero, 4000));
    assert_eq!(said(&mut world, ready(&zero, "loaded")), "");
    assert!(said(&mut world, ready(&zero, "other")).contains("ignored its readiness from rank 0"));
    assert!(said(&mut world, ready(&one, "loaded")).contains("job-1 is Running"));
}

#[test]
fn ranks_that_loaded_different_weights_never_train() {
    let (mut world, [zero, one]) = two_ranks_start();
    for event in [joins(&zero), joins(&one), store(&zero, 4000), ready(&zero, "this")] {
        world.apply(event);
    }
    let told = said(&mut world, ready(&one, "that"));
    assert!(
        told.contains(
            "wrong weights after loading: rank 0 holds this and rank 1 holds that as policy version 0"
        ),
        "{told}"
    );
    assert!(!told.contains("<- rollout"), "{told}");
}

#[test]
fn a_rank_that_joins_a_job_that_is_being_stopped_is_told_to_stop() {
    let (mut world, [zero, one]) = two_ranks_start();
    world.apply(joins(&zero));
    let told = said(&mut world, Event::JobCancelled { job: "job-1".to_owned(), why: "enough".to_owned() });
    assert!(
        told.contains("job-1/0 <- stop: cancelled: enough") && !told.contains("job-1/1 <- stop"),
        "{told}"
    );
    assert_eq!(said(&mut world, joins(&one)), "job-1/1 <- stop: stopping: cancelled: enough");
    assert!(!said(&mut world, joins(&one)).contains("<- stop"), "once is enough");
}

#[test]
fn a_rank_that_takes_long_to_join_is_not_silent_from_its_start_on() {
    let (mut world, [zero, one]) = two_ranks_start();
    pass(&mut world, 40, &[]);
    world.apply(joins(&zero));
    world.apply(joins(&one));
    pass(&mut world, 1, &[]);
    assert_eq!(
        detail(&world),
        "starting its ranks (2)",
        "the limit of silence is 30 s, and both spoke a second ago"
    );
}

#[test]
fn who_is_late_to_be_ready_is_named_and_who_is_ready_is_not() {
    let (mut world, [zero, one]) = two_ranks_start();
    for event in [joins(&zero), joins(&one), store(&zero, 4000), ready(&zero, "loaded")] {
        world.apply(event);
    }
    pass(&mut world, 60, &[zero.clone(), one.clone()]);
    assert_eq!(detail(&world), "starting its ranks (2)", "exactly at its limit");
    pass(&mut world, 1, &[zero, one]);
    let told = detail(&world);
    assert!(told.contains("waiting for rank 1 to load and attest its weights"), "{told}");
    assert!(!told.contains("waiting for rank 0"), "{told}");
}

#[test]
fn chains_may_be_late_by_the_margin_and_then_only_those_who_owe_some_are_named() {
    let (mut world, ranks) = two_ranks_roll_out();
    for index in 0..2 {
        arrives(&mut world, &ranks[0], 1, (0, index), None);
    }
    world.apply(Event::RolloutDone { rank: ranks[0].clone(), shard: 1, metrics: BTreeMap::new() });
    pass(&mut world, 70, &ranks);
    assert_eq!(detail(&world), "step 1 of 3: rollout, 2 of 4 chains", "60 s of the shard and 10 s of margin");
    pass(&mut world, 1, &ranks);
    let told = detail(&world);
    assert!(told.contains("waiting for rank 1 to finish its chains; it has been in load"), "{told}");
    assert!(told.contains("2 of 4 chains are in") && !told.contains("waiting for rank 0"), "{told}");
}

/// Step 1 is trained, and rank 0 was told to write its checkpoint.
fn two_ranks_save() -> (World, [RankId; 2]) {
    let (mut world, [zero, one]) = two_ranks_start();
    for event in
        [joins(&zero), joins(&one), store(&zero, 4000), ready(&zero, "loaded"), ready(&one, "loaded")]
    {
        world.apply(event);
    }
    for (rank, shard) in [(&zero, 1), (&one, 2)] {
        for index in 0..2 {
            arrives(&mut world, rank, shard, (u32::try_from(shard).unwrap() - 1, index), None);
        }
        world.apply(Event::RolloutDone { rank: rank.clone(), shard, metrics: BTreeMap::new() });
    }
    for rank in [&zero, &one] {
        let (rank, policy_version, weights_hash) = (rank.clone(), PolicyVersion(1), "trained".to_owned());
        world.apply(Event::TrainDone {
            rank,
            step: 1,
            policy_version,
            weights_hash,
            metrics: BTreeMap::new(),
        });
    }
    assert_eq!(detail(&world), "step 1 of 3: writing a checkpoint");
    (world, [zero, one])
}

#[test]
fn a_checkpoint_is_committed_once_and_when_every_rank_has_written_its_files_of_this_step() {
    let (mut world, [zero, one]) = two_ranks_save();
    let written = |rank: &RankId, step| {
        let files = vec![format!("of-{}", rank.rank)];
        Event::CheckpointWritten { rank: rank.clone(), step, files }
    };
    let committed =
        |step| Event::CheckpointCommitted { job: "job-1".to_owned(), step, result: Ok("there".into()) };
    assert_eq!(said(&mut world, committed(1)), "", "nothing is written yet");
    assert_eq!(said(&mut world, written(&one, 1)), "job-1 Checkpoint of step 1: 1/2");
    assert_eq!(said(&mut world, committed(1)), "", "rank 0 has not written");
    for (rank, step) in [(&one, 1), (&zero, 0), (&zero, 2)] {
        let told = said(&mut world, written(rank, step));
        assert!(told.contains("ignored the checkpoint of step") && !told.contains("commit"), "{told}");
    }
    assert_eq!(said(&mut world, written(&zero, 1)), "job-1 commit step 1 policy 1 trained: of-0 of-1");
    assert!(said(&mut world, written(&zero, 1)).contains("ignored the checkpoint of step 1"));
    assert_eq!(said(&mut world, committed(2)), "");
    assert!(said(&mut world, committed(1)).contains("<- rollout shard=3 step=2"));
}

#[test]
fn writing_and_committing_a_checkpoint_have_a_limit_each() {
    let (mut world, ranks) = two_ranks_save();
    pass(&mut world, 60, &ranks);
    for rank in &ranks {
        world.apply(Event::CheckpointWritten { rank: rank.clone(), step: 1, files: Vec::new() });
    }
    pass(&mut world, 60, &ranks);
    assert_eq!(detail(&world), "step 1 of 3: writing a checkpoint");
    pass(&mut world, 1, &ranks);
    let told = detail(&world);
    assert!(
        told.contains("waiting for the coordinator to commit the checkpoint; trainer.checkpoint_timeout_seconds=60 is over"),
        "{told}"
    );

    let (mut world, ranks) = two_ranks_save();
    world.apply(Event::CheckpointWritten { rank: ranks[0].clone(), step: 1, files: Vec::new() });
    pass(&mut world, 61, &ranks);
    let told = detail(&world);
    assert!(told.contains("waiting for rank 1 to write its part of the checkpoint"), "{told}");
    assert!(!told.contains("rank 0"), "{told}");
}

#[test]
fn who_holds_up_the_start_is_named_by_what_is_missing() {
    for (heard, words) in [
        (0, "waiting for rank 0 to join; it has not said what it does"),
        (1, "waiting for rank 1 to join"),
        (2, "waiting for rank 0 to open the rendezvous store; it has been in load"),
        (3, "waiting for rank 0 to load and attest its weights"),
    ] {
        let (mut world, [zero, one]) = two_ranks_start();
        let said = [joins(&zero), joins(&one), store(&zero, 4000)];
        said.into_iter().take(heard).for_each(|event| world.apply(event));
        pass(&mut world, 61, &[zero, one][..heard.min(2)]);
        assert!(detail(&world).contains(words), "after {heard} events: {}", detail(&world));
    }
    let mut world = World::new(1, Temper { hang: 1.0, ..Temper::default() });
    world.add_node("node-a", 1);
    world.submit("job-1", job(config(&["trainer.n_gpus_per_node=1"]), 0));
    let rank = RankId { job: "job-1".to_owned(), rank: 0, incarnation: 1 };
    world.apply(joins(&rank));
    pass(&mut world, 61, &[rank]);
    assert!(
        detail(&world).contains("waiting for rank 0 to load and attest its weights"),
        "{}",
        detail(&world)
    );
}

#[test]
fn a_job_whose_ranks_never_say_that_they_ended_ends_after_grace_and_margin() {
    let (mut world, ranks) = two_ranks_roll_out();
    world.apply(Event::JobCancelled { job: "job-1".to_owned(), why: "enough".to_owned() });
    world.apply(Event::RankExited { rank: ranks[0].clone(), cause: "ended with exit code 0".to_owned() });
    pass(&mut world, 14, &[]);
    assert!(!world.ended.contains_key("job-1"), "10 s of grace and 5 s of margin");
    pass(&mut world, 1, &[]);
    assert_eq!(world.ended["job-1"].state, JobState::Cancelled);
    let told = "job-1 Warn: rank 1 on node node-a did not report its exit in time; ending anyway";
    assert!(world.lines.iter().any(|line| line == told), "{:#?}", world.lines);
}

#[test]
fn training_may_take_its_limit_and_then_only_who_is_not_done_is_named() {
    let (mut world, ranks) = two_ranks_roll_out();
    for (rank, shard, group) in [(0, 1, 0), (1, 2, 1)] {
        for index in 0..2 {
            arrives(&mut world, &ranks[rank], shard, (group, index), None);
        }
        world.apply(Event::RolloutDone { rank: ranks[rank].clone(), shard, metrics: BTreeMap::new() });
    }
    let (policy_version, weights_hash) = (PolicyVersion(1), "trained".to_owned());
    let rank = ranks[1].clone();
    world.apply(Event::TrainDone { rank, step: 1, policy_version, weights_hash, metrics: BTreeMap::new() });
    pass(&mut world, 60, &ranks);
    assert_eq!(detail(&world), "step 1 of 3: training, 1 of 2 ranks done");
    pass(&mut world, 1, &ranks);
    let told = detail(&world);
    assert!(told.contains("waiting for rank 0 to finish training") && !told.contains("rank 1"), "{told}");
}

#[test]
fn every_rank_that_is_silent_is_named_rank_zero_too() {
    let (mut world, [zero, one]) = two_ranks_roll_out();
    pass(&mut world, 31, std::slice::from_ref(&one));
    let told = detail(&world);
    assert!(told.contains("rank 0 on node node-a has been silent for 31 s"), "{told}");
    assert!(told.contains("; is it stopped or hung?") && !told.contains("rank 1"), "{told}");

    let (mut world, [_, _]) = two_ranks_roll_out();
    pass(&mut world, 30, &[zero]);
    assert!(!detail(&world).contains("silent"), "exactly at the limit: {}", detail(&world));
    pass(&mut world, 1, &[]);
    assert!(detail(&world).contains("rank 1 on node node-a has been silent"), "{}", detail(&world));
}
