//! Decode steps by CUDA graphs: what a step launches up to the head is recorded, and launched as one from then on. With
//! a small model the host takes longer to launch a step's kernels than a GPU to run them.
//!
//! ```text
//! chains, one new token each ─▶ shape, rounded up ─▶ padded inputs ─▶ run (1st use) │ record (2nd) │ replay ─▶ hidden states
//! ```
//!
//! The head stays outside: one product on the true rows. Within, each graph would keep logits of its own, a hundred
//! MiB of them with a large vocabulary.
//!
//! What must stay true:
//! - a padded step gives a chain what an ordinary one does: to the bit where products do not depend on the batch;
//! - a graph holds the addresses of the cache and the weights. It is dropped with the cache's memory, and never replayed
//!   for another cache or model; weights change in place;
//! - hidden states are read before the next step: the graphs share their memory;
//! - where recording fails, steps are computed as without graphs, and one warning says why.

use std::collections::BTreeMap;

use agentfly_c10d::CudaGraph;
use agentfly_c10d::ops::{FixedStep, StepShape};
use tch::{Kind, Tensor};

use crate::model::{Attention, Decoder, ModelError};

use super::cache::pages_for;

/// Shapes kept at a time; a step of a further one is an ordinary one. A graph of a small model takes some MiB.
const MOST_SHAPES: usize = 64;

/// Where chains continue by one token each.
#[derive(Debug, Clone, Copy)]
pub(super) struct DecodeStep<'a> {
    /// The new token of each chain.
    pub(super) ids: &'a [i64],
    /// Its tokens with the new one.
    pub(super) lengths: &'a [i64],
    /// Its pages in order.
    pub(super) tables: &'a [Vec<i64>],
}

/// The shapes that came up since the cache was made, and what was recorded of them.
#[derive(Debug)]
pub(super) struct DecodeGraphs {
    /// No step is padded any more: graphs are not wanted, or recording has failed.
    off: bool,
    /// Pad steps on CPUs, too, where there is nothing to gain: tests hold padding to ordinary steps.
    on_cpus: bool,
    /// Record at a shape's second use. Tests leave it at padding.
    records: bool,
    made_for: Option<Addresses>,
    shapes: BTreeMap<StepShape, Shape>,
}

/// What graphs were recorded with: cache and weights.
type Addresses = (usize, usize);

#[derive(Debug)]
struct Shape {
    /// Before the inputs that it reads: dropped first.
    recorded: Option<(CudaGraph, Tensor)>,
    inputs: FixedStep,
}

impl DecodeGraphs {
    pub(super) fn new(enforce_eager: bool) -> Self {
        Self { off: enforce_eager, on_cpus: false, records: true, made_for: None, shapes: BTreeMap::new() }
    }

    /// Drops everything that was recorded. To be called before the cache's memory is given back.
    pub(super) fn clear(&mut self) {
        self.shapes.clear();
        self.made_for = None;
    }

    /// Hidden states `[chains, hidden]` of the new tokens. None where the step is to be computed as any other. `cache`
    /// has a last page that no chain is given.
    pub(super) fn hidden(
        &mut self,
        decoder: &Decoder,
        cache: &Tensor,
        step: DecodeStep<'_>,
    ) -> Result<Option<Tensor>, ModelError> {
        // In f32 attention reads a rectangle of all chains' pages, as wide as the longest: padding would make it wider.
        let on_gpu = decoder.device().is_cuda() && decoder.kind() != Kind::Float;
        if self.off || step.ids.is_empty() || !(self.on_cpus || on_gpu) {
            return Ok(None);
        }
        self.bind(decoder, cache)?;
        let shape = shape_of(step.lengths);
        if self.shapes.len() >= MOST_SHAPES && !self.shapes.contains_key(&shape) {
            return Ok(None);
        }
        let all = self.compute(decoder, cache, step, shape)?;
        Ok(Some(all.f_narrow(0, 0, step.ids.len() as i64)?))
    }

    /// Forgets what was recorded for another model or cache.
    fn bind(&mut self, decoder: &Decoder, cache: &Tensor) -> Result<(), ModelError> {
        let addresses = (cache.data_ptr().addr(), decoder.parameters().flat().data_ptr().addr());
        if self.made_for != Some(addresses) {
            self.clear();
            // Padding attends to it: what it holds is multiplied by 0, and must be a number.
            let _same = cache.f_get(cache.size()[0] - 1)?.f_zero_()?;
            self.made_for = Some(addresses);
        }
        Ok(())
    }

    /// Hidden states of all rows, padding included.
    fn compute(
        &mut self,
        decoder: &Decoder,
        cache: &Tensor,
        step: DecodeStep<'_>,
        shape: StepShape,
    ) -> Result<Tensor, ModelError> {
        let device = decoder.device();
        let (seen_before, mut entry) = match self.shapes.remove(&shape) {
            Some(entry) => (true, entry),
            None => {
                (false, Shape { recorded: None, inputs: FixedStep::new(shape, cache.size()[0], device)? })
            }
        };
        entry.inputs.fill(step.ids, step.lengths, step.tables)?;
        let run = |inputs: &FixedStep| {
            let attention = Attention::Paged { pages: cache, step: inputs.step() };
            decoder.hidden(inputs.ids(), inputs.positions(), attention)
        };
        // At its first use the shape may never come again; and libraries have made by the second what they need.
        if seen_before && self.records && entry.recorded.is_none() {
            let beside = self.shapes.values().find_map(|other| other.recorded.as_ref());
            let held = vec![cache.shallow_clone(), decoder.parameters().flat().shallow_clone()];
            match CudaGraph::record(device, beside.map(|(graph, _)| graph), held, || run(&entry.inputs)) {
                Ok(recorded) => {
                    tracing::debug!(?shape, "recorded a decode step");
                    entry.recorded = Some(recorded);
                }
                Err(error) => return self.give_up(&error, || run(&entry.inputs)),
            }
        }
        let hidden = match &entry.recorded {
            Some((graph, hidden)) => {
                graph.replay()?;
                hidden.shallow_clone()
            }
            None => run(&entry.inputs)?,
        };
        self.shapes.insert(shape, entry);
        Ok(hidden)
    }

    /// No graphs from now on; this step's rows are computed without.
    fn give_up(
        &mut self,
        error: &ModelError,
        run: impl FnOnce() -> Result<Tensor, ModelError>,
    ) -> Result<Tensor, ModelError> {
        tracing::warn!(
            %error,
            "decode steps cannot be recorded as CUDA graphs, and are launched kernel by kernel from now on, which is \
             slower; actor_rollout_ref.rollout.enforce_eager=True does so from the start"
        );
        self.off = true;
        self.clear();
        run()
    }
}

/// The shape that a step of chains of these lengths is padded to.
fn shape_of(lengths: &[i64]) -> StepShape {
    let pages = || lengths.iter().map(|&length| pages_for(length as usize));
    let rows = rounded(lengths.len());
    let all = pages().sum::<usize>() + (rows - lengths.len());
    StepShape { rows, pages_each: pages().max().unwrap_or(1).next_power_of_two(), pages_all: rounded(all) }
}

/// The next of 1, 2, 3, 4, 6, 8, 12, 16, 24, …: few numbers, none half as much again as it must be.
fn rounded(n: usize) -> usize {
    let power = n.next_power_of_two();
    if n <= power / 4 * 3 { power / 4 * 3 } else { power }
}

#[cfg(test)]
mod tests;
