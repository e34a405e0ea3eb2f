//! The KV cache: one tensor, a row (slot) per chain.
//!
//! What must stay true: positions beyond a chain's cached tokens hold finite numbers (they are masked, and a
//! NaN would leak through the mask). A head's positions lie together: attention reads them 3 times as fast. It starts small and doubles up to its limits, so memory follows use.

use tch::{Device, Kind, Tensor};

use crate::model::{LayerCache, ModelConfig, ModelError};

/// Positions a fresh cache has at least: growing by less is not worth the copy.
const MIN_TOKENS: usize = 256;

#[derive(Debug)]
pub(crate) struct KvCache {
    layers: i64,
    kv_heads: i64,
    head_dim: i64,
    max_slots: usize,
    max_tokens: usize,
    slots: usize,
    tokens: usize,
    /// `[layers, 2, slots, kv_heads, tokens, head_dim]`; none until the first use and after `clear`.
    all: Option<Tensor>,
    /// Views into `all`.
    views: Vec<LayerCache>,
}

impl KvCache {
    pub(crate) fn new(model: &ModelConfig, max_slots: usize, max_tokens: usize) -> Self {
        Self {
            layers: model.layers,
            kv_heads: model.kv_heads,
            head_dim: model.head_dim,
            max_slots,
            max_tokens,
            slots: 0,
            tokens: 0,
            all: None,
            views: Vec::new(),
        }
    }

    pub(crate) fn layers(&self) -> &[LayerCache] {
        &self.views
    }

    /// Where the first head of a slot's position lies, for [`Self::write_index`].
    pub(crate) fn place(&self, slot: usize, position: usize) -> usize {
        slot * self.kv_heads as usize * self.tokens + position
    }

    /// [`CacheStep::write`](crate::model::CacheStep::write) of some places `[N]`.
    pub(crate) fn write_index(&self, places: &Tensor) -> Result<Tensor, ModelError> {
        let heads = Tensor::f_arange(self.kv_heads, (Kind::Int64, places.device()))?;
        let offsets = heads.f_mul_scalar(self.tokens as i64)?;
        Ok(places.f_unsqueeze(1)?.f_add(&offsets)?.f_view([-1])?)
    }

    /// Makes room for this many slots of this many tokens, keeping what is cached.
    pub(crate) fn ensure(
        &mut self,
        slots: usize,
        tokens: usize,
        kind: Kind,
        device: Device,
    ) -> Result<(), ModelError> {
        if self.all.is_some() && slots <= self.slots && tokens <= self.tokens {
            return Ok(());
        }
        let grown = |needed: usize, now: usize, most: usize| needed.max(now).next_power_of_two().min(most);
        let slots = grown(slots, self.slots, self.max_slots);
        let tokens = grown(tokens.max(MIN_TOKENS), self.tokens, self.max_tokens);
        let shape = [self.layers, 2, slots as i64, self.kv_heads, tokens as i64, self.head_dim];
        let all = Tensor::f_zeros(shape, (kind, device))?;
        if let Some(old) = &self.all {
            let (old_slots, old_tokens) = (self.slots as i64, self.tokens as i64);
            all.f_narrow(2, 0, old_slots)?.f_narrow(4, 0, old_tokens)?.f_copy_(old)?;
        }
        let mut views = Vec::new();
        for layer in 0..self.layers {
            let pair = all.f_select(0, layer)?;
            views.push(LayerCache { keys: pair.f_select(0, 0)?, values: pair.f_select(0, 1)? });
        }
        (self.slots, self.tokens, self.views, self.all) = (slots, tokens, views, Some(all));
        Ok(())
    }

    /// Copies the first `tokens` positions of a slot over another's.
    pub(crate) fn copy(&self, from: usize, to: usize, tokens: usize) -> Result<(), ModelError> {
        if tokens > 0 {
            self.part(to, tokens)?.f_copy_(&self.part(from, tokens)?)?;
        }
        Ok(())
    }

    /// Exchanges the first `tokens` positions of two slots.
    pub(crate) fn swap(&self, a: usize, b: usize, tokens: usize) -> Result<(), ModelError> {
        if tokens > 0 {
            let in_a = self.part(a, tokens)?;
            let mut kept = in_a.f_empty_like()?;
            kept.f_copy_(&in_a)?;
            self.copy(b, a, tokens)?;
            self.part(b, tokens)?.f_copy_(&kept)?;
        }
        Ok(())
    }

    /// Gives the memory back; the next use allocates the same size at once.
    pub(crate) fn clear(&mut self) {
        self.views.clear();
        self.all = None;
    }

    fn part(&self, slot: usize, tokens: usize) -> Result<Tensor, ModelError> {
        let all = self.all.as_ref().ok_or_else(|| ModelError::Input {
            what: "KV cache",
            got: "nothing cached".to_owned(),
            needed: format!("{tokens} tokens in slot {slot}"),
        })?;
        Ok(all.f_select(2, slot as i64)?.f_narrow(3, 0, tokens as i64)?)
    }
}
