//! A token's numbers are its own: the same bits at any place of any batch, however its sequence was cut into steps,
//! on any number of threads. Where this crate has no kernels libtorch decides, and nothing is promised.

use agentfly_c10d::ops::{
    self, Heads, Linear, PAGE_TOKENS, PagedStep, attention, page_numbers, paged_attention,
};
use tch::{Device, Kind, Tensor};

use crate::attention::heads;
use crate::util::{KINDS, Numbers, assert_same_bits, has_kernels, leaf, norm, starts, swiglu, whole, zeros};

/// A sequence's rows, and how many of them each step takes.
pub(crate) struct Chain {
    pub(crate) qkv: Tensor,
    pub(crate) steps: Vec<i64>,
}

impl Chain {
    /// Packed sequences of these lengths, each in the steps that `cut` gives for its length.
    pub(crate) fn split(qkv: &Tensor, lengths: &[i64], cut: impl Fn(i64) -> Vec<i64>) -> Vec<Self> {
        let mut first = 0;
        let mut next = |&length: &i64| {
            first += length;
            Self { qkv: qkv.narrow(0, first - length, length), steps: cut(length) }
        };
        lengths.iter().map(&mut next).collect()
    }

    fn pages(&self) -> i64 {
        (self.qkv.size()[0] + PAGE_TOKENS as i64 - 1) / PAGE_TOKENS as i64
    }
}

/// Runs all chains together until each has taken its steps, in shuffled pages that held other numbers before.
pub(crate) fn through_cache(chains: &[Chain], h: Heads, numbers: &mut Numbers) -> Vec<Tensor> {
    const LAYERS: i64 = 3;
    let like = &chains[0].qkv;
    let count: i64 = chains.iter().map(Chain::pages).sum::<i64>() + 2;
    let shape = [count, LAYERS, h.keys * page_numbers(like, h.dim).unwrap()];
    let pages = Tensor::full(shape, 3.0, (like.kind(), Device::Cpu));
    let mut order = numbers.shuffled(count);
    let tables: Vec<Vec<i64>> =
        chains.iter().map(|c| order.split_off(order.len() - c.pages() as usize)).collect();
    let mut done = vec![0; chains.len()];
    let mut results: Vec<Vec<Tensor>> = chains.iter().map(|_| Vec::new()).collect();
    for step in 0.. {
        let running: Vec<usize> = (0..chains.len()).filter(|&c| step < chains[c].steps.len()).collect();
        if running.is_empty() {
            break;
        }
        let new: Vec<i64> = running.iter().map(|&c| chains[c].steps[step]).collect();
        let rows = running.iter().zip(&new).map(|(&c, n)| chains[c].qkv.narrow(0, done[c], *n));
        let qkv = Tensor::cat(&rows.collect::<Vec<_>>(), 0);
        let mut table: Vec<Vec<i64>> = Vec::new();
        for (&c, n) in running.iter().zip(&new) {
            done[c] += n;
            // What a chain does not need may be no page at all.
            table.push(tables[c].iter().copied().chain([i64::MAX; 2]).collect());
        }
        let lengths: Vec<i64> = running.iter().map(|&c| done[c]).collect();
        let ends = starts(&new);
        let paged = PagedStep::new(&ends, &lengths, &table, count, Device::Cpu).unwrap();
        let y = paged_attention(&qkv, &pages, 1, &paged, h).unwrap();
        for (part, &c) in y.split_with_sizes(&new, 0).into_iter().zip(&running) {
            results[c].push(part);
        }
    }
    assert!(pages.select(1, 0).eq(3.0).all().int64_value(&[]) == 1, "another layer was written to");
    assert!(pages.select(1, 2).eq(3.0).all().int64_value(&[]) == 1, "another layer was written to");
    results.into_iter().map(|parts| Tensor::cat(&parts, 0)).collect()
}

const HEADS: [Heads; 12] = [
    heads(3, 3, 64),
    heads(9, 3, 64),
    heads(2, 1, 8),
    heads(7, 1, 48),
    heads(14, 2, 32),
    heads(16, 2, 128),
    heads(65, 1, 16),
    heads(4, 2, 80),
    heads(4, 4, 96),
    heads(2, 1, 256),
    heads(3, 1, 34),
    heads(9, 1, 40),
];

/// Lengths and steps that end before, at and behind the borders of pages and of what a step reads.
fn many_chains() -> Vec<(i64, Vec<i64>)> {
    let one_by_one =
        |first: i64, rest: i64| std::iter::once(first).chain(vec![1; rest as usize]).collect::<Vec<_>>();
    vec![
        (70, one_by_one(1, 69)),
        (129, vec![129]),
        (132, one_by_one(126, 6)),
        (98, vec![63, 1, 1, 30, 1, 1, 1]),
        (1, vec![1]),
        (200, vec![5, 60, 64, 1, 69, 1]),
        (18, one_by_one(14, 4)),
    ]
}

#[test]
fn prefill_in_any_stretches_and_decoding_are_packed_attention_bit_for_bit() {
    for kind in KINDS.into_iter().filter(|kind| has_kernels(*kind)) {
        for h in HEADS {
            let mut numbers = Numbers::new(h.row() as u64);
            let (lengths, steps): (Vec<i64>, Vec<Vec<i64>>) = many_chains().into_iter().unzip();
            let qkv = numbers.tensor(&[lengths.iter().sum(), h.row()], kind) * 2.0;
            let packed = attention(&qkv, &whole(&lengths), h).unwrap();
            let mut chains = Chain::split(&qkv, &lengths, |_| Vec::new());
            for (chain, steps) in chains.iter_mut().zip(steps) {
                chain.steps = steps;
            }
            let together = through_cache(&chains, h, &mut numbers);
            assert_same_bits(&format!("{h:?} {kind:?}"), &Tensor::cat(&together, 0), &packed);
            // Alone, and by autograd's way: the same.
            let alone = through_cache(&chains[3..4], h, &mut numbers);
            assert_same_bits(&format!("{h:?} {kind:?} alone"), &alone[0], &together[3]);
            let recorded = attention(&leaf(&qkv, kind), &whole(&lengths), h).unwrap();
            assert_same_bits(&format!("{h:?} {kind:?} recorded"), &recorded, &packed);
        }
    }
}

#[test]
fn tiny_and_huge_numbers_decode_to_the_same_bits() {
    for kind in KINDS.into_iter().filter(|kind| has_kernels(*kind)) {
        // The last: products below the least normal number, which matrix units may take for 0.
        for (scale, values) in [(1e-20, 1.0), (1e-12, 1.0), (6.0, 1e30), (40.0, 1.0), (3.0, 2e-38)] {
            let h = heads(4, 2, 64);
            let mut numbers = Numbers::new(77);
            let qkv = numbers.tensor(&[100, h.row()], kind) * scale;
            let first = (h.queries + h.keys) * h.dim;
            qkv.narrow(1, first, h.keys * h.dim)
                .copy_(&(numbers.tensor(&[100, h.keys * h.dim], kind) * values));
            let packed = attention(&qkv, &whole(&[100]), h).unwrap();
            let chains = Chain::split(&qkv, &[100], |_| std::iter::once(1).chain(vec![1; 99]).collect());
            let decoded = through_cache(&chains, h, &mut numbers);
            assert_same_bits(
                &format!("scores of size {scale}, values {values}, {kind:?}"),
                &decoded[0],
                &packed,
            );
        }
    }
}

#[test]
fn a_row_of_a_linear_map_does_not_depend_on_the_others() {
    for kind in KINDS.into_iter().filter(|kind| has_kernels(*kind)) {
        // The last two are deeper than what of the weights is widened at a time, where bf16 is multiplied in f32.
        for (k, n, m) in [
            (64, 100, 130),
            (576, 192, 97),
            (34, 16, 70),
            (2, 7, 66),
            (1536, 65, 200),
            (130, 1, 130),
            (2048, 65, 97),
            (3100, 33, 40),
        ] {
            let mut numbers = Numbers::new((k + n) as u64);
            let (weight, bias) = (numbers.tensor(&[n, k], kind), numbers.tensor(&[n], kind));
            let x = numbers.tensor(&[m, k], kind);
            let map = Linear::new(&[&weight], &[&bias]).unwrap();
            let (all, wide) = (map.apply(&x).unwrap(), map.apply_wide(&x).unwrap());
            for count in 1..=m {
                let what = format!("{count} of {m} rows, k = {k}, n = {n}, {kind:?}");
                // The last rows, so that each is at another place than before.
                let (from, rows) = (m - count, x.narrow(0, m - count, count));
                assert_same_bits(&what, &map.apply(&rows).unwrap(), &all.narrow(0, from, count));
                if count % 16 == 1 {
                    assert_same_bits(&what, &map.apply_wide(&rows).unwrap(), &wide.narrow(0, from, count));
                }
            }
            let recorded = map.apply(&leaf(&x, kind)).unwrap();
            assert_same_bits("recorded", &recorded, &all);
        }
    }
}

#[test]
fn columns_do_not_depend_on_the_maps_beside_them() {
    for kind in KINDS.into_iter().filter(|kind| has_kernels(*kind)) {
        let mut numbers = Numbers::new(31);
        let weights = [5, 70, 64].map(|n| numbers.tensor(&[n, 48], kind));
        let x = numbers.tensor(&[9, 48], kind);
        let together = Linear::new(&weights.iter().collect::<Vec<_>>(), &[]).unwrap().apply(&x).unwrap();
        let alone = weights.each_ref().map(|w| Linear::new(&[w], &[]).unwrap().apply(&x).unwrap());
        assert_same_bits(&format!("{kind:?}"), &together, &Tensor::cat(&alone, 1));
    }
}

/// Everything that runs on several threads, at work sizes that do.
fn everything(kind: Kind) -> Vec<Tensor> {
    let mut numbers = Numbers::new(99);
    let h = heads(6, 2, 32);
    let lengths = [100, 3, 200];
    let x = leaf(&numbers.tensor(&[303, 576], kind), kind);
    let scale = numbers.tensor(&[576], kind);
    let norm_sum = zeros(&[576], Kind::Float);
    let weight = numbers.tensor(&[h.row(), 576], kind) * 0.1;
    let sum = zeros(&weight.size(), Kind::Float);
    let map = Linear::new(&[&weight], &[]).unwrap();
    map.train(&[&sum], &[]).unwrap();
    let qkv = map.apply_norm(&x, &norm(&scale, Some(&norm_sum), 1e-5)).unwrap();
    let y = swiglu(&attention(&qkv, &whole(&lengths), h).unwrap());
    let g = numbers.tensor(&y.size(), kind);
    ops::backward(&y, &g).unwrap();
    let chains = Chain::split(&qkv.detach(), &lengths, |length| vec![length - 1, 1]);
    let paged = Tensor::cat(&through_cache(&chains, h, &mut numbers), 0);
    vec![y, x.grad(), norm_sum, sum, paged]
}

#[test]
fn one_thread_and_two_give_the_same_bits() {
    for kind in KINDS.into_iter().filter(|kind| has_kernels(*kind)) {
        let results = [1, 2].map(|threads| {
            tch::set_num_threads(threads);
            assert_eq!(tch::get_num_threads(), threads);
            everything(kind)
        });
        for (i, (one, two)) in results[0].iter().zip(&results[1]).enumerate() {
            assert_same_bits(&format!("part {i} {kind:?}"), one, two);
        }
    }
}
