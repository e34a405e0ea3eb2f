//! One process at a time fetches a model into a cache; the others wait as long as it gets on.

use std::fs::{File, TryLockError};
use std::path::Path;
use std::sync::mpsc;
use std::time::{Duration, Instant};

use crate::error::HubError;

/// How often a waiting process looks whether the other gets on.
const LOOK_EVERY: Duration = Duration::from_millis(500);

/// Holds the lock until dropped; the kernel gives it back when the process ends, however it ends.
#[derive(Debug)]
pub(crate) struct Lock {
    _file: File,
}

/// Takes the lock of a model's folder in the cache. While another process has it, waits as long as `fetched` (the bytes
/// it has brought) changes at least every `patience`.
pub(crate) fn lock(
    path: &Path,
    name: &str,
    patience: Duration,
    fetched: impl Fn() -> u64,
) -> Result<Lock, HubError> {
    let file = File::options().create(true).append(true).open(path);
    let file = file.map_err(|e| HubError::io("cannot open", path, e))?;
    match file.try_lock() {
        Ok(()) => return Ok(Lock { _file: file }),
        Err(TryLockError::WouldBlock) => {}
        Err(TryLockError::Error(e)) => return Err(HubError::io("cannot lock", path, e)),
    }
    eprintln!("another process is fetching {name}: waiting for it");
    // The kernel wakes this thread; should it never do so, the thread ends with the process.
    let (locked, waiting) = mpsc::sync_channel(1);
    std::thread::spawn(move || locked.send(file.lock().map(|()| file)));
    let (mut bytes, mut changed) = (fetched(), Instant::now());
    loop {
        match waiting.recv_timeout(LOOK_EVERY) {
            Ok(Ok(file)) => return Ok(Lock { _file: file }),
            Ok(Err(e)) => return Err(HubError::io("cannot lock", path, e)),
            Err(_) if fetched() != bytes => (bytes, changed) = (fetched(), Instant::now()),
            Err(_) if changed.elapsed() < patience => {}
            Err(_) => {
                let (name, lock) = (name.to_owned(), path.to_owned());
                return Err(HubError::Locked { name, lock, seconds: patience.as_secs() });
            }
        }
    }
}
