//! What libtorch has and tch does not bind, behind one small C++ shim: c10d's collectives (Gloo on CPU, NCCL on
//! CUDA with feature `nccl`), its TCP store for rendezvous, the fused AdamW kernel, where gradients gather,
//! copies to GPUs that nobody waits for, CUDA graphs, and the float32 matrix-product precision. It is the engine PyTorch itself
//! uses.
//!
//! The learner calls the collectives and the optimizer kernel; the worker's session opens stores and groups.
//!
//! What must stay true:
//! - No call waits without a deadline: stores and groups are made with one, and it bounds each of their calls.
//! - Whatever the kernels below take on trust (contiguous memory, equal sizes, one kind, the right device) is
//!   checked on this side first, so that no argument of the public functions can reach memory it should not.
//! - After an error a group is dead; drop it, so that peers which wait for this rank notice at once.

mod error;
mod exit;
mod ffi;
mod graph;
mod group;
pub mod ops;
mod optim;
mod precision;
mod store;
mod transfer;
mod work;

pub use error::{Error, ErrorKind};
pub use exit::exit_at_once;
pub use graph::CudaGraph;
pub use group::{Group, ReduceOp, has_nccl};
pub use optim::{AdamWHyper, AdamWState, fused_adamw};
pub use precision::{Float32MatmulPrecision, set_float32_matmul_precision};
pub use store::Store;
pub use transfer::{upload, upload_into};

/// The libtorch that this was compiled against, `MAJOR.MINOR.PATCH`.
pub const LIBTORCH_VERSION: &str = env!("LIBTORCH_VERSION");

/// The result of every call of this crate.
pub type Result<T> = std::result::Result<T, Error>;
