//! CUDA graphs: what a piece of work launches on a GPU, recorded once and launched as one from then on. The engine
//! records decode steps of small models with it, whose launches take longer than their kernels.
//!
//! What must stay true: a graph touches the memory that its work touched when it was recorded, wherever its tensors have
//! gone since. What the work made, the graph keeps; what it was given, [`CudaGraph::record`] is told to keep.

use std::ffi::c_int;

use tch::{Device, Tensor};

use crate::error::check;
use crate::ffi::{self, RawGraph};
use crate::{Error, ErrorKind, Result};

/// Recorded work of one GPU.
#[derive(Debug)]
pub struct CudaGraph {
    raw: *mut RawGraph,
    _held: Vec<Tensor>,
}

// SAFETY: the C++ object has no ties to the thread that recorded it and is used by one thread at a time: the type is not
// Sync.
unsafe impl Send for CudaGraph {}

impl CudaGraph {
    /// Records what `work` launches on `device`, without running it, and gives what `work` gave: tensors in it hold
    /// nothing before the first [`Self::replay`], and each replay writes to them anew. `held` are the tensors that the
    /// work reads or writes and does not make. `beside` is an earlier graph whose memory this one may use, too; then
    /// what one of them gives is to be read before the other one replays.
    ///
    /// The work must be the same for every replay: no wait for the device, no copy from or to the host, no memory that
    /// only it knows of. Run it once before, so that libraries have made what they make at their first use. All that
    /// runs on the device is waited for first.
    ///
    /// # Errors
    /// [`ErrorKind::Unsupported`] in a build without CUDA (feature `nccl`) or on a device that is no GPU; what the work
    /// says; what libtorch says, such as that the work did something that cannot be recorded. Nothing was run then.
    pub fn record<T, E: From<Error>>(
        device: Device,
        beside: Option<&Self>,
        held: Vec<Tensor>,
        work: impl FnOnce() -> std::result::Result<T, E>,
    ) -> std::result::Result<(Self, T), E> {
        let operation = || format!("recording a CUDA graph on {device:?}");
        let index = match device {
            Device::Cuda(index) => c_int::try_from(index).ok(),
            _ => None,
        };
        let Some(index) = index else {
            let (kind, text) = (ErrorKind::Unsupported, "only a GPU has them".to_owned());
            return Err(Error { kind, operation: operation(), text }.into());
        };
        let beside = beside.map_or(std::ptr::null_mut(), |graph| graph.raw);
        let mut raw = std::ptr::null_mut();
        // SAFETY: a live graph or null, and an out-pointer to a live local.
        check(unsafe { ffi::af_graph_begin(index, beside, &raw mut raw) }, operation)?;
        // Dropped on every way out of here, it ends the recording.
        let graph = Self { raw, _held: held };
        let made = work()?;
        // SAFETY: the graph is live.
        check(unsafe { ffi::af_graph_end(graph.raw) }, operation)?;
        Ok((graph, made))
    }

    /// Launches the recorded work on the current stream, behind what was launched there before; waits for nothing.
    ///
    /// # Errors
    /// When the GPU cannot take it.
    pub fn replay(&self) -> Result<()> {
        // SAFETY: the graph is live, and so is the memory that it touches.
        check(unsafe { ffi::af_graph_replay(self.raw) }, || "replaying a CUDA graph".to_owned())
    }
}

impl Drop for CudaGraph {
    fn drop(&mut self) {
        // SAFETY: `raw` came from the shim and is released here only; what it touches is dropped after it.
        unsafe { ffi::af_graph_drop(self.raw) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn without_a_gpu_nothing_is_recorded_and_the_work_is_not_begun() {
        // No test machine has so many GPUs.
        for device in [Device::Cpu, Device::Cuda(4000)] {
            let work = || -> Result<()> { panic!("it was begun") };
            let error = CudaGraph::record(device, None, Vec::new(), work).unwrap_err();
            assert!(error.to_string().contains(&format!("{device:?}")), "{error}");
            if device == Device::Cpu || !crate::has_nccl() {
                assert_eq!(error.kind, ErrorKind::Unsupported, "{error}");
            }
        }
    }
}
