//! Attention over packed sequences is libtorch's, a sequence at a time, forward and back; through the cache, too.

use agentfly_c10d::ops::{self, Heads, Packed, Sequence, attention};
use tch::{Device, Kind, Tensor};

use crate::batch::{Chain, through_cache};
use crate::util::{KINDS, Numbers, assert_same_bits, assert_true, has_kernels, leaf, whole, zeros};

pub(crate) const fn heads(queries: i64, keys: i64, dim: i64) -> Heads {
    Heads { queries, keys, dim }
}

/// Heads and the sequences' lengths; those that have no kernel last.
const CASES: [(Heads, &[i64]); 16] = [
    (heads(2, 1, 64), &[1, 2, 63, 64, 65, 129, 700]),
    (heads(3, 3, 8), &[2, 1, 65, 130]),
    (heads(4, 2, 16), &[1, 64, 129]),
    (heads(6, 2, 32), &[129, 1, 63, 2]),
    (heads(7, 1, 48), &[1, 9, 10, 128]),
    (heads(14, 2, 80), &[65, 3, 1]),
    (heads(8, 1, 96), &[1, 8, 73, 129]),
    (heads(2, 2, 128), &[64, 1, 65]),
    (heads(2, 1, 256), &[70, 1]),
    (heads(65, 1, 16), &[1, 2, 66]),
    (heads(130, 2, 8), &[1, 65]),
    (heads(2, 1, 2), &[1, 70]),
    (heads(3, 1, 34), &[1, 66, 2]),
    (heads(1, 1, 100), &[129]),
    (heads(4, 2, 33), &[1, 65, 2]),
    (heads(3, 1, 7), &[1, 2, 70]),
];

/// The same by libtorch's operator, a sequence at a time.
fn plain(qkv: &Tensor, lengths: &[i64], h: Heads) -> Tensor {
    let mut first = 0;
    // Where there is no kernel, libtorch shares the keys of a group, and sums their gradients in bf16.
    let shared = qkv.kind() != Kind::Double && !has_kernels(qkv.kind());
    let mixed = lengths.iter().map(|&length| {
        let rows = qkv.narrow(0, first, length);
        first += length;
        let part = |from: i64, count: i64| {
            let part = rows.narrow(1, from * h.dim, count * h.dim).reshape([length, count, h.dim]);
            let copies = if shared { 1 } else { h.queries / count };
            part.transpose(0, 1).repeat_interleave_self_int(copies, 0, None).unsqueeze(0)
        };
        let (q, k, v) = (part(0, h.queries), part(h.queries, h.keys), part(h.queries + h.keys, h.keys));
        let none: Option<Tensor> = None;
        let y = Tensor::scaled_dot_product_attention(&q, &k, &v, none, 0.0, true, None, shared);
        y.squeeze_dim(0).transpose(0, 1).reshape([length, h.queries * h.dim])
    });
    Tensor::cat(&mixed.collect::<Vec<_>>(), 0)
}

/// y and the gradients of queries, keys and values.
fn both_ways(f: impl Fn(&Tensor) -> Tensor, qkv: &Tensor, g: &Tensor, h: Heads) -> [Tensor; 4] {
    let y = f(qkv);
    ops::backward(&y, &g.to_kind(y.kind())).unwrap();
    let grad = qkv.grad();
    let part = |from: i64, count: i64| grad.narrow(1, from * h.dim, count * h.dim);
    [y, part(0, h.queries), part(h.queries, h.keys), part(h.queries + h.keys, h.keys)]
}

#[test]
fn packed_sequences_attend_each_to_itself_and_back() {
    for kind in KINDS {
        if !ops::has_kernels(&zeros(&[1], kind)) {
            eprintln!("{kind:?}: no kernel on this processor, and libtorch's own attention promises less");
            continue;
        }
        for (h, lengths) in CASES {
            let rows: i64 = lengths.iter().sum();
            let mut numbers = Numbers::new((rows * h.dim) as u64);
            let (qkv, g) = (
                numbers.tensor(&[rows, h.row()], kind) * 2.0,
                numbers.tensor(&[rows, h.queries * h.dim], kind),
            );
            let by_libtorch = |kind: Kind| both_ways(|x| plain(x, lengths, h), &leaf(&qkv, kind), &g, h);
            let (truth, libtorch) = (by_libtorch(Kind::Double), by_libtorch(kind));
            let ends = whole(lengths);
            let ours = both_ways(|x| attention(x, &ends, h).unwrap(), &leaf(&qkv, kind), &g, h);
            for (i, name) in ["mix", "queries", "keys", "values"].into_iter().enumerate() {
                assert_true(
                    &format!("{name} of {h:?} {lengths:?} {kind:?}"),
                    &ours[i],
                    &truth[i],
                    &libtorch[i],
                );
            }
        }
    }
}

/// Sequences that begin alike, two groups and one alone: [beginning, rests] of each.
const GROUPS: [(usize, &[usize]); 3] = [(70, &[1, 66, 5]), (3, &[130, 2]), (0, &[9])];

/// Their rows as they are packed, and those of each sequence as a whole, one after another.
fn groups() -> (Vec<Sequence>, Vec<i64>, Vec<i64>) {
    let (mut sequences, mut whole, mut lengths, mut next) = (Vec::new(), Vec::new(), Vec::new(), 0);
    let mut take = |count: usize| {
        next += count;
        next - count..next
    };
    for (common, rests) in GROUPS {
        let beginning = take(common);
        for &rest in rests {
            let sequence = Sequence { beginning: beginning.clone(), rest: take(rest) };
            whole.extend(sequence.beginning.clone().chain(sequence.rest.clone()).map(|row| row as i64));
            lengths.push((common + rest) as i64);
            sequences.push(sequence);
        }
    }
    (sequences, whole, lengths)
}

#[test]
fn sequences_that_begin_alike_are_computed_as_each_alone_and_back() {
    let (sequences, rows_of_whole, lengths) = groups();
    let n = 70 + 72 + 3 + 132 + 9;
    let packed = Packed::sharing(&sequences, n, Device::Cpu).unwrap();
    let rows_of_whole = Tensor::from_slice(&rows_of_whole);
    for kind in KINDS {
        for h in [heads(6, 2, 32), heads(3, 1, 64), heads(65, 1, 16), heads(4, 2, 33)] {
            let mut numbers = Numbers::new(h.dim as u64);
            let qkv = numbers.tensor(&[n as i64, h.row()], kind) * 2.0;
            let g = numbers.tensor(&[n as i64, h.queries * h.dim], kind);
            let each = attention(&qkv.index_select(0, &rows_of_whole), &whole(&lengths), h).unwrap();
            let ours = attention(&qkv, &packed, h).unwrap();
            let what = format!("{h:?} {kind:?}");
            if !has_kernels(kind) {
                eprintln!(
                    "{kind:?}: no kernel on this processor, and libtorch's own attention promises less"
                );
                continue;
            }
            if h.dim % 2 == 0 {
                assert_same_bits(&what, &ours.index_select(0, &rows_of_whole), &each);
            }
            // What reaches a beginning is the sum of what its sequences give it; its own results count once.
            let by_libtorch = |kind: Kind| {
                let once = |x: &Tensor| {
                    let y = plain(&x.index_select(0, &rows_of_whole), &lengths, h);
                    let of_row: Vec<i64> = Vec::try_from(&rows_of_whole).unwrap();
                    let first = |row| of_row.iter().position(|r| *r == row).unwrap() as i64;
                    let first: Vec<i64> = (0..n as i64).map(first).collect();
                    y.index_select(0, &Tensor::from_slice(&first))
                };
                both_ways(once, &leaf(&qkv, kind), &g, h)
            };
            let (truth, libtorch) = (by_libtorch(Kind::Double), by_libtorch(kind));
            let ours = both_ways(|x| attention(x, &packed, h).unwrap(), &leaf(&qkv, kind), &g, h);
            for (i, name) in ["mix", "queries", "keys", "values"].into_iter().enumerate() {
                assert_true(&format!("{name} of {what}"), &ours[i], &truth[i], &libtorch[i]);
            }
        }
    }
}

#[test]
fn attention_works_on_rows_that_lie_apart() {
    let (h, lengths) = (heads(2, 1, 16), [5, 66]);
    for kind in KINDS {
        let mut numbers = Numbers::new(4);
        let wide = numbers.tensor(&[71, h.row() + 5], kind);
        let g = numbers.tensor(&[32, 71], kind).transpose(0, 1);
        let by_libtorch = |kind: Kind| {
            both_ways(|x| plain(x, &lengths, h), &leaf(&wide.narrow(1, 2, h.row()), kind), &g, h)
        };
        let (truth, libtorch) = (by_libtorch(Kind::Double), by_libtorch(kind));
        let apart = wide.narrow(1, 2, h.row()).detach().set_requires_grad(true);
        let ours = both_ways(|x| attention(x, &whole(&lengths), h).unwrap(), &apart, &g, h);
        for i in 0..4 {
            assert_true(&format!("part {i} {kind:?}"), &ours[i], &truth[i], &libtorch[i]);
        }
    }
}

#[test]
fn other_kinds_take_libtorchs_way() {
    let (h, lengths) = (heads(4, 2, 16), [3, 70]);
    let qkv = Numbers::new(6).tensor(&[73, h.row()], Kind::Float);
    let truth = plain(&qkv.to_kind(Kind::Double), &lengths, h);
    let y = attention(&qkv.to_kind(Kind::Double), &whole(&lengths), h).unwrap();
    assert_true("f64", &y, &truth, &truth);
    let half = qkv.to_kind(Kind::Half);
    let y = attention(&half, &whole(&lengths), h).unwrap();
    assert_eq!(y.kind(), Kind::Half);
    assert_true("f16", &y.to_kind(Kind::BFloat16), &truth, &truth.to_kind(Kind::BFloat16));
}

#[test]
fn the_cache_gives_what_whole_sequences_give() {
    for kind in [Kind::Float, Kind::BFloat16, Kind::Half] {
        for (h, lengths) in CASES {
            let total: i64 = lengths.iter().sum();
            let mut numbers = Numbers::new(total as u64);
            let qkv = numbers.tensor(&[total, h.row()], kind);
            let truth = plain(&qkv.to_kind(Kind::Double), lengths, h);
            // Each in two stretches, then two tokens one by one.
            let chains = Chain::split(&qkv, lengths, |length| match length {
                0..4 => vec![1; length as usize],
                _ => vec![length / 2, length - length / 2 - 2, 1, 1],
            });
            let ours = Tensor::cat(&through_cache(&chains, h, &mut numbers), 0);
            // f16 has no kernel; its rounding is the finer one.
            let libtorch =
                plain(&qkv.to_kind(if kind == Kind::Float { kind } else { Kind::BFloat16 }), lengths, h);
            assert_true(&format!("{h:?} {lengths:?} {kind:?}"), &ours, &truth, &libtorch);
        }
    }
}
