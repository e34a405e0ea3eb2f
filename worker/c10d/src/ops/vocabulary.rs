//! Over the vocabulary: log-probs and entropies, their way back to the logits, and drawing tokens. On the CPU by this
//! crate's kernels, a pass over each row; elsewhere by libtorch's operators ([`super::vocabulary_plain`]).

use std::ffi::c_void;

use tch::{Device, Kind, Tensor};

use super::{expect, expect_rows, ffi, is, one, shown, vocabulary_plain};
use crate::error::check;
use crate::group::pointer;
use crate::{Error, Result};

/// What logits say of their targets, `[n]` f32 each, under softmax(z / temperature).
#[derive(Debug)]
pub struct TokenTerms {
    /// log p(target).
    pub log_prob: Tensor,
    /// −Σ p·log p.
    pub entropy: Tensor,
    /// log Σ exp(z / temperature), from the CPU's kernel.
    pub(super) lse: Option<Tensor>,
    pub(super) temperature: f64,
}

fn fits(operation: &'static str, logits: &Tensor, targets: &Tensor) -> Result<()> {
    let (rows, width) = expect_rows(operation, logits)?;
    let sound = logits.kind() == Kind::Float
        && logits.is_contiguous()
        && width > 0
        && is(targets, Kind::Int64, logits.device())
        && targets.size() == [rows]
        && targets.is_contiguous();
    expect(operation, sound, || format!("logits {} and targets {}", shown(logits), shown(targets)))?;
    // The CPU's kernels read and write where targets say. On a GPU looking would wait for all its work, twice a piece;
    // there libtorch's own operators look, and whoever uploads ids has checked them.
    if rows == 0 || logits.device() != Device::Cpu {
        return Ok(());
    }
    let inside = |t: Tensor| t.f_int64_value(&[]).is_ok_and(|id| (0..width).contains(&id));
    expect(operation, inside(targets.min()) && inside(targets.max()), || {
        format!("targets from {:?} to {:?} in a vocabulary of {width}", targets.min(), targets.max())
    })
}

/// Whether logits can be divided by this temperature: it and its inverse are f32 that are normal numbers.
#[must_use]
pub fn is_divisor(temperature: f64) -> bool {
    temperature > 0.0 && scale(temperature).is_normal()
}

/// What logits are multiplied by, everywhere: a division would round otherwise.
pub(super) fn scale(temperature: f64) -> f32 {
    (1.0 / temperature) as f32
}

/// Log-probs and entropies of `targets` `[n]` i64 under logits `[n, vocabulary]` f32. No autograd: the way back is
/// [`TokenTerms::backward`].
///
/// # Errors
/// When the shapes do not fit, a target is outside the vocabulary (on the CPU), the temperature is no divisor, or
/// memory is out.
pub fn token_terms(logits: &Tensor, targets: &Tensor, temperature: f64) -> Result<TokenTerms> {
    let operation = "log-probs of tokens";
    fits(operation, logits, targets)?;
    expect(operation, is_divisor(temperature), || format!("at temperature {temperature}"))?;
    if logits.device() != Device::Cpu {
        return vocabulary_plain::token_terms(logits, targets, temperature);
    }
    let mut out: [*mut c_void; 3] = [std::ptr::null_mut(); 3];
    // SAFETY: live tensors that fit each other; room for three tensors.
    let code =
        unsafe { ffi::af_token_terms(pointer(logits), pointer(targets), temperature, out.as_mut_ptr()) };
    check(code, || operation.to_owned())?;
    // SAFETY: on success the shim has stored three new `torch::Tensor*`, ours from now on.
    let [log_prob, entropy, lse] = out.map(|raw| unsafe { Tensor::from_ptr(raw.cast()) });
    Ok(TokenTerms { log_prob, entropy, lse: Some(lse), temperature })
}

impl TokenTerms {
    /// The gradient of the same logits, in `kind` (f32 or bf16), from those of log-prob and entropy, `[n]` f32 each.
    ///
    /// # Errors
    /// When the shapes do not fit, or memory is out.
    pub fn backward(
        &self,
        logits: &Tensor,
        targets: &Tensor,
        g_log_prob: &Tensor,
        g_entropy: &Tensor,
        kind: Kind,
    ) -> Result<Tensor> {
        let operation = "gradient of logits";
        fits(operation, logits, targets)?;
        let column = |t: &Tensor| {
            is(t, Kind::Float, logits.device()) && t.size() == targets.size() && t.is_contiguous()
        };
        let sound = [&self.log_prob, &self.entropy, g_log_prob, g_entropy].into_iter().all(column)
            && self.lse.iter().all(column)
            && matches!(kind, Kind::Float | Kind::BFloat16);
        expect(operation, sound, || {
            format!("of {} from {} and {}", shown(logits), shown(g_log_prob), shown(g_entropy))
        })?;
        let Some(lse) = &self.lse else {
            return vocabulary_plain::backward(self, logits, targets, g_log_prob, g_entropy, kind);
        };
        let terms = [&self.log_prob, &self.entropy, lse].map(pointer);
        // SAFETY: live tensors that fit each other; three terms.
        one(
            || operation.to_owned(),
            |out| unsafe {
                ffi::af_token_terms_backward(
                    pointer(logits),
                    pointer(targets),
                    self.temperature,
                    terms.as_ptr(),
                    pointer(g_log_prob),
                    pointer(g_entropy),
                    i32::from(kind == Kind::BFloat16),
                    out,
                )
            },
        )
    }
}

/// Logits from which a GPU draws at a time, in whole rows: it needs several times their memory.
pub const SAMPLED_AT_A_TIME: i64 = 4 << 20;

/// How one row is drawn.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Draw {
    /// 0 is greedy; the log-prob is then the untempered one.
    pub temperature: f64,
    /// In (0, 1]; 1 keeps all.
    pub top_p: f64,
    /// At least 1; the vocabulary's size keeps all.
    pub top_k: i64,
    /// A uniform number in (0, 1].
    pub uniform: f64,
}

/// A token for each row of logits `[n, vocabulary]` f32 by the inverse of its cumulative distribution,
/// and the token's log-prob under the tempered distribution before top-k and top-p. Top-k cuts first and top-p
/// counts mass within what it left, as vLLM does.
///
/// # Errors
/// When the shapes do not fit or a parameter is out of its range.
pub fn sample(logits: &Tensor, draws: &[Draw]) -> Result<(Vec<i64>, Vec<f32>)> {
    let operation = "drawing tokens";
    let (rows, width) = expect_rows(operation, logits)?;
    let sound =
        logits.kind() == Kind::Float && logits.is_contiguous() && width > 0 && rows == draws.len() as i64;
    expect(operation, sound, || format!("{} draws from logits {}", draws.len(), shown(logits)))?;
    let share = |x: f64| x > 0.0 && x <= 1.0;
    let in_range = |d: &Draw| {
        (d.temperature == 0.0 || is_divisor(d.temperature))
            && d.top_k >= 1
            && share(d.top_p)
            && share(d.uniform)
    };
    if let Some(wrong) = draws.iter().find(|d| !in_range(d)) {
        return Err(Error::invalid(operation, format!("{wrong:?} is out of range")));
    }
    if logits.device() != Device::Cpu {
        return vocabulary_plain::sample(logits, draws);
    }
    let plan: Vec<f64> =
        draws.iter().flat_map(|d| [d.temperature, d.top_p, d.uniform, d.top_k.min(width) as f64]).collect();
    let (mut tokens, mut log_probs) = (vec![0; draws.len()], vec![0.0; draws.len()]);
    // SAFETY: logits of one row a draw, four numbers a draw, room for a token and a log-prob a draw.
    let code = unsafe {
        ffi::af_sample(pointer(logits), plan.as_ptr(), tokens.as_mut_ptr(), log_probs.as_mut_ptr())
    };
    check(code, || operation.to_owned())?;
    Ok((tokens, log_probs))
}
