//! The operators held to libtorch's plain ones in f64, with autograd for the way back, and to their own promises: the
//! same bits whatever else is in the batch, NaN stays NaN, and misuse is an error.
//!
//! The numbers are the same in every run: a test's inputs come from its own generator.
#![allow(clippy::unwrap_used, reason = "helpers of tests fail by panicking, too")]

mod attention;
mod batch;
mod hostile;
mod linear;
mod misuse;
mod pointwise;
mod processors;
mod util;
mod vocabulary;
