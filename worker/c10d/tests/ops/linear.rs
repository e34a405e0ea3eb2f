//! A linear map is libtorch's `linear` and its way back, over weights that may change in place.

use agentfly_c10d::ops::{self, Linear};
use agentfly_c10d::{AdamWHyper, AdamWState, fused_adamw};
use tch::{Kind, Tensor};

use crate::util::{
    KINDS, Numbers, assert_same_bits, assert_true, different_bits, has_kernels, leaf, norm, swiglu, zeros,
};

/// Rows of the weights, columns, rows of x, biased.
type Case = (&'static [i64], i64, i64, bool);

const CASES: [Case; 16] = [
    (&[16], 16, 16, false),
    (&[1], 2, 1, true),
    (&[5, 3], 7, 3, true), // odd k: no pairs in bf16
    (&[48, 16, 16], 64, 65, true),
    (&[200, 7, 7], 96, 130, false),
    (&[130], 34, 8, true),
    (&[64, 64], 128, 9, false),
    (&[63], 66, 513, true),
    (&[33, 31, 1], 17, 600, true),
    (&[100], 130, 1100, false),
    (&[65], 1000, 700, true), // rows in several chunks
    (&[9], 1, 70, true),
    (&[72], 2048, 64, false),
    (&[40], 3100, 9, true),        // few rows of weights in several parts
    (&[700, 600], 48, 530, false), // gradients of x in several parts
    (&[24, 40], 72, 0, true),
];

/// y, then the gradients of x, weights and biases.
fn by_libtorch(x: &Tensor, weights: &[Tensor], biases: &[Tensor], g: &Tensor, kind: Kind) -> Vec<Tensor> {
    let x = leaf(x, kind);
    let leaves = |list: &[Tensor]| list.iter().map(|t| leaf(t, kind)).collect::<Vec<_>>();
    let (weights, biases) = (leaves(weights), leaves(biases));
    let bias = (!biases.is_empty()).then(|| Tensor::cat(&biases, 0));
    let y = x.linear(&Tensor::cat(&weights, 0), bias);
    ops::backward(&y, &g.to_kind(kind)).unwrap();
    std::iter::once(y).chain([&x].into_iter().chain(&weights).chain(&biases).map(Tensor::grad)).collect()
}

struct Ours {
    map: Linear,
    sums: Vec<Tensor>,
    bias_sums: Vec<Tensor>,
}

impl Ours {
    fn new(weights: &[Tensor], biases: &[Tensor]) -> Self {
        let map =
            Linear::new(&weights.iter().collect::<Vec<_>>(), &biases.iter().collect::<Vec<_>>()).unwrap();
        let sums = |list: &[Tensor]| list.iter().map(|t| zeros(&t.size(), Kind::Float)).collect::<Vec<_>>();
        let (sums, bias_sums) = (sums(weights), sums(biases));
        map.train(&sums.iter().collect::<Vec<_>>(), &bias_sums.iter().collect::<Vec<_>>()).unwrap();
        Self { map, sums, bias_sums }
    }

    fn gradients(&self) -> impl Iterator<Item = &Tensor> {
        self.sums.iter().chain(&self.bias_sums)
    }
}

fn inputs((rows, k, m, biased): Case, kind: Kind) -> (Tensor, Vec<Tensor>, Vec<Tensor>, Tensor) {
    let mut numbers = Numbers::new((k * 1000 + m) as u64);
    let x = numbers.tensor(&[m, k], kind);
    let weights = rows.iter().map(|n| numbers.tensor(&[*n, k], kind)).collect();
    let biases = rows.iter().filter(|_| biased).map(|n| numbers.tensor(&[*n], kind)).collect();
    let g = numbers.tensor(&[m, rows.iter().sum()], kind);
    (x, weights, biases, g)
}

#[test]
fn a_map_and_its_gradients_are_libtorchs() {
    for kind in KINDS {
        for case in CASES {
            let (x, weights, biases, g) = inputs(case, kind);
            let truth = by_libtorch(&x, &weights, &biases, &g, Kind::Double);
            let libtorch = by_libtorch(&x, &weights, &biases, &g, kind);
            let ours = Ours::new(&weights, &biases);
            let input = leaf(&x, kind);
            let y = ours.map.apply(&input).unwrap();
            ops::backward(&y, &g).unwrap();
            assert_eq!(y.kind(), kind);
            let got = [y, input.grad()];
            for (i, tensor) in got.iter().chain(ours.gradients()).enumerate() {
                assert_true(&format!("{case:?} {kind:?} part {i}"), tensor, &truth[i], &libtorch[i]);
            }
            // Wide: what was summed, not rounded to bf16.
            let wide = ours.map.apply_wide(&x).unwrap();
            assert_eq!(wide.kind(), Kind::Float);
            if has_kernels(kind) && !(kind == Kind::BFloat16 && case.1 % 2 == 1) {
                assert_true(&format!("{case:?} {kind:?} wide"), &wide, &truth[0], &wide);
            }
        }
    }
}

/// As on a GPU: there is no kernel for f64 either.
#[test]
fn a_map_without_a_kernel_is_libtorchs_too() {
    for case in CASES {
        for biased in [false, true] {
            let (x, weights, biases, g) = inputs((case.0, case.1, case.2, biased), Kind::Double);
            let truth = by_libtorch(&x, &weights, &biases, &g, Kind::Double);
            let ours = Ours::new(&weights, &biases);
            let input = leaf(&x, Kind::Double);
            let y = ours.map.apply(&input).unwrap();
            ops::backward(&y, &g).unwrap();
            let wide = ours.map.apply_wide(&x).unwrap();
            assert_eq!((y.kind(), wide.kind()), (Kind::Double, Kind::Float));
            assert!(y.is_contiguous());
            assert_same_bits(&format!("{case:?} wide"), &wide, &y.detach().to_kind(Kind::Float));
            for (i, tensor) in [y, input.grad()].iter().chain(ours.gradients()).enumerate() {
                assert_true(&format!("{case:?} biased: {biased} part {i}"), tensor, &truth[i], &truth[i]);
            }
        }
    }
}

#[test]
fn a_wide_result_has_its_way_back_too() {
    let case: Case = (&[40, 30], 48, 70, true);
    for kind in KINDS {
        let (x, weights, biases, g) = inputs(case, kind);
        let truth = by_libtorch(&x, &weights, &biases, &g, Kind::Double);
        let libtorch = by_libtorch(&x, &weights, &biases, &g, kind);
        let ours = Ours::new(&weights, &biases);
        let input = leaf(&x, kind);
        ops::backward(&ours.map.apply_wide(&input).unwrap(), &g.to_kind(Kind::Float)).unwrap();
        for (i, tensor) in [&input.grad()].into_iter().chain(ours.gradients()).enumerate() {
            assert_true(&format!("{kind:?} part {i}"), tensor, &truth[i + 1], &libtorch[i + 1]);
        }
    }
}

#[test]
fn gradients_add_up_over_two_ways_back() {
    for kind in KINDS {
        let case: Case = (&[20, 12], 34, 70, true);
        let (x, weights, biases, g) = inputs(case, kind);
        let ours = Ours::new(&weights, &biases);
        let once_more = || {
            let input = leaf(&x, kind);
            ops::backward(&ours.map.apply(&input).unwrap(), &g).unwrap();
        };
        once_more();
        let first: Vec<Tensor> = ours.gradients().map(Tensor::copy).collect();
        once_more();
        for (sum, first) in ours.gradients().zip(&first) {
            assert_true(&format!("{kind:?}"), sum, &(first.to_kind(Kind::Double) * 2.0), sum);
        }
    }
}

#[test]
fn the_way_back_alone_is_that_of_autograd() {
    for kind in KINDS {
        for case in [(&[100][..], 34, 700, false), (&[3], 64, 1, false)] {
            let (x, weights, _, g) = inputs(case, kind);
            let truth = by_libtorch(&x, &weights, &[], &g, Kind::Double);
            let libtorch = by_libtorch(&x, &weights, &[], &g, kind);
            let ours = Ours::new(&weights, &[]);
            let gx = ours.map.backward(&x, &g).unwrap();
            assert_true(&format!("{case:?} {kind:?} x"), &gx, &truth[1], &libtorch[1]);
            assert_true(&format!("{case:?} {kind:?} weight"), &ours.sums[0], &truth[2], &libtorch[2]);
        }
    }
}

/// Columns of a wider tensor, every second row, a transposed one, one row for all.
fn strided(numbers: &mut Numbers, m: i64, k: i64, kind: Kind) -> Vec<Tensor> {
    vec![
        numbers.tensor(&[m, k + 9], kind).narrow(1, 5, k),
        numbers.tensor(&[2 * m, k], kind).slice(0, 0, 2 * m, 2),
        numbers.tensor(&[k, m], kind).transpose(0, 1),
        numbers.tensor(&[1, k], kind).expand([m, k], false),
    ]
}

#[test]
fn rows_may_lie_apart() {
    let (m, k) = (67, 34);
    for kind in KINDS {
        let mut numbers = Numbers::new(5);
        let weights = [numbers.tensor(&[20, k], kind), numbers.tensor(&[12, k], kind)];
        let g = numbers.tensor(&[m, 32], kind);
        for (i, x) in strided(&mut numbers, m, k, kind).into_iter().enumerate() {
            let truth = by_libtorch(&x, &weights, &[], &g, Kind::Double);
            let libtorch = by_libtorch(&x, &weights, &[], &g, kind);
            let ours = Ours::new(&weights, &[]);
            let x = x.detach().set_requires_grad(true);
            assert!(!x.is_contiguous());
            let y = ours.map.apply(&x).unwrap();
            ops::backward(&y, &g).unwrap();
            for (part, tensor) in [&y, &x.grad()].into_iter().chain(ours.gradients()).enumerate() {
                assert_true(&format!("x {i} {kind:?} part {part}"), tensor, &truth[part], &libtorch[part]);
            }
        }
    }
}

type Change = (&'static str, fn(&mut Tensor));

fn adamw(weight: &mut Tensor) {
    let lists = [(); 3].map(|()| [zeros(&weight.size(), weight.kind()) + 0.5]);
    let params = [weight.shallow_clone()];
    let state = AdamWState { params: &params, grads: &lists[0], exp_avgs: &lists[1], exp_avg_sqs: &lists[2] };
    let hyper = AdamWHyper { lr: 0.1, beta1: 0.9, beta2: 0.99, weight_decay: 0.1, eps: 1e-8 };
    fused_adamw(state, 1, &hyper, None).unwrap();
}

#[test]
fn a_weight_changed_in_place_is_seen_at_once() {
    let changes: [Change; 7] = [
        ("copy_", |w| w.copy_(&(w.neg() + 1.0))),
        ("a view's rows", |w| drop(w.narrow(0, 1, 1).fill_(3.0))),
        ("a transposed view", |w| drop(w.transpose(0, 1).get(2).fill_(-2.0))),
        ("a detached alias", |w| drop(w.detach().fill_(0.25))),
        ("another kind's values", |w| w.copy_(&w.to_kind(Kind::Double).square())),
        ("a sum", |w| drop(w.g_add_scalar_(0.5))),
        ("AdamW", adamw),
    ];
    for kind in KINDS {
        let mut numbers = Numbers::new(8);
        let mut weights = [numbers.tensor(&[20, 16], kind), numbers.tensor(&[70, 16], kind)];
        let biases = [numbers.tensor(&[20], kind), numbers.tensor(&[70], kind)];
        let x = numbers.tensor(&[5, 16], kind);
        let ours = Ours::new(&weights, &biases);
        let mut before = ours.map.apply(&x).unwrap();
        for which in [0, 1] {
            for (name, change) in changes {
                tch::no_grad(|| change(&mut weights[which]));
                let after = ours.map.apply(&x).unwrap();
                let fresh = Ours::new(&weights, &biases).map.apply(&x).unwrap();
                assert!(
                    different_bits(&before, &after) > 0,
                    "{name} of weight {which} {kind:?} was not seen"
                );
                assert_same_bits(name, &after, &fresh);
                before = after;
            }
        }
        drop(biases[1].narrow(0, 3, 4).fill_(7.0));
        let after = ours.map.apply(&x).unwrap();
        assert!(different_bits(&before, &after) > 0, "a bias's change was not seen in {kind:?}");
    }
}

#[test]
fn a_weight_changed_between_the_ways_is_an_error() {
    for kind in KINDS {
        let mut numbers = Numbers::new(9);
        let weights = [numbers.tensor(&[20, 16], kind)];
        let ours = Ours::new(&weights, &[]);
        let x = leaf(&numbers.tensor(&[5, 16], kind), kind);
        let y = ours.map.apply(&x).unwrap();
        drop(weights[0].shallow_clone().fill_(1.0));
        let error = ops::backward(&y, &y.detach()).unwrap_err();
        assert!(error.to_string().contains("in place"), "{error}");
    }
}

/// y and all gradients of a map after its norm or SwiGLU, in one or one after the other.
fn after(kind: Kind, seed: u64, gated: bool, apart: bool) -> Vec<Tensor> {
    let mut numbers = Numbers::new(seed);
    let (rows, width) = (300, 96);
    let x = leaf(&numbers.tensor(&[rows, if gated { 2 * width } else { width }], kind), kind);
    let (scale, scale_sum) = (numbers.tensor(&[width], kind), zeros(&[width], Kind::Float));
    let ours = Ours::new(
        &[numbers.tensor(&[40, width], kind), numbers.tensor(&[24, width], kind)],
        &[numbers.tensor(&[40], kind), numbers.tensor(&[24], kind)],
    );
    let norm = norm(&scale, Some(&scale_sum), 1e-5);
    let y = match (gated, apart) {
        (true, true) => ours.map.apply(&swiglu(&x)),
        (true, false) => ours.map.apply_swiglu(&x),
        (false, true) => ours.map.apply(&ops::rms_norm(&x, &norm).unwrap()),
        (false, false) => ours.map.apply_norm(&x, &norm),
    };
    let y = y.unwrap();
    ops::backward(&y, &numbers.tensor(&[rows, 64], kind)).unwrap();
    let sums = ours.gradients().map(Tensor::shallow_clone);
    let mut all: Vec<Tensor> = [y, x.grad()].into_iter().chain(sums).collect();
    all.push(scale_sum);
    all
}

#[test]
fn a_map_after_a_norm_or_swiglu_is_the_two_one_after_the_other() {
    // f64 goes by libtorch's operators.
    for kind in [Kind::Float, Kind::BFloat16, Kind::Double] {
        for gated in [false, true] {
            let (one, two) = (after(kind, 5, gated, false), after(kind, 5, gated, true));
            for (part, (one, two)) in one.iter().zip(&two).enumerate() {
                assert_same_bits(&format!("part {part} {kind:?}, gated: {gated}"), one, two);
            }
            let moved = one[..6].iter().all(|t| t.abs().max().double_value(&[]) > 0.0);
            assert!(moved, "y or a gradient is zero in {kind:?}");
        }
    }
}
