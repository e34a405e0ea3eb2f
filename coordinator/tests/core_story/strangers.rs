//! Answers that nobody asked for, that come twice or from the wrong rank, and phases that have nothing to do: none
//! of them may count, train or hang.

use agentfly_common::trajectory::Trajectory;
use agentfly_coordinator::core::event::Decision;

use super::*;

/// What the core says to one event.
fn said(world: &mut World, event: Event) -> String {
    let before = world.lines.len();
    world.apply(event);
    world.lines[before..].join("\n")
}

fn arrival(rank: &RankId, shard: u64, (group, index): (u32, u32)) -> Event {
    let key = ChainKey { purpose: Purpose::Train, step: 1, group, chain: index };
    let trajectory = Box::new(chain(key, PolicyVersion(0)));
    Event::TrajectoryArrived { rank: rank.clone(), shard, trajectory }
}

fn done(rank: &RankId, shard: u64) -> Event {
    Event::RolloutDone { rank: rank.clone(), shard, metrics: BTreeMap::new() }
}

fn trained(rank: &RankId, step: u64) -> Event {
    let (policy_version, weights_hash) = (PolicyVersion(step), format!("hash-{step}"));
    Event::TrainDone { rank: rank.clone(), step, policy_version, weights_hash, metrics: BTreeMap::new() }
}

/// Both ranks have their chains in: training step 1 is under way.
fn two_ranks_train() -> (World, [RankId; 2]) {
    let (mut world, ranks) = two_ranks_roll_out();
    for (rank, shard, group) in [(0, 1, 0), (1, 2, 1)] {
        for index in 0..2 {
            world.apply(arrival(&ranks[rank], shard, (group, index)));
        }
        world.apply(done(&ranks[rank], shard));
    }
    assert!(world.lines.iter().any(|line| line == "job-1/1 <- train step=1 policy=0"), "{:#?}", world.lines);
    (world, ranks)
}

fn detail(world: &World) -> String {
    world.state.view().jobs[0].detail.clone()
}

#[test]
fn how_far_a_rollout_is_is_told_chain_by_chain() {
    let (mut world, [zero, one]) = two_ranks_roll_out();
    assert_eq!(detail(&world), "step 1 of 3: rollout, 0 of 4 chains");
    assert_eq!(said(&mut world, arrival(&zero, 1, (0, 1))), "job-1 Rollout of step 1: 1/4");
    assert_eq!(said(&mut world, arrival(&one, 2, (1, 0))), "job-1 Rollout of step 1: 2/4");
    assert_eq!(detail(&world), "step 1 of 3: rollout, 2 of 4 chains");
}

#[test]
fn a_chain_of_another_ranks_shard_or_another_shards_group_cannot_be_trained_on() {
    for (rank, shard, key) in [(1, 1, (0, 0)), (0, 1, (1, 0)), (0, 3, (0, 0)), (0, 9, (0, 0))] {
        let (mut world, ranks) = two_ranks_roll_out();
        said(&mut world, arrival(&ranks[rank], shard, key));
        let told = detail(&world);
        assert!(told.contains("sent a chain that cannot be trained on"), "rank {rank} shard {shard}: {told}");
    }
}

#[test]
fn a_chain_of_a_shard_of_an_earlier_step_is_late_and_changes_nothing() {
    let (mut world, [zero, one]) = two_ranks_train();
    world.apply(trained(&zero, 1));
    world.apply(trained(&one, 1));
    assert_eq!(detail(&world), "step 2 of 3: rollout, 0 of 4 chains");
    for shard in [1, 2] {
        let told = said(&mut world, arrival(&zero, shard, (0, 0)));
        assert!(told.contains("ignored chain train/step 1/group 0/chain 0 of shard"), "{told}");
    }
    assert_eq!(detail(&world), "step 2 of 3: rollout, 0 of 4 chains");
}

#[test]
fn the_end_of_a_shard_counts_once_and_from_its_own_rank() {
    let (mut world, [zero, one]) = two_ranks_roll_out();
    for index in 0..2 {
        world.apply(arrival(&zero, 1, (0, index)));
    }
    assert!(said(&mut world, done(&one, 1)).contains("ignored the end of shard 1 from rank 1"));
    assert_eq!(said(&mut world, done(&zero, 1)), "");
    assert!(said(&mut world, done(&zero, 1)).contains("ignored the end of shard 1 from rank 0"));
    for index in 0..2 {
        world.apply(arrival(&one, 2, (1, index)));
    }
    assert!(said(&mut world, done(&one, 2)).contains("<- train step=1"));
}

#[test]
fn the_end_of_training_counts_once_a_rank_and_only_for_its_step() {
    let (mut world, [zero, one]) = two_ranks_train();
    for step in [0, 2] {
        assert!(
            said(&mut world, trained(&zero, step)).contains("ignored the end of training step"),
            "step {step}"
        );
    }
    assert_eq!(said(&mut world, trained(&zero, 1)), "job-1 Train of step 1: 1/2");
    assert!(said(&mut world, trained(&zero, 1)).contains("ignored the end of training step 1 from rank 0"));
    assert!(said(&mut world, trained(&one, 1)).contains("job-1 finished step 1"));
}

/// The metrics of the finished step.
fn step_metrics(world: &mut World, last: Event) -> BTreeMap<String, f64> {
    let decisions = world.state.apply(world.now, last);
    let metrics = decisions.into_iter().find_map(|decision| match decision {
        Decision::StepFinished { metrics, .. } => Some(metrics),
        _ => None,
    });
    metrics.expect("the step is finished")
}

#[test]
fn faults_and_reruns_of_a_step_are_counted_and_a_fault_of_a_chain_that_is_in_is_not() {
    let (mut world, [zero, one]) = two_ranks_roll_out();
    arrives(&mut world, &zero, 1, (0, 0), Some("the tool pool died"));
    arrives(&mut world, &zero, 1, (0, 1), None);
    arrives(&mut world, &zero, 1, (0, 1), Some("it came again, and broke"));
    world.apply(done(&zero, 1));
    for index in 0..2 {
        arrives(&mut world, &one, 2, (1, index), None);
        arrives(&mut world, &one, 3, (0, index), None);
    }
    world.apply(done(&one, 2));
    world.apply(done(&one, 3));
    world.now += Duration::from_secs(3);
    world.apply(trained(&zero, 1));
    let metrics = step_metrics(&mut world, trained(&one, 1));
    assert_eq!(metrics["training/infrastructure_faults"], 1.0);
    assert_eq!(metrics["training/groups_rerun"], 1.0);
    assert_eq!(metrics["timing_s/update_actor"], 3.0);
}

#[test]
fn a_step_in_which_nothing_broke_counts_no_fault_and_no_rerun() {
    let (mut world, [zero, one]) = two_ranks_train();
    world.apply(trained(&zero, 1));
    let metrics = step_metrics(&mut world, trained(&one, 1));
    assert_eq!((metrics["training/infrastructure_faults"], metrics["training/groups_rerun"]), (0.0, 0.0));
}

#[test]
fn a_group_that_fails_four_times_ends_the_job_and_says_so() {
    let (mut world, ranks) = two_ranks_roll_out();
    for index in 0..2 {
        world.apply(arrival(&ranks[1], 2, (1, index)));
    }
    world.apply(done(&ranks[1], 2));
    for (attempt, shard) in [(0, 1), (1, 3), (2, 4), (3, 5)] {
        assert!(!detail(&world).contains("failed"), "attempt {attempt}: {}", detail(&world));
        let rank = &ranks[attempt % 2];
        arrives(&mut world, rank, shard, (0, 0), Some("no slot"));
        arrives(&mut world, rank, shard, (0, 1), None);
        world.apply(done(rank, shard));
    }
    let told = detail(&world);
    assert!(
        told.contains("group 0/chain 0 failed 4 times") && told.contains("last on rank 1: no slot"),
        "{told}"
    );
}

/// One rank that has attested its weights; it answers nothing by itself.
fn one_rank(overrides: &[&str], validation_rows: usize) -> (World, RankId, String) {
    let mut world = World::new(1, Temper { hang: 1.0, ..Temper::default() });
    world.add_node("node-a", 1);
    world
        .submit("job-1", job(config(&[&["trainer.n_gpus_per_node=1"], overrides].concat()), validation_rows));
    let rank = RankId { job: "job-1".to_owned(), rank: 0, incarnation: 1 };
    world.apply(Event::RankJoined { rank: rank.clone() });
    let (policy_version, weights_hash) = (PolicyVersion(0), "loaded".to_owned());
    let begun = said(&mut world, Event::RankReady { rank: rank.clone(), policy_version, weights_hash });
    (world, rank, begun)
}

#[test]
fn a_job_validates_first_only_when_it_is_told_to_and_has_something_to_validate_on() {
    let first = "trainer.val_before_train=True";
    for (overrides, rows, validates) in
        [(&[first][..], 2, true), (&[first], 1, true), (&[first], 0, false), (&[], 2, false), (&[], 0, false)]
    {
        let begun = one_rank(overrides, rows).2;
        assert_eq!(begun.contains("<- validate"), validates, "{overrides:?} with {rows} rows: {begun}");
        assert_eq!(begun.contains("<- rollout"), !validates, "{overrides:?} with {rows} rows: {begun}");
    }
}

/// What the core says when step 1 of one rank, with chains as `change` makes them, ends with unchanged weights.
fn unchanged_after(change: impl Fn(&mut Trajectory), metrics: &[(&str, f64)]) -> String {
    let (world, rank, _) = one_rank(&[], 0);
    let (mut state, now) = (world.state, world.now);
    for (group, index) in [(0, 0), (0, 1), (1, 0), (1, 1)] {
        let key = ChainKey { purpose: Purpose::Train, step: 1, group, chain: index };
        let mut trajectory = Box::new(chain(key, PolicyVersion(0)));
        change(&mut trajectory);
        state.apply(now, Event::TrajectoryArrived { rank: rank.clone(), shard: 1, trajectory });
    }
    state.apply(now, done(&rank, 1));
    let (policy_version, weights_hash) = (PolicyVersion(1), "loaded".to_owned());
    let metrics = metrics.iter().map(|&(name, value)| (name.to_owned(), value)).collect();
    let ended = state.apply(now, Event::TrainDone { rank, step: 1, policy_version, weights_hash, metrics });
    let words = ended.into_iter().filter_map(|decision| match decision {
        Decision::Log { text, .. } => Some(text),
        Decision::StepFinished { step, .. } => Some(format!("finished step {step}")),
        _ => None,
    });
    words.collect::<Vec<_>>().join("\n")
}

fn samples_nothing(chain: &mut Trajectory) {
    chain.loss_mask.fill(false);
    chain.log_probs.fill(0.0);
}

#[test]
fn weights_may_stay_when_no_chain_could_teach() {
    let excuse = "unchanged, because no chain did better or worse than its group";
    let told = unchanged_after(|chain| chain.reward.value = 1.0, &[]);
    assert!(told.contains(excuse) && told.contains("finished step 1"), "{told}");
    let one_of_two_samples = |chain: &mut Trajectory| {
        if chain.key.chain == 1 {
            samples_nothing(chain);
        } else {
            // One sampled token, and the whole group's advantage is on it.
            chain.loss_mask[2..].fill(false);
            chain.log_probs[2..].fill(0.0);
            (chain.loss_mask[2], chain.log_probs[2]) = (true, -0.25);
        }
    };
    let told = unchanged_after(one_of_two_samples, &[]);
    assert!(told.contains("the update changed nothing"), "it did worse than its group: {told}");
}

#[test]
fn weights_may_stay_when_the_ranks_say_why_and_only_then() {
    for (name, value, excuse) in [
        ("actor/lr", 0.0, Some("the learning rate is 0")),
        ("actor/lr", 1.0, None),
        ("actor/skipped_updates", 1.0, Some("values that are not finite")),
        ("actor/skipped_updates", 0.5, Some("values that are not finite")),
        ("actor/skipped_updates", 0.0, None),
    ] {
        let told = unchanged_after(|_| (), &[(name, value)]);
        assert_eq!(told.contains("the update changed nothing"), excuse.is_none(), "{name}={value}: {told}");
        assert!(excuse.is_none_or(|excuse| told.contains(excuse)), "{name}={value}: {told}");
    }
}

#[test]
fn a_rank_alone_has_no_other_to_blame() {
    let (mut world, rank, _) = one_rank(&[], 0);
    let fault = CoreFault { whose: Whose::Outside, message: "the disk is gone".to_owned() };
    let told = said(&mut world, Event::RankFailed { rank, fault });
    assert!(told.contains("job-1 Error: rank 0 on node node-a failed: the disk is gone"), "{told}");
}

#[test]
fn only_the_ranks_of_the_lost_node_are_lost_with_it() {
    let mut world = World::new(1, Temper { hang: 1.0, ..Temper::default() });
    world.add_node("node-a", 1);
    world.add_node("node-b", 1);
    world.submit("job-1", job(two_ranks(&[]), 0));
    let there = |world: &World| {
        world.state.view().jobs[0].ranks.iter().map(|rank| rank.rank.rank).collect::<Vec<_>>()
    };
    assert_eq!(there(&world), [0, 1]);
    let left = Event::NodeLeft { node: "node-b".to_owned(), cause: "its session ended".to_owned() };
    let told = said(&mut world, left);
    assert!(told.contains("node node-b is lost, and rank 1 with it: its session ended"), "{told}");
    assert_eq!(there(&world), [0]);
}
