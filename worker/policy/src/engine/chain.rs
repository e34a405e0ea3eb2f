//! What the engine knows of one chain.

use agentfly_common::ids::PolicyVersion;
use agentfly_common::sampling::{Generation, SamplingParams, StopReason};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::cache::Page;

/// One chain's tokens and where its cache is.
#[derive(Debug)]
pub(crate) struct Chain {
    pub(crate) group: Option<u64>,
    /// Everything said so far: prompt, sampled tokens, observations.
    pub(crate) tokens: Vec<u32>,
    /// How many of them have their keys and values cached; fewer than all of them.
    pub(crate) cached: usize,
    /// Where those are, in order; enough for them, maybe some more.
    pub(crate) pages: Vec<Page>,
    pub(crate) turn: Option<Turn>,
    /// Order of arrival: the youngest chain is the first to lose its pages.
    pub(crate) born: u64,
}

impl Chain {
    pub(crate) fn new(group: Option<u64>, born: u64) -> Self {
        Self { group, tokens: Vec::new(), cached: 0, pages: Vec::new(), turn: None, born }
    }

    /// Tokens that must still go through the model; a token is sampled after the last of them.
    pub(crate) fn to_compute(&self) -> usize {
        self.tokens.len() - self.cached
    }
}

/// A turn being sampled.
#[derive(Debug)]
pub(crate) struct Turn {
    pub(crate) sampling: SamplingParams,
    rng: ChaCha8Rng,
    ids: Vec<u32>,
    log_probs: Vec<f32>,
    /// Whose weights sampled them; none before the first.
    sampled_by: Option<PolicyVersion>,
}

impl Turn {
    pub(crate) fn new(sampling: SamplingParams, seed: u64) -> Self {
        Self {
            sampling,
            rng: ChaCha8Rng::seed_from_u64(seed),
            ids: Vec::new(),
            log_probs: Vec::new(),
            sampled_by: None,
        }
    }

    /// The stream's next number, in (0, 1].
    pub(crate) fn uniform(&mut self) -> f64 {
        1.0 - self.rng.random::<f64>()
    }

    /// Notes that `version` samples this turn's next token. Another version, if it sampled the tokens before.
    pub(crate) fn sampled_by(&mut self, version: PolicyVersion) -> Option<PolicyVersion> {
        self.sampled_by.replace(version).filter(|before| *before != version)
    }

    /// Adds a sampled token; says whether, and why, the turn ends with it.
    pub(crate) fn push(&mut self, id: u32, log_prob: f32, window_is_full: bool) -> Option<StopReason> {
        self.ids.push(id);
        // Rounding may leave a certain token a hair above 0.
        self.log_probs.push(log_prob.min(0.0));
        if self.sampling.stop_ids.contains(&id) {
            Some(StopReason::Stop)
        } else if window_is_full || self.ids.len() >= self.sampling.max_tokens as usize {
            Some(StopReason::Length)
        } else {
            None
        }
    }

    pub(crate) fn finish(self, stop: StopReason, policy_version: PolicyVersion) -> Generation {
        Generation { ids: self.ids, log_probs: self.log_probs, stop, policy_version }
    }
}
