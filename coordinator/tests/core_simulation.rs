//! The core in hundreds of worlds that break in random ways: every invariant after every event, and every job
//! ends. A failing seed is printed; `CORE_SEED=<n> cargo nextest run core_simulation` replays it alone.
#![allow(clippy::unwrap_used, reason = "helpers of tests fail by panicking")]

mod core_world;

use std::collections::BTreeMap;
use std::time::Duration;

use agentfly_common::config::Config;
use agentfly_coordinator::core::event::JobState;
use core_world::{Temper, World, config, job};

const SEEDS: u64 = 600;

/// A calm world, and worlds where one kind of mishap or all of them happen.
fn temper(seed: u64) -> Temper {
    let calm = Temper { slowness: 8.0, ..Temper::default() };
    let rough = Temper {
        duplicate: 0.1,
        die: 0.01,
        hang: 0.01,
        lie: 0.01,
        faulty_chain: 0.05,
        foreign_chain: 0.002,
        idle_update: 0.01,
        lost_checkpoint: 0.02,
        node_leaves: 0.05,
        cancel: 0.05,
        slowness: 12.0,
    };
    match seed % 10 {
        0 => calm,
        1 => Temper { duplicate: 0.5, ..calm },
        2 => Temper { die: 0.02, duplicate: 0.2, ..calm },
        3 => Temper { hang: 0.02, ..calm },
        4 => Temper { lie: 0.05, ..calm },
        5 => Temper { faulty_chain: 0.3, foreign_chain: 0.005, duplicate: 0.2, ..calm },
        6 => Temper { node_leaves: 0.3, cancel: 0.1, ..calm },
        7 => Temper { idle_update: 0.1, lost_checkpoint: 0.2, ..calm },
        _ => rough,
    }
}

fn live_through(seed: u64, base: &Config) -> Vec<(JobState, String)> {
    let mut world = World::new(seed, temper(seed));
    for node in 0..=world.below(3) {
        let seats = 1 + world.below(3);
        world.add_node(&format!("node-{node}"), seats);
    }
    for number in 0..=world.below(3) {
        let mut config = base.clone();
        config.trainer.n_gpus_per_node = 1 + world.below(3);
        config.trainer.total_training_steps = Some(1 + u64::from(world.below(4)));
        config.trainer.test_freq = i64::from(world.below(3)) - 1;
        config.trainer.save_freq = i64::from(world.below(3)) - 1;
        config.trainer.val_before_train = world.chance(0.5);
        let validation_rows = world.below(4) as usize;
        world.submit(&format!("job-{number}"), job(config, validation_rows));
    }
    world.run(Duration::from_secs(3000));
    world.ended.into_values().map(|end| (end.state, end.detail)).collect()
}

#[test]
fn every_job_ends_and_every_invariant_holds_however_the_world_breaks() {
    let base = config(&[]);
    if let Ok(seed) = std::env::var("CORE_SEED") {
        println!("{:#?}", live_through(seed.parse().unwrap(), &base));
        return;
    }
    let mut ends: BTreeMap<&'static str, u32> = BTreeMap::new();
    for seed in 0..SEEDS {
        let lived = std::panic::catch_unwind(|| live_through(seed, &base));
        let lived =
            lived.unwrap_or_else(|_| panic!("broken by seed {seed}: replay it with CORE_SEED={seed}"));
        for (state, detail) in lived {
            let kind = kind(state, &detail);
            if kind == "other" {
                println!("seed {seed}: {state:?}: {detail}");
            }
            *ends.entry(kind).or_default() += 1;
        }
    }
    println!("{ends:?}");
    for expected in KINDS.iter().map(|(kind, _)| *kind).chain(["finished", "cancelled"]) {
        assert!(
            ends.contains_key(expected),
            "no job ended as `{expected}`: the worlds are too tame: {ends:?}"
        );
    }
    assert_eq!(ends.get("other"), None, "an end nobody foresaw: see `kind`");
}

/// How jobs can fail, and words that tell it.
const KINDS: [(&str, &str); 14] = [
    ("died", "is gone: was killed (signal 9)"),
    ("silent", "has been silent for"),
    ("said so", "CUDA is out of memory"),
    ("node lost", "is lost, and rank"),
    ("no place", "queued without a place for longer than"),
    ("start too slow", "starting took longer than trainer.startup_timeout_seconds"),
    ("rollout too slow", "trainer.rollout_timeout_seconds"),
    ("training too slow", "to finish training; it has been in all_reduce for"),
    ("wrong weights", "wrong weights after"),
    ("idle update", "the update changed nothing"),
    ("foreign chain", "cannot be trained on"),
    ("chains that fail again and again", "for reasons that are not its own"),
    ("broken collective", "connection closed by peer"),
    ("checkpoint lost", "no space left on the disk"),
];

fn kind(state: JobState, detail: &str) -> &'static str {
    match state {
        JobState::Finished => "finished",
        JobState::Cancelled => "cancelled",
        _ if detail.contains("part of the checkpoint") => "checkpoint too slow",
        _ => KINDS.iter().find(|(_, words)| detail.contains(words)).map_or("other", |(kind, _)| kind),
    }
}
