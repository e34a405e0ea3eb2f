//! From logits to what the losses use: log-prob of the sampled token and entropy of the distribution, both of
//! the tempered distribution softmax(z / temperature) that the rollout sampled from. Pure.

use tch::{TchError, Tensor};

/// What one position's logits say.
#[derive(Debug)]
pub struct TokenTerms {
    /// log softmax(z)ₜ of each target, `[N]`.
    pub log_prob: Tensor,
    /// logsumexp(z) − Σ softmax(z)·z, `[N]`.
    pub entropy: Tensor,
}

/// Log-prob of `targets` (`[N]` i64) under `logits` (`[N, vocab]`, already divided by the temperature).
///
/// # Errors
/// On shapes that do not fit, and when memory is out.
pub fn log_probs(logits: &Tensor, targets: &Tensor) -> Result<Tensor, TchError> {
    let chosen = logits.f_gather(-1, &targets.f_unsqueeze(-1)?, false)?.f_squeeze_dim(-1)?;
    chosen.f_sub(&logits.f_logsumexp([-1], false)?)
}

/// Log-probs as [`log_probs`], and entropies. The entropy takes part in the gradient only where
/// `entropy_gradient` says so: it is costly, and mostly only reported.
///
/// # Errors
/// As [`log_probs`].
pub fn token_terms(
    logits: &Tensor,
    targets: &Tensor,
    entropy_gradient: bool,
) -> Result<TokenTerms, TchError> {
    let log_prob = log_probs(logits, targets)?;
    let entropy = if entropy_gradient {
        entropy(logits)?
    } else {
        let _no_grad = tch::no_grad_guard();
        entropy(logits)?
    };
    Ok(TokenTerms { log_prob, entropy })
}

/// Entropy of softmax(`logits`) along the last dimension.
///
/// # Errors
/// When memory is out.
pub fn entropy(logits: &Tensor) -> Result<Tensor, TchError> {
    let expected = logits.f_softmax(-1, logits.kind())?.f_mul(logits)?.f_sum_dim_intlist(
        [-1].as_slice(),
        false,
        None,
    )?;
    logits.f_logsumexp([-1], false)?.f_sub(&expected)
}
