//! Who gets a slot, which tokens a step computes, and who loses its pages when the cache is full.
//!
//! What must stay true: chains get slots in the order they came; a running chain takes pages from those that do not
//! run and from younger ones that do, so the oldest that runs always goes on and none waits for ever; tokens are
//! computed in order.

use agentfly_c10d::ops::PAGE_TOKENS;

use crate::model::ModelError;

use super::Engine;
use super::cache::pages_for;

/// A stretch of one chain's tokens to compute.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Stretch {
    pub(crate) chain: u64,
    pub(crate) start: usize,
    pub(crate) count: usize,
    /// Whether it reaches the chain's last token, so that a token is sampled.
    pub(crate) samples: bool,
}

impl Engine {
    /// Gives slots to waiting chains while there are slots, and cache for all of a chain's tokens.
    pub(super) fn admit(&mut self) {
        while self.active.len() < self.config.max_slots {
            let Some(&id) = self.queue.front() else { return };
            let needed = self.chains.get(&id).map_or(0, |c| pages_for(c.tokens.len() + 1) - c.pages.len());
            let others =
                self.chains.iter().filter(|(other, _)| **other != id && !self.active.contains(other));
            let may_come = self.cache.available() + others.map(|(_, c)| c.pages.len()).sum::<usize>();
            // Alone it gets what it needs, whoever has it now.
            if needed > may_come && !self.active.is_empty() {
                return;
            }
            self.queue.pop_front();
            self.active.push(id);
        }
    }

    /// The next step's stretches, with their pages. Prefixes that a chain of the group has cached are shared on the
    /// way; a chain whose prefix a group mate is about to compute waits for it.
    pub(super) fn plan(&mut self) -> Result<Vec<Stretch>, ModelError> {
        let (mut budget, mut batch) = (self.config.max_prefill_tokens, Vec::<Stretch>::new());
        for (place, id) in self.active.clone().into_iter().enumerate() {
            if !self.active.contains(&id) || !self.share_prefix(id, place) {
                continue;
            }
            let Some(chain) = self.chains.get(&id) else { continue };
            let (start, left) = (chain.cached, chain.to_compute());
            let count = if left == 1 { 1 } else { left.min(budget) };
            if count == 0 {
                continue;
            }
            if !self.reserve(id, start, start + count)? {
                self.pause(id);
                continue;
            }
            if left > 1 {
                budget -= count;
            }
            batch.push(Stretch { chain: id, start, count, samples: count == left });
        }
        // A chain later in the order may have taken the pages of one that was planned before it.
        batch.retain(|stretch| self.active.contains(&stretch.chain));
        Ok(batch)
    }

    /// Shares the longest prefix that a chain of the same group has cached. False when a chain ahead of it will have
    /// cached more of it soon, and waiting is the better choice.
    fn share_prefix(&mut self, id: u64, place: usize) -> bool {
        let Some(chain) = self.chains.get(&id) else { return false };
        let Some(group) = chain.group else { return true };
        let wanted = chain.tokens.len() - 1;
        if wanted <= chain.cached {
            return true;
        }
        let (mut donor, mut now, mut soon) = (None, chain.cached, chain.cached);
        for (&mate_id, mate) in &self.chains {
            if mate.group != Some(group) || mate_id == id {
                continue;
            }
            let ahead = self.active[..place.min(self.active.len())].contains(&mate_id);
            if mate.cached <= now && !ahead {
                continue;
            }
            let common = common_prefix(&mate.tokens, &chain.tokens).min(wanted);
            if common.min(mate.cached) > now {
                now = common.min(mate.cached);
                donor = Some(mate_id);
            }
            if ahead {
                soon = soon.max(common);
            }
        }
        if soon > now {
            return false;
        }
        if let Some(pages) = donor.and_then(|donor| self.chains.get(&donor)).map(|mate| mate.pages.clone()) {
            self.stats.shared_tokens += (now - chain.cached) as u64;
            self.drop_cache(id);
            let shared = &pages[..pages_for(now)];
            shared.iter().for_each(|&page| self.cache.share(page));
            if let Some(chain) = self.chains.get_mut(&id) {
                chain.pages = shared.to_vec();
                chain.cached = now;
            }
        }
        true
    }

    /// Pages of its own for a chain's tokens `from..to`. False when they are not to be had: other chains are older.
    fn reserve(&mut self, id: u64, from: usize, to: usize) -> Result<bool, ModelError> {
        for place in from / PAGE_TOKENS..pages_for(to) {
            let held = self.chains.get(&id).and_then(|c| c.pages.get(place).copied());
            if held.is_some_and(|page| !self.cache.is_shared(page)) {
                continue;
            }
            let Some(page) = self.take_page(id)? else { return Ok(false) };
            // The mate may have been paused for it: then the page is this chain's alone already.
            if let Some(shared) = held {
                self.cache.copy(shared, page)?;
                self.cache.give_back(shared);
            }
            if let Some(chain) = self.chains.get_mut(&id) {
                match held {
                    Some(_) => chain.pages[place] = page,
                    None => chain.pages.push(page),
                }
            }
        }
        Ok(true)
    }

    /// A page: a free one, else from the youngest idle chain, else from the youngest whose turn waits for a slot, else
    /// from the youngest running one that is younger.
    fn take_page(&mut self, id: u64) -> Result<Option<usize>, ModelError> {
        let born = self.chains.get(&id).map_or(0, |c| c.born);
        loop {
            if let Some(page) = self.cache.take()? {
                return Ok(Some(page));
            }
            let holders = self.chains.iter().filter(|(other, c)| !c.pages.is_empty() && **other != id);
            let (running, still): (Vec<_>, Vec<_>) =
                holders.partition(|(other, _)| self.active.contains(other));
            let still = still.into_iter().max_by_key(|(_, c)| (c.turn.is_none(), c.born));
            if let Some(victim) = still.map(|(id, _)| *id) {
                self.drop_cache(victim);
                self.stats.evictions += 1;
                continue;
            }
            let younger = running.into_iter().filter(|(_, c)| c.born > born);
            let Some(victim) = younger.max_by_key(|(_, c)| c.born).map(|(id, _)| *id) else {
                return Ok(None);
            };
            self.pause(victim);
        }
    }

    /// Takes a running chain's slot and cache; it is first in the queue for both.
    fn pause(&mut self, id: u64) {
        self.drop_cache(id);
        if let Some(place) = self.active.iter().position(|other| *other == id) {
            self.active.remove(place);
            self.queue.push_front(id);
            self.stats.preemptions += 1;
        }
    }

    /// Frees a chain's pages.
    pub(super) fn drop_cache(&mut self, id: u64) {
        if let Some(chain) = self.chains.get_mut(&id) {
            chain.cached = 0;
            for page in std::mem::take(&mut chain.pages) {
                self.cache.give_back(page);
            }
        }
    }

    /// Frees the slot of a chain whose turn is over, or its place in the queue; it keeps its cache.
    pub(super) fn leave(&mut self, id: u64) {
        self.active.retain(|other| *other != id);
        self.queue.retain(|other| *other != id);
    }
}

fn common_prefix(a: &[u32], b: &[u32]) -> usize {
    a.iter().zip(b).take_while(|(x, y)| x == y).count()
}
