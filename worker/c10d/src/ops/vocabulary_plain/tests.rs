//! What GPUs run is what the CPU's kernels compute, here on the CPU: the same tokens from the same uniform numbers.

use super::*;
use crate::ops;

const ROWS: usize = 48;
const WIDTHS: [i64; 3] = [5, 513, 5000];

/// Fractions of 1, the same in every run.
fn fractions(seed: u64) -> impl FnMut() -> f64 {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 11) as f64 / (1_u64 << 53) as f64
    }
}

fn logits(width: i64, rows: usize) -> Tensor {
    let mut next = fractions(width as u64);
    let values: Vec<f32> = (0..rows as i64 * width).map(|_| (next() * 12.0 - 6.0) as f32).collect();
    Tensor::from_slice(&values).view([rows as i64, width])
}

fn vector(values: impl Iterator<Item = f32>) -> Tensor {
    Tensor::from_slice(&values.collect::<Vec<f32>>())
}

fn floats(x: &Tensor) -> Vec<f64> {
    Vec::<f64>::try_from(x.to_kind(Kind::Double).flatten(0, -1)).unwrap()
}

fn assert_close(what: &str, ours: &Tensor, kernel: &Tensor, bound: f64) {
    for (i, (a, b)) in floats(ours).into_iter().zip(floats(kernel)).enumerate() {
        assert!((a - b).abs() <= bound, "{what}: {a} and {b} at {i}");
    }
}

/// Each way to draw, one after another: greedy, tempered, top-k, top-p, both.
fn mixed(rows: usize, seed: u64) -> Vec<Draw> {
    let mut next = fractions(seed);
    let ways = [(0.0, 1.0, 1000), (1.0, 1.0, 100_000), (0.7, 1.0, 3), (1.3, 0.8, 100_000), (0.6, 0.5, 20)];
    let draw = |i: usize| {
        let (temperature, top_p, top_k) = ways[i % ways.len()];
        Draw { temperature, top_p, top_k, uniform: 1.0 - next() }
    };
    (0..rows).map(draw).collect()
}

/// Draws by both. A token may differ only where the uniform number is within 1e-5 of the border between the two, which
/// none of these seeds meets; log-probs within 1e-5.
fn assert_same_draws(what: &str, logits: &Tensor, draws: &[Draw]) {
    let (tokens, log_probs) = sample(logits, draws).unwrap();
    let (kernel_tokens, kernel_log_probs) = ops::sample(logits, draws).unwrap();
    assert_eq!(tokens, kernel_tokens, "{what}");
    let both = log_probs.iter().zip(&kernel_log_probs).enumerate();
    for (i, (a, b)) in both {
        assert!((a - b).abs() < 1e-5, "{what}: row {i} {:?} has {a} and {b}", draws[i]);
    }
}

#[test]
fn the_same_uniform_numbers_draw_the_same_tokens_in_mixed_batches() {
    for width in WIDTHS {
        let logits = logits(width, ROWS);
        for seed in 0..6 {
            let draws = mixed(ROWS, seed);
            assert_same_draws(&format!("{width} tokens, mixed, seed {seed}"), &logits, &draws);
            for way in 0..5 {
                let alike: Vec<Draw> = draws.iter().skip(way).step_by(5).copied().collect();
                let rows = logits.narrow(0, 0, alike.len() as i64);
                assert_same_draws(&format!("{width} tokens, way {way}, seed {seed}"), &rows, &alike);
            }
        }
    }
}

#[test]
fn rows_are_drawn_alike_in_pieces_of_any_size() {
    let logits = logits(513, ROWS);
    let draws = mixed(ROWS, 3);
    let together = sample(&logits, &draws).unwrap();
    for rows in [1, 7, 47, 48] {
        assert_eq!(sample_in_pieces(&logits, &draws, rows).unwrap(), together, "{rows} at a time");
    }
}

#[test]
fn equals_are_drawn_in_the_vocabularys_order() {
    // Logits of three values only.
    let logits = (logits(600, ROWS) / 4.0).round();
    for seed in 0..10 {
        assert_same_draws("equals", &logits, &mixed(ROWS, seed));
    }
}

#[test]
fn the_ends_of_the_uniform_numbers_draw_tokens_that_can_come() {
    let logits = logits(600, 10);
    drop(logits.narrow(1, 100, 400).fill_(f64::NEG_INFINITY));
    drop(logits.narrow(1, 590, 10).fill_(f64::NEG_INFINITY));
    for uniform in [f64::MIN_POSITIVE, 1e-9, 0.5, 1.0] {
        let draws: Vec<Draw> = mixed(10, 1).into_iter().map(|draw| Draw { uniform, ..draw }).collect();
        assert_same_draws(&format!("uniform {uniform}"), &logits, &draws);
    }
}

#[test]
fn what_is_no_number_gives_no_log_prob_and_reaches_no_other_row() {
    for evil in [f64::NAN, f64::INFINITY] {
        let bad = logits(513, ROWS);
        drop(bad.narrow(0, 5, 5).narrow(1, 100, 3).fill_(evil));
        let draws = mixed(ROWS, 3);
        let (tokens, log_probs) = sample(&bad, &draws).unwrap();
        let (sound_tokens, _) = sample(&logits(513, ROWS), &draws).unwrap();
        for i in 0..ROWS {
            assert!((0..513).contains(&tokens[i]));
            assert_eq!(log_probs[i].is_finite(), !(5..10).contains(&i), "row {i} with {evil}");
            assert!(tokens[i] == sound_tokens[i] || (5..10).contains(&i), "row {i} with {evil}");
        }
        let terms =
            token_terms(&bad, &Tensor::zeros([ROWS as i64], (Kind::Int64, Device::Cpu)), 1.0).unwrap();
        for (i, (log_prob, entropy)) in floats(&terms.log_prob).iter().zip(floats(&terms.entropy)).enumerate()
        {
            assert_eq!(
                log_prob.is_finite() && entropy.is_finite(),
                !(5..10).contains(&i),
                "row {i} with {evil}"
            );
        }
    }
}

#[test]
fn a_drawn_token_is_learned_from_with_the_same_bits() {
    for (temperature, width) in [(1.0, 513), (0.7, 5000), (1.3, 49_152), (0.05, 600)] {
        let logits = logits(width, 16);
        // Beside rows of other temperatures, and alone.
        let mut draws = mixed(16, 9);
        draws[..8].iter_mut().for_each(|draw| draw.temperature = temperature);
        let (tokens, log_probs) = sample(&logits, &draws).unwrap();
        for rows in [8, 3] {
            let targets = Tensor::from_slice(&tokens[..rows]);
            let terms = token_terms(&logits.narrow(0, 0, rows as i64), &targets, temperature).unwrap();
            let learned = Vec::<f32>::try_from(&terms.log_prob).unwrap();
            let bits = |x: &[f32]| x.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
            assert_eq!(bits(&learned), bits(&log_probs[..rows]), "temperature {temperature}");
        }
    }
}

#[test]
fn log_probs_entropies_and_their_gradients_are_the_kernels() {
    for (width, temperature, offset) in
        [(5, 1.0, 0.0), (513, 0.5, 30.0), (5000, 2.0, -30.0), (600, 1.0, 1000.0)]
    {
        let z = logits(width, 6) + offset;
        let targets = Tensor::from_slice(&(0..6).map(|i| i * (width - 1) / 5).collect::<Vec<i64>>());
        let mut next = fractions(4);
        let [g, h] = [(); 2].map(|()| vector((0..6).map(|_| next() as f32 - 0.5)));
        let what = format!("{width} tokens at {offset}, temperature {temperature}");
        let ours = token_terms(&z, &targets, temperature).unwrap();
        let kernel = ops::token_terms(&z, &targets, temperature).unwrap();
        assert_close(&what, &ours.log_prob, &kernel.log_prob, 1e-5);
        assert_close(&what, &ours.entropy, &kernel.entropy, 1e-5);
        for (kind, bound) in [(Kind::Float, 1e-5), (Kind::BFloat16, 4e-3)] {
            let gradient = ours.backward(&z, &targets, &g, &h, kind).unwrap();
            assert_eq!(gradient.kind(), kind);
            // The kernel subtracts a rounded sum far from zero; what is compared is near it.
            if offset.abs() < 100.0 {
                assert_close(&what, &gradient, &kernel.backward(&z, &targets, &g, &h, kind).unwrap(), bound);
            }
        }
    }
}

#[test]
fn a_token_that_is_ruled_out_takes_nothing_from_the_others() {
    let all = logits(600, 2);
    let kept = Tensor::cat(&[all.narrow(1, 0, 100), all.narrow(1, 500, 100)], 1);
    let cut = all.copy();
    drop(cut.narrow(1, 100, 400).fill_(f64::NEG_INFINITY));
    let targets = Tensor::from_slice(&[7_i64, 99]);
    let (g, h) = (vector([0.3_f32, -0.2].into_iter()), vector([0.1_f32, 0.4].into_iter()));
    let (cut_terms, kept_terms) =
        (token_terms(&cut, &targets, 0.7).unwrap(), token_terms(&kept, &targets, 0.7).unwrap());
    assert_close("log-prob", &cut_terms.log_prob, &kept_terms.log_prob, 1e-6);
    assert_close("entropy", &cut_terms.entropy, &kept_terms.entropy, 1e-6);
    let gradient = |terms: &TokenTerms, z: &Tensor| terms.backward(z, &targets, &g, &h, Kind::Float).unwrap();
    let (of_cut, of_kept) = (gradient(&cut_terms, &cut), gradient(&kept_terms, &kept));
    let outer = Tensor::cat(&[of_cut.narrow(1, 0, 100), of_cut.narrow(1, 500, 100)], 1);
    assert_close("gradient", &outer, &of_kept, 1e-6);
    assert_close(
        "gradient of what is ruled out",
        &of_cut.narrow(1, 100, 400),
        &Tensor::zeros([2, 400], (Kind::Float, Device::Cpu)),
        0.0,
    );
}

#[test]
fn only_rows_that_are_cut_are_sorted() {
    let plan = Plan::new(&mixed(7, 0), 600);
    assert_eq!(plan, Plan { any_sampled: true, restricted: vec![2, 3, 4], widest: 600 });
    let greedy = Draw { temperature: 0.0, top_p: 0.5, top_k: 2, uniform: 0.5 };
    assert_eq!(Plan::new(&[greedy; 3], 600), Plan::default());
}
