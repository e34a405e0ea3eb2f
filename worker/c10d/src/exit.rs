//! Leaving a process while libtorch still computes on another thread.
//!
//! A normal exit runs the destructors of libtorch's globals under that thread's feet, which ends in a
//! segmentation fault. Called by a rank that was told to stop; everything it must say is said by then.

use std::ffi::c_int;

unsafe extern "C" {
    fn _exit(code: c_int) -> !;
}

/// Ends the process at once: no destructor, no exit handler. Output that is still buffered is lost.
pub fn exit_at_once(code: u8) -> ! {
    // SAFETY: `_exit` is always safe to call: it takes no pointer and never returns.
    unsafe { _exit(c_int::from(code)) }
}
