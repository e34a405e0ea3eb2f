//! The runtime folder: where a running head says how to reach it.
//!
//! `AGENTFLY_RUNTIME_DIR`, else `$XDG_RUNTIME_DIR/agentfly`, else `/tmp/agentfly-<uid>`: ours alone (0700, owner
//! checked), for `head.json` holds the token. Written by the head, read by every other command.
//!
//! # Invariants
//! - `head.json` is complete or absent: it is written beside and renamed.
//! - A head removes only the file that names its own pid.

use std::fs::{self, OpenOptions};
use std::io::Write;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::process;

/// How to reach a running head.
#[derive(Clone, PartialEq, Serialize, Deserialize)]
pub struct HeadFile {
    /// Its process.
    pub pid: u32,
    /// gRPC, `host:port`.
    pub address: String,
    /// HTTP, `host:port`.
    pub http_address: String,
    /// What every call must show. Never logged.
    pub token: String,
    /// Its crate version.
    pub version: String,
    /// It lives for one `coordinator train` and takes no other jobs.
    pub for_one_job: bool,
}

impl std::fmt::Debug for HeadFile {
    /// Without the token: what is printed ends up in logs.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("HeadFile")
            .field("pid", &self.pid)
            .field("address", &self.address)
            .field("http_address", &self.http_address)
            .field("version", &self.version)
            .field("for_one_job", &self.for_one_job)
            .finish_non_exhaustive()
    }
}

/// Why the runtime folder cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum RuntimeDirError {
    /// It belongs to someone else.
    #[error(
        "the runtime folder {} belongs to user {owner}, not to you ({me}); set AGENTFLY_RUNTIME_DIR to a folder of yours",
        path.display()
    )]
    Owner {
        /// The folder.
        path: PathBuf,
        /// Its owner.
        owner: u32,
        /// This process's user.
        me: u32,
    },
    /// It is not a folder.
    #[error("the runtime folder {} is not a folder; set AGENTFLY_RUNTIME_DIR to one", path.display())]
    NotAFolder {
        /// The path.
        path: PathBuf,
    },
    /// Reading or writing failed.
    #[error("could not {what} {}", path.display())]
    Io {
        /// What was tried.
        what: &'static str,
        /// On which path.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// `head.json` is no head file.
    #[error("{} is damaged; if no head runs, remove it", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        #[source]
        source: serde_json::Error,
    },
}

/// The runtime folder of this user, made and checked.
#[derive(Debug, Clone)]
pub struct RuntimeDir(PathBuf);

impl RuntimeDir {
    /// Opens the folder that the environment names.
    ///
    /// # Errors
    /// When it cannot be made, is no folder, or belongs to another user.
    pub fn from_environment() -> Result<Self, RuntimeDirError> {
        let named = std::env::var_os("AGENTFLY_RUNTIME_DIR").map(PathBuf::from);
        let session = std::env::var_os("XDG_RUNTIME_DIR").map(|dir| PathBuf::from(dir).join("agentfly"));
        let shared = || PathBuf::from(format!("/tmp/agentfly-{}", rustix::process::getuid().as_raw()));
        Self::open(&named.or(session).unwrap_or_else(shared))
    }

    /// Opens `path`, making it (0700) when absent.
    ///
    /// # Errors
    /// As [`Self::from_environment`].
    pub fn open(path: &Path) -> Result<Self, RuntimeDirError> {
        let io = |what| {
            let path = path.to_owned();
            move |source| RuntimeDirError::Io { what, path, source }
        };
        if let Err(source) = fs::DirBuilder::new().recursive(true).mode(0o700).create(path) {
            return match fs::symlink_metadata(path) {
                Ok(found) if !found.is_dir() => Err(RuntimeDirError::NotAFolder { path: path.to_owned() }),
                _ => Err(io("make the runtime folder")(source)),
            };
        }
        let found = fs::symlink_metadata(path).map_err(io("look at"))?;
        let me = rustix::process::geteuid().as_raw();
        if !found.is_dir() {
            return Err(RuntimeDirError::NotAFolder { path: path.to_owned() });
        }
        if found.uid() != me {
            return Err(RuntimeDirError::Owner { path: path.to_owned(), owner: found.uid(), me });
        }
        if found.permissions().mode() & 0o077 != 0 {
            fs::set_permissions(path, fs::Permissions::from_mode(0o700)).map_err(io("close to others"))?;
        }
        Ok(Self(path.to_owned()))
    }

    /// The folder.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.0
    }

    fn head_path(&self) -> PathBuf {
        self.0.join("head.json")
    }

    /// What `head.json` says, alive or not.
    ///
    /// # Errors
    /// When the file cannot be read or is damaged.
    pub fn read_head(&self) -> Result<Option<HeadFile>, RuntimeDirError> {
        let path = self.head_path();
        let text = match fs::read_to_string(&path) {
            Ok(text) => text,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(source) => {
                return Err(RuntimeDirError::Io { what: "read", path, source });
            }
        };
        serde_json::from_str(&text).map(Some).map_err(|source| RuntimeDirError::Damaged { path, source })
    }

    /// The running head; a `head.json` whose process is gone counts as none.
    ///
    /// # Errors
    /// As [`Self::read_head`].
    pub fn running_head(&self) -> Result<Option<HeadFile>, RuntimeDirError> {
        Ok(self.read_head()?.filter(|head| process::is_alive(head.pid)))
    }

    /// Writes `head.json` (0600) beside and renames it into place.
    ///
    /// # Errors
    /// When the folder is not writable.
    pub fn write_head(&self, head: &HeadFile) -> Result<(), RuntimeDirError> {
        let beside = self.0.join(format!("head.json.{}", head.pid));
        let write = || -> std::io::Result<()> {
            let mut file =
                OpenOptions::new().create(true).write(true).truncate(true).mode(0o600).open(&beside)?;
            file.write_all(&serde_json::to_vec_pretty(head)?)?;
            file.sync_all()?;
            fs::rename(&beside, self.head_path())
        };
        write().map_err(|source| RuntimeDirError::Io { what: "write", path: self.head_path(), source })
    }

    /// Removes `head.json` if it names `pid`.
    ///
    /// # Errors
    /// When it is there and cannot be removed.
    pub fn remove_head(&self, pid: u32) -> Result<(), RuntimeDirError> {
        let path = self.head_path();
        if !matches!(self.read_head(), Ok(Some(head)) if head.pid == pid) {
            return Ok(());
        }
        match fs::remove_file(&path) {
            Err(source) if source.kind() != std::io::ErrorKind::NotFound => {
                Err(RuntimeDirError::Io { what: "remove", path, source })
            }
            _ => Ok(()),
        }
    }
}

/// A fresh token: 256 random bits from the operating system, as hex.
#[must_use]
pub fn new_token() -> String {
    hex::encode(rand::random::<[u8; 32]>())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn head(pid: u32) -> HeadFile {
        HeadFile {
            pid,
            address: "127.0.0.1:6379".into(),
            http_address: "127.0.0.1:8265".into(),
            token: new_token(),
            version: "0".into(),
            for_one_job: false,
        }
    }

    #[test]
    fn the_folder_and_the_file_are_ours_alone() {
        let parent = tempfile::tempdir().unwrap();
        let path = parent.path().join("a/b");
        fs::create_dir_all(&path).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
        let dir = RuntimeDir::open(&path).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o777, 0o700);
        dir.write_head(&head(1)).unwrap();
        assert_eq!(fs::metadata(dir.head_path()).unwrap().mode() & 0o777, 0o600);
    }

    #[test]
    fn a_head_file_prints_without_the_token() {
        let head = head(1);
        let printed = format!("{head:?}");
        assert!(printed.contains(&head.address) && !printed.contains(&head.token), "{printed}");
    }

    #[test]
    fn a_head_that_is_gone_counts_as_none_and_removes_only_its_own_file() {
        let parent = tempfile::tempdir().unwrap();
        let dir = RuntimeDir::open(parent.path()).unwrap();
        assert_eq!(dir.running_head().unwrap(), None);
        let mut gone = std::process::Command::new("true").spawn().unwrap();
        gone.wait().unwrap();
        dir.write_head(&head(gone.id())).unwrap();
        assert_eq!(dir.running_head().unwrap(), None);
        let me = head(std::process::id());
        dir.write_head(&me).unwrap();
        dir.remove_head(gone.id()).unwrap();
        assert_eq!(dir.running_head().unwrap(), Some(me.clone()));
        dir.remove_head(me.pid).unwrap();
        assert_eq!(dir.read_head().unwrap(), None);
    }

    #[test]
    fn a_file_in_the_way_is_named() {
        let parent = tempfile::tempdir().unwrap();
        let path = parent.path().join("file");
        fs::write(&path, "x").unwrap();
        let error = RuntimeDir::open(&path).unwrap_err().to_string();
        assert!(error.contains("is not a folder") && error.contains("AGENTFLY_RUNTIME_DIR"), "{error}");
    }

    #[test]
    fn a_damaged_file_is_named() {
        let parent = tempfile::tempdir().unwrap();
        let dir = RuntimeDir::open(parent.path()).unwrap();
        fs::write(dir.head_path(), "{").unwrap();
        assert!(dir.running_head().unwrap_err().to_string().contains("head.json is damaged"));
    }
}
