//! The system from outside: real processes on free ports, real sockets, real files.
//!
//! Used by the stories in `tests/tests/`. Nothing here reaches into the programs it starts.
#![forbid(unsafe_code)]

pub mod cluster;
pub mod hub;
pub mod job;
pub mod trace;
pub mod tree;
