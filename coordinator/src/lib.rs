//! The coordinator: holds the cluster and the jobs, decides, computes advantages, keeps everything on disk.
//!
//! ```text
//!  cli ─▶ commands ─▶ head ─┬─ api (gRPC) ──┐
//!              │            ├─ http         ├──▶ scheduler ──▶ core (pure)
//!              └─▶ client ──┘               │        ├──▶ journal, feed, shelf
//!                                           └────────┴──▶ recorder ──▶ store, sinks
//! ```
//! [`core`] and [`data`] know nothing of the rest. Never links libtorch.
#![forbid(unsafe_code)]

pub mod api;
pub mod cli;
pub mod client;
pub mod clock;
pub mod commands;
pub mod core;
pub mod data;
pub mod failure;
pub mod feed;
pub mod head;
pub mod http;
pub mod journal;
pub mod memory_check;
pub mod model_check;
pub mod process;
pub mod recorder;
pub mod runtime_dir;
pub mod scheduler;
pub mod shelf;
pub mod sinks;
pub mod store;
pub mod submission;
pub mod views;

/// This program's version; both sides of the wire must agree on it.
pub const VERSION: &str = env!("CARGO_PKG_VERSION");
