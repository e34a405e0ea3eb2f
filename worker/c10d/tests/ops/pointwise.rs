//! Norm, rotary embedding and SwiGLU are what their formulas say, forward and back, wherever rows lie.

use agentfly_c10d::ops;
use tch::{Kind, Tensor};

use crate::util::{KINDS, Numbers, assert_true, leaf, norm, swiglu, zeros};

/// What `f` gives and the gradients of its leaves.
fn run(f: impl Fn(&[Tensor]) -> Tensor, leaves: &[&Tensor], g: &Tensor, kind: Kind) -> Vec<Tensor> {
    let leaves: Vec<Tensor> = leaves.iter().map(|t| leaf(t, kind)).collect();
    let y = f(&leaves);
    ops::backward(&y, &g.to_kind(y.kind())).unwrap();
    std::iter::once(y).chain(leaves.iter().map(Tensor::grad)).collect()
}

/// The same rows in other places of memory.
fn layouts(x: &Tensor) -> [Tensor; 2] {
    let width = x.size()[1];
    let wide = zeros(&[x.size()[0], width + 7], x.kind());
    wide.narrow(1, 3, width).copy_(x);
    let turned = x.transpose(0, 1).contiguous().transpose(0, 1);
    [wide.narrow(1, 3, width), turned]
}

fn plain_norm(x: &Tensor, weight: &Tensor) -> Tensor {
    let mean = x.square().mean_dim(-1, true, x.kind());
    x * (mean + 1e-5).rsqrt() * weight
}

#[test]
fn rms_norm_and_its_gradients_are_autograds() {
    for kind in KINDS {
        for (rows, n) in [(5, 7), (1, 2), (257, 96), (700, 64), (3, 1536), (0, 8)] {
            let mut numbers = Numbers::new((rows * n + 1) as u64);
            let (x, weight) = (numbers.tensor(&[rows, n], kind), numbers.tensor(&[n], kind) + 1.0);
            let g = numbers.tensor(&[rows, n], kind);
            let plain = |leaves: &[Tensor]| plain_norm(&leaves[0], &leaves[1]);
            let truth = run(plain, &[&x, &weight], &g, Kind::Double);
            let libtorch = run(plain, &[&x, &weight], &g, kind);
            let sum = zeros(&[n], Kind::Float);
            let ours = |l: &[Tensor]| ops::rms_norm(&l[0], &norm(&weight, Some(&sum), 1e-5)).unwrap();
            let got = run(ours, &[&x], &g, kind);
            let what = format!("[{rows}, {n}] {kind:?}");
            for (i, tensor) in got.iter().chain([&sum]).enumerate() {
                assert_true(&format!("{what} part {i}"), tensor, &truth[i], &libtorch[i]);
            }
            run(ours, &[&x], &g, kind);
            assert_true(&format!("{what} twice"), &sum, &(&truth[2] * 2.0), &libtorch[2]);
            // Several heads a row, as for norms of queries and keys.
            let heads = x.view([rows, 1, n]).repeat([1, 3, 1]);
            let y = ops::rms_norm(&heads, &norm(&weight, None, 1e-5)).unwrap();
            for h in 0..3 {
                assert_true(&format!("{what} head {h}"), &y.select(1, h), &truth[0], &libtorch[0]);
            }
        }
    }
}

#[test]
fn a_norm_works_on_rows_that_lie_apart() {
    for kind in KINDS {
        let mut numbers = Numbers::new(3);
        let (x, weight) = (numbers.tensor(&[9, 20], kind), numbers.tensor(&[20], kind));
        let g = numbers.tensor(&[9, 20], kind);
        let plain = |leaves: &[Tensor]| plain_norm(&leaves[0], &weight.to_kind(leaves[0].kind()));
        let (truth, libtorch) = (run(plain, &[&x], &g, Kind::Double), run(plain, &[&x], &g, kind));
        for x in layouts(&x) {
            let x = x.detach().set_requires_grad(true);
            let y = ops::rms_norm(&x, &norm(&weight, None, 1e-5)).unwrap();
            // Nor need the gradient be dense.
            ops::backward(&y, &layouts(&g)[1]).unwrap();
            assert_true("y", &y, &truth[0], &libtorch[0]);
            assert_true("x", &x.grad(), &truth[1], &libtorch[1]);
        }
    }
}

fn plain_rope(x: &Tensor, cos: &Tensor, sin: &Tensor, heads: i64) -> Tensor {
    let (rows, half, kind) = (x.size()[0], cos.size()[1], x.kind());
    let turned = heads * 2 * half;
    let part = x.narrow(1, 0, turned).reshape([rows, heads, 2, half]);
    let (a, b) = (part.select(2, 0), part.select(2, 1));
    let (c, s) = (cos.to_kind(kind).unsqueeze(1), sin.to_kind(kind).unsqueeze(1));
    let y = Tensor::stack(&[&a * &c - &b * &s, &b * &c + &a * &s], 2).reshape([rows, turned]);
    Tensor::cat(&[y, x.narrow(1, turned, x.size()[1] - turned)], 1)
}

#[test]
fn rope_turns_the_first_heads_and_back() {
    for kind in KINDS {
        for (rows, heads, half, rest) in
            [(5, 3, 4, 8), (70, 2, 32, 0), (1, 1, 1, 3), (33, 5, 24, 17), (0, 1, 2, 1)]
        {
            let mut numbers = Numbers::new((rows + heads + half) as u64);
            let width = heads * 2 * half + rest;
            let (x, g) = (numbers.tensor(&[rows, width], kind), numbers.tensor(&[rows, width], kind));
            let angle = numbers.tensor(&[rows, half], Kind::Float) * 3.0;
            let (cos, sin) = (angle.cos(), angle.sin());
            let plain = |l: &[Tensor]| plain_rope(&l[0], &cos, &sin, heads);
            let (truth, libtorch) = (run(plain, &[&x], &g, Kind::Double), run(plain, &[&x], &g, kind));
            for (i, x) in [x.copy()].into_iter().chain(layouts(&x)).enumerate() {
                let x = x.detach().set_requires_grad(true);
                let y = ops::rope(&x, &cos, &sin, heads).unwrap();
                ops::backward(&y, &layouts(&g)[0]).unwrap();
                let what = format!("{rows} rows, {heads} heads of {half}, layout {i}, {kind:?}");
                assert_true(&what, &y, &truth[0], &libtorch[0]);
                assert_true(&what, &x.grad(), &truth[1], &libtorch[1]);
                assert!(y.narrow(1, width - rest, rest).equal(&x.narrow(1, width - rest, rest)));
            }
        }
    }
}

#[test]
fn swiglu_and_its_gradient_are_autograds() {
    for kind in KINDS {
        for (rows, n) in [(5, 3), (64, 96), (1, 1), (300, 40), (0, 4)] {
            let mut numbers = Numbers::new((rows * n + 2) as u64);
            let (x, g) = (numbers.tensor(&[rows, 2 * n], kind) * 8.0, numbers.tensor(&[rows, n], kind));
            let plain = |l: &[Tensor]| l[0].narrow(1, 0, n).silu() * l[0].narrow(1, n, n);
            let (truth, libtorch) = (run(plain, &[&x], &g, Kind::Double), run(plain, &[&x], &g, kind));
            for (i, x) in [x.copy()].into_iter().chain(layouts(&x)).enumerate() {
                let x = x.detach().set_requires_grad(true);
                let y = swiglu(&x);
                ops::backward(&y, &layouts(&g)[0]).unwrap();
                let what = format!("[{rows}, {n}] layout {i} {kind:?}");
                assert_true(&what, &y, &truth[0], &libtorch[0]);
                assert_true(&what, &x.grad(), &truth[1], &libtorch[1]);
            }
        }
    }
}

#[test]
fn swiglu_without_a_kernel_is_turned_back_row_by_row_alike() {
    // More rows than are turned back at a time, and no multiple of them.
    let (rows, n) = (2500, 6);
    let mut numbers = Numbers::new(8);
    let x = numbers.tensor(&[rows, 2 * n], Kind::Double);
    let g = numbers.tensor(&[rows, n], Kind::Double);
    let plain = |l: &[Tensor]| l[0].narrow(1, 0, n).silu() * l[0].narrow(1, n, n);
    let truth = run(plain, &[&x], &g, Kind::Double);
    let ours = run(|l: &[Tensor]| swiglu(&l[0]), &[&x], &g, Kind::Double);
    for (ours, truth) in ours.iter().zip(&truth) {
        assert_true("f64", ours, truth, truth);
    }
}

#[test]
fn swiglu_of_far_gates_is_the_gate_or_nothing() {
    for kind in KINDS {
        let gates = [-300.0f32, -100.0, -50.0, 0.0, 50.0, 100.0, 300.0];
        let gate = Tensor::from_slice(&gates).view([-1, 1]);
        let x = Tensor::cat(&[&gate, &gate.full_like(2.0)], 1).to_kind(kind);
        let y = Vec::<f32>::try_from(swiglu(&x).view(-1).to_kind(Kind::Float)).unwrap();
        for (y, gate) in y.into_iter().zip(gates) {
            let rounding = if kind == Kind::Float { 1e-6 } else { 4e-3 };
            assert!((y - 2.0 * gate.max(0.0)).abs() <= rounding * gate.abs(), "{gate} gives {y} in {kind:?}");
        }
    }
}
