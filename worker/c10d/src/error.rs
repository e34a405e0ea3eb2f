//! What can go wrong below, by kind, with libtorch's own words. Made by [`check`] after every shim call.

use std::ffi::{CStr, CString, c_int};

use crate::{Result, ffi};

/// What a caller can decide by.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ErrorKind {
    /// The deadline passed: a peer is late, hung, or in another collective.
    Timeout,
    /// A connection was refused, reset or closed: a peer is gone.
    Network,
    /// The store failed.
    Store,
    /// The collective backend failed.
    Backend,
    /// This build or machine cannot do it.
    Unsupported,
    /// An argument that would have corrupted memory or could never work.
    InvalidArgument,
    /// Anything else libtorch throws.
    Other,
}

/// A failed call: what was attempted, of which kind the failure is, and libtorch's text.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{operation} failed ({kind:?}): {text}")]
pub struct Error {
    /// Of which kind.
    pub kind: ErrorKind,
    /// What was attempted, with its values.
    pub operation: String,
    /// Why it failed.
    pub text: String,
}

impl Error {
    pub(crate) fn invalid(operation: impl Into<String>, text: impl Into<String>) -> Self {
        Self { kind: ErrorKind::InvalidArgument, operation: operation.into(), text: text.into() }
    }

    /// What one of tch's own calls failed with.
    pub(crate) fn of_libtorch(operation: impl Into<String>, error: &tch::TchError) -> Self {
        Self { kind: ErrorKind::Other, operation: operation.into(), text: libtorch_reason(error) }
    }
}

/// Why one of tch's own calls failed, in libtorch's words: one line, without tch's name for such errors before it and
/// the C++ backtrace behind it.
#[must_use]
pub fn libtorch_reason(error: &tch::TchError) -> String {
    let text = error.to_string();
    let text = text.strip_prefix("Internal torch error: ").unwrap_or(&text);
    text.lines().next().unwrap_or("no reason given").to_owned()
}

/// Turns a shim code into a result; `operation` is only rendered when it failed.
pub(crate) fn check(code: c_int, operation: impl FnOnce() -> String) -> Result<()> {
    let kind = match code {
        0 => return Ok(()),
        2 => ErrorKind::Timeout,
        3 => ErrorKind::Network,
        4 => ErrorKind::Store,
        5 => ErrorKind::Backend,
        6 => ErrorKind::Unsupported,
        _ => ErrorKind::Other,
    };
    // SAFETY: the shim returns the NUL-terminated text of this thread's last error, which stays valid until
    // this thread's next failing call; it is copied before that.
    let text = unsafe { CStr::from_ptr(ffi::af_last_error()) }.to_string_lossy().into_owned();
    Err(Error { kind, operation: operation(), text })
}

/// A C string, or an error that shows the text with the NUL in it.
pub(crate) fn c_string(what: &str, text: &str) -> Result<CString> {
    CString::new(text).map_err(|e| {
        let at = e.nul_position();
        Error::invalid(format!("{what} {text:?}"), format!("it holds a NUL at byte {at}"))
    })
}

/// Milliseconds for the shim: at least one, since it reads zero as "for ever".
pub(crate) fn milliseconds(duration: std::time::Duration) -> i64 {
    i64::try_from(duration.as_millis()).unwrap_or(i64::MAX / 4).clamp(1, i64::MAX / 4)
}

#[cfg(test)]
mod tests {
    use tch::Tensor;

    use super::*;

    #[test]
    fn libtorchs_reason_is_its_first_line_and_nothing_of_tchs() {
        let error = Tensor::from_slice(&[1.0, 2.0]).f_view([7]).unwrap_err();
        assert!(error.to_string().lines().count() > 1, "a trace that is to be cut off: {error}");
        let told = Error::of_libtorch("a view", &error).to_string();
        assert_eq!(told, "a view failed (Other): shape '[7]' is invalid for input of size 2");
    }
}
