//! The jail as data: the list of steps that turns a new mount namespace into the snippet's file system.
//!
//! [`plan`] runs in the supervisor and may allocate, read directories and fail with long texts. [`Step::perform`] runs
//! in the freshly cloned process of a threaded program, where another thread may have held the allocator's lock at
//! the moment of the clone: it must make system calls only, on memory prepared here.
//!
//! The root is a small tmpfs, mounted over the namespace's own view of `/tmp` so that nothing is created on the host;
//! host directories appear in it read-only, and at the end the root itself becomes read-only.

use std::ffi::CString;
use std::fmt;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::mount::{MountFlags, MountPropagationFlags, UnmountFlags};

use crate::error::SandboxError;
use crate::interpreter::Interpreter;
use crate::python;

/// Where the sandbox's own programs lie in the jail.
pub(crate) const PROGRAMS: &str = "/opt/agentfly";

/// Where the host's tree and the future root are while the jail is being built.
const HOST: &str = "/host";
const ROOT: &str = "/root";

/// System directories that an interpreter and a program may need. `/etc` is not one: four of its files are.
const SYSTEM: &[&str] = &["/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64"];
const SYSTEM_FILES: &[&str] = &["/etc/ld.so.cache", "/etc/localtime"];
const DEVICES: &[&str] = &["/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom"];

/// One step: one or two system calls.
#[derive(Debug)]
pub(crate) enum Step {
    /// No mount made from here on spreads to the host.
    PrivateMounts,
    Tmpfs {
        at: CString,
        options: CString,
    },
    Proc {
        at: CString,
    },
    Directory {
        at: CString,
        mode: u32,
    },
    File {
        at: CString,
        content: Vec<u8>,
    },
    Symlink {
        at: CString,
        target: CString,
    },
    Bind {
        from: CString,
        at: CString,
    },
    /// This mount and those below it: read-only, no devices, no set-user-id programs.
    ReadOnly {
        at: CString,
    },
    /// The mount of the root alone: read-only.
    ReadOnlyRoot,
    Pivot {
        new: CString,
        old: CString,
    },
    Detach {
        at: CString,
    },
    Enter {
        directory: CString,
    },
    HostName,
}

/// Builds the list of steps for one interpreter.
///
/// # Errors
/// [`SandboxError::Config`] if a path holds a NUL byte.
pub(crate) fn plan(interpreter: &Interpreter, uid: u32, gid: u32) -> Result<Vec<Step>, SandboxError> {
    let mut plan = Plan { steps: vec![Step::PrivateMounts] };
    plan.tmpfs("/tmp", "mode=0755,size=2m")?;
    plan.push(Step::Enter { directory: c("/tmp")? });
    plan.directory("host", 0o755)?;
    plan.directory("root", 0o755)?;
    plan.push(Step::Pivot { new: c(".")?, old: c("host")? });
    plan.push(Step::Enter { directory: c("/")? });
    plan.tmpfs(ROOT, "mode=0755,size=2m")?;
    for directory in ["dev", "dev/shm", "etc", "opt", "opt/agentfly", "proc", "tmp"] {
        plan.directory(&format!("{ROOT}/{directory}"), 0o755)?;
    }
    for path in SYSTEM {
        plan.system_directory(path)?;
    }
    for path in SYSTEM_FILES.iter().map(Path::new) {
        if let Ok(real) = path.canonicalize() {
            plan.bind_read_only(&real, &path.to_string_lossy())?;
        }
    }
    for (from, at) in &interpreter.binds {
        plan.bind_read_only(from, at)?;
    }
    for device in DEVICES {
        plan.file(device, b"")?;
        plan.push(Step::Bind { from: c(format!("{HOST}{device}"))?, at: c(format!("{ROOT}{device}"))? });
    }
    for (name, target) in [("fd", "/proc/self/fd"), ("stdin", "fd/0"), ("stdout", "fd/1"), ("stderr", "fd/2")]
    {
        plan.symlink(&format!("/dev/{name}"), target)?;
    }
    plan.file("/etc/passwd", format!("sandbox:x:{uid}:{gid}::/tmp:/bin/sh\n").as_bytes())?;
    plan.file("/etc/group", format!("sandbox:x:{gid}:\n").as_bytes())?;
    plan.file("/etc/hosts", b"127.0.0.1 localhost\n")?;
    for (name, source) in python::PROGRAMS {
        plan.file(&format!("{PROGRAMS}/{name}"), source.as_bytes())?;
    }
    plan.push(Step::Proc { at: c(format!("{ROOT}/proc"))? });
    plan.push(Step::Enter { directory: c(ROOT)? });
    plan.push(Step::Pivot { new: c(".")?, old: c(".")? });
    plan.push(Step::Detach { at: c(".")? });
    plan.push(Step::Enter { directory: c("/")? });
    plan.push(Step::ReadOnlyRoot);
    plan.push(Step::HostName);
    Ok(plan.steps)
}

/// What snippets may read where there is no jail: the paths, without symlinks, that [`plan`] would show them.
pub(crate) fn readable(interpreter: &Interpreter) -> Vec<PathBuf> {
    let system = SYSTEM.iter().chain(SYSTEM_FILES).filter_map(|path| Path::new(path).canonicalize().ok());
    let mut paths: Vec<_> = system.chain(interpreter.binds.iter().map(|(from, _)| from.clone())).collect();
    paths.sort();
    paths.dedup();
    paths
}

struct Plan {
    steps: Vec<Step>,
}

impl Plan {
    fn push(&mut self, step: Step) {
        self.steps.push(step);
    }

    fn tmpfs(&mut self, at: &str, options: &str) -> Result<(), SandboxError> {
        self.push(Step::Tmpfs { at: c(at)?, options: c(options)? });
        Ok(())
    }

    fn directory(&mut self, at: &str, mode: u32) -> Result<(), SandboxError> {
        self.push(Step::Directory { at: c(at)?, mode });
        Ok(())
    }

    fn file(&mut self, at: &str, content: &[u8]) -> Result<(), SandboxError> {
        self.push(Step::File { at: c(format!("{ROOT}{at}"))?, content: content.to_vec() });
        Ok(())
    }

    fn symlink(&mut self, at: &str, target: &str) -> Result<(), SandboxError> {
        self.push(Step::Symlink { at: c(format!("{ROOT}{at}"))?, target: c(target)? });
        Ok(())
    }

    /// A directory of the system, or the symlink it is where `/bin` and `/usr/bin` are one.
    fn system_directory(&mut self, path: &str) -> Result<(), SandboxError> {
        let path = Path::new(path);
        match (path.read_link(), path.is_dir()) {
            (Ok(target), true) => self.symlink(&path.to_string_lossy(), &target.to_string_lossy()),
            (Err(_), true) => self.bind_read_only(path, &path.to_string_lossy()),
            (_, false) => Ok(()),
        }
    }

    /// Shows `from` (a path of the host without symlinks) at `at`, read-only with all mounts below it.
    fn bind_read_only(&mut self, from: &Path, at: &str) -> Result<(), SandboxError> {
        let parents: Vec<_> = Path::new(at).ancestors().skip(1).filter(|p| p.parent().is_some()).collect();
        for parent in parents.into_iter().rev() {
            self.directory(&format!("{ROOT}{}", parent.display()), 0o755)?;
        }
        if from.is_dir() {
            self.directory(&format!("{ROOT}{at}"), 0o755)?;
        } else {
            self.file(at, b"")?;
        }
        let mut source = HOST.as_bytes().to_vec();
        source.extend(from.as_os_str().as_bytes());
        let at = c(format!("{ROOT}{at}"))?;
        self.push(Step::Bind { from: c(source)?, at: at.clone() });
        self.push(Step::ReadOnly { at });
        Ok(())
    }
}

fn c(text: impl Into<Vec<u8>>) -> Result<CString, SandboxError> {
    CString::new(text).map_err(|e| SandboxError::Config(format!("a path of the jail holds a NUL byte: {e}")))
}

impl Step {
    /// Performs the step. Allocates nothing and takes no lock.
    pub(crate) fn perform(&self) -> Result<(), Errno> {
        let plain = MountFlags::NOSUID | MountFlags::NODEV;
        match self {
            Self::PrivateMounts => {
                rustix::mount::mount_change(c"/", MountPropagationFlags::REC | MountPropagationFlags::PRIVATE)
            }
            Self::Tmpfs { at, options } => {
                rustix::mount::mount(c"tmpfs", at.as_c_str(), c"tmpfs", plain, options.as_c_str())
            }
            Self::Proc { at } => {
                let flags = plain | MountFlags::NOEXEC;
                rustix::mount::mount(c"proc", at.as_c_str(), c"proc", flags, c"subset=pid")
            }
            Self::Directory { at, mode } => {
                match rustix::fs::mkdir(at.as_c_str(), Mode::from_raw_mode(*mode)) {
                    Err(Errno::EXIST) => Ok(()),
                    other => other,
                }
            }
            Self::File { at, content } => write_file(at, content),
            Self::Symlink { at, target } => rustix::fs::symlink(target.as_c_str(), at.as_c_str()),
            Self::Bind { from, at } => rustix::mount::mount_bind_recursive(from.as_c_str(), at.as_c_str()),
            Self::ReadOnly { at } => set_mount_attributes(at, libc::AT_RECURSIVE, RDONLY | NOSUID | NODEV),
            Self::ReadOnlyRoot => set_mount_attributes(c"/", 0, RDONLY | NOSUID | NODEV),
            Self::Pivot { new, old } => rustix::process::pivot_root(new.as_c_str(), old.as_c_str()),
            Self::Detach { at } => rustix::mount::unmount(at.as_c_str(), UnmountFlags::DETACH),
            Self::Enter { directory } => rustix::process::chdir(directory.as_c_str()),
            Self::HostName => rustix::system::sethostname(b"sandbox"),
        }
    }
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::File { at, content } => write!(f, "File {{ at: {at:?}, {} bytes }}", content.len()),
            other => write!(f, "{other:?}"),
        }
    }
}

fn write_file(at: &CString, content: &[u8]) -> Result<(), Errno> {
    let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::TRUNC | OFlags::CLOEXEC;
    let file = rustix::fs::open(at.as_c_str(), flags, Mode::from_raw_mode(0o644))?;
    let mut rest = content;
    while !rest.is_empty() {
        let written = rustix::io::write(&file, rest)?;
        rest = rest.get(written..).unwrap_or_default();
    }
    Ok(())
}

const RDONLY: u64 = libc::MOUNT_ATTR_RDONLY;
const NOSUID: u64 = libc::MOUNT_ATTR_NOSUID;
const NODEV: u64 = libc::MOUNT_ATTR_NODEV;

/// `mount_setattr(2)`: unlike a bind remount it changes a whole tree of mounts at once.
fn set_mount_attributes(at: &std::ffi::CStr, flags: i32, attributes: u64) -> Result<(), Errno> {
    let change = libc::mount_attr { attr_set: attributes, attr_clr: 0, propagation: 0, userns_fd: 0 };
    // SAFETY: `at` is NUL-terminated and `change` outlives the call; the size passed is that of `change`.
    let result = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            libc::AT_FDCWD,
            at.as_ptr(),
            flags,
            &raw const change,
            size_of::<libc::mount_attr>(),
        )
    };
    if result == 0 {
        Ok(())
    } else {
        Err(Errno::from_io_error(&std::io::Error::last_os_error()).unwrap_or(Errno::IO))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn system_python() -> Interpreter {
        Interpreter {
            program: "/usr/bin/python3".into(),
            binds: Vec::new(),
            library_path: None,
            packages: None,
        }
    }

    #[test]
    fn every_bound_directory_is_made_read_only_at_once() {
        let mut interpreter = system_python();
        interpreter.binds.push((PathBuf::from("/srv/python/lib"), "/opt/python/lib".into()));
        let steps = plan(&interpreter, 65534, 65534).expect("plans");
        for (index, step) in steps.iter().enumerate() {
            let Step::Bind { at, .. } = step else { continue };
            if at.to_string_lossy().starts_with("/root/dev/") {
                continue;
            }
            assert!(
                matches!(steps.get(index + 1), Some(Step::ReadOnly { at: sealed }) if sealed == at),
                "{at:?} is not made read-only"
            );
        }
        assert!(matches!(steps.iter().rev().nth(1), Some(Step::ReadOnlyRoot)), "the root is sealed last");
    }

    #[test]
    fn nothing_of_the_host_is_bound_beyond_the_system_and_the_interpreter() {
        let steps = plan(&system_python(), 65534, 65534).expect("plans");
        for step in &steps {
            let Step::Bind { from, .. } = step else { continue };
            let from = from.to_string_lossy();
            let allowed =
                ["/host/usr", "/host/bin", "/host/sbin", "/host/lib", "/host/dev/", "/host/etc/ld.so.cache"];
            assert!(allowed.iter().any(|a| from.starts_with(a)), "{from} would be visible");
        }
    }
}
