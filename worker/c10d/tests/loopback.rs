//! Two ranks as two threads over real loopback sockets: what the collectives promise, and how they fail.
#![allow(clippy::unwrap_used, reason = "helpers of tests fail by panicking, too")]

use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use agentfly_c10d::ops::Linear;
use agentfly_c10d::{ErrorKind, Group, ReduceOp, Store};
use tch::{Device, Kind, Tensor};

const DEADLINE: Duration = Duration::from_secs(10);

/// Runs `body` once per rank, each in its thread with its own store client, and gives the results by rank.
fn ranks<T: Send + 'static>(
    size: usize,
    deadline: Duration,
    body: impl Fn(Group) -> T + Send + Sync + 'static,
) -> Vec<T> {
    let (server, port) = Store::serve("127.0.0.1", 0, DEADLINE).unwrap();
    let body = Arc::new(body);
    let threads: Vec<_> = (0..size)
        .map(|rank| {
            let body = Arc::clone(&body);
            thread::spawn(move || {
                let store = Store::connect("127.0.0.1", port, DEADLINE).unwrap();
                let store = store.with_prefix("group-0").unwrap();
                body(Group::gloo(&store, rank, size, "127.0.0.1", deadline).unwrap())
            })
        })
        .collect();
    let results = threads.into_iter().map(|t| t.join().unwrap()).collect();
    drop(server);
    results
}

fn floats(tensor: &Tensor) -> Vec<f32> {
    Vec::<f32>::try_from(tensor.flatten(0, -1)).unwrap()
}

#[test]
fn all_reduce_is_exact_and_equal_on_every_rank() {
    let results = ranks(3, DEADLINE, |group| {
        let n = 100_003; // no multiple of anything
        let mine = Tensor::arange(n, (Kind::Float, Device::Cpu)) * (group.rank() as f64 + 1.0);
        let [sum, max] = [ReduceOp::Sum, ReduceOp::Max].map(|op| {
            let mut tensor = mine.copy();
            group.all_reduce(&mut tensor, op).unwrap();
            floats(&tensor)
        });
        (sum, max)
    });
    for (sum, max) in &results {
        for i in [0usize, 1, 4097, 100_002] {
            let x = i as f32;
            assert_eq!((sum[i], max[i]), (6.0 * x, 3.0 * x), "element {i}");
        }
    }
    assert!(results.iter().all(|r| r == &results[0]), "ranks disagree");
}

#[test]
fn broadcast_and_scatter_put_values_where_they_say() {
    ranks(2, DEADLINE, |group| {
        let rank = group.rank() as f32;
        let mut shared = Tensor::from_slice(&[rank, rank]);
        group.broadcast(&mut shared, 1).unwrap();
        assert_eq!(floats(&shared), [1.0, 1.0]);

        let whole = Tensor::from_slice(&[rank, 10.0 + rank, 20.0, 30.0 * rank]);
        let mut part = Tensor::zeros([2], (Kind::Float, Device::Cpu));
        group.reduce_scatter(&mut part, &whole, ReduceOp::Sum).unwrap();
        assert_eq!(floats(&part), if rank == 0.0 { [1.0, 21.0] } else { [40.0, 30.0] });
    });
}

#[test]
fn a_peer_that_never_comes_is_a_timeout_that_names_the_collective() {
    let start = Instant::now();
    let results = ranks(2, Duration::from_millis(300), |group| match group.rank() {
        0 => {
            let failed = group.all_reduce(&mut Tensor::from_slice(&[1.0f32]), ReduceOp::Sum);
            (Some(failed.unwrap_err()), None)
        }
        _ => (None, Some(group)), // stays alive, and silent, until rank 0 has given up
    });
    let error = results[0].0.clone().unwrap();
    assert_eq!(error.kind, ErrorKind::Timeout, "{error}");
    let text = error.to_string();
    for part in ["all-reduce (Sum)", "rank 0 of 2", "300ms"] {
        assert!(text.contains(part), "{part:?} is not in {text:?}");
    }
    assert!(start.elapsed() < Duration::from_secs(5));
}

#[test]
fn a_peer_that_left_is_a_network_error() {
    let results = ranks(2, DEADLINE, |group| {
        // Both have joined: one that leaves before is another error, the joining one's.
        group.all_reduce(&mut Tensor::from_slice(&[0.0f32]), ReduceOp::Sum).unwrap();
        match group.rank() {
            0 => group.broadcast(&mut Tensor::from_slice(&[0.0f32]), 1).err(),
            _ => {
                drop(group);
                None
            }
        }
    });
    let error = results[0].clone().unwrap();
    assert_eq!(error.kind, ErrorKind::Network, "{error}");
}

#[test]
fn a_rank_that_never_joins_and_a_key_nobody_sets_are_timeouts_with_names() {
    let short = Duration::from_millis(200);
    let (store, _) = Store::serve("127.0.0.1", 0, short).unwrap();
    let error = Group::gloo(&store, 0, 2, "127.0.0.1", short).unwrap_err();
    assert_eq!(error.kind, ErrorKind::Timeout, "{error}");
    assert!(error.to_string().contains("rank 0 of 2"), "{error}");
    let error = store.get("weights-address").unwrap_err();
    assert_eq!(error.kind, ErrorKind::Timeout, "{error}");
    assert!(error.to_string().contains("weights-address"), "{error}");
}

#[test]
fn tensors_that_would_corrupt_memory_are_refused_before_anything_is_sent() {
    ranks(2, DEADLINE, |group| {
        let whole = Tensor::zeros([4, 4], (Kind::Float, Device::Cpu));
        let error = group.all_reduce(&mut whole.narrow(1, 0, 2), ReduceOp::Sum).unwrap_err();
        assert_eq!(error.kind, ErrorKind::InvalidArgument);
        assert!(error.to_string().contains("strides [4, 1]"), "{error}");

        let mut short = Tensor::zeros([5], (Kind::Float, Device::Cpu));
        let error = group.reduce_scatter(&mut short, &whole, ReduceOp::Sum).unwrap_err();
        assert!(error.to_string().contains("16 elements of Float, a part 5"), "{error}");
        let mut doubles = Tensor::zeros([8], (Kind::Double, Device::Cpu));
        assert!(group.reduce_scatter(&mut doubles, &whole, ReduceOp::Sum).is_err());

        assert!(group.broadcast(&mut whole.copy(), 2).unwrap_err().to_string().contains("0 to 1"));
        group.broadcast(&mut whole.copy(), 1).unwrap(); // and the group still works
    });
}

#[test]
fn a_store_is_shared_by_threads_and_prefixes_keep_groups_apart() {
    let (store, port) = Store::serve("127.0.0.1", 0, DEADLINE).unwrap();
    thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| {
                for _ in 0..50 {
                    store.add("counter", 1).unwrap();
                }
            });
        }
    });
    assert_eq!(store.add("counter", 0).unwrap(), 400);
    store.with_prefix("a").unwrap().set("key", b"one").unwrap();
    store.with_prefix("b").unwrap().set("key", &[0, 255]).unwrap();
    let client = Store::connect("127.0.0.1", port, DEADLINE).unwrap();
    assert_eq!(client.with_prefix("a").unwrap().get("key").unwrap(), b"one");
    assert_eq!(client.with_prefix("b").unwrap().get("key").unwrap(), [0, 255]);
    assert!(Store::connect("127.0.0.1", 0, DEADLINE).is_err());
    assert!(store.set("a\0b", b"").unwrap_err().to_string().contains("NUL at byte 1"));
}

#[test]
fn an_nccl_group_says_what_it_lacks() {
    if agentfly_c10d::has_nccl() {
        return; // a CUDA build is tested with GPUs
    }
    let (store, _) = Store::serve("127.0.0.1", 0, DEADLINE).unwrap();
    let error = Group::nccl(&store, 0, 1, 0, DEADLINE).unwrap_err();
    assert_eq!(error.kind, ErrorKind::Unsupported, "{error}");
}

#[test]
fn a_linear_map_sees_weights_that_arrive() {
    let results = ranks(2, DEADLINE, |group| {
        let mut weight = Tensor::ones([16, 16], (Kind::Float, Device::Cpu)) * (group.rank() as f64 + 1.0);
        let map = Linear::new(&[&weight], &[]).unwrap();
        let x = Tensor::ones([1, 16], (Kind::Float, Device::Cpu));
        let mut seen = vec![map.apply(&x).unwrap().double_value(&[0, 15])];
        group.all_reduce(&mut weight, ReduceOp::Sum).unwrap();
        seen.push(map.apply(&x).unwrap().double_value(&[0, 15]));
        if group.rank() == 1 {
            weight = weight.fill_(7.0);
        }
        group.broadcast(&mut weight, 1).unwrap();
        seen.push(map.apply(&x).unwrap().double_value(&[0, 15]));
        seen
    });
    assert_eq!(results, [[16.0, 48.0, 112.0], [32.0, 48.0, 112.0]]);
}

#[test]
fn three_ranks_exchange_in_a_circle_without_locking_up() {
    let results = ranks(3, DEADLINE, |group| {
        let (rank, size) = (group.rank(), group.size());
        // More than a socket holds, so that nobody gets rid of it before the other takes it; of different lengths.
        let outgoing = Tensor::full([1 << 20], rank as f64, (Kind::Float, Device::Cpu)).narrow(0, 7, 999_999);
        let mut whole = Tensor::full([1 << 20], -1.0, (Kind::Float, Device::Cpu));
        for round in 1..size {
            let (to, from) = ((rank + round) % size, (rank + size - round) % size);
            let mut incoming = whole.narrow(0, 40, 999_999);
            group.exchange(&outgoing, to, &mut incoming, from, round as i32).unwrap();
            assert_eq!(incoming.min().double_value(&[]), from as f64);
            assert_eq!(incoming.max().double_value(&[]), from as f64);
        }
        assert_eq!(whole.double_value(&[39]), -1.0, "only the part that was given is written");
        let strided = Tensor::zeros([4, 4], (Kind::Float, Device::Cpu)).narrow(1, 0, 2);
        let to = (rank + 1) % size;
        let error = group.exchange(&strided, to, &mut whole, to, 0).unwrap_err();
        assert_eq!(error.kind, ErrorKind::InvalidArgument, "{error}");
        assert!(group.exchange(&outgoing, rank, &mut whole, to, 0).is_err(), "not with itself");
        group.broadcast(&mut whole, 1).unwrap(); // and the group still works
    });
    assert_eq!(results.len(), 3);
}
