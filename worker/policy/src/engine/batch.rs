//! The forward pass of a step: some tokens of each chain in it, and a sample for those that reach their last.
//!
//! What must stay true: a pass crosses to the device once with its inputs and once back with its tokens.

use agentfly_c10d::ops::PagedStep;
use agentfly_c10d::upload;
use agentfly_common::ids::PolicyVersion;
use tch::Kind;

use crate::model::{Attention, Decoder, ModelError};

use super::sampler::{self, Row};
use super::schedule::Stretch;
use super::{Engine, EngineError, TurnResult};

impl Engine {
    /// Computes the stretches; returns the turns that ended.
    pub(super) fn compute(
        &mut self,
        decoder: &Decoder,
        batch: &[Stretch],
        version: PolicyVersion,
    ) -> Result<Vec<TurnResult>, EngineError> {
        if batch.is_empty() {
            return Ok(Vec::new());
        }
        let sampled = self.pass(decoder, batch)?;
        for stretch in batch {
            if let Some(chain) = self.chains.get_mut(&stretch.chain) {
                chain.cached = stretch.start + stretch.count;
            }
            self.stats.prefill_tokens += (stretch.count - usize::from(stretch.samples)) as u64;
        }
        let mut ended = Vec::new();
        for (stretch, (token, log_prob)) in batch.iter().filter(|s| s.samples).zip(sampled) {
            self.stats.decode_tokens += 1;
            ended.extend(self.accept(stretch.chain, token, log_prob, version));
        }
        for (id, _) in &ended {
            self.leave(*id);
        }
        Ok(ended)
    }

    /// Tokens and log-probs of the stretches that sample, in order.
    fn pass(&mut self, decoder: &Decoder, batch: &[Stretch]) -> Result<Vec<(u32, f32)>, ModelError> {
        let (mut ids, mut positions, mut last, mut draws) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        let (mut starts, mut lengths, mut pages) = (vec![0], Vec::new(), Vec::new());
        for stretch in batch {
            let Some(chain) = self.chains.get_mut(&stretch.chain) else { continue };
            let end = stretch.start + stretch.count;
            ids.extend(chain.tokens[stretch.start..end].iter().map(|&id| i64::from(id)));
            positions.extend(stretch.start as i64..end as i64);
            starts.push(ids.len() as i64);
            lengths.push(end as i64);
            pages.push(chain.pages.iter().map(|&page| page as i64).collect::<Vec<_>>());
            if let (true, Some(turn)) = (stretch.samples, &mut chain.turn) {
                last.push(ids.len() as i64 - 1);
                draws.push(Row { uniform: turn.uniform(), sampling: turn.sampling.clone() });
            }
        }
        let (cache, device) = (self.cache.tensor()?, decoder.device());
        let step = PagedStep::new(&starts, &lengths, &pages, cache.size()[0], device)?;
        let tokens = ids.len() as i64;
        let all = upload(&[ids, positions, last].concat(), device)?;
        let (ids, positions) = (all.f_narrow(0, 0, tokens)?, all.f_narrow(0, tokens, tokens)?);
        let attention = Attention::Paged { pages: cache, step: &step };
        let hidden = decoder.hidden(&ids, &positions, attention)?;
        if draws.is_empty() {
            return Ok(Vec::new());
        }
        let last = all.f_narrow(0, 2 * tokens, draws.len() as i64)?;
        let logits = decoder.logits(&hidden.f_index_select(0, &last)?)?;
        debug_assert_eq!(logits.kind(), Kind::Float);
        sampler::sample(&logits, &draws)
    }

    /// Adds a sampled token to its chain; the turn's result if it ended.
    fn accept(&mut self, id: u64, token: u32, log_prob: f32, version: PolicyVersion) -> Option<TurnResult> {
        let window = self.config.max_tokens_per_chain;
        let chain = self.chains.get_mut(&id)?;
        let position = chain.tokens.len();
        let mut turn = chain.turn.take()?;
        if let Some(before) = turn.sampled_by(version) {
            return Some((id, Err(EngineError::PolicyChanged { chain: id, position, before, version })));
        }
        if !log_prob.is_finite() {
            let (version, log_prob) = (format!("policy version {version}"), f64::from(log_prob));
            // A NaN in its cache must not reach those that would share it.
            self.drop_cache(id);
            return Some((id, Err(EngineError::NotFinite { chain: id, position, log_prob, version })));
        }
        chain.tokens.push(token);
        match turn.push(token, log_prob, chain.tokens.len() >= window) {
            Some(stop) => Some((id, Ok(turn.finish(stop, version)))),
            None => {
                chain.turn = Some(turn);
                None
            }
        }
    }
}
