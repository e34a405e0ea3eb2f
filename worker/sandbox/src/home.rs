//! The directory that a zygote without namespaces lives in: its programs, and one directory for each snippet.
//!
//! Its warden removes it (`python/warden.py`), also when this program is killed; what is here makes it, for the user who
//! the zygote will be.

use std::fs::{self, Permissions};
use std::io;
use std::os::unix::fs::{PermissionsExt, chown};
use std::path::{Path, PathBuf};

use tempfile::TempDir;

use crate::error::SandboxError;
use crate::python;

const PROGRAMS: &str = "programs";

/// A new directory, removed when this is dropped before [`Home::leave_to_warden`].
#[derive(Debug)]
pub(crate) struct Home(TempDir);

impl Home {
    /// Makes it below the directory for temporary files (`TMPDIR`, else `/tmp`), and writes the programs into it.
    ///
    /// # Errors
    /// [`SandboxError::System`] with the path.
    pub(crate) fn make(uid: u32, gid: u32) -> Result<Self, SandboxError> {
        let below = std::env::temp_dir();
        let made = below.canonicalize().and_then(|below| {
            let mut builder = tempfile::Builder::new();
            builder.prefix("agentfly-sandbox-").permissions(Permissions::from_mode(0o700));
            let home = builder.tempdir_in(below)?;
            fill(home.path(), uid, gid).map(|()| Self(home))
        });
        made.map_err(|source| SandboxError::System {
            what: format!("making a directory for snippets below {}", below.display()),
            source,
        })
    }

    /// The program to execute.
    pub(crate) fn warden(&self) -> PathBuf {
        self.0.path().join(PROGRAMS).join(python::WARDEN)
    }

    pub(crate) fn path(&self) -> &Path {
        self.0.path()
    }

    /// From here on the warden removes it.
    pub(crate) fn leave_to_warden(self) -> PathBuf {
        self.0.keep()
    }
}

fn fill(home: &Path, uid: u32, gid: u32) -> io::Result<()> {
    let programs = home.join(PROGRAMS);
    fs::create_dir(&programs)?;
    for (name, source) in python::PROGRAMS {
        let file = programs.join(name);
        fs::write(&file, source)?;
        chown(&file, Some(uid), Some(gid))?;
    }
    chown(&programs, Some(uid), Some(gid))?;
    chown(home, Some(uid), Some(gid))
}
