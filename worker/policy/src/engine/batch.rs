//! The two forward passes: prefill of padded stretches, and decode of one token for every ready chain.
//!
//! What must stay true: each pass crosses to the device once with its inputs, and decode once back with its
//! tokens and log-probs.

use agentfly_common::ids::PolicyVersion;
use tch::{Device, Kind, Tensor};

use crate::model::{Attention, CacheStep, Decoder, ModelError, Rows, additive_mask};

use super::sampler::{self, Plan, RowParams};
use super::schedule::Stretch;
use super::{Engine, EngineError, TurnResult};

impl Engine {
    /// Computes and stores keys and values of some chains' next tokens.
    pub(super) fn prefill_pass(&mut self, decoder: &Decoder, batch: &[Stretch]) -> Result<(), ModelError> {
        let rows = batch.len();
        let length = batch.iter().map(|s| s.count).max().unwrap_or(0);
        let span = batch.iter().map(|s| s.start + s.count).max().unwrap_or(0);
        let (mut ids, mut positions) = (vec![0; rows * length], vec![0; rows * length]);
        let (mut write, mut kept, mut slots) = (Vec::new(), Vec::new(), Vec::new());
        for (row, stretch) in batch.iter().enumerate() {
            let Some(chain) = self.chains.get(&stretch.chain) else {
                continue;
            };
            slots.push(stretch.slot as i64);
            for i in 0..stretch.count {
                let (at, position) = (row * length + i, stretch.start + i);
                ids[at] = i64::from(chain.tokens[position]);
                positions[at] = position as i64;
                write.push(self.cache.place(stretch.slot, position) as i64);
                kept.push(at as i64);
            }
        }
        let device = decoder.device();
        let tokens = kept.len() as i64;
        let host = [ids, positions, write, kept, slots].concat();
        let all = Tensor::f_from_slice(&host)?.f_to_device(device)?;
        let (n, shape) = ((rows * length) as i64, [rows as i64, length as i64]);
        let positions = all.f_narrow(0, n, n)?.f_view(shape)?;
        let mask = if batch.iter().all(|s| s.start == 0) {
            None
        } else {
            let columns = Tensor::f_arange(span as i64, (Kind::Int64, device))?;
            let visible = columns.f_le_tensor(&positions.f_unsqueeze(-1)?)?.f_unsqueeze(1)?;
            Some(additive_mask(&visible, decoder.kind())?)
        };
        let step = CacheStep {
            layers: self.cache.layers(),
            rows: Rows::Picked(all.f_narrow(0, 2 * n + 2 * tokens, rows as i64)?),
            write: self.cache.write_index(&all.f_narrow(0, 2 * n, tokens)?)?,
            kept: if tokens == n { None } else { Some(all.f_narrow(0, 2 * n + tokens, tokens)?) },
            span: span as i64,
            mask,
        };
        let ids = all.f_narrow(0, 0, n)?.f_view(shape)?;
        // Nothing is sampled from prefilled tokens: their keys and values are what is wanted.
        let _hidden = decoder.hidden(&ids, &positions, Attention::Cached(&step))?;
        Ok(())
    }

    /// Samples one token for every chain of the decode batch; returns the turns that ended.
    pub(super) fn decode(
        &mut self,
        decoder: &Decoder,
        version: PolicyVersion,
    ) -> Result<Vec<TurnResult>, EngineError> {
        let batch: Vec<u64> = self.slots[..self.decoding].iter().flatten().copied().collect();
        if batch.is_empty() {
            return Ok(Vec::new());
        }
        let sampled = self.decode_pass(decoder, &batch)?;
        let mut ended = Vec::new();
        for (row, &id) in batch.iter().enumerate() {
            let (token, log_prob) = (sampled[row], sampled[batch.len() + row]);
            if let Some(end) = self.accept(id, token as u32, log_prob, version) {
                ended.push(end);
            }
        }
        for (id, _) in &ended {
            self.retire(*id);
        }
        self.stats.decode_tokens += batch.len() as u64;
        Ok(ended)
    }

    /// The forward pass of the batch's last tokens: sampled ids, then their log-probs.
    fn decode_pass(&mut self, decoder: &Decoder, batch: &[u64]) -> Result<Vec<f64>, ModelError> {
        let span =
            batch.iter().filter_map(|id| self.chains.get(id)).map(|c| c.tokens.len()).max().unwrap_or(0);
        self.cache.ensure(batch.len(), span, decoder.kind(), decoder.device())?;
        let n = batch.len();
        // One row each: id, position, cache index, then the sampler's; whole numbers are exact in f64.
        let mut host = vec![0.0; (3 + RowParams::COUNT) * n];
        let mut plan = Plan::default();
        for (row, id) in batch.iter().enumerate() {
            let Some(chain) = self.chains.get_mut(id) else {
                continue;
            };
            let Some(turn) = &mut chain.turn else { continue };
            let position = chain.cached;
            host[row] = f64::from(chain.tokens[position]);
            host[n + row] = position as f64;
            host[2 * n + row] = self.cache.place(row, position) as f64;
            let uniform = turn.uniform();
            let params = plan.add(row, &turn.sampling, uniform, self.vocab);
            for (i, value) in params.into_iter().enumerate() {
                host[(3 + i) * n + row] = value;
            }
        }
        let (rows, device) = (n as i64, decoder.device());
        let all = Tensor::f_from_slice(&host)?.f_view([-1, rows])?.f_to_device(device)?;
        let whole = all.f_narrow(0, 0, 3)?.f_to_kind(Kind::Int64)?;
        let ids = whole.f_select(0, 0)?.f_unsqueeze(1)?;
        let positions = whole.f_select(0, 1)?.f_unsqueeze(1)?;
        let visible = Tensor::f_arange(span as i64, (Kind::Int64, device))?.f_le_tensor(&positions)?;
        let mask = additive_mask(&visible, decoder.kind())?.f_view([rows, 1, 1, span as i64])?;
        let step = CacheStep {
            layers: self.cache.layers(),
            rows: Rows::Prefix,
            write: self.cache.write_index(&whole.f_select(0, 2)?)?,
            kept: None,
            span: span as i64,
            mask: Some(mask),
        };
        let hidden = decoder.hidden(&ids, &positions, Attention::Cached(&step))?;
        let logits = decoder.logits(&hidden.f_squeeze_dim(1)?)?;
        let params = RowParams::from_rows(&all.f_narrow(0, 3, RowParams::COUNT as i64)?)?;
        let sampled = sampler::sample(&logits, &params, &plan)?;
        let mut values = vec![0.0; 2 * n];
        sampled.f_to_device(Device::Cpu)?.f_copy_data(&mut values, 2 * n)?;
        Ok(values)
    }

    /// Adds a sampled token to its chain; the turn's result if it ended.
    fn accept(&mut self, id: u64, token: u32, log_prob: f64, version: PolicyVersion) -> Option<TurnResult> {
        let window = self.config.max_tokens_per_chain;
        let chain = self.chains.get_mut(&id)?;
        let position = chain.tokens.len();
        let mut turn = chain.turn.take()?;
        if !log_prob.is_finite() {
            let version = format!("policy version {version}");
            return Some((id, Err(EngineError::NotFinite { chain: id, position, log_prob, version })));
        }
        chain.cached = position;
        chain.tokens.push(token);
        match turn.push(token, log_prob as f32, chain.tokens.len() >= window) {
            Some(stop) => Some((id, Ok(turn.finish(stop, version)))),
            None => {
                chain.turn = Some(turn);
                None
            }
        }
    }
}
