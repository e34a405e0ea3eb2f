//! `algorithm.*`: from rewards to advantages. Read by the coordinator.

use serde::{Deserialize, Serialize};

use crate::config::checks::Checks;
use crate::config::choices::AdvEstimator;

/// `algorithm.*`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Algorithm {
    /// The estimator.
    pub adv_estimator: AdvEstimator,
    /// Discount γ.
    pub gamma: f64,
    /// λ of GAE.
    pub lam: f64,
    /// Divide by the group's standard deviation.
    pub norm_adv_by_std_in_grpo: bool,
}

impl Algorithm {
    pub(crate) fn check(&self, checks: &mut Checks) {
        checks.within("algorithm.gamma", self.gamma, 0.0, 1.0);
        checks.within("algorithm.lam", self.lam, 0.0, 1.0);
    }
}
