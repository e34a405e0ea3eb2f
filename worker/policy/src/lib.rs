//! The policy: the only crate, besides its C++ shim, that touches libtorch.
//!
//! - [`model`]: the decoder (Llama, Qwen2, Qwen3), read from and written to Hugging Face directories;
//! - [`engine`]: continuous batching, the KV cache and the sampler: how rollouts are generated;
//! - [`learner`]: from a step's batch to the next policy version;
//! - [`environment`]: what a process that computes must be started with;
//! - [`placement`]: devices and dtypes in words that need no libtorch type;
//! - [`device`]: the one OS thread that owns all three, and the async handle to it.
//!
//! What must stay true: tensors never leave the device thread, and what the engine reports as a token's
//! log-prob is what the learner computes for it from the same weights.

pub mod device;
pub mod engine;
pub mod environment;
pub mod learner;
pub mod model;
pub mod placement;
