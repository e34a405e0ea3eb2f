//! What a run leaves on disk, and how it is found again.
//!
//! ```text
//! runs/<project>/<experiment>/          run_dir: made, locked, resumed or moved aside
//!   config.json  summary.json  reward_curve.svg
//!   metrics.jsonl                       sinks::jsonl writes, metrics_file reads and cuts back
//!   trajectories/step_000001.jsonl.zst  trajectories
//!   checkpoints/global_step_20/         checkpoints: written beside, checksummed, renamed
//!   trace/step_000001.json              trace: where the time went
//!   logs/                               of the ranks
//! ```
//! Everything here blocks; the recorder's thread and `spawn_blocking` call it.

pub mod checkpoints;
pub mod curve;
pub mod metrics_file;
pub mod run_dir;
pub mod summary;
pub mod trace;
pub mod trajectories;

use std::io::Write;
use std::path::{Path, PathBuf};

/// A file operation that failed, with the path and what was tried.
#[derive(Debug, thiserror::Error)]
#[error("could not {what} {}", path.display())]
pub struct StoreError {
    /// What was tried.
    pub what: &'static str,
    /// On which path.
    pub path: PathBuf,
    /// Why it failed.
    #[source]
    pub source: std::io::Error,
}

/// Turns an `io::Error` into a [`StoreError`] for `path`.
pub(crate) fn on<'a>(what: &'static str, path: &'a Path) -> impl FnOnce(std::io::Error) -> StoreError + 'a {
    move |source| StoreError { what, path: path.to_owned(), source }
}

/// Writes a whole file beside `path`, syncs it and renames it into place: readers see the old or the new one.
///
/// # Errors
/// When the folder is not writable or the disk is full.
pub fn write_whole(path: &Path, bytes: &[u8]) -> Result<(), StoreError> {
    let folder = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let write = || -> std::io::Result<()> {
        let mut beside = tempfile::Builder::new().prefix(".new-").tempfile_in(folder)?;
        beside.write_all(bytes)?;
        beside.as_file().sync_all()?;
        let mode = std::os::unix::fs::PermissionsExt::from_mode(0o644);
        beside.as_file().set_permissions(mode)?;
        beside.persist(path).map_err(|e| e.error)?;
        sync_folder(folder)
    };
    write().map_err(on("write", path))
}

/// Makes a rename in `folder` last through a power cut.
pub(crate) fn sync_folder(folder: &Path) -> std::io::Result<()> {
    std::fs::File::open(folder)?.sync_all()
}

/// Bytes that an ordinary user may still write on the disk that holds `path` or its nearest existing parent.
///
/// # Errors
/// When the disk cannot be asked.
pub fn free_bytes(path: &Path) -> Result<u64, StoreError> {
    let mut there = path;
    while !there.exists() {
        match there.parent().filter(|p| !p.as_os_str().is_empty()) {
            Some(parent) => there = parent,
            None => there = Path::new("."),
        }
    }
    let disk = rustix::fs::statvfs(there).map_err(|e| on("ask for the free space of", there)(e.into()))?;
    Ok(disk.f_bavail.saturating_mul(disk.f_frsize))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_replaced_whole_and_leaves_nothing_beside() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.json");
        write_whole(&path, b"one").unwrap();
        write_whole(&path, b"two").unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), b"two");
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
        let missing = dir.path().join("none/a.json");
        assert!(write_whole(&missing, b"").unwrap_err().to_string().contains("none/a.json"));
    }

    #[test]
    fn free_space_is_asked_of_the_nearest_folder_there_is() {
        let dir = tempfile::tempdir().unwrap();
        let here = free_bytes(dir.path()).unwrap();
        let deep = free_bytes(&dir.path().join("a/b/c")).unwrap();
        assert!(here > 0 && deep > 0);
    }
}
