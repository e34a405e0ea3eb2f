//! A process group: ranks 0 to size−1 that call the same collectives in the same order. The learner sums its
//! gradients and metrics over one; the worker's session makes and, after any error, drops it.

use std::ffi::{c_int, c_void};
use std::time::Duration;

use tch::{Device, Kind, Tensor};

use crate::error::{c_string, check, milliseconds};
use crate::ffi::{self, RawGroup, RawWork};
use crate::work::Work;
use crate::{Error, Result, Store};

/// How long a call outlives the transport's own deadline, so that the transport, which knows the peer and the
/// phase, is the one to report.
const GRACE: Duration = Duration::from_secs(2);

/// How values of the ranks become one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(i32)]
pub enum ReduceOp {
    /// Their sum.
    Sum = 0,
    /// The largest.
    Max = 1,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Backend {
    Gloo,
    Nccl,
}

/// This process's place in a process group.
///
/// Every collective blocks until it is done, at most the group's deadline. `Group` is `Send` but not `Sync`:
/// all ranks must start collectives in one order, which two threads could not keep. After an error the group is
/// dead and its tensors' contents are unspecified.
#[derive(Debug)]
pub struct Group {
    raw: *mut RawGroup,
    rank: usize,
    size: usize,
    backend: Backend,
    timeout: Duration,
}

// SAFETY: a c10d backend is an atomically counted handle with its own worker threads and no ties to the thread
// that made it.
unsafe impl Send for Group {}

/// Whether this build can make NCCL groups.
#[must_use]
pub fn has_nccl() -> bool {
    cfg!(feature = "nccl")
}

impl Group {
    /// Joins a Gloo group (CPU tensors) of `size` ranks; returns when all have joined. Peers connect to this
    /// rank at `bind_host`, an address of this machine. `timeout` bounds joining and every collective.
    ///
    /// # Errors
    /// [`crate::ErrorKind::Timeout`] when not all ranks come in time.
    pub fn gloo(store: &Store, rank: usize, size: usize, bind_host: &str, timeout: Duration) -> Result<Self> {
        let operation = || format!("joining Gloo group {} as rank {rank} of {size}", store.name());
        let (c_rank, c_size) = ranks(rank, size, operation)?;
        let c_host = c_string("Gloo bind host", bind_host)?;
        let mut raw = std::ptr::null_mut();
        // SAFETY: the store is live, `c_host` lives through the call, the out-pointer is to a live local.
        let code = unsafe {
            ffi::af_group_gloo(
                store.raw(),
                c_rank,
                c_size,
                c_host.as_ptr(),
                milliseconds(timeout),
                &raw mut raw,
            )
        };
        check(code, || format!("{} at {bind_host} (deadline {timeout:?})", operation()))?;
        Ok(Self { raw, rank, size, backend: Backend::Gloo, timeout })
    }

    /// Joins an NCCL group (tensors on CUDA device `device`) of `size` ranks.
    ///
    /// # Errors
    /// [`crate::ErrorKind::Unsupported`] without feature `nccl`; otherwise as [`Group::gloo`].
    pub fn nccl(store: &Store, rank: usize, size: usize, device: usize, timeout: Duration) -> Result<Self> {
        let operation =
            || format!("joining NCCL group {} as rank {rank} of {size} on device {device}", store.name());
        let (c_rank, c_size) = ranks(rank, size, operation)?;
        let c_device =
            c_int::try_from(device).map_err(|_| Error::invalid(operation(), "no such device number"))?;
        let mut raw = std::ptr::null_mut();
        // SAFETY: the store is live and the out-pointer is to a live local.
        let code = unsafe {
            ffi::af_group_nccl(store.raw(), c_rank, c_size, c_device, milliseconds(timeout), &raw mut raw)
        };
        check(code, || format!("{} (deadline {timeout:?})", operation()))?;
        Ok(Self { raw, rank, size, backend: Backend::Nccl, timeout })
    }

    /// This process's number, from 0.
    #[must_use]
    pub fn rank(&self) -> usize {
        self.rank
    }

    /// How many ranks there are.
    #[must_use]
    pub fn size(&self) -> usize {
        self.size
    }

    /// Replaces `tensor` on every rank by the reduction of all ranks' tensors. Gloo gives every rank the same
    /// bits.
    ///
    /// # Errors
    /// On a tensor the backend cannot take, a late peer or a lost one.
    pub fn all_reduce(&self, tensor: &mut Tensor, op: ReduceOp) -> Result<()> {
        self.run(
            |out| {
                // SAFETY: group and tensor are live; `run` has checked the tensor's memory.
                unsafe { ffi::af_all_reduce(self.raw, pointer(tensor), op as c_int, out) }
            },
            &[tensor],
            || format!("all-reduce ({op:?})"),
        )
    }

    /// Replaces `tensor` on every rank by rank `root`'s.
    ///
    /// # Errors
    /// As [`Group::all_reduce`], and on a root outside the group.
    pub fn broadcast(&self, tensor: &mut Tensor, root: usize) -> Result<()> {
        let c_root = self.peer(root, "broadcast from")?;
        self.run(
            |out| {
                // SAFETY: group and tensor are live; `run` has checked the tensor's memory.
                unsafe { ffi::af_broadcast(self.raw, pointer(tensor), c_root, out) }
            },
            &[tensor],
            || format!("broadcast from rank {root}"),
        )
    }

    /// The reduction of all ranks' `input`s, of which rank r keeps the r-th of `size` equal parts in `output`.
    ///
    /// # Errors
    /// As [`Group::all_reduce`], and when the sizes do not fit.
    pub fn reduce_scatter(&self, output: &mut Tensor, input: &Tensor, op: ReduceOp) -> Result<()> {
        self.sized("reduce-scatter", input, output)?;
        self.run(
            |out| {
                // SAFETY: group and tensors are live; sizes and memory are checked.
                unsafe { ffi::af_reduce_scatter(self.raw, pointer(output), pointer(input), op as c_int, out) }
            },
            &[output, input],
            || format!("reduce-scatter ({op:?})"),
        )
    }

    /// Sends `outgoing` to rank `to` while `incoming` is filled with what rank `from` sends, both under `tag`: the
    /// two directions of a connection at the same time. A round in which every rank calls this with its own
    /// neighbours cannot lock up.
    ///
    /// # Errors
    /// As [`Group::all_reduce`], and on a rank outside the group or this one itself.
    pub fn exchange(
        &self,
        outgoing: &Tensor,
        to: usize,
        incoming: &mut Tensor,
        from: usize,
        tag: i32,
    ) -> Result<()> {
        let (c_to, c_from) = (self.other(to, "send to")?, self.other(from, "receive from")?);
        let sending = || self.describe(&format!("send of {:?} to rank {to} (tag {tag})", outgoing.size()));
        let receiving = || self.describe(&format!("receive from rank {from} (tag {tag})"));
        self.fits(outgoing).map_err(|text| Error::invalid(sending(), text))?;
        self.fits(incoming).map_err(|text| Error::invalid(receiving(), text))?;
        let deadline = self.timeout.saturating_add(GRACE);
        // SAFETY: group and tensors are live, and their memory is checked.
        let receive = Work::start(
            |out| unsafe { ffi::af_recv(self.raw, pointer(incoming), c_from, tag, out) },
            receiving,
        )?;
        // SAFETY: as above.
        let sent =
            Work::start(|out| unsafe { ffi::af_send(self.raw, pointer(outgoing), c_to, tag, out) }, sending)
                .and_then(|send| send.wait(deadline, sending));
        // Whatever became of the sending: nothing may write to `incoming` once this returns.
        let received = receive.wait(deadline, receiving);
        sent.and(received)
    }

    /// Checks the tensors' memory, starts the collective and awaits it.
    fn run(
        &self,
        start: impl FnOnce(*mut *mut RawWork) -> c_int,
        tensors: &[&Tensor],
        operation: impl Fn() -> String,
    ) -> Result<()> {
        let of = |t: &&Tensor| format!(" of {:?} {:?}", t.size(), t.f_kind());
        let describe =
            || self.describe(&format!("{}{}", operation(), tensors.first().map(of).unwrap_or_default()));
        for tensor in tensors {
            self.fits(tensor).map_err(|text| Error::invalid(describe(), text))?;
        }
        Work::start(start, describe)?.wait(self.timeout.saturating_add(GRACE), describe)
    }

    /// What the transports take on trust: they read `numel` elements from the first one's address.
    fn fits(&self, tensor: &Tensor) -> std::result::Result<(), String> {
        if !tensor.defined() {
            return Err("the tensor is undefined".to_owned());
        }
        if tensor.is_sparse() || !tensor.is_contiguous() {
            return Err(format!(
                "collectives need contiguous memory, and a tensor of sizes {:?} has strides {:?}: call \
                 contiguous() and copy back",
                tensor.size(),
                tensor.stride()
            ));
        }
        match (self.backend, tensor.device()) {
            (Backend::Gloo, Device::Cpu) | (Backend::Nccl, Device::Cuda(_)) => Ok(()),
            (backend, device) => Err(format!("a {backend:?} group cannot move a tensor on {device:?}")),
        }
    }

    fn sized(&self, operation: &str, whole: &Tensor, part: &Tensor) -> Result<()> {
        let fits = |t: &Tensor| self.fits(t).map_err(|text| Error::invalid(self.describe(operation), text));
        fits(whole)?;
        fits(part)?;
        let kinds: (Kind, Kind) = (whole.kind(), part.kind());
        if kinds.0 == kinds.1 && whole.numel() == part.numel() * self.size {
            return Ok(());
        }
        let text = format!(
            "the whole has {} elements of {:?}, a part {} of {:?}: it must be {} times as many of one kind",
            whole.numel(),
            kinds.0,
            part.numel(),
            kinds.1,
            self.size
        );
        Err(Error::invalid(self.describe(operation), text))
    }

    fn peer(&self, rank: usize, operation: &str) -> Result<c_int> {
        if rank < self.size {
            return Ok(c_int::try_from(rank).expect("group sizes are c_ints, and the rank is below the size"));
        }
        let text = format!("the group's ranks are 0 to {}", self.size - 1);
        Err(Error::invalid(self.describe(&format!("{operation} rank {rank}")), text))
    }

    fn other(&self, rank: usize, operation: &str) -> Result<c_int> {
        if rank == self.rank {
            let text = "a rank does not talk to itself".to_owned();
            return Err(Error::invalid(self.describe(&format!("{operation} rank {rank}")), text));
        }
        self.peer(rank, operation)
    }

    fn describe(&self, operation: &str) -> String {
        format!("{operation} on rank {} of {} (deadline {:?})", self.rank, self.size, self.timeout)
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        // SAFETY: `raw` came from the shim and is released here only.
        unsafe { ffi::af_group_drop(self.raw) }
    }
}

/// tch's handle is a pointer to a `torch::Tensor`, which is what the shim takes. The object is C++'s and changes
/// through C++ alone, so `const` says nothing about it.
pub(crate) fn pointer(tensor: &Tensor) -> *mut c_void {
    tensor.as_ptr().cast_mut().cast::<c_void>()
}

fn ranks(rank: usize, size: usize, operation: impl Fn() -> String) -> Result<(c_int, c_int)> {
    match (c_int::try_from(rank), c_int::try_from(size)) {
        (Ok(r), Ok(s)) if r < s => Ok((r, s)),
        _ => Err(Error::invalid(operation(), "the rank must be below the size")),
    }
}
