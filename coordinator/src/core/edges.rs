//! Tests of the core's arithmetic where a wrong number would be believed: groups that earn nothing or almost
//! nothing, chains that sampled nothing, and every metric that is computed from time.

use std::time::Duration;

use agentfly_common::trajectory::Message;
use agentfly_common::trajectory::Role;

use super::advantage::{Estimator, Scored, advantages};
use super::event::{Device, RankId};
use super::fleet::{Fleet, Placement, Seating};
use super::job::reduce;
use super::metrics::{Batch, Metrics, balance, time};
use super::plan;
use super::testing::{chain, facts, plan as plan_of};

fn scored(of: &[(u32, f64, usize)]) -> Vec<Scored> {
    of.iter().map(|&(group, score, tokens)| Scored { group, score, tokens }).collect()
}

#[test]
fn gpg_scales_by_the_scores_that_are_not_zero_and_has_no_advantage_where_all_are() {
    let one_earns = advantages(Estimator::Gpg, &scored(&[(0, 1.0, 4), (0, 0.0, 4)])).unwrap();
    assert_eq!(one_earns, [1.0, -1.0], "(S − 0.5) · 2 chains / 1 that earned");
    let none_earns = advantages(Estimator::Gpg, &scored(&[(0, 0.0, 4), (0, 0.0, 4)])).unwrap();
    assert_eq!(none_earns, [0.0, 0.0]);
}

#[test]
fn two_sampled_tokens_are_enough_to_whiten() {
    let found =
        advantages(Estimator::ReinforcePlusPlusBaseline, &scored(&[(0, 0.0, 1), (0, 1.0, 1)])).unwrap();
    assert!(
        (found[0] + 0.5_f64.sqrt()).abs() < 1e-6 && (found[1] - 0.5_f64.sqrt()).abs() < 1e-6,
        "{found:?}"
    );
}

#[test]
fn opo_weighs_by_length_down_to_a_single_token() {
    let found = advantages(Estimator::Opo, &scored(&[(0, 1.0, 1), (0, 0.0, 0)])).unwrap();
    assert_eq!(found, [0.0, -1.0], "the one token there is sets the baseline");
    let found = advantages(Estimator::Opo, &scored(&[(0, 1.0, 0), (0, 0.0, 0)])).unwrap();
    assert_eq!(found, [1.0, 0.0], "no token, no baseline");
}

#[test]
fn the_best_of_a_group_leads_by_what_the_second_best_got() {
    let found =
        advantages(Estimator::GrpoPassK { by_std: false }, &scored(&[(0, 0.5, 1), (0, 3.0, 1), (0, 2.0, 1)]))
            .unwrap();
    assert_eq!(found, [0.0, 1.0, 0.0]);
}

fn batch_of(chains: &[agentfly_common::trajectory::Trajectory]) -> Metrics {
    let rows: Vec<_> = chains.iter().map(|chain| (chain, 1.0)).collect();
    Batch { step: 3, rows: &rows, faults: 0, groups_rerun: 0, rollout_seconds: 2.0, max_turn_tokens: 64 }
        .metrics()
}

fn assert_metrics(out: &Metrics, expected: &[(&str, f64)]) {
    for (name, value) in expected {
        assert_eq!(out.get(*name), Some(value), "{name}");
    }
}

#[test]
fn a_chain_that_sampled_nothing_is_not_scored_but_its_reward_is_still_the_rollouts() {
    let out = batch_of(&[chain(3, 0, 0, 1, 1.0), chain(3, 0, 1, 3, 0.0)]);
    assert_metrics(
        &out,
        &[
            ("critic/score/mean", 0.0),
            ("critic/score/max", 0.0),
            ("critic/rewards/mean", 0.0),
            ("agent/rollout/reward", 0.5),
        ],
    );
}

#[test]
fn a_reply_of_one_token_is_not_an_aborted_one() {
    let out = batch_of(&[chain(3, 0, 0, 2, 0.0), chain(3, 0, 1, 1, 0.0)]);
    assert_metrics(&out, &[("response/aborted_ratio", 0.5), ("response_length_non_aborted/mean", 1.0)]);
}

#[test]
fn prompts_times_and_tool_calls_of_a_batch() {
    let mut chains = [chain(3, 0, 0, 5, 0.0), chain(3, 0, 1, 5, 0.0)];
    // A prompt of three tokens, one sampled, one observed.
    chains[0].loss_mask = vec![false, false, false, true, false];
    for (chain, (seconds, calls)) in chains.iter_mut().zip([(1.0, 2), (4.0, 0)]) {
        chain.timings.total_seconds = seconds;
        chain.timings.tool_calls = calls;
        let call = Message { role: Role::Tool, content: String::new(), tool: Some("code".to_owned()) };
        chain.messages = vec![call; calls as usize];
    }
    assert_metrics(
        &batch_of(&chains),
        &[
            ("prompt_length/max", 3.0),
            ("prompt_length/min", 1.0),
            ("agent/rollout/time/min", 1.0),
            ("agent/rollout/time/max", 4.0),
            ("agent/rollout/time/avg", 2.5),
            ("agent/rollout/avg_tool_calls", 1.0),
            ("tool_call_counts/max", 2.0),
            ("agent/rollout/tool_calls/code", 1.0),
            ("timing_s/gen", 2.0),
            ("training/global_step", 3.0),
        ],
    );
}

#[test]
fn times_and_throughput_of_a_step() {
    let mut out = Metrics::from([("perf/total_num_tokens".to_owned(), 500.0)]);
    time(&mut out, Duration::from_secs(2), Duration::from_secs(10), 5);
    assert_metrics(
        &out,
        &[
            ("timing_s/update_actor", 2.0),
            ("timing_s/step", 10.0),
            ("perf/time_per_step", 10.0),
            ("timing_per_token_ms/update_actor", 4.0),
            ("perf/throughput", 10.0),
        ],
    );
    let mut fast = Metrics::from([("perf/total_num_tokens".to_owned(), 500.0)]);
    time(&mut fast, Duration::from_millis(125), Duration::from_millis(500), 1);
    assert_metrics(&fast, &[("perf/throughput", 1000.0)]);
    let mut nothing = Metrics::new();
    time(&mut nothing, Duration::from_millis(250), Duration::ZERO, 1);
    assert_metrics(&nothing, &[("timing_per_token_ms/update_actor", 250.0)]);
    assert_eq!(nothing.get("perf/throughput"), None, "no time, no throughput");
}

#[test]
fn the_tokens_of_more_ranks_than_rows() {
    let chains = [chain(1, 0, 0, 4, 0.0)];
    let rows: Vec<_> = chains.iter().map(|chain| (chain, 0.0)).collect();
    let shards = plan::shards(1, agentfly_common::ids::PolicyVersion(0), &rows, 4, 3);
    let out = balance(&rows, &shards);
    assert_metrics(
        &out,
        &[
            ("global_seqlen/max", 4.0),
            ("global_seqlen/balanced_max", 4.0),
            ("global_seqlen/balanced_min", 0.0),
        ],
    );
}

#[test]
fn what_ranks_measured_is_reduced_by_the_words_of_its_name() {
    let of = |value: f64| {
        ["a/max_x", "a/min", "total_tokens", "token.count", "minimum", "maxima"]
            .map(|name| (name.to_owned(), value))
            .into_iter()
            .collect::<Metrics>()
    };
    let (mut one, two) = (of(1.0), of(3.0));
    one.insert("only/here".to_owned(), 7.0);
    assert_metrics(
        &reduce([one, two].iter()),
        &[
            ("a/max_x", 3.0),
            ("a/min", 1.0),
            ("total_tokens", 4.0),
            ("token.count", 4.0),
            ("minimum", 2.0),
            ("maxima", 2.0),
            ("only/here", 7.0),
        ],
    );
}

fn placed(seating: Seating) -> Vec<Placement> {
    match seating {
        Seating::Now(placements) => placements,
        other => panic!("{other:?}"),
    }
}

#[test]
fn ranks_take_the_gpus_where_there_are_any_and_cpu_seats_only_where_there_are_none() {
    let mut fleet = Fleet::default();
    let mut with_gpu = facts(2);
    with_gpu.devices.extend([Device::Cuda(0), Device::Cuda(1)]);
    fleet.join("a".to_owned(), facts(2), Duration::ZERO);
    fleet.join("b".to_owned(), with_gpu, Duration::ZERO);
    let seats = placed(fleet.seats_for(&plan_of(2)));
    assert!(seats.iter().all(|seat| seat.node == "b" && matches!(seat.device, Device::Cuda(_))), "{seats:?}");
    let Seating::TooSmall(told) = fleet.seats_for(&plan_of(3)) else {
        panic!("two GPUs hold no three ranks")
    };
    assert!(
        told.contains(
            "3 ranks need 3 GPUs and the cluster has 2 (a has 0, b has 2); start workers with 1 more"
        ),
        "{told}"
    );
    let rank = RankId { job: "j".to_owned(), rank: 0, incarnation: 1 };
    fleet.seat(&seats[0], rank);
    let Seating::Later(told) = fleet.seats_for(&plan_of(2)) else { panic!("one GPU is taken") };
    assert_eq!(told, "waiting for devices: 1 of 2 GPUs are free, 2 are needed");
}

#[test]
fn a_nodes_cores_are_shared_by_the_ranks_on_it_and_each_has_at_least_one() {
    let threads = |seats: u32, ranks: u32| -> Vec<u32> {
        let mut fleet = Fleet::default();
        fleet.join("a".to_owned(), facts(seats), Duration::ZERO);
        placed(fleet.seats_for(&plan_of(ranks))).iter().map(|seat| seat.threads).collect()
    };
    assert_eq!(threads(8, 1), [4], "four cores");
    assert_eq!(threads(8, 2), [2, 2]);
    assert_eq!(threads(8, 5), [1; 5], "more ranks than cores");
}

#[test]
fn what_does_not_fit_as_configured_goes_where_there_is_room_and_nowhere_twice() {
    let mut fleet = Fleet::default();
    for (node, seats) in [("a", 3), ("b", 3), ("c", 3)] {
        fleet.join(node.to_owned(), facts(seats), Duration::ZERO);
    }
    let mut plan = plan_of(6);
    plan.ranks_per_node = 1;
    let nodes: Vec<String> = placed(fleet.seats_for(&plan)).into_iter().map(|seat| seat.node).collect();
    assert_eq!(nodes, ["a", "a", "a", "b", "b", "c"]);
    let mut seen = std::collections::BTreeSet::new();
    assert!(placed(fleet.seats_for(&plan)).into_iter().all(|seat| seen.insert((seat.node, seat.device))));
}

#[test]
fn validation_and_saving_are_due_every_so_many_steps_and_after_the_last() {
    let mut plan = plan_of(1);
    (plan.total_steps, plan.validation_rows, plan.validate_every, plan.save_every) = (5, 1, Some(2), None);
    let due = |of: &dyn Fn(u64) -> bool| (1..=5).filter(|&step| of(step)).collect::<Vec<u64>>();
    assert_eq!(due(&|step| plan.validates_after(step)), [2, 4, 5]);
    assert_eq!(due(&|step| plan.saves_after(step)), [5], "a trained model is never lost");
    (plan.validation_rows, plan.save_every) = (0, Some(1));
    assert_eq!(due(&|step| plan.validates_after(step)), [0; 0], "nothing to validate on");
    assert_eq!(due(&|step| plan.saves_after(step)), [1, 2, 3, 4, 5]);
}
