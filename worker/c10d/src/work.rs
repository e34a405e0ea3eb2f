//! One collective, from its start to its end. Private: [`crate::Group`] starts and awaits it in one call, so no
//! tensor is ever handed back while the transport still writes to it.

use std::ffi::c_int;
use std::time::Duration;

use crate::Result;
use crate::error::{check, milliseconds};
use crate::ffi::{self, RawWork};

pub(crate) struct Work(*mut RawWork);

impl Work {
    /// Starts a collective: `start` gets the place for the handle.
    pub(crate) fn start(
        start: impl FnOnce(*mut *mut RawWork) -> c_int,
        operation: impl FnOnce() -> String,
    ) -> Result<Self> {
        let mut raw = std::ptr::null_mut();
        check(start(&raw mut raw), operation)?;
        Ok(Self(raw))
    }

    /// Awaits its end.
    pub(crate) fn wait(self, timeout: Duration, operation: impl FnOnce() -> String) -> Result<()> {
        // SAFETY: `self.0` came from the shim and lives until `drop`.
        check(unsafe { ffi::af_work_wait(self.0, milliseconds(timeout)) }, operation)
    }
}

impl Drop for Work {
    fn drop(&mut self) {
        // SAFETY: the handle came from the shim and is released once; the collective keeps its own count.
        unsafe { ffi::af_work_drop(self.0) }
    }
}
