//! The decoder-only transformer: Llama, Qwen2/2.5 and Qwen3 as Hugging Face stores them.
//!
//! Called by the rollout engine (with a KV cache) and by the learner (with autograd); both run the same
//! [`Decoder::hidden`]. What must stay true: parameters keep their Hugging Face names from load to export, a
//! tied head is stored once, and input faults are errors, never libtorch panics.

mod attention;
mod decoder;
mod error;
mod export;
pub(crate) mod invariance;
mod layers;
mod load;
mod parameters;
#[cfg(test)]
pub(crate) mod plain;
mod rope;
mod score;

pub use agentfly_common::model_dir::{Architecture, ModelConfig, RopeScaling};
pub use attention::Attention;
pub use decoder::Decoder;
pub(crate) use decoder::EMBEDDING;
pub use error::ModelError;
pub use export::export;
pub(crate) use export::write_safetensors;
pub use parameters::{Parameters, tensor_bytes};
pub(crate) use parameters::{Slot, for_each_chunk};
pub(crate) use rope::Rotation;
pub use score::{Scores, score, score_rows, visit_logits};
pub(crate) use score::{head_pieces, host, visit_head};
