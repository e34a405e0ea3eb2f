//! The wire and nothing else: messages and services generated from `agentfly/v1/*.proto`.
//!
//! Both sides translate at their edge (`agentfly_common::wire`); no generated type travels further in.
#![forbid(unsafe_code)]
#![allow(
    missing_docs,
    clippy::all,
    clippy::pedantic,
    reason = "generated; the proto files carry the comments"
)]

/// Version 1 of the protocol.
pub mod v1 {
    tonic::include_proto!("agentfly.v1");
}

/// Largest `Chunk.data`, bytes: well below gRPC's default limit of 4 MiB a message.
pub const CHUNK_BYTES: usize = 1 << 20;
