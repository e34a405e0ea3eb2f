//! The worker: a node that joins a coordinator, and the ranks that do the work, one process per device.
//!
//! ```text
//!  coordinator ◀──NodeSession── node ──spawns, watches──▶ rank (one per device and job)
//!       ▲ ▲                                                │ device thread: model, engine, learner
//!       │ └───────────────RankSession──────────────────────┤ chains: generate ⇄ sandbox ─▶ reward
//!       └─────────────────Upload / FetchTrainShard─────────┘
//! ```
//! The node holds no model, so that it stays small and sees a rank's death; a rank holds one device and dies
//! with its node.
#![forbid(unsafe_code)]

pub mod cli;
pub mod commands;
pub mod connection;
pub mod gpu;
pub mod node;
pub mod process;
pub mod rank;
