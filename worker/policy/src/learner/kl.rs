//! Estimators of the divergence from the reference policy, per sampled token (Schulman, "Approximating KL
//! Divergence"; verl's `kl_penalty`). Pure; gradients flow through `log_prob` alone.

use std::fmt;
use std::str::FromStr;

use tch::Tensor;

/// Which estimator of KL(π ‖ π_ref), with d = log π − log π_ref.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum KlBase {
    /// `kl`, `k1`: d.
    K1,
    /// `abs`: |d|.
    Abs,
    /// `mse`, `k2`: ½d².
    K2,
    /// `low_var_kl`, `k3`: e^{−d} + d − 1.
    K3,
}

/// An estimator, and whether its gradient is replaced by k2's, which is the unbiased one (verl's suffix `+`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct KlEstimator {
    /// The value.
    pub base: KlBase,
    /// Gradient of k2 instead of the value's own.
    pub straight_through: bool,
}

/// A name that is no estimator.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is no KL estimator: use kl (k1), abs, mse (k2) or low_var_kl (k3), each with an optional `+`")]
pub struct UnknownKl(pub String);

impl FromStr for KlEstimator {
    type Err = UnknownKl;

    fn from_str(name: &str) -> Result<Self, UnknownKl> {
        let (base, straight_through) = match name.strip_suffix('+') {
            Some(base) => (base, true),
            None => (name, false),
        };
        let base = match base {
            "kl" | "k1" => KlBase::K1,
            "abs" => KlBase::Abs,
            "mse" | "k2" => KlBase::K2,
            "low_var_kl" | "k3" => KlBase::K3,
            _ => return Err(UnknownKl(name.to_owned())),
        };
        Ok(Self { base, straight_through })
    }
}

impl fmt::Display for KlEstimator {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let base = match self.base {
            KlBase::K1 => "kl",
            KlBase::Abs => "abs",
            KlBase::K2 => "mse",
            KlBase::K3 => "low_var_kl",
        };
        f.write_str(base)?;
        f.write_str(if self.straight_through { "+" } else { "" })
    }
}

impl KlEstimator {
    /// The estimate for each token, `[N]`.
    pub fn estimate(self, log_prob: &Tensor, ref_log_prob: &Tensor) -> Tensor {
        let d = log_prob - ref_log_prob;
        let value = match self.base {
            KlBase::K1 => d.shallow_clone(),
            KlBase::Abs => d.abs(),
            KlBase::K2 => half_square(&d),
            KlBase::K3 => {
                let d = d.clamp(-20.0, 20.0);
                ((-&d).exp() + &d - 1.0).clamp(-10.0, 10.0)
            }
        };
        if !self.straight_through {
            return value;
        }
        let k2 = half_square(&d);
        value.detach() + &k2 - k2.detach()
    }
}

fn half_square(d: &Tensor) -> Tensor {
    d * d * 0.5
}
