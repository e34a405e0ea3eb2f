//! How fast three ways of summing gradients and two of sharing weights are on this machine: `cargo run --release -p
//! agentfly-c10d --example collectives [ranks]`. Each rank is a thread with a Gloo group of its own over loopback; a
//! figure is the best of some repeats, as the slowest rank saw it. Sharing weights by libtorch's all-gather is none of
//! them: Gloo's took ten times as long as broadcasts, and the crate does not bind it.
#![allow(clippy::unwrap_used, reason = "a program for developers that fails by panicking")]

use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use agentfly_c10d::{Group, ReduceOp, Store};
use tch::{Device, Kind, Tensor};

const DEADLINE: Duration = Duration::from_secs(120);
/// Weights of the model whose gradients are shared.
const WEIGHTS: i64 = 50 << 20;
const REPEATS: usize = 12;

type Work = fn(&Group, &mut Tensor, i64);

fn shard(tensor: &Tensor, rank: usize, share: i64) -> Tensor {
    tensor.narrow(0, rank as i64 * share, share)
}

fn all_reduce(group: &Group, whole: &mut Tensor, _: i64) {
    group.all_reduce(whole, ReduceOp::Sum).unwrap();
}

fn reduce_scatter(group: &Group, whole: &mut Tensor, share: i64) {
    let mut own = whole.new_empty([share], (whole.kind(), Device::Cpu));
    group.reduce_scatter(&mut own, whole, ReduceOp::Sum).unwrap();
}

/// Part by part, as the learner does it: a part is added while it is in the cache.
fn exchange_and_add(group: &Group, whole: &mut Tensor, share: i64) {
    const PART: i64 = 1 << 20;
    let (rank, size) = (group.rank(), group.size());
    let incoming = whole.new_empty([PART], (whole.kind(), Device::Cpu));
    for round in 1..size {
        let (to, from) = ((rank + round) % size, (rank + size - round) % size);
        for start in (0..share).step_by(PART as usize) {
            let len = PART.min(share - start);
            let outgoing = shard(whole, to, share).narrow(0, start, len);
            let mut part = incoming.narrow(0, 0, len);
            group.exchange(&outgoing, to, &mut part, from, round as i32).unwrap();
            let _same = shard(whole, rank, share).narrow(0, start, len).g_add_(&part);
        }
    }
}

fn broadcasts(group: &Group, whole: &mut Tensor, share: i64) {
    for owner in 0..group.size() {
        group.broadcast(&mut shard(whole, owner, share), owner).unwrap();
    }
}

fn exchange(group: &Group, whole: &mut Tensor, share: i64) {
    let (rank, size) = (group.rank(), group.size());
    for round in 1..size {
        let (to, from) = ((rank + round) % size, (rank + size - round) % size);
        let own = shard(whole, rank, share);
        group.exchange(&own, to, &mut shard(whole, from, share), from, round as i32).unwrap();
    }
}

fn main() {
    let size: usize = std::env::args().nth(1).map_or(2, |n| n.parse().unwrap());
    let (_server, port) = Store::serve("127.0.0.1", 0, DEADLINE).unwrap();
    let ways: &'static [(&str, Work)] = &[
        ("gradients: all_reduce", all_reduce),
        ("gradients: reduce_scatter", reduce_scatter),
        ("gradients: exchange and add", exchange_and_add),
        ("weights: broadcast per owner", broadcasts),
        ("weights: exchange", exchange),
    ];
    let barrier = Arc::new(std::sync::Barrier::new(size));
    let rank = |rank: usize| {
        let barrier = Arc::clone(&barrier);
        thread::spawn(move || {
            let _no_grad = tch::no_grad_guard();
            tch::set_num_threads(1);
            let store = Store::connect("127.0.0.1", port, DEADLINE).unwrap();
            let group = Group::gloo(&store, rank, size, "127.0.0.1", DEADLINE).unwrap();
            let share = WEIGHTS / size as i64;
            let mut best = Vec::new();
            for kind in [Kind::Float, Kind::BFloat16] {
                let mut whole = Tensor::ones([share * size as i64], (kind, Device::Cpu));
                for (name, work) in ways {
                    let once = |whole: &mut Tensor| {
                        barrier.wait();
                        let started = Instant::now();
                        work(&group, whole, share);
                        barrier.wait();
                        started.elapsed()
                    };
                    let fastest = (0..REPEATS).map(|_| once(&mut whole)).min().unwrap();
                    best.push((format!("{kind:?} {name}"), fastest));
                }
            }
            best
        })
    };
    let threads: Vec<_> = (0..size).map(rank).collect();
    let mut results: Vec<_> = threads.into_iter().map(|thread| thread.join().unwrap()).collect();
    println!("{WEIGHTS} weights, {size} ranks of one thread");
    for (name, seconds) in results.remove(0) {
        println!("{name:40} {:7.1} ms", seconds.as_secs_f64() * 1e3);
    }
}
