//! The forward pass of a step: some tokens of each chain in it, and a sample for those that reach their last.
//!
//! What must stay true: a pass crosses to the device once with its inputs and once back with its tokens.

use agentfly_c10d::ops::PagedStep;
use agentfly_c10d::upload;
use agentfly_common::ids::PolicyVersion;
use tch::{Kind, Tensor};

use crate::model::{Attention, Decoder, ModelError};

use super::graphs::DecodeStep;
use super::sampler::{self, Row};
use super::schedule::Stretch;
use super::{Engine, EngineError, TurnResult};

/// A pass's new tokens, one stretch after another.
#[derive(Debug, Default)]
struct Rows {
    ids: Vec<i64>,
    positions: Vec<i64>,
    /// Where each stretch starts, and where the last one ends.
    starts: Vec<i64>,
    /// Tokens of each stretch's chain up to its end, and the pages that they are in.
    lengths: Vec<i64>,
    tables: Vec<Vec<i64>>,
    /// The rows that sample, and how.
    last: Vec<i64>,
    draws: Vec<Row>,
}

impl Rows {
    /// The pass, if it is one new token of each chain, from which the next one is sampled. Most are that.
    fn decode_step(&self) -> Option<DecodeStep<'_>> {
        let Self { ids, lengths, tables, .. } = self;
        (self.last.len() == ids.len()).then_some(DecodeStep { ids, lengths, tables })
    }
}

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
        let rows = self.rows(batch);
        let mut hidden = None;
        if let Some(step) = rows.decode_step() {
            hidden = self.graphs.hidden(decoder, self.cache.tensor()?, step)?;
        }
        if hidden.is_none() {
            hidden = self.ordinary(decoder, &rows)?;
        }
        let Some(hidden) = hidden else { return Ok(Vec::new()) };
        let logits = decoder.logits(&hidden)?;
        debug_assert_eq!(logits.kind(), Kind::Float);
        sampler::sample(&logits, &rows.draws)
    }

    /// What a pass over these stretches reads.
    fn rows(&mut self, batch: &[Stretch]) -> Rows {
        let mut rows = Rows { starts: vec![0], ..Rows::default() };
        for stretch in batch {
            let Some(chain) = self.chains.get_mut(&stretch.chain) else { continue };
            let end = stretch.start + stretch.count;
            rows.ids.extend(chain.tokens[stretch.start..end].iter().map(|&id| i64::from(id)));
            rows.positions.extend(stretch.start as i64..end as i64);
            rows.starts.push(rows.ids.len() as i64);
            rows.lengths.push(end as i64);
            rows.tables.push(chain.pages.iter().map(|&page| page as i64).collect());
            if let (true, Some(turn)) = (stretch.samples, &mut chain.turn) {
                rows.last.push(rows.ids.len() as i64 - 1);
                rows.draws.push(Row { uniform: turn.uniform(), sampling: turn.sampling.clone() });
            }
        }
        rows
    }

    /// Hidden states of the rows that sample; none where none does.
    fn ordinary(&self, decoder: &Decoder, rows: &Rows) -> Result<Option<Tensor>, ModelError> {
        let (cache, device) = (self.cache.tensor()?, decoder.device());
        let step = PagedStep::new(&rows.starts, &rows.lengths, &rows.tables, cache.size()[0], device)?;
        let tokens = rows.ids.len() as i64;
        let all = upload(&[&rows.ids[..], &rows.positions, &rows.last].concat(), device)?;
        let (ids, positions) = (all.f_narrow(0, 0, tokens)?, all.f_narrow(0, tokens, tokens)?);
        let attention = Attention::Paged { pages: cache, step: &step };
        let hidden = decoder.hidden(&ids, &positions, attention)?;
        if rows.last.is_empty() {
            return Ok(None);
        }
        let last = all.f_narrow(0, 2 * tokens, rows.last.len() as i64)?;
        Ok(Some(hidden.f_index_select(0, &last)?))
    }

    /// Adds a sampled token to its chain; the turn's result if it ended.
    fn accept(&mut self, id: u64, token: u32, log_prob: f32, version: PolicyVersion) -> Option<TurnResult> {
        let window = self.config.max_tokens_per_chain;
        let chain = self.chains.get_mut(&id)?;
        let position = chain.tokens.len();
        let mut turn = chain.turn.take()?;
        if let Some(before) = turn.sampled_by(version) {
            // Its next turn may add nothing, and samples after the last token all the same.
            chain.cached = chain.cached.min(position - 1);
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
