//! Log-probs, entropies, their way back and draws, against softmax in f64.

use agentfly_c10d::ops::{Draw, sample, token_terms};
use tch::{Kind, Tensor};

use crate::util::{Numbers, assert_same_bits, distance, indices, leaf};

const WIDTHS: [i64; 5] = [5, 511, 512, 513, 49_152];
const ROWS: i64 = 3;

fn logits(width: i64, offset: f64) -> Tensor {
    Numbers::new(width as u64).tensor(&[ROWS, width], Kind::Float) * 6.0 + offset
}

/// Log-probs and entropies in f64, and the gradient of the logits for those of both.
fn plain(z: &Tensor, targets: &Tensor, temperature: f64, g: &Tensor, h: &Tensor) -> [Tensor; 3] {
    let z = leaf(z, Kind::Double);
    let log_probs = (&z / temperature).log_softmax(-1, Kind::Double);
    let log_prob = log_probs.gather(1, &targets.unsqueeze(1), false).squeeze_dim(1);
    let entropy = -(log_probs.exp() * &log_probs).sum_dim_intlist(-1, false, Kind::Double);
    (&log_prob * g + &entropy * h).sum(Kind::Double).backward();
    [log_prob, entropy, z.grad()]
}

#[test]
fn log_probs_entropies_and_their_gradients_are_those_of_log_softmax() {
    for width in WIDTHS {
        // Far from zero a difference of two large numbers would lose the small one.
        for (temperature, offset) in [(0.5, 0.0), (1.0, 30.0), (2.0, -30.0), (1.0, 1000.0)] {
            let z = logits(width, offset);
            let targets = indices(&[0, width / 2, width - 1]);
            let mut numbers = Numbers::new(7);
            let (g, h) = (numbers.tensor(&[ROWS], Kind::Float), numbers.tensor(&[ROWS], Kind::Float));
            let [log_prob, entropy, exact] = plain(&z, &targets, temperature, &g, &h);
            let what = format!("{width} tokens at {offset}, temperature {temperature}");
            let terms = token_terms(&z, &targets, temperature).unwrap();
            for (ours, truth) in [(&terms.log_prob, &log_prob), (&terms.entropy, &entropy)] {
                assert!((ours - truth).abs().max().double_value(&[]) < 5e-6, "{what}: {ours} is not {truth}");
            }
            let close = 1e-5 * offset.abs().max(1.0);
            for (kind, share) in [(Kind::Float, close), (Kind::BFloat16, 4e-3 + close)] {
                let gradient = terms.backward(&z, &targets, &g, &h, kind).unwrap();
                assert_eq!(gradient.kind(), kind);
                let off = distance(&gradient, &exact);
                assert!(off < share, "{what}: the {kind:?} gradient is {off:.2e} off");
            }
            // Each alone: neither hides in the other's shadow.
            let none = g.zeros_like();
            for (g, h) in [(&g, &none), (&none, &h)] {
                let [_, _, exact] = plain(&z, &targets, temperature, g, h);
                let gradient = terms.backward(&z, &targets, g, h, Kind::Float).unwrap();
                let off = distance(&gradient, &exact);
                assert!(off < close, "{what}: {off:.2e} off");
            }
        }
    }
}

#[test]
fn a_sure_token_has_log_prob_zero_and_no_gradient() {
    let z = Tensor::from_slice(&[900.0f32, 0.0, -5.0]).view([1, 3]);
    let targets = indices(&[0]);
    let terms = token_terms(&z, &targets, 1.0).unwrap();
    assert_eq!((terms.log_prob.double_value(&[0]), terms.entropy.double_value(&[0])), (0.0, 0.0));
    let one = Tensor::from_slice(&[1.0f32]);
    let gradient = terms.backward(&z, &targets, &one, &one, Kind::Float).unwrap();
    assert_eq!(gradient.abs().max().double_value(&[]), 0.0);
}

#[test]
fn greedy_takes_the_first_of_the_largest() {
    for width in WIDTHS {
        let z = logits(width, 0.0);
        let top = z.max().double_value(&[]) + 1.0;
        for at in [width / 3, width / 2, width - 1] {
            drop(z.narrow(1, at, 1).fill_(top));
        }
        let draw = Draw { temperature: 0.0, top_p: 0.3, top_k: 2, uniform: 0.9 };
        let (tokens, log_probs) = sample(&z, &[draw; ROWS as usize]).unwrap();
        assert_eq!(tokens, [width / 3; ROWS as usize]);
        let terms = token_terms(&z, &indices(&tokens), 1.0).unwrap();
        assert_same_bits("greedy", &Tensor::from_slice(&log_probs), &terms.log_prob);
    }
}

/// The tokens that may be drawn, in the order in which mass is counted, and how much there is up to each.
fn plain_draw(z: &[f32], draw: &Draw) -> Vec<(i64, f64)> {
    let most = z.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let mass = |i: usize| ((f64::from(z[i]) - f64::from(most)) / draw.temperature).exp();
    let mut kept: Vec<usize> = (0..z.len()).collect();
    let restricted = draw.top_p < 1.0 || (draw.top_k as usize) < z.len();
    if restricted {
        kept.sort_by(|&a, &b| z[b].total_cmp(&z[a]).then(a.cmp(&b)));
        kept.truncate(draw.top_k as usize);
    }
    let all: f64 = kept.iter().map(|&i| mass(i)).sum();
    let mut before = 0.0;
    let mut nucleus = Vec::new();
    for i in kept {
        if before >= draw.top_p * all && !nucleus.is_empty() {
            break;
        }
        before += mass(i);
        nucleus.push((i as i64, before));
    }
    nucleus
}

#[test]
fn draws_follow_the_inverse_of_the_cumulative_distribution() {
    const DRAWS: usize = 400;
    for width in [5, 511, 512, 513, 2000] {
        for (temperature, top_p, top_k) in [
            (1.0, 1.0, i64::MAX),
            (0.5, 1.0, i64::MAX),
            (2.0, 0.9, i64::MAX),
            (1.0, 0.5, i64::MAX),
            (1.0, 0.999_999, i64::MAX),
            (1.0, 1e-9, i64::MAX),
            (1.5, 1.0, 3),
            (1.0, 1.0, 1),
            (0.7, 0.6, 40),
            (1.0, 0.95, 512),
        ] {
            let z = logits(width, 0.0).get(0);
            // Equals: the vocabulary's order decides.
            drop(z.narrow(0, 1, 3).fill_(z.max().double_value(&[])));
            let host = Vec::<f32>::try_from(&z).unwrap();
            let draws: Vec<Draw> = (1..=DRAWS)
                .map(|i| Draw { temperature, top_p, top_k, uniform: i as f64 / DRAWS as f64 })
                .collect();
            let rows = z.expand([DRAWS as i64, width], false).contiguous();
            let (tokens, log_probs) = sample(&rows, &draws).unwrap();
            let nucleus = plain_draw(&host, &draws[0]);
            let total = nucleus.last().unwrap().1;
            for (token, draw) in tokens.iter().zip(&draws) {
                let aim = draw.uniform * total;
                let at = nucleus.iter().position(|n| n.1 >= aim).unwrap_or(nucleus.len() - 1);
                let near = |i: usize| (nucleus[i].1 - aim).abs() < 1e-5 * total;
                let sound = *token == nucleus[at].0
                    || (near(at) && nucleus.get(at + 1).is_some_and(|n| n.0 == *token))
                    || (at > 0 && near(at - 1) && nucleus[at - 1].0 == *token);
                assert!(sound, "{draw:?} of {width} gives {token}, not {:?}", nucleus[at]);
            }
            // The log-prob is of the whole tempered distribution, and the learner's bit for bit.
            let terms = token_terms(&rows, &indices(&tokens), temperature).unwrap();
            assert_same_bits(
                &format!("{:?} of {width}", draws[0]),
                &Tensor::from_slice(&log_probs),
                &terms.log_prob,
            );
        }
    }
}

#[test]
fn a_row_draws_the_same_whatever_stands_beside_it() {
    let z = logits(49_152, 0.0);
    let draws = [(0.0, 1.0), (0.8, 0.9), (1.3, 1.0)].map(|(temperature, top_p)| Draw {
        temperature,
        top_p,
        top_k: i64::MAX,
        uniform: 0.77,
    });
    let (tokens, log_probs) = sample(&z, &draws).unwrap();
    for (i, draw) in draws.into_iter().enumerate() {
        let (token, log_prob) = sample(&z.narrow(0, i as i64, 1), &[draw]).unwrap();
        assert_eq!((token[0], log_prob[0].to_bits()), (tokens[i], log_probs[i].to_bits()));
    }
}

#[test]
fn a_token_of_no_mass_is_never_drawn() {
    let mut host = vec![-200.0f32; 1500];
    host[700] = 1.0;
    host[1400] = 1.0;
    let z = Tensor::from_slice(&host).view([1, 1500]);
    for i in 1..=20 {
        for (top_p, top_k) in [(1.0, i64::MAX), (0.999, i64::MAX), (1.0, 30)] {
            let draw = Draw { temperature: 1.0, top_p, top_k, uniform: f64::from(i) / 20.0 };
            let token = sample(&z, &[draw]).unwrap().0[0];
            assert_eq!(token, if i <= 10 { 700 } else { 1400 }, "{draw:?}");
        }
    }
}
