//! What both sides of the wire must agree on: ids, trajectories, sampling, configuration, names of metrics.
//!
//! Used by the coordinator, the worker and the tests. No server, no libtorch, no file is opened here except
//! configuration files and model directories that the user named, and what the kernel says of this machine.
#![forbid(unsafe_code)]

pub mod batch;
pub mod config;
pub mod error;
pub mod ids;
pub mod machine;
pub mod model_dir;
pub mod planner;
pub mod row;
pub mod sampling;
pub mod secret;
pub mod seed;
pub mod shutdown;
pub mod telemetry;
pub mod trajectory;
pub mod wire;
