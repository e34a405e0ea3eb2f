//! The tokens of a chain as they come: ids, mask and log-probs, always equally long.
//!
//! Used by [`super::run`]. A generation enters whole or not at all, and only when it keeps the engine's contract.

use agentfly_common::ids::PolicyVersion;
use agentfly_common::sampling::Generation;

/// The growing token record; length T in all three.
#[derive(Debug, Default)]
pub(super) struct Record {
    pub(super) token_ids: Vec<u32>,
    pub(super) loss_mask: Vec<bool>,
    pub(super) log_probs: Vec<f32>,
    /// From here on the engine has seen nothing.
    unseen_from: usize,
}

impl Record {
    /// Tokens so far.
    pub(super) fn len(&self) -> usize {
        self.token_ids.len()
    }

    /// The ids that the engine has not seen.
    pub(super) fn unseen(&self) -> &[u32] {
        &self.token_ids[self.unseen_from..]
    }

    /// Appends ids that the policy reads.
    pub(super) fn observe(&mut self, ids: &[u32]) {
        self.token_ids.extend_from_slice(ids);
        self.loss_mask.resize(self.token_ids.len(), false);
        self.log_probs.resize(self.token_ids.len(), 0.0);
    }

    /// Appends ids that the policy sampled, or says how the generation breaks the contract.
    pub(super) fn sample(
        &mut self,
        generation: &Generation,
        version: PolicyVersion,
        max_tokens: u32,
    ) -> Result<(), String> {
        let (ids, log_probs) = (&generation.ids, &generation.log_probs);
        if generation.policy_version != version {
            return Err(format!(
                "the rollout engine sampled with policy version {} in a chain of version {version}: every token \
                 of a chain must come from the same weights",
                generation.policy_version
            ));
        }
        if ids.is_empty() || ids.len() > max_tokens as usize {
            return Err(format!("the rollout engine returned {} ids, not 1 to {max_tokens}", ids.len()));
        }
        if log_probs.len() != ids.len() {
            return Err(format!(
                "the rollout engine returned {} log-probs for {} ids",
                log_probs.len(),
                ids.len()
            ));
        }
        if let Some(at) = log_probs.iter().position(|p| !(p.is_finite() && *p <= 0.0)) {
            return Err(format!(
                "the rollout engine returned log-prob {} for sampled token {at} (id {}); it must be finite and at \
                 most 0",
                log_probs[at], ids[at]
            ));
        }
        self.token_ids.extend_from_slice(ids);
        self.loss_mask.resize(self.token_ids.len(), true);
        self.log_probs.extend_from_slice(log_probs);
        self.unseen_from = self.token_ids.len();
        Ok(())
    }
}
