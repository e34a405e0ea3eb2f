//! The policy loss per token: PPO's clipped surrogate with dual clip, verl's `vanilla` mode.
//!
//! Pure functions over vectors `[N]` of tokens with loss, of one kind and device; the learner aggregates their
//! values ([`super::Aggregation`]). Gradients flow through `log_prob` alone.

use tch::Tensor;

/// The trust region (PPO, Schulman et al. 2017; asymmetric: DAPO; dual clip: Ye et al. 2020).
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct ClipRange {
    /// ε_l: the ratio counts down to 1 − ε_l.
    pub low: f64,
    /// ε_h: the ratio counts up to 1 + ε_h.
    pub high: f64,
    /// c > 1: where A < 0, a token's loss is at most −A·c.
    pub dual: f64,
}

/// Loss and diagnostics of each token, `[N]` each.
#[derive(Debug)]
pub struct PolicyTerms {
    /// What is minimised.
    pub loss: Tensor,
    /// 1 where the clipped surrogate is the larger: the token's gradient is cut.
    pub clipped: Tensor,
    /// 1 where A < 0 and the dual clip bounds the loss.
    pub clipped_lower: Tensor,
    /// log π_old − log π: its mean estimates KL(π_old ‖ π).
    pub kl: Tensor,
}

/// Log-ratios are cut off here: e²⁰ is far outside every trust region, and finite.
const MAX_LOG_RATIO: f64 = 20.0;

/// verl's `compute_policy_loss_vanilla`, before aggregation.
#[must_use]
pub fn ppo_clip(
    log_prob: &Tensor,
    old_log_prob: &Tensor,
    advantages: &Tensor,
    clip: ClipRange,
) -> PolicyTerms {
    let kind = log_prob.kind();
    let log_ratio = (log_prob - old_log_prob).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO);
    let ratio = log_ratio.exp();
    let surrogate = -advantages * &ratio;
    let clipped_surrogate = -advantages * ratio.clamp(1.0 - clip.low, 1.0 + clip.high);
    let pessimistic = surrogate.maximum(&clipped_surrogate);
    let bound = advantages * -clip.dual;
    let negative = advantages.lt(0.0);
    let loss = pessimistic.minimum(&bound).where_self(&negative, &pessimistic);
    let clipped = clipped_surrogate.gt_tensor(&surrogate).to_kind(kind);
    let clipped_lower = pessimistic.gt_tensor(&bound).logical_and(&negative).to_kind(kind);
    PolicyTerms { loss, clipped, clipped_lower, kl: -log_ratio.detach() }
}
