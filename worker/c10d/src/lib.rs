//! What libtorch has and tch does not bind, and what libtorch lacks or has slower, behind one small C++ shim:
//!
//! - [`Group`] and [`Store`]: process groups and their rendezvous, which are c10d's, the engine PyTorch itself uses: Gloo
//!   on CPUs, NCCL on GPUs with feature `nccl`;
//! - [`ops`]: the model's kernels, forward and back, on CPUs; elsewhere the same by libtorch's operators;
//! - [`fused_adamw`]: libtorch's optimizer kernel;
//! - [`CudaGraph`]: work on a GPU, recorded once and launched as one; [`upload`], copies to GPUs that nobody waits for;
//! - what a process sets or ends once: the float32 matrix-product precision, [`exit_at_once`].
//!
//! The model and the engine call the kernels and graphs, the learner the collectives and the optimizer kernel as well;
//! the worker's session opens stores and groups.
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

pub use error::{Error, ErrorKind, libtorch_reason};
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
