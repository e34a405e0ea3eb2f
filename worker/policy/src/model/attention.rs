//! Grouped-query self-attention over rows of tokens: of whole sequences (the learner, scoring) or continuing
//! chains through the paged KV cache (the engine).
//!
//! What must stay true: both ways give a token the same attention to the same tokens, so that a rollout's
//! log-probs are the learner's.

use agentfly_c10d::ops::{Heads, Packed, PagedStep, attention, paged_attention, rope};
use agentfly_common::model_dir::ModelConfig;
use tch::Tensor;

use super::error::ModelError;
use super::layers::{FindSum, Map, Norm};
use super::rope::Rotation;

/// What the tokens of a forward pass attend to.
#[derive(Debug, Clone, Copy)]
pub enum Attention<'a> {
    /// Rows are sequences one after another, some of which may share the rows of their beginning. Each token attends to
    /// its own sequence up to itself.
    Packed(&'a Packed),
    /// Tokens continue chains whose keys and values are cached; theirs are added.
    Paged {
        /// The cache, `[pages, layers, numbers]`.
        pages: &'a Tensor,
        /// Which tokens continue which chain, and where its pages are.
        step: &'a PagedStep,
    },
}

/// One block's attention, after its norm.
#[derive(Debug)]
pub(crate) struct SelfAttention {
    pub(crate) norm: Norm,
    /// Queries, keys and values of a row side by side.
    pub(crate) qkv: Map,
    pub(crate) output: Map,
    /// Qwen3 normalises each head's queries and keys.
    pub(crate) head_norms: Option<(Norm, Norm)>,
}

/// The heads of a model's rows.
pub(crate) fn heads(config: &ModelConfig) -> Heads {
    Heads { queries: config.heads, keys: config.kv_heads, dim: config.head_dim }
}

impl SelfAttention {
    /// `[N, hidden]` → `[N, hidden]`.
    pub(crate) fn apply(
        &self,
        config: &ModelConfig,
        layer: usize,
        x: &Tensor,
        rotation: &Rotation,
        reach: Attention<'_>,
    ) -> Result<Tensor, ModelError> {
        let heads = heads(config);
        let mut qkv = self.qkv.apply_norm(&self.norm, x)?;
        if let Some(norms) = &self.head_norms {
            qkv = normalise_heads(&qkv, heads, norms)?;
        }
        let qkv = rope(&qkv, &rotation.cos, &rotation.sin, heads.queries + heads.keys)?;
        let mixed = match reach {
            Attention::Packed(packed) => attention(&qkv, packed, heads)?,
            Attention::Paged { pages, step } => paged_attention(&qkv, pages, layer as i64, step, heads)?,
        };
        self.output.apply(&mixed)
    }

    pub(crate) fn gather(&mut self, find: Option<FindSum<'_>>) -> Result<(), ModelError> {
        self.norm.gather(find)?;
        self.qkv.gather(find)?;
        self.output.gather(find)?;
        if let Some((queries, keys)) = &mut self.head_norms {
            queries.gather(find)?;
            keys.gather(find)?;
        }
        Ok(())
    }
}

/// Rows whose queries and keys have unit root mean square, head by head, times the norms' weights.
fn normalise_heads(qkv: &Tensor, heads: Heads, norms: &(Norm, Norm)) -> Result<Tensor, ModelError> {
    let rows = qkv.size()[0];
    let part = |norm: &Norm, first: i64, count: i64| -> Result<Tensor, ModelError> {
        let part = qkv.f_narrow(1, first * heads.dim, count * heads.dim)?;
        let normed = norm.apply(&part.f_reshape([rows * count, heads.dim])?)?;
        Ok(normed.f_view([rows, count * heads.dim])?)
    };
    let queries = part(&norms.0, 0, heads.queries)?;
    let keys = part(&norms.1, heads.queries, heads.keys)?;
    let values = qkv.f_narrow(1, (heads.queries + heads.keys) * heads.dim, heads.keys * heads.dim)?;
    Ok(Tensor::f_cat(&[queries, keys, values], 1)?)
}
