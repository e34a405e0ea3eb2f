//! Advantages of outcome-rewarded chains: how much better a chain did than its group.
//!
//! Called once per training step, over the whole batch, when all groups are complete. Everything here is
//! arithmetic on one score per chain; an advantage is one number for all tokens a chain sampled.
//!
//! Notation, as in the papers: `S` score of a chain, `L` tokens it sampled, `n` chains of a group. Formulas
//! are those of verl's `core_algos` (function names in the variants' docs), in 64-bit floats.

use std::collections::BTreeMap;

/// verl's guard against division by a zero standard deviation.
const EPSILON: f64 = 1e-6;
/// verl's guard in token-weighted means and in whitening.
const WHITEN_EPSILON: f64 = 1e-8;

/// How scores become advantages (`algorithm.adv_estimator`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Estimator {
    /// `compute_grpo_outcome_advantage` (DeepSeekMath, arXiv 2402.03300): `(S − mean) / (std + ε)`, std with
    /// n − 1. A group of one keeps its score. Without `by_std`, `S − mean` (Dr. GRPO, arXiv 2503.20783).
    Grpo {
        /// `algorithm.norm_adv_by_std_in_grpo`.
        by_std: bool,
    },
    /// `compute_grpo_passk_outcome_advantage`: only the best chain of a group earns, by its lead over the
    /// second best. Needs groups of at least two.
    GrpoPassK {
        /// `algorithm.norm_adv_by_std_in_grpo`.
        by_std: bool,
    },
    /// `compute_rloo_outcome_advantage` (arXiv 2402.14740): `S −` mean of the others.
    Rloo,
    /// `compute_opo_outcome_advantage` (arXiv 2505.23585): `S −` length-weighted mean.
    Opo,
    /// `compute_gpg_outcome_advantage` (arXiv 2504.02546): `S − mean`, scaled by batch / non-zero scores.
    Gpg,
    /// `compute_reinforce_plus_plus_baseline_outcome_advantage` (arXiv 2501.03262): `S − mean`, whitened over
    /// all sampled tokens of the batch.
    ReinforcePlusPlusBaseline,
}

impl Estimator {
    /// The estimator of a name in `algorithm.adv_estimator`; `None` if it is not one of these.
    #[must_use]
    pub fn named(name: &str, by_std: bool) -> Option<Self> {
        Some(match name {
            "grpo" => Self::Grpo { by_std },
            "grpo_passk" => Self::GrpoPassK { by_std },
            "rloo" => Self::Rloo,
            "opo" => Self::Opo,
            "gpg" => Self::Gpg,
            "reinforce_plus_plus_baseline" => Self::ReinforcePlusPlusBaseline,
            _ => return None,
        })
    }
}

/// What an estimator sees of a chain.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Scored {
    /// Its group.
    pub group: u32,
    /// What it earned.
    pub score: f64,
    /// Tokens it sampled.
    pub tokens: usize,
}

/// Scores from which an estimator cannot find an advantage.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum AdvantageError {
    /// `grpo_passk` compares the best with the second best.
    #[error("group {group} has one chain, and grpo_passk needs two: set agent.num_chains to 2 or more")]
    Alone {
        /// The group.
        group: u32,
    },
    /// Whitening needs a variance.
    #[error(
        "the batch has {tokens} sampled tokens, and reinforce_plus_plus_baseline needs two: \
         use larger batches or another algorithm.adv_estimator"
    )]
    TooFewTokens {
        /// Sampled tokens in the batch.
        tokens: usize,
    },
    /// A score that is not a number.
    #[error("a chain of group {group} has the score {score}: the reward must be a finite number")]
    NotFinite {
        /// The group.
        group: u32,
        /// Its score.
        score: f64,
    },
}

/// One advantage per chain, in the order of `chains`.
///
/// # Errors
/// If a score is not finite, or the estimator needs larger groups or more tokens.
pub fn advantages(estimator: Estimator, chains: &[Scored]) -> Result<Vec<f64>, AdvantageError> {
    if let Some(&Scored { group, score, .. }) = chains.iter().find(|chain| !chain.score.is_finite()) {
        return Err(AdvantageError::NotFinite { group, score });
    }
    let mut groups: BTreeMap<u32, Vec<usize>> = BTreeMap::new();
    for (index, chain) in chains.iter().enumerate() {
        groups.entry(chain.group).or_default().push(index);
    }
    let mut found = vec![0.0; chains.len()];
    for (&group, members) in &groups {
        let scores: Vec<f64> = members.iter().map(|&index| chains[index].score).collect();
        let tokens: Vec<f64> = members.iter().map(|&index| chains[index].tokens as f64).collect();
        let of_group = match estimator {
            Estimator::Grpo { by_std } => grpo(&scores, by_std),
            Estimator::GrpoPassK { by_std } if scores.len() > 1 => grpo_passk(&scores, by_std),
            Estimator::GrpoPassK { .. } => return Err(AdvantageError::Alone { group }),
            Estimator::Rloo => rloo(&scores),
            Estimator::Opo => minus(&scores, opo_baseline(&scores, &tokens)),
            Estimator::Gpg | Estimator::ReinforcePlusPlusBaseline => centred(&scores),
        };
        for (&index, advantage) in members.iter().zip(of_group) {
            found[index] = advantage;
        }
    }
    match estimator {
        Estimator::Gpg => {
            let earning = chains.iter().filter(|chain| chain.score != 0.0).count().max(1);
            let scale = chains.len() as f64 / earning as f64;
            found.iter_mut().for_each(|advantage| *advantage *= scale);
        }
        Estimator::ReinforcePlusPlusBaseline => whiten(&mut found, chains)?,
        _ => {}
    }
    Ok(found)
}

/// Whether all scores of a group are the same, so that it teaches nothing.
#[must_use]
pub fn is_constant(scores: &[f64]) -> bool {
    scores.windows(2).all(|pair| pair[0] == pair[1])
}

fn mean(values: &[f64]) -> f64 {
    values.iter().sum::<f64>() / values.len() as f64
}

/// Standard deviation with n − 1.
fn std(values: &[f64]) -> f64 {
    let mean = mean(values);
    (values.iter().map(|value| (value - mean).powi(2)).sum::<f64>() / (values.len() as f64 - 1.0)).sqrt()
}

fn minus(scores: &[f64], baseline: f64) -> Vec<f64> {
    scores.iter().map(|score| score - baseline).collect()
}

/// `S − mean`; a group of one keeps its score. Exactly 0 for equal scores: their mean, rounded, need not be
/// equal to them, and a deviation of 1e-17 over ε would train on noise.
fn centred(scores: &[f64]) -> Vec<f64> {
    match scores {
        [one] => vec![*one],
        _ if is_constant(scores) => vec![0.0; scores.len()],
        _ => minus(scores, mean(scores)),
    }
}

fn grpo(scores: &[f64], by_std: bool) -> Vec<f64> {
    let scale = match (by_std, scores.len()) {
        (false, _) => 1.0,
        (true, 1) => 1.0 + EPSILON, // the std of a group of one is taken as 1
        (true, _) => std(scores) + EPSILON,
    };
    centred(scores).iter().map(|advantage| advantage / scale).collect()
}

fn grpo_passk(scores: &[f64], by_std: bool) -> Vec<f64> {
    // Of equal bests the first counts.
    let best =
        (0..scores.len()).fold(0, |best, index| if scores[index] > scores[best] { index } else { best });
    let rest = scores.iter().enumerate().filter(|(index, _)| *index != best);
    let second = rest.map(|(_, &score)| score).fold(f64::NEG_INFINITY, f64::max);
    let scale = if by_std { std(scores) + EPSILON } else { 1.0 };
    let mut advantages = vec![0.0; scores.len()];
    advantages[best] = (scores[best] - second) / scale;
    advantages
}

fn rloo(scores: &[f64]) -> Vec<f64> {
    let n = scores.len() as f64;
    let scale = if scores.len() > 1 { n / (n - 1.0) } else { 1.0 };
    centred(scores).iter().map(|advantage| advantage * scale).collect()
}

fn opo_baseline(scores: &[f64], tokens: &[f64]) -> f64 {
    let total: f64 = tokens.iter().sum();
    if scores.len() == 1 || total == 0.0 {
        return 0.0;
    }
    scores.iter().zip(tokens).map(|(score, tokens)| score * tokens).sum::<f64>() / total
}

/// Mean 0 and variance 1 over all sampled tokens of the batch.
fn whiten(values: &mut [f64], chains: &[Scored]) -> Result<(), AdvantageError> {
    let tokens: usize = chains.iter().map(|chain| chain.tokens).sum();
    if tokens < 2 {
        return Err(AdvantageError::TooFewTokens { tokens });
    }
    let n = tokens as f64;
    let weighted = |of: &dyn Fn(f64) -> f64, values: &[f64]| {
        let sum: f64 = values.iter().zip(chains).map(|(&value, chain)| of(value) * chain.tokens as f64).sum();
        sum / (n + WHITEN_EPSILON)
    };
    let mean = weighted(&|value| value, values);
    let variance = weighted(&|value| (value - mean).powi(2), values) * n / (n - 1.0);
    let scale = (variance + WHITEN_EPSILON).sqrt();
    values.iter_mut().for_each(|value| *value = (*value - mean) / scale);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn group(scores: &[f64]) -> Vec<Scored> {
        scores.iter().map(|&score| Scored { group: 0, score, tokens: 4 }).collect()
    }

    #[test]
    fn a_group_of_equal_scores_has_exactly_no_advantage() {
        for estimator in ["grpo", "rloo", "gpg", "reinforce_plus_plus_baseline"] {
            let estimator = Estimator::named(estimator, true).unwrap();
            assert_eq!(advantages(estimator, &group(&[0.1, 0.1, 0.1])), Ok(vec![0.0; 3]), "{estimator:?}");
        }
    }

    #[test]
    fn grpo_by_hand() {
        // mean 0.5, std with n − 1 = sqrt(0.5) for scores 0 and 1
        let scale = 0.5_f64.sqrt() + 1e-6;
        let found = advantages(Estimator::Grpo { by_std: true }, &group(&[0.0, 1.0])).unwrap();
        assert_eq!(found, vec![-0.5 / scale, 0.5 / scale]);
        let found = advantages(Estimator::Grpo { by_std: false }, &group(&[0.0, 1.0])).unwrap();
        assert_eq!(found, vec![-0.5, 0.5]);
    }

    #[test]
    fn what_an_estimator_cannot_do_it_says() {
        let passk = Estimator::GrpoPassK { by_std: true };
        assert_eq!(advantages(passk, &group(&[1.0])), Err(AdvantageError::Alone { group: 0 }));
        let whitened = Estimator::ReinforcePlusPlusBaseline;
        let one = [Scored { group: 0, score: 1.0, tokens: 1 }];
        assert_eq!(advantages(whitened, &one), Err(AdvantageError::TooFewTokens { tokens: 1 }));
        let found = advantages(Estimator::Rloo, &group(&[f64::NAN]));
        assert!(matches!(found, Err(AdvantageError::NotFinite { group: 0, .. })), "{found:?}");
        assert_eq!(Estimator::named("gae", true), None);
    }
}
