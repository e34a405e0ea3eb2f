//! Clones a process, into new namespaces where there are any, turns it into the jailed zygote and executes Python there.
//!
//! Called by a zygote's keeper thread, which must outlive the zygote: the kernel sends the parent-death signal when
//! that *thread* ends, and it is what ends the zygote (and with its pid namespace every snippet) even if the owner is
//! killed with SIGKILL. Where there are no namespaces the process executed is the zygote's warden, which ends everything
//! when its end of the control socket says that the owner is gone.
//!
//! The clone copies one thread of a threaded program, so until `execve` the child makes system calls only, on memory
//! prepared before: no allocation, no lock, and none of the C library's calls that speak to its other threads (its
//! `setuid` does; the raw call does not). A failing step is reported by number through a pipe.

use std::ffi::{CStr, CString, c_char};
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::fs::{MemfdFlags, Mode, OFlags};
use rustix::io::Errno;
use rustix::net::{AddressFamily, Shutdown, SocketFlags, SocketType};
use rustix::pipe::PipeFlags;
use rustix::process::{Pid, Signal, WaitId, WaitIdOptions};
use rustix::thread::{Gid, Uid};

use crate::cgroup::Cgroup;
use crate::error::{SandboxError, system};
use crate::home::Home;
use crate::jail::Step;
use crate::probe::Tier;

/// Everything that makes a zygote, prepared once; each start copies nothing but the processes.
#[derive(Debug)]
pub(crate) struct Recipe {
    pub(crate) tier: Tier,
    /// Who the zygote is: a user of nobody's if root starts it, otherwise the caller.
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    /// Limits the whole pool.
    pub(crate) cgroup: Option<Arc<Cgroup>>,
    /// Snippets of the pool that may run at once, as the same user if there are no namespaces.
    pub(crate) slots: u32,
    pub(crate) steps: Vec<Step>,
    /// The seccomp programs: a snippet's, and that of the heads of sessions.
    pub(crate) programs: Vec<Vec<u8>>,
    /// The interpreter and its options.
    pub(crate) interpreter: Vec<CString>,
    /// The program in the jail; where there is none it is a file of each zygote's own.
    pub(crate) program: CString,
    /// What the snippets may read on a node without namespaces: paths with colons between.
    pub(crate) readable: CString,
    /// The zygote's further arguments.
    pub(crate) arguments: Vec<CString>,
    pub(crate) environment: Vec<CString>,
}

/// A process that is executing Python in its jail. Dropping it kills and reaps it.
#[derive(Debug)]
pub(crate) struct Spawned {
    pub(crate) pidfd: OwnedFd,
    pub(crate) socket: OwnedFd,
    /// Without namespaces: the directory in which each snippet has one by its process's number.
    pub(crate) home: Option<PathBuf>,
    /// What it writes to standard error: an anonymous file.
    log: File,
}

impl Spawned {
    /// The end of its error output, each line indented, for messages.
    pub(crate) fn log_tail(&self) -> String {
        let mut bytes = Vec::new();
        let read =
            io::Seek::rewind(&mut &self.log).and_then(|()| (&self.log).take(1 << 20).read_to_end(&mut bytes));
        if read.is_err() {
            return String::new();
        }
        let text = String::from_utf8_lossy(&bytes);
        let lines: Vec<_> = text.lines().collect();
        let tail = lines.len().saturating_sub(12);
        lines.iter().skip(tail).map(|line| format!("\n  {line}")).collect()
    }
}

impl Spawned {
    /// Ends it, with every snippet it has made, and reaps it. Once it has ended this does nothing.
    pub(crate) fn end(&self) {
        if self.home.is_some() {
            // A warden that is killed ends nothing: it is told, and given time.
            let _ = rustix::net::shutdown(&self.socket, Shutdown::Both);
            let mut polled = [PollFd::new(&self.pidfd, PollFlags::IN)];
            let _ = rustix::io::retry_on_intr(|| rustix::event::poll(&mut polled, Some(&WARDEN_DEADLINE)));
        }
        let _ = rustix::process::pidfd_send_signal(&self.pidfd, Signal::KILL);
        let mut polled = [PollFd::new(&self.pidfd, PollFlags::IN)];
        let ended = rustix::io::retry_on_intr(|| rustix::event::poll(&mut polled, Some(&KILL_DEADLINE)));
        if ended == Ok(0) {
            tracing::error!(process = ?self.pidfd, "sandbox: a killed zygote does not end, and is left; does a file system hang?");
        }
        let options = WaitIdOptions::EXITED | WaitIdOptions::NOHANG;
        let _ =
            rustix::io::retry_on_intr(|| rustix::process::waitid(WaitId::PidFd(self.pidfd.as_fd()), options));
    }
}

impl Drop for Spawned {
    fn drop(&mut self) {
        self.end();
    }
}

/// Descriptors of the child, moved above the places they will take, and C arrays for `execve`.
struct Prepared<'a> {
    recipe: &'a Recipe,
    /// From 0: input, output, error, control socket, seccomp programs…
    descriptors: Vec<OwnedFd>,
    report: OwnedFd,
    /// Owns what `arguments` points to.
    _words: Vec<CString>,
    arguments: Vec<*const c_char>,
    environment: Vec<*const c_char>,
    maps: Vec<(&'static CStr, Vec<u8>)>,
    /// The owner is root, and the zygote must not be.
    changes_user: bool,
}

/// The steps that are not in the plan, by number from [`FIRST_STAGE`].
const STAGES: &[&str] = &[
    "writing the user namespace's id map",
    "giving up the groups",
    "giving up the group id",
    "giving up the user id",
    "setting the parent-death signal",
    "setting no_new_privs",
    "placing descriptors",
    "closing other descriptors",
    "executing the interpreter",
];
const FIRST_STAGE: u32 = 1 << 16;
/// Building a jail takes about a millisecond; a file system that does not answer must not hang the caller.
const BUILD_DEADLINE: Timespec = Timespec { tv_sec: 20, tv_nsec: 0 };
/// What is killed gives back its memory, and ends.
const KILL_DEADLINE: Timespec = Timespec { tv_sec: 20, tv_nsec: 0 };
/// Ending the snippets of four slots, and removing their files, takes milliseconds, and on a busy machine seconds.
const WARDEN_DEADLINE: Timespec = Timespec { tv_sec: 30, tv_nsec: 0 };

/// Makes a zygote. The calling thread must live as long as the zygote.
///
/// # Errors
/// [`SandboxError::Jail`] naming the step that failed, [`SandboxError::System`] if the clone itself failed.
pub(crate) fn spawn(recipe: &Recipe) -> Result<Spawned, SandboxError> {
    let (socket, theirs) =
        rustix::net::socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)
            .map_err(system("control socket"))?;
    let (report_end, report) = rustix::pipe::pipe_with(PipeFlags::CLOEXEC).map_err(system("report pipe"))?;
    let log = memory_file(c"zygote-log", b"")?;
    let home = if recipe.tier.has_namespaces() { None } else { Some(Home::make(recipe.uid, recipe.gid)?) };
    let prepared = prepare(recipe, home.as_ref(), theirs, report, &log)?;
    let (pid, pidfd) = clone(recipe.tier, &prepared)?;
    drop(prepared); // closes the child's ends here, so that its end is seen as end of file
    let mut spawned = Spawned { pidfd, socket, home: None, log };
    wait_for_exec(recipe, &report_end, pid)?;
    spawned.home = home.map(Home::leave_to_warden);
    if let Some(cgroup) = &recipe.cgroup
        && let Err(error) = cgroup.add(pid.as_raw_nonzero().get())
    {
        tracing::warn!(%error, "sandbox: a zygote runs outside of the pool's cgroup; its other limits stand");
    }
    Ok(spawned)
}

/// The words of the command: the program's first argument is its directory, empty in a jail.
fn command(recipe: &Recipe, home: Option<&Home>) -> Result<Vec<CString>, SandboxError> {
    let (program, home) = match home {
        None => (recipe.program.clone(), CString::default()),
        Some(home) => (c_path(&home.warden())?, c_path(home.path())?),
    };
    let own = [program, home, recipe.readable.clone()];
    Ok(recipe.interpreter.iter().chain(&own).chain(&recipe.arguments).cloned().collect())
}

fn c_path(path: &Path) -> Result<CString, SandboxError> {
    CString::new(path.as_os_str().as_bytes())
        .map_err(|e| SandboxError::Config(format!("{} holds a NUL byte: {e}", path.display())))
}

fn prepare<'a>(
    recipe: &'a Recipe,
    home: Option<&Home>,
    socket: OwnedFd,
    report: OwnedFd,
    log: &File,
) -> Result<Prepared<'a>, SandboxError> {
    let null = rustix::fs::open(c"/dev/null", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())
        .map_err(system("opening /dev/null"))?;
    let mut sources = vec![null.as_fd(), null.as_fd(), log.as_fd(), socket.as_fd()];
    let programs =
        recipe.programs.iter().map(|p| memory_file(c"seccomp", p)).collect::<Result<Vec<_>, _>>()?;
    sources.extend(programs.iter().map(AsFd::as_fd));
    let above = |fd| rustix::io::fcntl_dupfd_cloexec(fd, 64).map_err(system("moving a descriptor"));
    let descriptors = sources.into_iter().map(above).collect::<Result<Vec<_>, _>>()?;
    let pointers = |strings: &[CString]| {
        strings.iter().map(|s| s.as_ptr()).chain([std::ptr::null()]).collect::<Vec<_>>()
    };
    let maps = match recipe.tier {
        Tier::Root | Tier::Landlock => Vec::new(),
        Tier::UserNamespaces => vec![
            (c"/proc/self/setgroups", b"deny".to_vec()),
            (c"/proc/self/uid_map", format!("{0} {0} 1", recipe.uid).into_bytes()),
            (c"/proc/self/gid_map", format!("{0} {0} 1", recipe.gid).into_bytes()),
        ],
    };
    let words = command(recipe, home)?;
    Ok(Prepared {
        recipe,
        descriptors,
        report: above(report.as_fd())?,
        arguments: pointers(&words),
        _words: words,
        environment: pointers(&recipe.environment),
        maps,
        changes_user: rustix::process::geteuid().is_root(),
    })
}

/// An anonymous file with some content, read from its start.
pub(crate) fn memory_file(name: &CStr, content: &[u8]) -> Result<File, SandboxError> {
    let file = rustix::fs::memfd_create(name, MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)
        .map_err(system("anonymous file"))?;
    let mut file = File::from(file);
    file.write_all(content)
        .and_then(|()| io::Seek::rewind(&mut file))
        .map_err(system("filling an anonymous file"))?;
    Ok(file)
}

fn clone(tier: Tier, prepared: &Prepared<'_>) -> Result<(Pid, OwnedFd), SandboxError> {
    let namespaces =
        libc::CLONE_NEWNS | libc::CLONE_NEWPID | libc::CLONE_NEWNET | libc::CLONE_NEWIPC | libc::CLONE_NEWUTS;
    let namespaces = match tier {
        Tier::Root => namespaces,
        Tier::UserNamespaces => namespaces | libc::CLONE_NEWUSER,
        Tier::Landlock => 0,
    };
    let flags = namespaces | libc::CLONE_PIDFD | libc::SIGCHLD;
    let mut pidfd: RawFd = -1;
    // SAFETY: without CLONE_VM the child gets a copy of this thread's memory, so nothing is shared; with a null stack
    // it goes on on the copy of this one. `pidfd` is written by the kernel in the parent before the call returns. The
    // child runs `become_zygote` only, which never returns and keeps to what a copy of one thread may do.
    let pid = unsafe { libc::syscall(libc::SYS_clone, libc::c_long::from(flags), 0, &raw mut pidfd, 0, 0) };
    match pid {
        0 => become_zygote(prepared),
        pid if pid > 0 => {
            // SAFETY: the kernel has just made this descriptor for us (CLONE_PIDFD), and nothing else knows it.
            let pidfd = unsafe { OwnedFd::from_raw_fd(pidfd) };
            let pid =
                i32::try_from(pid).ok().and_then(Pid::from_raw).ok_or_else(|| SandboxError::System {
                    what: format!("clone returned {pid}, which is no process id"),
                    source: io::Error::from(Errno::SRCH),
                })?;
            Ok((pid, pidfd))
        }
        _ => {
            Err(SandboxError::System { what: "clone of a zygote".into(), source: io::Error::last_os_error() })
        }
    }
}

/// The child's end of the story: every step in order, then Python. System calls only.
fn become_zygote(prepared: &Prepared<'_>) -> ! {
    let (place, errno) = try_to_become_zygote(prepared);
    let mut message = [0_u8; 8];
    let (left, right) = message.split_at_mut(4);
    left.copy_from_slice(&place.to_ne_bytes());
    right.copy_from_slice(&errno.raw_os_error().to_ne_bytes());
    let _ = rustix::io::write(&prepared.report, &message);
    // SAFETY: `_exit` ends the process without running anything of the copied program.
    unsafe { libc::_exit(127) }
}

fn try_to_become_zygote(prepared: &Prepared<'_>) -> (u32, Errno) {
    let Prepared { recipe, .. } = prepared;
    let mut stage = FIRST_STAGE;
    macro_rules! attempt {
        ($call:expr) => {
            if let Err(errno) = $call {
                return (stage, errno);
            }
            stage += 1;
        };
    }
    reset_signals();
    rustix::process::umask(Mode::from_raw_mode(0o022));
    attempt!(prepared.maps.iter().try_for_each(|(path, content)| write_to(path, content)));
    for (index, step) in (0_u32..).zip(&recipe.steps) {
        if let Err(errno) = step.perform() {
            return (index, errno);
        }
    }
    let (uid, gid) = (Uid::from_raw(recipe.uid), Gid::from_raw(recipe.gid));
    let change = prepared.changes_user;
    attempt!(if change { rustix::thread::set_thread_groups(&[]) } else { Ok(()) });
    attempt!(if change { rustix::thread::set_thread_res_gid(gid, gid, gid) } else { Ok(()) });
    attempt!(if change { rustix::thread::set_thread_res_uid(uid, uid, uid) } else { Ok(()) });
    // After the change of user, which clears it.
    let killed_with_owner = recipe.tier.has_namespaces().then_some(Signal::KILL);
    attempt!(rustix::process::set_parent_process_death_signal(killed_with_owner));
    attempt!(rustix::thread::set_no_new_privs(true));
    let _ = rustix::process::setsid(); // fails only if it leads a session already
    attempt!(place_descriptors(prepared));
    attempt!(close_from(prepared.descriptors.len() + 1));
    // SAFETY: both arrays end with a null pointer, and their strings live in `recipe`.
    unsafe {
        libc::execve(prepared.arguments[0], prepared.arguments.as_ptr(), prepared.environment.as_ptr());
    }
    (stage, last_errno())
}

/// A program may have blocked signals or ignored some of them; both would survive `execve`.
fn reset_signals() {
    // SAFETY: an all-zero sigset is valid and `sigemptyset` initialises it; `signal` and `sigprocmask` only make
    // system calls, and no handler of the copied program can run afterwards.
    unsafe {
        for signal in 1..32 {
            libc::signal(signal, libc::SIG_DFL);
        }
        let mut none: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&raw mut none);
        libc::sigprocmask(libc::SIG_SETMASK, &raw const none, std::ptr::null_mut());
    }
}

fn write_to(path: &CStr, content: &[u8]) -> Result<(), Errno> {
    let file = rustix::fs::open(path, OFlags::WRONLY | OFlags::CLOEXEC, Mode::empty())?;
    rustix::io::write(&file, content).map(|_| ())
}

/// Puts the descriptors at 0, 1, 2, … and the report just above them, to be closed by `execve`.
fn place_descriptors(prepared: &Prepared<'_>) -> Result<(), Errno> {
    for (place, descriptor) in (0..).zip(&prepared.descriptors) {
        duplicate_to(descriptor.as_raw_fd(), place, 0)?;
    }
    let above = i32::try_from(prepared.descriptors.len()).map_err(|_| Errno::MFILE)?;
    duplicate_to(prepared.report.as_raw_fd(), above, libc::O_CLOEXEC)
}

fn duplicate_to(from: RawFd, to: RawFd, flags: i32) -> Result<(), Errno> {
    // SAFETY: a system call on two descriptor numbers of a process that owns no Rust value at the target number: the
    // sources all lie at 64 and above, and the child uses nothing else any more.
    if unsafe { libc::dup3(from, to, flags) } < 0 { Err(last_errno()) } else { Ok(()) }
}

fn close_from(first: usize) -> Result<(), Errno> {
    // SAFETY: closes descriptors that this process, about to execute another program, does not use any more.
    let result = unsafe { libc::syscall(libc::SYS_close_range, first, libc::c_uint::MAX, 0) };
    if result < 0 { Err(last_errno()) } else { Ok(()) }
}

fn last_errno() -> Errno {
    Errno::from_io_error(&io::Error::last_os_error()).unwrap_or(Errno::IO)
}

/// Waits until `execve` has closed the report pipe, or for the report of the step that failed.
fn wait_for_exec(recipe: &Recipe, report: &OwnedFd, pid: Pid) -> Result<(), SandboxError> {
    let mut polled = [PollFd::new(report, PollFlags::IN)];
    let ready = rustix::io::retry_on_intr(|| rustix::event::poll(&mut polled, Some(&BUILD_DEADLINE)))
        .map_err(system("waiting for the jail"))?;
    if ready == 0 {
        let limit = Duration::from_secs(BUILD_DEADLINE.tv_sec.cast_unsigned());
        let reason = format!(
            "process {} has not built its jail within {limit:?}: does a file system hang?",
            pid.as_raw_nonzero()
        );
        return Err(SandboxError::ZygoteStart { reason, log: String::new() });
    }
    let mut message = [0_u8; 8];
    let length =
        rustix::io::retry_on_intr(|| rustix::io::read(report, &mut message)).map_err(system("report"))?;
    if length == 0 {
        return Ok(());
    }
    let half = |at: usize| -> [u8; 4] { std::array::from_fn(|i| message[at + i]) };
    let place = u32::from_ne_bytes(half(0));
    let source = io::Error::from_raw_os_error(i32::from_ne_bytes(half(4)));
    let step = match recipe.steps.get(place as usize) {
        Some(step) => step.to_string(),
        None => {
            let stage =
                STAGES.get(place.wrapping_sub(FIRST_STAGE) as usize).copied().unwrap_or("an unknown step");
            stage.to_owned()
        }
    };
    Err(SandboxError::Jail { step, source })
}
