//! Finds what the jail must hold for one Python interpreter: its program, its standard library, its packages.
//!
//! Called once when a pool starts. An interpreter of the system is reached through the jail's `/usr`; any other one
//! (pyenv, uv, a home directory with mode 0700) is bound to `/opt/python` while the supervisor still has the right
//! to reach it, so that no directory above it becomes visible. Only the program and its `lib` are bound, never the
//! prefix: that may be somebody's home.

use std::io::Read;
use std::path::{Path, PathBuf};

use crate::error::SandboxError;

const PREFIX_IN_JAIL: &str = "/opt/python";
const PACKAGES_IN_JAIL: &str = "/opt/packages";

/// An interpreter as the jail sees it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Interpreter {
    /// The program's path in the jail.
    pub(crate) program: String,
    /// What to bind read-only beside the system's directories: (path on the host without symlinks, path in the jail).
    pub(crate) binds: Vec<(PathBuf, String)>,
    /// Where its shared library may lie, if not in the system's directories.
    pub(crate) library_path: Option<String>,
    /// The packages of its virtual environment, in the jail.
    pub(crate) packages: Option<String>,
}

impl Interpreter {
    /// Looks at `python`: `bin/python` of a virtual environment, or an interpreter itself.
    ///
    /// # Errors
    /// [`SandboxError::Interpreter`] if it is missing, out of reach, a wrapper script or incomplete.
    pub(crate) fn find(python: &Path) -> Result<Self, SandboxError> {
        let fault = |reason: String| SandboxError::Interpreter { path: python.to_owned(), reason };
        let program = python.canonicalize().map_err(|e| {
            fault(format!("{e}; make the environment with `make setup`, or name another interpreter"))
        })?;
        require_binary(&program).map_err(fault)?;
        let name = program.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
        let prefix = program.parent().and_then(Path::parent).unwrap_or(Path::new("/"));
        let mut binds = Vec::new();
        let system = program.starts_with("/usr");
        if !system {
            let library = prefix.join("lib");
            if !holds_standard_library(&library) {
                return Err(fault(format!(
                    "{} holds no python3.*/os.py, so its standard library cannot be found",
                    library.display()
                )));
            }
            binds.push((program.clone(), format!("{PREFIX_IN_JAIL}/bin/{name}")));
            let library = library.canonicalize().map_err(|e| fault(format!("its lib directory: {e}")))?;
            binds.push((library, format!("{PREFIX_IN_JAIL}/lib")));
        }
        let packages = packages_of(python).map_err(fault)?.map(|packages| {
            binds.push((packages, PACKAGES_IN_JAIL.to_owned()));
            PACKAGES_IN_JAIL.to_owned()
        });
        Ok(Self {
            program: if system {
                program.to_string_lossy().into_owned()
            } else {
                format!("{PREFIX_IN_JAIL}/bin/{name}")
            },
            binds,
            library_path: (!system).then(|| format!("{PREFIX_IN_JAIL}/lib")),
            packages,
        })
    }

    /// The same without a jail: each path as the node has it.
    pub(crate) fn on_the_node(&self) -> Self {
        let of_node = |in_jail: &String| {
            let bound = self.binds.iter().find(|(_, at)| at == in_jail);
            bound.map_or_else(|| in_jail.clone(), |(path, _)| path.to_string_lossy().into_owned())
        };
        Self {
            program: of_node(&self.program),
            binds: self.binds.clone(),
            library_path: self.library_path.as_ref().map(of_node),
            packages: self.packages.as_ref().map(of_node),
        }
    }
}

/// A version manager's shim is a shell script that would not work in the jail.
fn require_binary(program: &Path) -> Result<(), String> {
    let mut magic = [0_u8; 4];
    let read = std::fs::File::open(program).and_then(|mut file| file.read_exact(&mut magic));
    match read {
        Ok(()) if magic == *b"\x7fELF" => Ok(()),
        Ok(()) => Err("is a script around an interpreter; name the interpreter itself, as printed by \
                       python3 -c 'import os, sys; print(os.path.realpath(sys.executable))'"
            .into()),
        Err(e) => Err(format!(
            "cannot be read ({e}); name an interpreter that this user can reach, such as /usr/bin/python3"
        )),
    }
}

fn holds_standard_library(library: &Path) -> bool {
    subdirectories(library).iter().any(|d| is_python_directory(d) && d.join("os.py").is_file())
}

/// The `site-packages` of the virtual environment that `python` belongs to, if it belongs to one.
fn packages_of(python: &Path) -> Result<Option<PathBuf>, String> {
    let Some(root) = python.parent().and_then(Path::parent).filter(|r| r.join("pyvenv.cfg").is_file()) else {
        return Ok(None);
    };
    let found: Vec<_> = subdirectories(&root.join("lib"))
        .into_iter()
        .filter(|d| is_python_directory(d))
        .map(|d| d.join("site-packages"))
        .filter(|d| d.is_dir())
        .collect();
    match found.as_slice() {
        [one] => one.canonicalize().map(Some).map_err(|e| format!("{}: {e}", one.display())),
        _ => Err(format!(
            "its environment {} has {} lib/python3.*/site-packages instead of one; remove it and run `make setup`",
            root.display(),
            found.len()
        )),
    }
}

fn is_python_directory(directory: &Path) -> bool {
    directory.file_name().is_some_and(|n| n.to_string_lossy().starts_with("python3."))
}

fn subdirectories(directory: &Path) -> Vec<PathBuf> {
    let Ok(entries) = std::fs::read_dir(directory) else {
        return Vec::new();
    };
    entries.flatten().map(|e| e.path()).filter(|p| p.is_dir()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    /// A directory of this test alone, removed at its end.
    struct Scratch(PathBuf);

    impl Scratch {
        fn new(name: &str) -> Self {
            let path = std::env::temp_dir().join(format!("agentfly-sandbox-{name}-{}", std::process::id()));
            fs::create_dir_all(&path).expect("temporary directory");
            Self(path.canonicalize().expect("exists"))
        }

        fn file(&self, name: &str, content: &[u8]) -> PathBuf {
            let path = self.0.join(name);
            fs::create_dir_all(path.parent().expect("has a parent")).expect("directory");
            fs::write(&path, content).expect("file");
            path
        }
    }

    impl Drop for Scratch {
        fn drop(&mut self) {
            let _ = fs::remove_dir_all(&self.0);
        }
    }

    #[test]
    fn an_environment_on_a_private_interpreter_binds_only_program_library_and_packages() {
        let scratch = Scratch::new("venv");
        let base = scratch.file("home/bin/python3.12", b"\x7fELF...");
        scratch.file("home/lib/python3.12/os.py", b"");
        scratch.file("home/.ssh/id_rsa", b"secret");
        scratch.file("venv/pyvenv.cfg", b"");
        scratch.file("venv/lib/python3.12/site-packages/numpy/__init__.py", b"");
        fs::create_dir_all(scratch.0.join("venv/bin")).expect("directory");
        let python = scratch.0.join("venv/bin/python");
        std::os::unix::fs::symlink(&base, &python).expect("symlink");

        let found = Interpreter::find(&python).expect("usable");
        assert_eq!(found.program, "/opt/python/bin/python3.12");
        assert_eq!(
            found.binds,
            [
                (base, "/opt/python/bin/python3.12".to_owned()),
                (scratch.0.join("home/lib"), "/opt/python/lib".to_owned()),
                (scratch.0.join("venv/lib/python3.12/site-packages"), "/opt/packages".to_owned()),
            ]
        );
        let plain = found.on_the_node();
        let path = |below: &str| scratch.0.join(below).to_string_lossy().into_owned();
        assert_eq!(plain.program, path("home/bin/python3.12"));
        assert_eq!(plain.library_path, Some(path("home/lib")));
        assert_eq!(plain.packages, Some(path("venv/lib/python3.12/site-packages")));
    }

    #[test]
    fn a_version_manager_s_shim_is_refused_with_the_way_to_the_real_one() {
        let scratch = Scratch::new("shim");
        let shim = scratch.file("shims/python3", b"#!/usr/bin/env bash\n");
        let text = Interpreter::find(&shim).expect_err("a script").to_string();
        assert!(text.contains("realpath(sys.executable)"), "{text}");
        let missing = Interpreter::find(&scratch.0.join("none/bin/python")).expect_err("missing").to_string();
        assert!(missing.contains("make setup"), "{missing}");
    }
}
