//! Whatever a caller gets wrong is an error that says so: never a panic, and never memory that is not its own.

use std::ops::Range;

use agentfly_c10d::ops::{
    self, Draw, FixedStep, Heads, Linear, PAGE_TOKENS, Packed, PagedStep, Sequence, StepShape, attention,
    page_numbers, paged_attention, rms_norm, rope, sample, token_terms,
};
use agentfly_c10d::{ErrorKind, Result};
use tch::{Device, Kind, Tensor};

use crate::attention::heads;
use crate::util::{KINDS, indices, leaf, norm, swiglu, zeros};

fn ones(shape: &[i64]) -> Tensor {
    Tensor::ones(shape, (Kind::Float, Device::Cpu))
}

/// Transposed: the shape fits, the layout does not.
fn apart(rows: i64, columns: i64) -> Tensor {
    ones(&[columns, rows]).transpose(0, 1)
}

#[track_caller]
fn refused<T>(what: &str, result: Result<T>) {
    match result {
        Ok(_) => panic!("{what} was taken"),
        Err(error) => assert_eq!(error.kind, ErrorKind::InvalidArgument, "{what}: {error}"),
    }
}

#[test]
fn linear_maps_refuse_what_does_not_fit() {
    let (w, b) = (ones(&[3, 4]), ones(&[3]));
    let weights: [(&str, &[&Tensor]); 8] = [
        ("no weights", &[]),
        ("a vector", &[&b]),
        ("no columns", &[&ones(&[3, 0])]),
        ("other columns", &[&w, &ones(&[3, 5])]),
        ("another kind", &[&w, &w.to_kind(Kind::BFloat16)]),
        ("whole numbers", &[&w.to_kind(Kind::Int64)]),
        ("a transposed weight", &[&apart(3, 4)]),
        ("an undefined weight", &[&w, &Tensor::new()]),
    ];
    for (what, weights) in weights {
        refused(what, Linear::new(weights, &[]));
    }
    let biases: [(&str, &[&Tensor]); 4] = [
        ("too many biases", &[&b, &b]),
        ("a long bias", &[&ones(&[4])]),
        ("another kind", &[&b.to_kind(Kind::Double)]),
        ("an undefined bias", &[&Tensor::new()]),
    ];
    for (what, biases) in biases {
        refused(what, Linear::new(&[&w], biases));
    }
    let map = Linear::new(&[&w], &[]).unwrap();
    for (what, x) in [
        ("narrow rows", ones(&[2, 3])),
        ("a vector", ones(&[4])),
        ("three dimensions", ones(&[1, 2, 4])),
        ("another kind", ones(&[2, 4]).to_kind(Kind::BFloat16)),
        ("nothing", Tensor::new()),
    ] {
        refused(what, map.apply(&x));
        refused(what, map.apply_wide(&x));
        refused(what, map.backward(&x, &ones(&[2, 3])));
        refused(what, map.apply_norm(&x, &norm(&ones(&[4]), None, 1e-5)));
    }
    for (what, weight, grad) in [
        ("a short norm", ones(&[3]), ones(&[4])),
        ("a norm of another kind", ones(&[4]).to_kind(Kind::Double), ones(&[4])),
        ("a norm's short sum", ones(&[4]), ones(&[3])),
    ] {
        refused(what, map.apply_norm(&ones(&[2, 4]), &norm(&weight, Some(&grad), 1e-5)));
    }
    for (what, x) in [
        ("gates alone", ones(&[2, 4])),
        ("an odd width", ones(&[2, 7])),
        ("a vector", ones(&[8])),
        ("another kind", ones(&[2, 8]).to_kind(Kind::BFloat16)),
        ("nothing", Tensor::new()),
    ] {
        refused(what, map.apply_swiglu(&x));
    }
    for (what, g) in [
        ("other rows", ones(&[1, 3])),
        ("other columns", ones(&[2, 4])),
        ("another kind", ones(&[2, 3]).to_kind(Kind::Double)),
        ("a transposed gradient", apart(2, 3)),
        ("nothing", Tensor::new()),
    ] {
        refused(what, map.backward(&ones(&[2, 4]), &g));
    }
    let two = Linear::new(&[&w, &w], &[]).unwrap();
    refused("backward of two", two.backward(&ones(&[2, 4]), &ones(&[2, 6])));
    for (what, sum) in [
        ("another shape", ones(&[4, 3])),
        ("another kind", ones(&[3, 4]).to_kind(Kind::Double)),
        ("a transposed sum", apart(3, 4)),
        ("nothing", Tensor::new()),
    ] {
        refused(what, map.train(&[&sum], &[]));
    }
    refused("two sums for one weight", map.train(&[&w, &w], &[]));
    refused("a bias's sum without a bias", map.train(&[&w], &[&b]));
    assert_eq!(map.apply(&ones(&[0, 4])).unwrap().size(), [0, 3]);
}

#[test]
fn a_weight_or_a_sum_that_changes_its_shape_is_an_error() {
    for kind in KINDS {
        let changes: [fn(&mut Tensor); 3] =
            [|t| drop(t.resize_([1, 2])), |t| drop(t.transpose_(0, 1)), |t| drop(t.resize_([500, 64]))];
        for change in changes {
            let (mut weight, x) = (zeros(&[16, 64], kind), zeros(&[3, 64], kind));
            let map = Linear::new(&[&weight], &[]).unwrap();
            assert_eq!(map.apply(&x).unwrap().size(), [3, 16]);
            change(&mut weight);
            assert!(map.apply(&x).is_err(), "a weight of another shape was taken in {kind:?}");
            assert!(map.backward(&x, &zeros(&[3, 16], kind)).is_err());
            let weight = zeros(&[16, 64], kind);
            let map = Linear::new(&[&weight], &[]).unwrap();
            let mut sum = zeros(&[16, 64], Kind::Float);
            map.train(&[&sum], &[]).unwrap();
            let y = map.apply(&leaf(&x, kind)).unwrap();
            change(&mut sum);
            assert!(ops::backward(&y, &y.detach()).is_err(), "a sum of another shape was taken in {kind:?}");
            assert!(map.backward(&x, &zeros(&[3, 16], kind)).is_err());
        }
    }
}

#[test]
fn norm_and_rope_refuse_what_does_not_fit() {
    let (x, w) = (ones(&[2, 8]), ones(&[8]));
    for (what, result) in [
        ("a long weight", rms_norm(&x, &norm(&ones(&[9]), None, 1e-5))),
        ("another kind", rms_norm(&x, &norm(&w.to_kind(Kind::BFloat16), None, 1e-5))),
        ("whole numbers", rms_norm(&x.to_kind(Kind::Int64), &norm(&w.to_kind(Kind::Int64), None, 1e-5))),
        ("a weight apart", rms_norm(&x, &norm(&ones(&[16]).slice(0, 0, 16, 2), None, 1e-5))),
        ("a scalar", rms_norm(&ones(&[]), &norm(&ones(&[]), None, 1e-5))),
        ("no columns", rms_norm(&ones(&[2, 0]), &norm(&ones(&[0]), None, 1e-5))),
        ("a short sum", rms_norm(&x, &norm(&w, Some(&ones(&[7])), 1e-5))),
        ("a sum of another kind", rms_norm(&x, &norm(&w, Some(&w.to_kind(Kind::BFloat16)), 1e-5))),
        ("a negative eps", rms_norm(&x, &norm(&w, None, -1.0))),
        ("no eps", rms_norm(&x, &norm(&w, None, f64::NAN))),
        ("nothing", rms_norm(&Tensor::new(), &norm(&w, None, 1e-5))),
        ("no weight", rms_norm(&x, &norm(&Tensor::new(), None, 1e-5))),
        ("no sum", rms_norm(&x, &norm(&w, Some(&Tensor::new()), 1e-5))),
    ] {
        refused(what, result);
    }
    let a = ones(&[2, 2]);
    for (what, result) in [
        ("too many heads", rope(&x, &a, &a, 3)),
        ("fewer than no heads", rope(&x, &a, &a, -1)),
        ("heads beyond counting", rope(&x, &a, &a, i64::MAX)),
        ("heads that wrap to none", rope(&x, &a, &a, 1 << 62)),
        ("no angles", rope(&x, &ones(&[2, 0]), &ones(&[2, 0]), i64::MAX)),
        ("one row of angles", rope(&x, &ones(&[1, 2]), &a, 1)),
        ("other sines", rope(&x, &a, &ones(&[2, 1]), 1)),
        ("f64 angles", rope(&x, &a.to_kind(Kind::Double), &a, 1)),
        ("angles apart", rope(&x, &apart(2, 2), &a, 1)),
        ("a vector", rope(&w, &a, &a, 1)),
        ("whole numbers", rope(&x.to_kind(Kind::Int64), &a, &a, 1)),
        ("nothing", rope(&Tensor::new(), &a, &a, 1)),
        ("no cosines", rope(&x, &Tensor::new(), &a, 1)),
    ] {
        refused(what, result);
    }
}

/// Rows `[3, 8]` of two query heads and one key head.
const HEADS: Heads = heads(2, 1, 2);

#[test]
fn attention_refuses_what_does_not_fit() {
    let packed = Packed::new(&[0, 1, 3], Device::Cpu).unwrap();
    let qkv = ones(&[3, 8]);
    for wrong in [
        heads(0, 1, 2),
        heads(2, 0, 2),
        heads(2, 1, 0),
        heads(3, 2, 2),
        heads(-2, -1, -2),
        heads(3, 1, 2),
        heads((1 << 62) + 2, 1, 2), // its row would wrap to 8
        heads((1 << 61) + 2, 1 << 61, 2),
        heads(i64::MAX, 1, i64::MAX),
    ] {
        refused(&format!("{wrong:?}"), attention(&qkv, &packed, wrong));
    }
    for (what, qkv) in [
        ("a vector", ones(&[8])),
        ("whole numbers", qkv.to_kind(Kind::Int64)),
        ("nothing", Tensor::new()),
        ("a row more", ones(&[4, 8])),
        ("no rows", ones(&[0, 8])),
    ] {
        refused(what, attention(&qkv, &packed, HEADS));
    }
}

#[test]
fn sequences_are_refused_that_do_not_fit_their_rows() {
    for (what, starts) in [
        ("no starts", &[][..]),
        ("one start", &[0]),
        ("an empty sequence", &[0, 1, 1, 3]),
        ("a way back", &[0, 2, 1, 3]),
        ("a start before", &[-1, 3]),
        ("a late start", &[1, 3]),
    ] {
        refused(what, Packed::new(starts, Device::Cpu));
    }
    let sequence = |beginning: Range<usize>, rest: Range<usize>| Sequence { beginning, rest };
    for (what, sequences, rows) in [
        ("none", vec![], 0),
        ("an empty rest", vec![sequence(0..2, 2..2)], 2),
        ("a row of nobody", vec![sequence(0..1, 1..2)], 3),
        ("a row too far", vec![sequence(0..1, 1..4)], 3),
        ("a range that ends before it starts", vec![sequence(Range { start: 2, end: 1 }, 0..3)], 3),
        ("a rest of two", vec![sequence(0..1, 1..3), sequence(0..1, 1..3)], 3),
        ("beginnings in part the same", vec![sequence(0..2, 2..3), sequence(1..2, 3..4)], 4),
        ("another one's rest to begin with", vec![sequence(0..0, 0..2), sequence(0..2, 2..3)], 3),
        ("a rest within its beginning", vec![sequence(0..3, 2..4)], 4),
        ("more rows than there is memory", vec![sequence(0..1, 1..2)], usize::MAX),
    ] {
        refused(what, Packed::sharing(&sequences, rows, Device::Cpu));
    }
    let apart = Packed::sharing(&[sequence(3..4, 1..3), sequence(3..4, 0..1)], 4, Device::Cpu);
    assert_eq!(
        apart.map(|packed| packed.rows()).map_err(|e| e.to_string()),
        Ok(4),
        "rows may lie in any order"
    );
}

/// A step in a cache of four pages; `most` pages a table.
fn step(starts: &[i64], lengths: &[i64], table: &[i64], most: usize) -> Result<PagedStep> {
    let tables: Vec<Vec<i64>> = table.chunks(most).map(<[i64]>::to_vec).collect();
    PagedStep::new(starts, lengths, &tables, 4, Device::Cpu)
}

#[test]
fn a_step_outside_the_cache_or_over_others_is_refused() {
    step(&[0, 1, 3], &[65, 2], &[3, 0, 1, -1], 2).unwrap();
    step(&[0, 1, 2], &[65, 66], &[3, 0, 3, 1], 2).unwrap(); // a shared prefix
    step(&[0, 1, 3], &[65, 2], &[3, 0, 1], 2).unwrap(); // tables of several lengths
    for (what, step) in [
        ("a page below", step(&[0, 1, 3], &[65, 2], &[3, -1, 1, 2], 2)),
        ("a page above", step(&[0, 1, 3], &[65, 2], &[4, 0, 1, 2], 2)),
        ("a read page above", step(&[0, 1, 3], &[65, 2], &[3, 0, i64::MAX, 2], 2)),
        ("more new than all", step(&[0, 1, 3], &[65, 1], &[3, 0, 1, 2], 2)),
        ("no length", step(&[0, 1, 3], &[65, 0], &[3, 0, 1, 2], 2)),
        ("a length below", step(&[0, 1, 3], &[i64::MIN, 2], &[3, 0, 1, 2], 2)),
        ("more than the pages hold", step(&[0, 1, 3], &[129, 2], &[3, 0, 1, 2], 2)),
        ("a length that wraps", step(&[0, 1, 3], &[i64::MAX, 2], &[3, 0, 1, 2], 2)),
        ("one page written by two", step(&[0, 1, 3], &[65, 2], &[3, 0, 0, 2], 2)),
        ("one page written twice", step(&[0, 3], &[66], &[0, 0], 2)),
        ("a page written that another reads", step(&[0, 1, 3], &[65, 2], &[3, 0, 3, 1], 2)),
        ("a page written that it reads", step(&[0, 3], &[67], &[0, 0], 2)),
        ("fewer lengths", step(&[0, 1, 3], &[65], &[3, 0, 1, 2], 2)),
        ("fewer tables", step(&[0, 1, 3], &[65, 2], &[3, 0], 2)),
        ("no tables", step(&[0, 1, 3], &[65, 2], &[], 1)),
        ("an empty table", PagedStep::new(&[0, 1], &[1], &[vec![]], 4, Device::Cpu)),
        ("no chains", step(&[0], &[], &[], 1)),
        ("no starts", step(&[], &[], &[], 1)),
        ("a chain without new tokens", step(&[0, 0, 3], &[65, 2], &[3, 0, 1, 2], 2)),
        ("no pages", PagedStep::new(&[0, 1], &[1], &[vec![0]], 0, Device::Cpu)),
        ("fewer than no pages", PagedStep::new(&[0, 1], &[1], &[vec![0]], -1, Device::Cpu)),
    ] {
        refused(what, step);
    }
}

#[test]
fn a_cache_of_more_pages_than_there_is_memory_costs_none() {
    let tables = [vec![i64::MAX - 2, 7], vec![3]];
    let of = |tables: &[Vec<i64>]| PagedStep::new(&[0, 1, 2], &[65, 1], tables, i64::MAX, Device::Cpu);
    let step = of(&tables).unwrap();
    refused("one page written by two", of(&[tables[0].clone(), vec![7]]));
    refused("a page written that another reads", of(&[tables[0].clone(), vec![i64::MAX - 2]]));
    let qkv = zeros(&[2, 8], Kind::Half);
    let cache = zeros(&[8, 1, page_numbers(&qkv, 2).unwrap()], Kind::Half);
    refused("a step for a larger cache", paged_attention(&qkv, &cache, 0, &step, HEADS));
    let shape = StepShape { rows: 2, pages_each: 2, pages_all: 4 };
    let mut fixed = FixedStep::new(shape, i64::MAX, Device::Cpu).unwrap();
    fixed.fill(&[5, 6], &[65, 1], &tables).unwrap();
    refused("one page written by two", fixed.fill(&[5, 6], &[65, 1], &[tables[0].clone(), vec![7]]));
    refused("the page of padding", fixed.fill(&[5], &[1], &[vec![i64::MAX - 1]]));
}

/// Where there is no kernel a page is keys and values as they are: it shows how many tokens C++ puts into one.
#[test]
fn a_page_has_room_for_the_keys_and_values_of_its_tokens() {
    for dim in [1, 2, 80] {
        let numbers = page_numbers(&zeros(&[1, 4], Kind::Half), dim).unwrap();
        assert_eq!(numbers, 2 * PAGE_TOKENS as i64 * dim);
    }
}

#[test]
fn the_cache_must_fit_the_rows() {
    for kind in [Kind::Float, Kind::BFloat16, Kind::Half] {
        let qkv = zeros(&[3, 8], kind);
        let numbers = page_numbers(&qkv, 2).unwrap();
        let good = || step(&[0, 1, 3], &[65, 2], &[3, 0, 1, 2], 2).unwrap();
        let pages = zeros(&[4, 2, numbers], kind);
        assert_eq!(paged_attention(&leaf(&qkv, kind), &pages, 1, &good(), HEADS).unwrap().size(), [3, 4]);
        let other = if kind == Kind::Half { Kind::Float } else { Kind::Half };
        for (what, layer, pages) in [
            ("a layer below", -1, pages.copy()),
            ("a layer above", 2, pages.copy()),
            ("another kind", 0, zeros(&[4, 2, numbers], other)),
            ("smaller pages", 0, zeros(&[4, 2, numbers - 1], kind)),
            ("larger pages", 0, zeros(&[4, 2, 2 * numbers], kind)),
            ("two dimensions", 0, zeros(&[8, numbers], kind)),
            ("pages apart", 0, zeros(&[2, 4, numbers], kind).transpose(0, 1)),
            ("one page for all", 0, zeros(&[1, 2, numbers], kind).expand([4, 2, numbers], false)),
            ("too few pages", 0, zeros(&[3, 2, numbers], kind)),
            ("no cache", 0, Tensor::new()),
        ] {
            refused(what, paged_attention(&qkv, &pages, layer, &good(), HEADS));
        }
        refused("other heads", paged_attention(&qkv, &pages, 0, &good(), heads(6, 1, 1)));
        let fewer = step(&[0, 1, 2], &[65, 2], &[3, 0, 1, 2], 2).unwrap();
        refused("other rows", paged_attention(&qkv, &pages, 0, &fewer, HEADS));
        for dim in [0, -1, i64::MAX] {
            refused("a head of no size", page_numbers(&qkv, dim));
        }
    }
    let doubles = zeros(&[3, 8], Kind::Double);
    refused("f64", page_numbers(&doubles, 2));
    refused("nothing", page_numbers(&Tensor::new(), 2));
    assert!(!ops::has_kernels(&Tensor::new()));
}

#[test]
fn log_probs_refuse_what_does_not_fit() {
    let (z, targets) = (ones(&[2, 5]), indices(&[0, 4]));
    for temperature in [0.0, -1.0, f64::NAN, f64::INFINITY, 1e-60, 1e60] {
        refused(&format!("temperature {temperature}"), token_terms(&z, &targets, temperature));
    }
    for (what, targets) in [
        ("a target below", indices(&[0, -1])),
        ("a target above", indices(&[5, 0])),
        ("a target far above", indices(&[i64::MAX, 0])),
        ("fewer", indices(&[0])),
        ("two dimensions", indices(&[0, 1]).view([2, 1])),
        ("short numbers", indices(&[0, 1]).to_kind(Kind::Int)),
        ("targets apart", indices(&[0, 1, 2, 3]).slice(0, 0, 4, 2)),
        ("nothing", Tensor::new()),
    ] {
        refused(what, token_terms(&z, &targets, 1.0));
    }
    for (what, z) in [
        ("bf16", z.to_kind(Kind::BFloat16)),
        ("f64", z.to_kind(Kind::Double)),
        ("logits apart", apart(2, 5)),
        ("a vector", ones(&[2])),
        ("no vocabulary", ones(&[2, 0])),
        ("nothing", Tensor::new()),
    ] {
        refused(what, token_terms(&z, &targets, 1.0));
        refused(what, sample(&z, &[DRAW, DRAW]));
    }
    let terms = token_terms(&leaf(&z, Kind::Float), &targets, 1.0).unwrap();
    assert!(!terms.log_prob.requires_grad() && !terms.entropy.requires_grad());
    let g = ones(&[2]);
    for (what, result) in [
        ("f16", terms.backward(&z, &targets, &g, &g, Kind::Half)),
        ("a short gradient", terms.backward(&z, &targets, &ones(&[1]), &g, Kind::Float)),
        ("an f64 gradient", terms.backward(&z, &targets, &g, &g.to_kind(Kind::Double), Kind::Float)),
        (
            "other rows",
            terms.backward(&ones(&[3, 5]), &indices(&[0, 0, 0]), &ones(&[3]), &ones(&[3]), Kind::Float),
        ),
        ("other targets", terms.backward(&z, &indices(&[0, 9]), &g, &g, Kind::Float)),
        ("nothing", terms.backward(&z, &targets, &Tensor::new(), &g, Kind::Float)),
    ] {
        refused(what, result);
    }
    let none = token_terms(&ones(&[0, 5]), &indices(&[]), 1.0).unwrap();
    assert_eq!(none.log_prob.numel(), 0);
}

const DRAW: Draw = Draw { temperature: 1.0, top_p: 1.0, top_k: 5, uniform: 0.5 };

#[test]
fn draws_out_of_range_are_refused() {
    let z = ones(&[1, 5]);
    for draw in [
        Draw { temperature: -1.0, ..DRAW },
        Draw { temperature: f64::NAN, ..DRAW },
        Draw { temperature: f64::INFINITY, ..DRAW },
        Draw { temperature: 1e-60, ..DRAW },
        Draw { top_p: 0.0, ..DRAW },
        Draw { top_p: 1.5, ..DRAW },
        Draw { top_p: f64::NAN, ..DRAW },
        Draw { top_k: 0, ..DRAW },
        Draw { top_k: -1, ..DRAW },
        Draw { uniform: 0.0, ..DRAW },
        Draw { uniform: 1.5, ..DRAW },
        Draw { uniform: f64::NAN, ..DRAW },
    ] {
        refused(&format!("{draw:?}"), sample(&z, &[draw]));
    }
    refused("no draws", sample(&z, &[]));
    refused("two draws of one row", sample(&z, &[DRAW, DRAW]));
    assert!(sample(&ones(&[0, 5]), &[]).unwrap().0.is_empty());
    let huge = Draw { top_k: i64::MAX, ..DRAW };
    assert_eq!(sample(&leaf(&z, Kind::Float), &[huge]).unwrap().0, [2]);
}

#[test]
fn backward_of_what_was_not_recorded_is_an_error() {
    let x = leaf(&ones(&[2, 4]), Kind::Float);
    let y = swiglu(&x);
    assert!(ops::backward(&ones(&[2]), &ones(&[2])).is_err());
    assert!(ops::backward(&y, &ones(&[3, 3])).is_err());
    assert!(ops::backward(&y, &Tensor::new()).is_err());
    assert!(ops::backward(&Tensor::new(), &y).is_err());
}
