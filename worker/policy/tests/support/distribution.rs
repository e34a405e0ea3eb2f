//! Which distribution a token is to be drawn from, by definition and apart from the sampler, and whether it was.

use std::fmt::Debug;

use agentfly_common::sampling::SamplingParams;

/// A cell expects at least this many draws, or is joined to the next: the approximation is good from five on.
const CELL: f64 = 10.0;

/// The softmax of `logits / temperature`, less what top-k, then top-p within it, cut off.
pub(crate) fn distribution(logits: &[f64], sampling: &SamplingParams) -> Vec<f64> {
    let most = logits.iter().copied().fold(f64::MIN, f64::max);
    let weights: Vec<f64> = logits.iter().map(|l| ((l - most) / sampling.temperature).exp()).collect();
    let mut order: Vec<usize> = (0..weights.len()).collect();
    order.sort_by(|&a, &b| weights[b].total_cmp(&weights[a]));
    order.truncate(sampling.top_k.map_or(weights.len(), |k| k as usize));
    let mass: f64 = order.iter().map(|&id| weights[id]).sum();
    let (mut kept, mut probs) = (0.0, vec![0.0; weights.len()]);
    for id in order {
        if kept < sampling.top_p * mass {
            probs[id] = weights[id];
            kept += weights[id];
        }
    }
    probs.iter().map(|p| p / kept).collect()
}

/// Fails if so many draws of each token are not what `probs` gives: one that is cut off was drawn, or Pearson's
/// statistic is beyond what it exceeds once in a million times.
#[track_caller]
pub(crate) fn assert_drawn_from(probs: &[f64], counts: &[u64], what: &impl Debug) {
    for (id, (count, p)) in counts.iter().zip(probs).enumerate() {
        assert!(*p > 0.0 || *count == 0, "token {id} is cut off and was drawn {count} times: {what:?}");
    }
    let (statistic, degrees) = chi_square(counts, probs);
    let bound = critical(degrees);
    assert!(degrees >= 5.0, "{degrees} degrees of freedom prove little: {what:?}");
    assert!(statistic < bound, "chi-square {statistic:.1} of {degrees} degrees exceeds {bound:.1}: {what:?}");
}

/// Pearson's statistic and its degrees of freedom. Cells that expect few draws are joined, in the order of ids, so
/// that a shift of the draw by one token moves mass between cells.
fn chi_square(counts: &[u64], probs: &[f64]) -> (f64, f64) {
    let draws = counts.iter().sum::<u64>() as f64;
    let (mut statistic, mut cells) = (0.0, 0.0);
    let (mut seen, mut expected) = (0.0, 0.0);
    let mut left = draws;
    for (count, p) in counts.iter().zip(probs) {
        seen += *count as f64;
        expected += p * draws;
        // The last cell takes the rest with it.
        if expected >= CELL && left - expected >= CELL {
            statistic += (seen - expected).powi(2) / expected;
            cells += 1.0;
            left -= expected;
            (seen, expected) = (0.0, 0.0);
        }
    }
    statistic += (seen - expected).powi(2) / expected;
    (statistic, cells)
}

/// Chi-square's quantile at 1 − 10⁻⁶ (Wilson and Hilferty 1931; within a per cent of tables from 5 degrees on).
fn critical(degrees: f64) -> f64 {
    let z = 4.7534;
    let part = 2.0 / (9.0 * degrees);
    degrees * (1.0 - part + z * part.sqrt()).powi(3)
}
