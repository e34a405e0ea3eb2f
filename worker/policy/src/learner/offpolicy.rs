//! How far the learner's log-probs are from those the rollout reported for the same tokens (verl's
//! `rollout_corr/*` and `training/rollout_probs_diff_*`). Pure: sums over rows that ranks can add.

use std::collections::BTreeMap;

/// Log-ratios are cut off here before they become squared ratios, as in verl; k3 and the perplexities' ratio are not.
const MAX_LOG_RATIO: f64 = 20.0;

/// Sums over tokens and rows, and maxima.
#[derive(Debug, Clone, PartialEq)]
pub struct OffPolicySums {
    /// Added over ranks. By token: count, rollout − trained, k3, squared ratio, probability difference and its
    /// square; by row: count, perplexity and log-perplexity trained, then by the rollout, their difference,
    /// its size, their ratio, squared sequence ratio.
    pub sums: [f64; 15],
    /// The largest over ranks: probability difference, log-perplexity difference, its negative, log-prob difference.
    pub maxima: [f64; 4],
}

impl Default for OffPolicySums {
    fn default() -> Self {
        Self { sums: [0.0; 15], maxima: [f64::NEG_INFINITY; 4] }
    }
}

impl OffPolicySums {
    /// Adds one row: log-probs of its tokens with loss, by the weights that sampled them as the learner and as
    /// the rollout computed them. Both of one length; an empty row counts for nothing.
    pub fn add_row(&mut self, trained: &[f32], rollout: &[f32]) {
        if trained.is_empty() {
            return;
        }
        let (mut sum_trained, mut sum_rollout) = (0.0, 0.0);
        let mut per_token = [0.0; 6];
        for (&trained, &rollout) in trained.iter().zip(rollout) {
            let (trained, rollout) = (f64::from(trained), f64::from(rollout));
            let log_ratio = trained - rollout;
            let ratio = log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp();
            let difference = (trained.exp() - rollout.exp()).abs();
            let values = [
                1.0,
                -log_ratio,
                log_ratio.exp() - log_ratio - 1.0,
                ratio * ratio,
                difference,
                difference * difference,
            ];
            per_token.iter_mut().zip(values).for_each(|(sum, value)| *sum += value);
            raise(&mut self.maxima[0], difference);
            raise(&mut self.maxima[3], log_ratio.abs());
            sum_trained += trained;
            sum_rollout += rollout;
        }
        let tokens = per_token[0];
        let (mean_trained, mean_rollout) = (sum_trained / tokens, sum_rollout / tokens);
        let difference = mean_rollout - mean_trained;
        let sequence = (sum_trained - sum_rollout).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp();
        let per_row = [
            1.0,
            (-mean_trained).exp(),
            -mean_trained,
            (-mean_rollout).exp(),
            -mean_rollout,
            difference,
            difference.abs(),
            difference.exp(),
            sequence * sequence,
        ];
        self.sums.iter_mut().zip(per_token.into_iter().chain(per_row)).for_each(|(sum, value)| *sum += value);
        raise(&mut self.maxima[1], difference);
        raise(&mut self.maxima[2], -difference);
    }

    /// The metrics, by verl's names; none when there was no row.
    #[must_use]
    pub fn metrics(&self) -> BTreeMap<&'static str, f64> {
        let [tokens, kl, k3, chi2, diff, diff_squared, rows, by_row @ ..] = &self.sums;
        if *rows == 0.0 {
            return BTreeMap::new();
        }
        let mean = diff / tokens;
        let variance = (diff_squared - tokens * mean * mean).max(0.0) / (tokens - 1.0).max(1.0);
        let mut metrics = BTreeMap::from([
            ("rollout_corr/kl", kl / tokens),
            ("rollout_corr/k3_kl", k3 / tokens),
            ("rollout_corr/chi2_token", chi2 / tokens - 1.0),
            ("rollout_corr/log_ppl_diff_max", self.maxima[1]),
            ("rollout_corr/log_ppl_diff_min", -self.maxima[2]),
            ("rollout_corr/log_prob_diff_max", self.maxima[3]),
            ("training/rollout_probs_diff_max", self.maxima[0]),
            ("training/rollout_probs_diff_mean", mean),
            ("training/rollout_probs_diff_std", variance.sqrt()),
        ]);
        let names = [
            "rollout_corr/training_ppl",
            "rollout_corr/training_log_ppl",
            "rollout_corr/rollout_ppl",
            "rollout_corr/rollout_log_ppl",
            "rollout_corr/log_ppl_diff",
            "rollout_corr/log_ppl_abs_diff",
            "rollout_corr/ppl_ratio",
        ];
        metrics.extend(names.into_iter().zip(by_row).map(|(name, sum)| (name, sum / rows)));
        metrics.insert("rollout_corr/chi2_seq", by_row[7] / rows - 1.0);
        metrics
    }
}

/// The larger of the two; NaN counts as infinite, for `max` would hide it.
fn raise(largest: &mut f64, value: f64) {
    *largest = largest.max(if value.is_nan() { f64::INFINITY } else { value });
}
