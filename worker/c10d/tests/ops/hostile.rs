//! NaN and infinity that come in come out: a number made of one would be a mistake that nobody sees.

use agentfly_c10d::ops::{self, Draw, Linear, attention, sample, token_terms};
use tch::{Kind, Tensor};

use crate::attention::heads;
use crate::batch::{Chain, through_cache};
use crate::util::{KINDS, Numbers, from_bits, leaf, norm, swiglu, whole, zeros};

/// Every form of NaN: quiet and not, of both signs, with the payloads that rounding could carry away.
fn nans(kind: Kind) -> Vec<Tensor> {
    let bits: &[u32] = match kind {
        Kind::BFloat16 => &[0x7fc0, 0xffc0, 0x7fff, 0xffff, 0x7f81, 0xff81],
        _ => &[
            0x7fc0_0000,
            0xffc0_0000,
            0x7fff_ffff,
            0xffff_ffff,
            0x7f80_0001,
            0xff80_0001,
            0x7fc0_01ff,
            0x7fdf_ff80,
        ],
    };
    bits.iter().map(|&bits| from_bits(bits, kind)).collect()
}

/// NaNs and infinities.
fn evils(kind: Kind) -> Vec<Tensor> {
    let infinities = [f64::INFINITY, f64::NEG_INFINITY].map(|x| zeros(&[1], kind) + x);
    nans(kind).into_iter().chain(infinities).collect()
}

/// `x` with one number replaced.
fn with(x: &Tensor, row: i64, column: i64, value: &Tensor) -> Tensor {
    let x = x.copy();
    x.narrow(0, row, 1).narrow(1, column, 1).copy_(&value.view([1, 1]));
    assert!(!finite(&x));
    x
}

fn finite(x: &Tensor) -> bool {
    x.isfinite().all().int64_value(&[]) == 1
}

fn all_nan(x: &Tensor) -> bool {
    x.isnan().all().int64_value(&[]) == 1
}

fn no_number(x: &Tensor) -> bool {
    x.isfinite().any().int64_value(&[]) == 0
}

#[test]
fn a_linear_map_of_nan_is_nan() {
    for kind in KINDS {
        let mut numbers = Numbers::new(1);
        let (x, weight, bias) =
            (numbers.tensor(&[70, 32], kind), numbers.tensor(&[80, 32], kind), numbers.tensor(&[80], kind));
        for evil in evils(kind) {
            let map = Linear::new(&[&weight], &[&bias]).unwrap();
            for x in [with(&x, 69, 31, &evil), with(&x.narrow(0, 0, 1), 0, 3, &evil)] {
                let y = map.apply(&x).unwrap();
                assert!(no_number(&y.get(-1)), "{evil:?} in x gives {y:?} in {kind:?}");
                assert!(x.size()[0] == 1 || finite(&y.narrow(0, 0, 69)), "it reached other rows");
            }
            let y = Linear::new(&[&with(&weight, 66, 2, &evil)], &[&bias]).unwrap().apply(&x).unwrap();
            assert!(no_number(&y.select(1, 66)), "{evil:?} in a weight gives {y:?} in {kind:?}");
            assert!(finite(&y.narrow(1, 0, 66)), "it reached other columns");
            let bad = with(&bias.view([1, 80]), 0, 5, &evil).view(80);
            let y = Linear::new(&[&weight], &[&bad]).unwrap().apply(&x).unwrap();
            assert!(no_number(&y.select(1, 5)), "{evil:?} in a bias gives {y:?} in {kind:?}");
            // The way back.
            let sum = zeros(&[80, 32], Kind::Float);
            map.train(&[&sum], &[]).unwrap();
            let g = with(&zeros(&[70, 80], kind), 68, 7, &evil);
            let gx = map.backward(&x, &g).unwrap();
            assert!(no_number(&gx.get(68)) && no_number(&sum.get(7)), "{evil:?} in a gradient in {kind:?}");
        }
    }
}

#[test]
fn norm_rope_and_swiglu_of_nan_are_nan() {
    for kind in KINDS {
        let mut numbers = Numbers::new(2);
        let (x, weight) = (numbers.tensor(&[4, 24], kind), numbers.tensor(&[24], kind));
        let angle = numbers.tensor(&[4, 4], Kind::Float);
        let (cos, sin) = (angle.cos(), angle.sin());
        for evil in evils(kind) {
            let bad = with(&x, 2, 5, &evil);
            let y = ops::rms_norm(&bad, &norm(&weight, None, 1e-5)).unwrap();
            assert!(all_nan(&y.get(2).get(5)), "norm of {evil:?} in {kind:?} is {y:?}");
            let bad_weight = with(&weight.view([1, 24]), 0, 5, &evil).view(24);
            let y = ops::rms_norm(&x, &norm(&bad_weight, None, 1e-5)).unwrap();
            assert!(no_number(&y.select(1, 5)), "norm by {evil:?} in {kind:?}");
            let y = ops::rope(&bad, &cos, &sin, 3).unwrap();
            // Column 5 is in the first head's second half: it is turned into column 1, too.
            assert!(
                no_number(&y.get(2).get(5)) && no_number(&y.get(2).get(1)),
                "rope of {evil:?} in {kind:?}"
            );
            for column in [5, 17] {
                let bad = leaf(&with(&x, 2, column, &evil), kind);
                let y = swiglu(&bad);
                let far_gate = column == 5 && evil.double_value(&[0]) == f64::NEG_INFINITY;
                assert!(far_gate || no_number(&y.get(2).get(5)), "swiglu of {evil:?} in {kind:?} is {y:?}");
                assert!(y.narrow(0, 0, 2).isfinite().all().int64_value(&[]) == 1, "it spread to other rows");
            }
        }
        for nan in nans(kind) {
            let x = leaf(&x, kind);
            ops::backward(&swiglu(&x), &with(&zeros(&[4, 12], kind), 1, 5, &nan)).unwrap();
            assert!(
                all_nan(&x.grad().get(1).get(5)) && all_nan(&x.grad().get(1).get(17)),
                "{nan:?} {kind:?}"
            );
            assert!(
                x.grad().narrow(0, 2, 2).isfinite().all().int64_value(&[]) == 1,
                "it spread to other rows"
            );
            let x = leaf(&x, kind);
            let y = ops::rms_norm(&x, &norm(&weight, None, 1e-5)).unwrap();
            ops::backward(&y, &with(&zeros(&[4, 24], kind), 1, 5, &nan)).unwrap();
            assert!(all_nan(&x.grad().get(1)), "{nan:?} {kind:?}");
        }
    }
}

#[test]
fn attention_of_nan_is_nan_from_there_on() {
    let h = heads(2, 1, 16);
    for kind in KINDS {
        if !ops::has_kernels(&zeros(&[1], kind)) {
            eprintln!("{kind:?}: no kernel on this processor, and libtorch's own attention promises less");
            continue;
        }
        let mut numbers = Numbers::new(3);
        let qkv = numbers.tensor(&[140, h.row()], kind);
        for evil in evils(kind) {
            // A query of the second head, a key, a value; all of the second sequence's token 70.
            for (part, column) in [("query", 16), ("key", 32), ("value", 48)] {
                let bad = leaf(&with(&qkv, 110, column, &evil), kind);
                let y = attention(&bad, &whole(&[40, 100]), h).unwrap();
                let what = format!("{evil:?} in a {part} in {kind:?}");
                assert!(finite(&y.narrow(0, 0, 40)), "{what} reached another sequence");
                let infinite = evil.double_value(&[0]).is_infinite();
                if part == "key" && infinite {
                    continue; // a score of minus infinity is a probability of 0
                }
                assert!(!finite(&y.get(110).narrow(0, 16, 16)), "{what} is gone");
                assert!(part == "query" || !finite(&y.get(139)), "{what} is gone later");
                ops::backward(&y, &y.ones_like()).unwrap();
                assert!(!finite(&bad.grad().narrow(0, 40, 100)), "{what} is gone on the way back");
                assert!(
                    finite(&bad.grad().narrow(0, 0, 40)),
                    "{what} reached another sequence on the way back"
                );
                // Decoded: the same, in its own chain alone.
                let chains = Chain::split(&bad.detach(), &[40, 100], |length| vec![length - 30, 1, 29]);
                let decoded = through_cache(&chains, h, &mut numbers);
                assert!(finite(&decoded[0]), "{what} reached another chain");
                assert!(!finite(&decoded[1].get(70)), "{what} is gone when decoded");
            }
        }
    }
}

#[test]
fn logits_with_nan_give_no_log_prob_and_no_crash() {
    let ways =
        [(0.0, 1.0, i64::MAX), (1.0, 1.0, i64::MAX), (0.7, 0.5, i64::MAX), (1.0, 1.0, 20), (1.5, 0.9, 3)];
    for width in [5, 600, 5000] {
        let logits = Numbers::new(4).tensor(&[1, width], Kind::Float) * 5.0;
        let infinity = zeros(&[1], Kind::Float) + f64::INFINITY;
        for evil in nans(Kind::Float).into_iter().chain([infinity]) {
            for first in [0, width / 2, width - 1] {
                let mut bad = with(&logits, 0, first, &evil);
                if first == 0 && width > 5 {
                    // Many of them: an order with them is none.
                    bad.slice(1, 0, width, 3).copy_(&evil.expand([1, (width + 2) / 3], false));
                    bad = bad.contiguous();
                }
                let terms = token_terms(&bad, &Tensor::from_slice(&[1i64]), 1.0).unwrap();
                assert!(no_number(&terms.log_prob) && no_number(&terms.entropy), "{evil:?} gives {terms:?}");
                for (temperature, top_p, top_k) in ways {
                    let draw = Draw { temperature, top_p, top_k, uniform: 0.6 };
                    let (tokens, log_probs) = sample(&bad, &[draw]).unwrap();
                    assert!((0..width).contains(&tokens[0]));
                    assert!(
                        !log_probs[0].is_finite(),
                        "{evil:?} at {first} of {width}: {draw:?} gives {log_probs:?}"
                    );
                }
            }
        }
        let nothing = zeros(&[1, width], Kind::Float) + f64::NEG_INFINITY;
        for (temperature, top_p, top_k) in ways {
            let draw = Draw { temperature, top_p, top_k, uniform: 1.0 };
            let (tokens, log_probs) = sample(&nothing, &[draw]).unwrap();
            assert!((0..width).contains(&tokens[0]) && !log_probs[0].is_finite());
        }
    }
}

#[test]
fn a_token_that_is_ruled_out_takes_nothing_from_the_others() {
    let logits = Numbers::new(5).tensor(&[1, 600], Kind::Float) * 3.0;
    let cut = logits.copy();
    drop(cut.narrow(1, 100, 400).fill_(f64::NEG_INFINITY));
    let kept = Tensor::cat(&[logits.narrow(1, 0, 100), logits.narrow(1, 500, 100)], 1);
    let target = Tensor::from_slice(&[7i64]);
    let (cut, kept) = (token_terms(&cut, &target, 0.7).unwrap(), token_terms(&kept, &target, 0.7).unwrap());
    for (a, b) in [(&cut.log_prob, &kept.log_prob), (&cut.entropy, &kept.entropy)] {
        assert!((a - b).abs().double_value(&[0]) < 1e-5, "{a:?} {b:?}");
    }
}
