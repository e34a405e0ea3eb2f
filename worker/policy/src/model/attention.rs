//! Grouped-query self-attention, over whole rows (the learner) or through a KV cache (the engine).
//!
//! What must stay true: both ways give a token the same attention to the same tokens, so that a rollout's
//! log-probs are the learner's up to rounding.

use agentfly_common::model_dir::ModelConfig;
use tch::{Device, Kind, Tensor};

use super::error::ModelError;
use super::rope::Rotation;

/// What the tokens of a forward pass attend to.
pub enum Attention<'a> {
    /// Rows start at their first token and are padded on the right; each token attends to its row up to
    /// itself, so padding never reaches a real token.
    Causal,
    /// Tokens continue chains whose keys and values are cached; theirs are added.
    Cached(&'a CacheStep<'a>),
}

/// One layer's share of the KV cache.
#[derive(Debug)]
pub struct LayerCache {
    /// `[slots, kv_heads, tokens, head_dim]`, after rotation.
    pub keys: Tensor,
    /// The same shape.
    pub values: Tensor,
}

/// Which slots a batch's rows live in.
#[derive(Debug)]
pub enum Rows {
    /// Row i in slot i: the cache is read in place.
    Prefix,
    /// Row i in the slot that entry i of this `[B]` i64 tensor names: the cache is copied to be read.
    Picked(Tensor),
}

/// Where one forward pass writes into the cache and what it reads. B rows of L new tokens.
#[derive(Debug)]
pub struct CacheStep<'a> {
    /// The cache, a layer each.
    pub layers: &'a [LayerCache],
    /// The slots of the rows.
    pub rows: Rows,
    /// `[N × kv_heads]` i64: for each new token that is kept, and each head, the row of the cache seen as
    /// `[slots × kv_heads × tokens, head_dim]`.
    pub write: Tensor,
    /// `[N]` i64: which of the B × L new tokens are kept; `None`: all. Padding is not.
    pub kept: Option<Tensor>,
    /// Cached positions read: the longest row's length, new tokens included.
    pub span: i64,
    /// Added to the scores, `[B, 1, L, span]`, −∞ where a token must not look; `None`: no row had anything
    /// cached, and tokens attend causally among the new ones alone.
    pub mask: Option<Tensor>,
}

impl CacheStep<'_> {
    /// Stores keys and values `[B, L, kv_heads, head_dim]` of one layer.
    fn write(&self, layer: usize, keys: &Tensor, values: &Tensor) -> Result<(), ModelError> {
        for (cache, new) in [(&self.layers[layer].keys, keys), (&self.layers[layer].values, values)] {
            let (_, _, heads, head_dim) = new.size4()?;
            let mut new = new.f_reshape([-1, heads, head_dim])?;
            if let Some(kept) = &self.kept {
                new = new.f_index_select(0, kept)?;
            }
            let mut flat = cache.f_view([-1, head_dim])?;
            let _same_tensor = flat.f_index_copy_(0, &self.write, &new.f_view([-1, head_dim])?)?;
        }
        Ok(())
    }

    /// The rows' keys and values, `[B, kv_heads, span, head_dim]`.
    fn read(&self, layer: usize, rows: i64) -> Result<(Tensor, Tensor), ModelError> {
        let pick = |cache: &Tensor| -> Result<Tensor, ModelError> {
            let spanned = cache.f_narrow(2, 0, self.span)?;
            Ok(match &self.rows {
                Rows::Prefix => spanned.f_narrow(0, 0, rows)?,
                Rows::Picked(slots) => spanned.f_index_select(0, slots)?,
            })
        };
        Ok((pick(&self.layers[layer].keys)?, pick(&self.layers[layer].values)?))
    }
}

/// A linear map, weight `[out, in]`.
#[derive(Debug)]
pub(crate) struct Linear {
    pub(crate) weight: Tensor,
    pub(crate) bias: Option<Tensor>,
}

impl Linear {
    pub(crate) fn apply(&self, x: &Tensor) -> Result<Tensor, ModelError> {
        Ok(x.f_linear(&self.weight, self.bias.as_ref())?)
    }
}

/// Scales to unit root mean square, then by a weight.
#[derive(Debug)]
pub(crate) struct RmsNorm {
    pub(crate) weight: Tensor,
    pub(crate) eps: f64,
}

impl RmsNorm {
    pub(crate) fn apply(&self, x: &Tensor) -> Result<Tensor, ModelError> {
        Ok(x.f_rms_norm(self.weight.size(), Some(&self.weight), self.eps)?)
    }
}

/// One block's attention.
#[derive(Debug)]
pub(crate) struct SelfAttention {
    pub(crate) query: Linear,
    pub(crate) key: Linear,
    pub(crate) value: Linear,
    pub(crate) output: Linear,
    /// Qwen3 normalises each head's queries and keys.
    pub(crate) query_norm: Option<RmsNorm>,
    pub(crate) key_norm: Option<RmsNorm>,
}

impl SelfAttention {
    /// `[B, L, hidden]` → `[B, L, hidden]`.
    pub(crate) fn apply(
        &self,
        config: &ModelConfig,
        layer: usize,
        x: &Tensor,
        rotation: &Rotation,
        attention: &Attention<'_>,
    ) -> Result<Tensor, ModelError> {
        let (batch, length, _) = x.size3()?;
        let split = |x: Tensor, heads: i64| x.f_view([batch, length, heads, config.head_dim]);
        let mut queries = split(self.query.apply(x)?, config.heads)?;
        let mut keys = split(self.key.apply(x)?, config.kv_heads)?;
        let values = split(self.value.apply(x)?, config.kv_heads)?;
        if let (Some(query_norm), Some(key_norm)) = (&self.query_norm, &self.key_norm) {
            queries = query_norm.apply(&queries)?;
            keys = key_norm.apply(&keys)?;
        }
        let (queries, keys) = (rotation.apply(&queries)?, rotation.apply(&keys)?);
        let among_new = || {
            let (keys, values) = (keys.f_transpose(1, 2)?, values.f_transpose(1, 2)?);
            attend(&queries, &keys, &values, None)
        };
        let mixed = match attention {
            Attention::Causal => among_new()?,
            Attention::Cached(step) => {
                step.write(layer, &keys, &values)?;
                match &step.mask {
                    None => among_new()?,
                    Some(mask) => {
                        let (keys, values) = step.read(layer, batch)?;
                        attend(&queries, &keys, &values, Some(mask))?
                    }
                }
            }
        };
        self.output.apply(&mixed)
    }
}

/// Scaled dot-product attention of queries `[B, L, heads, head_dim]` over keys and values
/// `[B, kv_heads, S, head_dim]`, causal without a mask → `[B, L, heads × head_dim]`.
fn attend(q: &Tensor, k: &Tensor, v: &Tensor, mask: Option<&Tensor>) -> Result<Tensor, ModelError> {
    let (batch, length, heads, head_dim) = q.size4()?;
    let kv_heads = k.size()[1];
    if length == 1 && mask.is_some() && heads != kv_heads {
        // One new token a row: the queries that share a key head stand in for a sequence of queries, and
        // keys need not be repeated.
        let q = q.f_view([batch, kv_heads, heads / kv_heads, head_dim])?;
        let mixed = Tensor::f_scaled_dot_product_attention(&q, k, v, mask, 0.0, false, None, false)?;
        return Ok(mixed.f_reshape([batch, 1, heads * head_dim])?);
    }
    let q = q.f_transpose(1, 2)?;
    let causal = mask.is_none() && length > 1;
    if causal && q.requires_grad() && length <= EXPLICIT_TOKENS && q.device() == Device::Cpu {
        return attend_explicitly(&q, k, v);
    }
    let grouped = heads != kv_heads;
    let mixed = Tensor::f_scaled_dot_product_attention(&q, k, v, mask, 0.0, causal, None, grouped)?;
    Ok(mixed.f_transpose(1, 2)?.f_reshape([batch, length, heads * head_dim])?)
}

/// A score mask in `kind` from a boolean one: 0 where true, −∞ elsewhere.
pub(crate) fn additive_mask(visible: &Tensor, kind: Kind) -> Result<Tensor, ModelError> {
    let zeros = Tensor::f_zeros(visible.size(), (kind, visible.device()))?;
    Ok(zeros.f_masked_fill(&visible.f_logical_not()?, f64::NEG_INFINITY)?)
}

/// Longest rows whose attention scores may exist whole: [`attend_explicitly`].
const EXPLICIT_TOKENS: i64 = 512;

/// Causal attention written out, for training short rows on CPUs: the fused kernel's backward multiplies one
/// small block at a time there, and each product's set-up costs more than the product (a supervised update of
/// the tiny model took about half as long again). `q` is `[B, heads, L, head_dim]`.
fn attend_explicitly(q: &Tensor, k: &Tensor, v: &Tensor) -> Result<Tensor, ModelError> {
    let (batch, heads, length, head_dim) = q.size4()?;
    let kv_heads = k.size()[1];
    let shared = heads / kv_heads;
    // The queries that share a key head stand in for one longer sequence of queries.
    let q = q.f_reshape([batch * kv_heads, shared * length, head_dim])?;
    let k = k.f_reshape([batch * kv_heads, length, head_dim])?;
    let v = v.f_reshape([batch * kv_heads, length, head_dim])?;
    let future = Tensor::f_full([length, length], f64::NEG_INFINITY, (q.kind(), q.device()))?.f_triu(1)?;
    let future = future.f_repeat([shared, 1])?;
    let scale = (head_dim as f64).powf(-0.5);
    let scores = future.f_baddbmm(&q, &k.f_transpose(1, 2)?, 1.0, scale)?;
    let mixed = scores.f_softmax(-1, None)?.f_bmm(&v)?;
    let mixed = mixed.f_view([batch, heads, length, head_dim])?.f_transpose(1, 2)?;
    Ok(mixed.f_reshape([batch, length, heads * head_dim])?)
}
