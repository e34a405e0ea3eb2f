//! The key-value store over TCP by which ranks find each other. The session of the first rank serves it; every
//! rank opens its own client and makes a [`crate::Group`] from it.
//!
//! A group's ranks must share a prefix that no earlier group used ([`Store::with_prefix`]): a re-formed group
//! would otherwise read the dead one's addresses.

use std::ffi::c_int;
use std::time::Duration;

use crate::error::{c_string, check, milliseconds};
use crate::ffi::{self, RawStore};
use crate::{Error, Result};

/// A client of a TCP store, and possibly its server.
///
/// It may be shared between threads: c10d's client lets one request through at a time. A [`Store::get`] that
/// waits holds the client meanwhile, so a thread that is to *set* the awaited key needs a client of its own.
#[derive(Debug)]
pub struct Store {
    raw: *mut RawStore,
    name: String,
    timeout: Duration,
}

// SAFETY: a c10d store is an atomically counted handle whose client socket belongs to no thread.
unsafe impl Send for Store {}
// SAFETY: TCPStore takes its operation lock around every request of one client, PrefixStore only joins strings
// and forwards; neither is changed through `&Store` otherwise.
unsafe impl Sync for Store {}

impl Store {
    /// Serves a store on `host` and joins it. Port 0 takes a free one; the second value is the port taken.
    /// `timeout` bounds every later call.
    ///
    /// # Errors
    /// [`crate::ErrorKind::Network`] when the port is taken.
    pub fn serve(host: &str, port: u16, timeout: Duration) -> Result<(Self, u16)> {
        Self::tcp(host, port, true, timeout)
    }

    /// Joins the store served at `host:port`, waiting up to `timeout` for it to answer; `timeout` also bounds
    /// every later call.
    ///
    /// # Errors
    /// [`crate::ErrorKind::Timeout`] or [`crate::ErrorKind::Network`] when nothing answers there.
    pub fn connect(host: &str, port: u16, timeout: Duration) -> Result<Self> {
        if port == 0 {
            return Err(Error::invalid(format!("joining the store at {host}:0"), "port 0 names no server"));
        }
        Self::tcp(host, port, false, timeout).map(|(store, _)| store)
    }

    fn tcp(host: &str, port: u16, server: bool, timeout: Duration) -> Result<(Self, u16)> {
        let name = format!("{host}:{port}");
        let c_host = c_string("store host", host)?;
        let (mut raw, mut bound) = (std::ptr::null_mut(), 0);
        // SAFETY: `c_host` lives through the call, and both out-pointers are to live locals.
        let code = unsafe {
            ffi::af_store_tcp(
                c_host.as_ptr(),
                port,
                c_int::from(server),
                milliseconds(timeout),
                &raw mut raw,
                &raw mut bound,
            )
        };
        let verb = if server { "serving" } else { "joining" };
        check(code, || format!("{verb} the store at {name} (deadline {timeout:?})"))?;
        Ok((Self { raw, name: format!("{host}:{bound}"), timeout }, bound))
    }

    /// The same store with `prefix/` before every key: a name space of its own.
    ///
    /// # Errors
    /// When the prefix holds a NUL.
    pub fn with_prefix(&self, prefix: &str) -> Result<Self> {
        let c_prefix = c_string("store prefix", prefix)?;
        let mut raw = std::ptr::null_mut();
        // SAFETY: `self.raw` is a live store (only `drop` ends it), the rest are live locals.
        let code = unsafe { ffi::af_store_prefix(self.raw, c_prefix.as_ptr(), &raw mut raw) };
        let name = format!("{}/{prefix}", self.name);
        check(code, || format!("opening {name}"))?;
        Ok(Self { raw, name, timeout: self.timeout })
    }

    /// Sets `key`.
    ///
    /// # Errors
    /// When the server is gone.
    pub fn set(&self, key: &str, value: &[u8]) -> Result<()> {
        let c_key = c_string("store key", key)?;
        // SAFETY: the store is live, and pointer and length describe one live slice that the shim copies.
        let code = unsafe { ffi::af_store_set(self.raw, c_key.as_ptr(), value.as_ptr(), value.len()) };
        check(code, || format!("setting {key:?} ({} bytes) in store {}", value.len(), self.name))
    }

    /// The value of `key`, waiting for somebody to set it.
    ///
    /// # Errors
    /// [`crate::ErrorKind::Timeout`], naming the key, when nobody does within the store's deadline.
    pub fn get(&self, key: &str) -> Result<Vec<u8>> {
        let c_key = c_string("store key", key)?;
        let (mut bytes, mut len) = (std::ptr::null_mut(), 0);
        // SAFETY: the store is live and the out-pointers are to live locals.
        let code = unsafe { ffi::af_store_get(self.raw, c_key.as_ptr(), &raw mut bytes, &raw mut len) };
        check(code, || format!("waiting {:?} for {key:?} in store {}", self.timeout, self.name))?;
        // SAFETY: on success the shim gives `len` initialised bytes that are this caller's alone.
        let value = unsafe { std::slice::from_raw_parts(bytes, len) }.to_vec();
        // SAFETY: `bytes` came from the shim, is released once, and is not used again.
        unsafe { ffi::af_bytes_drop(bytes) };
        Ok(value)
    }

    /// Adds to the counter `key` (0 at first) and gives the sum.
    ///
    /// # Errors
    /// When the server is gone.
    pub fn add(&self, key: &str, delta: i64) -> Result<i64> {
        let c_key = c_string("store key", key)?;
        let mut sum = 0;
        // SAFETY: the store is live and the out-pointer is to a live local.
        let code = unsafe { ffi::af_store_add(self.raw, c_key.as_ptr(), delta, &raw mut sum) };
        check(code, || format!("adding {delta} to {key:?} in store {}", self.name))?;
        Ok(sum)
    }

    pub(crate) fn raw(&self) -> *mut RawStore {
        self.raw
    }

    pub(crate) fn name(&self) -> &str {
        &self.name
    }
}

impl Drop for Store {
    fn drop(&mut self) {
        // SAFETY: `raw` came from the shim and is released here only; groups hold their own count of the store.
        unsafe { ffi::af_store_drop(self.raw) }
    }
}
