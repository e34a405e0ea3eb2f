//! Who gets a slot, which tokens a step computes, and who loses its pages when the cache is full.
//!
//! What must stay true: chains get slots in the order they came; a running chain takes pages from those that do not
//! run and from younger ones that do, so the oldest that runs always goes on and none waits for ever; tokens are
//! computed in order.

use std::collections::BTreeSet;

use agentfly_c10d::ops::PAGE_TOKENS;
use tch::Kind;

use crate::model::ModelError;

use super::cache::{Page, pages_for};
use super::chain::Chain;
use super::{Engine, GATHERED_CACHES};

/// A stretch of one chain's tokens to compute.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Stretch {
    pub(crate) chain: u64,
    pub(crate) start: usize,
    pub(crate) count: usize,
    /// Whether it reaches the chain's last token, so that a token is sampled.
    pub(crate) samples: bool,
}

/// What other chains have, or will have, of a chain's tokens.
struct Prefix {
    /// Who has cached the most of it.
    donor: Option<u64>,
    /// How many tokens that, or the chain's own cache, is.
    now: usize,
    /// How many it will be once the chains ahead have computed theirs.
    soon: usize,
}

impl Engine {
    /// Gives slots to waiting chains, those that were paused first, while there are slots and room in the cache for all
    /// of a chain's tokens and a page more, beside what the running ones still need.
    pub(super) fn admit(&mut self) {
        if self.active.len() >= self.config.max_slots || (self.paused.is_empty() && self.queue.is_empty()) {
            return;
        }
        // What the running chains hold, and what they will still take: neither can be given to another.
        let pages = |id: &u64| self.chains.get(id).into_iter().flat_map(|c| c.pages.iter().copied());
        let mut held: BTreeSet<Page> = self.active.iter().flat_map(pages).collect();
        let missing = |(place, id): (usize, &u64)| self.missing_pages(*id, &self.active[..place]);
        let mut promised: usize = self.active.iter().enumerate().map(missing).sum();
        while self.active.len() < self.config.max_slots {
            let paused = self.paused.first_key_value().map(|(_, &id)| id);
            let Some(id) = paused.or_else(|| self.queue.front().copied()) else { return };
            held.extend(self.chains.get(&id).into_iter().flat_map(|c| c.pages.iter().copied()));
            promised += self.missing_pages(id, &self.active);
            // Alone it gets what it needs, whoever has it now.
            if !self.active.is_empty() && held.len() + promised > self.config.cache_tokens / PAGE_TOKENS {
                return;
            }
            if paused.is_some() {
                self.paused.pop_first();
            } else {
                self.queue.pop_front();
            }
            self.active.push(id);
        }
    }

    /// Pages that a chain lacks for its tokens and a page of new ones, beside what it will share with those `ahead`.
    fn missing_pages(&self, id: u64, ahead: &[u64]) -> usize {
        let Some(chain) = self.chains.get(&id) else { return 0 };
        let all = pages_for((chain.tokens.len() + PAGE_TOKENS).min(self.config.max_tokens_per_chain));
        let own = match chain.cached {
            0 => self.prefix(id, chain, ahead).soon / PAGE_TOKENS,
            // The page it writes to next is copied first where another chain uses it, too.
            cached => {
                let next = chain.pages.get(cached / PAGE_TOKENS);
                chain.pages.len() - usize::from(next.is_some_and(|page| self.cache.is_shared(*page)))
            }
        };
        all.saturating_sub(own)
    }

    /// The next step's stretches, with their pages. Prefixes that another chain has cached are shared on the way; a
    /// chain whose prefix one ahead of it is about to compute waits for it.
    pub(super) fn plan(&mut self) -> Result<Vec<Stretch>, ModelError> {
        let (mut budget, mut batch) = (self.config.max_prefill_tokens, Vec::<Stretch>::new());
        for id in self.active.clone() {
            // It may have lost its slot to one before it.
            let Some(place) = self.active.iter().position(|other| *other == id) else { continue };
            let to_compute = |engine: &Self| engine.chains.get(&id).map_or(0, Chain::to_compute);
            if (budget == 0 && to_compute(self) > 1) || !self.share_prefix(id, place) {
                continue;
            }
            let (start, left) = (self.chains.get(&id).map_or(0, |c| c.cached), to_compute(self));
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
        if self.cache.tensor()?.device().is_cuda() {
            let most = GATHERED_CACHES * self.config.cache_tokens / PAGE_TOKENS;
            let pages = batch.iter().map(|stretch| pages_for(stretch.start + stretch.count));
            batch.truncate(gatherable(pages, self.cache.tensor()?.kind() == Kind::Float, most));
        }
        Ok(batch)
    }

    /// Shares the longest prefix that another chain has cached. False when a chain ahead of it will have cached more of
    /// it soon, and waiting is the better choice.
    fn share_prefix(&mut self, id: u64, place: usize) -> bool {
        let Some(chain) = self.chains.get(&id) else { return false };
        let (cached, prefix) = (chain.cached, self.prefix(id, chain, &self.active[..place]));
        if prefix.soon > prefix.now {
            return false;
        }
        let donor = prefix.donor.and_then(|donor| self.chains.get(&donor));
        if let Some(pages) = donor.map(|mate| mate.pages[..pages_for(prefix.now)].to_vec()) {
            self.stats.shared_tokens += (prefix.now - cached) as u64;
            self.drop_cache(id);
            pages.iter().for_each(|&page| self.cache.share(page));
            if let Some(chain) = self.chains.get_mut(&id) {
                (chain.pages, chain.cached) = (pages, prefix.now);
            }
        }
        true
    }

    /// What a chain can take over of its uncomputed tokens. Chains of one group share any prefix, others only whole
    /// pages: a few tokens in common are not worth a copy, or waiting for.
    fn prefix(&self, id: u64, chain: &Chain, ahead: &[u64]) -> Prefix {
        let wanted = chain.tokens.len() - 1;
        let mut prefix = Prefix { donor: None, now: chain.cached, soon: chain.cached };
        if wanted <= chain.cached {
            return prefix;
        }
        let common = |mate: &Chain| {
            let common = common_prefix(&mate.tokens, &chain.tokens).min(wanted);
            let is_mate = chain.group.is_some() && mate.group == chain.group;
            if is_mate { common } else { common - common % PAGE_TOKENS }
        };
        for (&mate_id, mate) in self.chains.iter().filter(|(mate_id, _)| **mate_id != id) {
            if mate.cached > prefix.now {
                let shared = common(mate).min(mate.cached);
                if shared > prefix.now {
                    (prefix.donor, prefix.now) = (Some(mate_id), shared);
                }
            }
        }
        prefix.soon = prefix.now;
        for mate in ahead.iter().filter_map(|mate| self.chains.get(mate)) {
            if prefix.soon == wanted {
                break;
            }
            prefix.soon = prefix.soon.max(common(mate));
        }
        prefix
    }

    /// Pages of its own for a chain's tokens `from..to`. False when they are not to be had: other chains are older.
    fn reserve(&mut self, id: u64, from: usize, to: usize) -> Result<bool, ModelError> {
        for place in from / PAGE_TOKENS..pages_for(to) {
            let held = self.chains.get(&id).and_then(|c| c.pages.get(place).copied());
            if held.is_some_and(|page| !self.cache.is_shared(page)) {
                continue;
            }
            let Some(page) = self.take_page(id)? else {
                // Who shared the page may have lost it on the way: then it is this chain's alone, and no other is needed.
                if held.is_some_and(|page| !self.cache.is_shared(page)) {
                    continue;
                }
                return Ok(false);
            };
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

    /// Takes a running chain's slot and cache; it goes before the queue for both, the oldest first.
    fn pause(&mut self, id: u64) {
        self.drop_cache(id);
        let born = self.chains.get(&id).map(|chain| chain.born);
        if let (Some(place), Some(born)) = (self.active.iter().position(|other| *other == id), born) {
            self.active.remove(place);
            self.paused.insert(born, id);
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
        self.paused.retain(|_, other| *other != id);
    }
}

/// How many of a pass's stretches, which have so many pages each, can be gathered into `most` pages; the younger ones wait.
/// Without FlashAttention, in f32, each takes as much as the longest.
fn gatherable(pages: impl Iterator<Item = usize>, as_longest: bool, most: usize) -> usize {
    let (mut sum, mut longest) = (0, 0);
    let gathered = pages.enumerate().map(|(before, pages)| {
        (sum, longest) = (sum + pages, longest.max(pages));
        if as_longest { longest * (before + 1) } else { sum }
    });
    gathered.take_while(|gathered| *gathered <= most).count()
}

fn common_prefix(a: &[u32], b: &[u32]) -> usize {
    a.iter().zip(b).take_while(|(x, y)| x == y).count()
}

#[cfg(test)]
mod tests {
    use super::gatherable;

    #[test]
    fn a_pass_gathers_what_fits_and_the_oldest_in_any_case() {
        let fit =
            |as_longest| [9, 10, 14, 15, 40].map(|most| gatherable([9, 1, 4].into_iter(), as_longest, most));
        assert_eq!(fit(false), [1, 2, 3, 3, 3]);
        assert_eq!(fit(true), [1, 1, 1, 1, 3], "nine pages for each");
    }
}
