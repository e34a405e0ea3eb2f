//! Who gets a slot, who is prefilled, who decodes.
//!
//! What must stay true: the decode batch is the first slots, so that the cache is read in place; a chain in
//! the queue that has a slot keeps it until its turn ends; chains get slots in the order they came.

use crate::model::{Decoder, ModelError};

use super::{Engine, EngineError};

/// A stretch of one chain's tokens to prefill.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Stretch {
    pub(crate) chain: u64,
    pub(crate) slot: usize,
    pub(crate) start: usize,
    pub(crate) count: usize,
}

impl Engine {
    /// Gives slots to waiting chains: free ones, then those of idle chains, the youngest first.
    pub(super) fn admit(&mut self) {
        let waiting: Vec<u64> = self.queue.iter().copied().filter(|id| self.slot_of(*id).is_none()).collect();
        for id in waiting {
            let free = self.slots.iter().position(Option::is_none);
            let Some(slot) = free.or_else(|| self.evict()) else {
                return;
            };
            self.slots[slot] = Some(id);
            if let Some(chain) = self.chains.get_mut(&id) {
                chain.slot = Some(slot);
            }
        }
    }

    /// Takes the slot of the youngest idle chain.
    fn evict(&mut self) -> Option<usize> {
        let idle = self.chains.values_mut().filter(|c| c.turn.is_none() && c.slot.is_some());
        let victim = idle.max_by_key(|c| c.born)?;
        let slot = victim.slot.take()?;
        victim.cached = 0;
        self.slots[slot] = None;
        self.stats.evictions += 1;
        Some(slot)
    }

    /// Computes keys and values of one batch of waiting chains' tokens, up to but not including each chain's
    /// last.
    pub(super) fn prefill(&mut self, decoder: &Decoder) -> Result<(), EngineError> {
        let longest = self.queue.iter().filter_map(|id| self.chains.get(id)).filter(|c| c.slot.is_some());
        let Some(tokens) = longest.map(|c| c.tokens.len()).max() else {
            return Ok(());
        };
        self.cache.ensure(self.slots_spanned(), tokens, decoder.kind(), decoder.device())?;
        let batch = self.plan_prefill()?;
        if batch.is_empty() {
            return Ok(());
        }
        self.prefill_pass(decoder, &batch)?;
        for stretch in &batch {
            if let Some(chain) = self.chains.get_mut(&stretch.chain) {
                chain.cached = stretch.start + stretch.count;
            }
            self.stats.prefill_tokens += stretch.count as u64;
        }
        Ok(())
    }

    /// The next stretches in queue order, as many as fit `max_prefill_tokens` with padding. Prefixes that a
    /// chain of the group has cached are copied on the way; a chain whose prefix a group mate is about to
    /// compute waits for it.
    fn plan_prefill(&mut self) -> Result<Vec<Stretch>, ModelError> {
        let (budget, mut batch, mut longest) = (self.config.max_prefill_tokens, Vec::new(), 0);
        let queue: Vec<u64> = self.queue.iter().copied().collect();
        for (place, &id) in queue.iter().enumerate() {
            if !self.share_prefix(id, &queue[..place])? {
                continue;
            }
            let Some(chain) = self.chains.get(&id) else {
                continue;
            };
            let Some(slot) = chain.slot else { continue };
            let count = chain.to_prefill().min(budget);
            if count == 0 {
                continue;
            }
            let padded = longest.max(count) * (batch.len() + 1);
            if padded > budget && !batch.is_empty() {
                break;
            }
            longest = longest.max(count);
            batch.push(Stretch { chain: id, slot, start: chain.cached, count });
        }
        Ok(batch)
    }

    /// Copies the longest prefix that a chain of the same group has cached. False when a chain ahead in the
    /// queue will have cached more of it soon, and waiting is the better choice.
    fn share_prefix(&mut self, id: u64, ahead: &[u64]) -> Result<bool, ModelError> {
        let Some(chain) = self.chains.get(&id) else {
            return Ok(false);
        };
        let (Some(group), Some(slot)) = (chain.group, chain.slot) else {
            return Ok(true);
        };
        let wanted = chain.tokens.len() - 1;
        let (mut donor, mut now, mut soon) = (None, chain.cached, chain.cached);
        for (&mate_id, mate) in &self.chains {
            let Some(mate_slot) = mate.slot.filter(|_| mate.group == Some(group) && mate_id != id) else {
                continue;
            };
            if wanted <= chain.cached || (mate.cached <= now && mate.to_prefill() == 0) {
                continue;
            }
            let common = common_prefix(&mate.tokens, &chain.tokens).min(wanted);
            if common.min(mate.cached) > now {
                now = common.min(mate.cached);
                donor = Some(mate_slot);
            }
            if ahead.contains(&mate_id) {
                soon = soon.max(common.min(mate.tokens.len() - 1));
            }
        }
        if soon > now {
            return Ok(false);
        }
        if let Some(donor) = donor {
            self.cache.copy(donor, slot, now)?;
            self.stats.shared_tokens += (now - chain.cached) as u64;
            if let Some(chain) = self.chains.get_mut(&id) {
                chain.cached = now;
            }
        }
        Ok(true)
    }

    /// Moves chains whose prefill is complete into the decode batch.
    pub(super) fn promote(&mut self) -> Result<(), EngineError> {
        let ready: Vec<(u64, usize)> = self
            .queue
            .iter()
            .filter_map(|id| {
                self.chains.get(id).filter(|c| c.to_prefill() == 0).and_then(|c| Some((*id, c.slot?)))
            })
            .collect();
        for (id, _) in ready {
            // Read anew: an earlier exchange may have moved it.
            let Some(slot) = self.slot_of(id) else { continue };
            self.exchange(slot, self.decoding)?;
            self.decoding += 1;
            self.queue.retain(|&queued| queued != id);
        }
        Ok(())
    }

    /// Takes a chain out of the decode batch; it keeps its cache. Should the copy fail, every
    /// cache is dropped: chains go on from their tokens.
    pub(super) fn retire(&mut self, id: u64) {
        let Some(slot) = self.slot_of(id).filter(|&slot| slot < self.decoding) else {
            return;
        };
        let last = self.decoding - 1;
        if self.exchange(slot, last).is_err() {
            self.forget_weights();
            self.queue.retain(|&queued| queued != id);
            return;
        }
        self.decoding = last;
    }

    /// Exchanges what two slots hold.
    fn exchange(&mut self, a: usize, b: usize) -> Result<(), ModelError> {
        if a == b {
            return Ok(());
        }
        let held = |slot: usize| self.slots[slot].and_then(|id| self.chains.get(&id)).map_or(0, |c| c.cached);
        let (in_a, in_b) = (held(a), held(b));
        match (in_a, in_b) {
            (0, tokens) => self.cache.copy(b, a, tokens)?,
            (tokens, 0) => self.cache.copy(a, b, tokens)?,
            _ => self.cache.swap(a, b, in_a.max(in_b))?,
        }
        self.slots.swap(a, b);
        for slot in [a, b] {
            if let Some(chain) = self.slots[slot].and_then(|id| self.chains.get_mut(&id)) {
                chain.slot = Some(slot);
            }
        }
        Ok(())
    }

    pub(super) fn slot_of(&self, id: u64) -> Option<usize> {
        self.chains.get(&id).and_then(|chain| chain.slot)
    }

    /// Slots from the first to the last that is held.
    fn slots_spanned(&self) -> usize {
        self.slots.iter().rposition(Option::is_some).map_or(0, |last| last + 1)
    }
}

fn common_prefix(a: &[u32], b: &[u32]) -> usize {
    a.iter().zip(b).take_while(|(x, y)| x == y).count()
}
