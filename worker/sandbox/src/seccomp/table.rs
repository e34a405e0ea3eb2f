//! The names: what a snippet may call. Numbers are the architecture's.
//!
//! Calls that make namespaces or mounts, trace processes, load programs into the kernel or hold memory outside the
//! accounting (memfd, System V shared memory) must stay out of it, and so must those by which a snippet could see what the
//! machine or another snippet does with files that all may read, or get in its way (inotify, flock, leases).

use serde_json::{Value, json};

use super::{Around, Who};

/// Allowed with any arguments, everywhere.
#[rustfmt::skip]
pub(super) const EVERYWHERE: &[&str] = &[
    // files that are open
    "read", "write", "close", "lseek", "pread64", "pwrite64", "readv", "writev", "preadv", "pwritev", "preadv2",
    "pwritev2", "sendfile", "splice", "tee", "copy_file_range", "fsync", "fdatasync", "truncate",
    "ftruncate", "fadvise64", "dup", "dup3", "close_range", "pipe2",
    // names of files
    "openat", "fstat", "newfstatat", "statx", "statfs", "fstatfs", "faccessat", "faccessat2", "getdents64", "getcwd",
    "chdir", "fchdir", "renameat", "renameat2", "mkdirat", "linkat", "unlinkat", "symlinkat", "readlinkat", "umask",
    // memory
    "munmap", "mprotect", "mremap", "msync", "mincore", "madvise", "brk", "membarrier",
    // waiting
    "ppoll", "pselect6", "epoll_create1", "epoll_ctl", "epoll_pwait", "epoll_pwait2", "eventfd2", "signalfd4",
    "timerfd_create", "timerfd_settime", "timerfd_gettime", "futex", "nanosleep", "clock_nanosleep", "sched_yield",
    "restart_syscall",
    // pairs of local sockets (which: by_argument)
    "getsockname", "getpeername", "getsockopt", "shutdown", "recvfrom", "recvmsg", "recvmmsg",
    // processes and threads (which clone: by_argument)
    "execve", "exit", "exit_group", "wait4", "waitid", "set_tid_address", "set_robust_list", "get_robust_list", "rseq",
    "getpid", "gettid", "getppid", "getpgid", "getsid", "sched_getaffinity", "sched_getparam", "sched_getscheduler",
    "sched_get_priority_max", "sched_get_priority_min", "getpriority", "getcpu",
    // signals that it gets
    "rt_sigaction", "rt_sigprocmask", "rt_sigreturn", "rt_sigpending", "rt_sigtimedwait", "rt_sigsuspend", "sigaltstack",
    // time
    "gettimeofday", "times", "clock_gettime", "clock_getres", "getitimer", "setitimer", 
    "timer_settime", "timer_gettime", "timer_getoverrun", "timer_delete",
    // who and where am I
    "uname", "sysinfo", "getuid", "getgid", "geteuid", "getegid", "getresuid", "getresgid", "getgroups", "capget",
    "getrlimit", "setrlimit", "getrusage", "getrandom",
];

/// Leave the process group or the session. Where that is how a snippet's processes are found, the calls do nothing and say
/// that they did, so that a program which detaches itself goes on.
pub(super) const LEAVE_GROUP: &[&str] = &["setpgid", "setsid"];

/// Allowed with any arguments where nobody else's files, sockets or processes are in reach. On the node itself Landlock does
/// not control them: who owns a file may change its mode and times, and who owns a process its priority and limits.
#[rustfmt::skip]
pub(super) const IN_NAMESPACES: &[&str] = &[
    "fchmod", "fchmodat", "utimensat", "fallocate",
    "getxattr", "lgetxattr", "fgetxattr", "listxattr", "llistxattr", "flistxattr",
    "bind", "listen", "connect", "accept", "accept4", "sendto", "sendmsg", "sendmmsg",
    "sched_setaffinity", "setpriority", "prlimit64",
];

/// Send a signal, by which of their arguments; allowed where they reach the snippet's own processes alone.
pub(super) const SIGNALS: &[(&str, u8)] =
    &[("kill", 1), ("tkill", 1), ("tgkill", 2), ("rt_sigqueueinfo", 1), ("pidfd_send_signal", 1)];
/// What the heads of a session, which are stopped between turns, could go on by: a signal at a time to come.
pub(super) const TIMERS: &[&str] = &["timer_create"];

/// The older forms of calls above, which newer architectures left out.
#[rustfmt::skip]
pub(super) const X86_64_EVERYWHERE: &[&str] = &[
    "open", "creat", "stat", "lstat", "access", "getdents", "rename", "mkdir", "rmdir", "link", "unlink", "symlink",
    "readlink", "dup2", "pipe", "poll", "select", "epoll_create", "epoll_wait", "eventfd", "pause", "fork", "vfork",
    "arch_prctl", "getpgrp", "time", "alarm",
];
pub(super) const X86_64_IN_NAMESPACES: &[&str] = &["chmod", "utime", "utimes", "futimesat"];

/// TCGETS (is it a terminal), TIOCGWINSZ, FIONREAD, FIONBIO, FIONCLEX, FIOCLEX.
const IOCTLS: &[u64] = &[0x5401, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451];
/// GET_PDEATHSIG, GET_DUMPABLE, NAME (set, get), CAPBSET_READ, SET_VMA (names of malloc's areas).
const PRCTLS: &[u64] = &[2, 3, 15, 16, 23, 0x5356_4d41];
/// The signal that a process gets when its parent ends.
const SET_PDEATHSIG: u64 = 1;
/// Duplicates, flags, locks, the size of a pipe. Not: leases, notices, and whom the kernel shall signal.
const FCNTLS: &[u64] = &[0, 1, 2, 3, 4, 5, 6, 7, 36, 37, 38, 1030, 1031, 1032];
const UNIX: u64 = libc::AF_UNIX as u64;
/// Sockets that have one peer for good; a datagram socket of a pair can be given another one.
const CONNECTED: &[u64] = &[libc::SOCK_STREAM as u64, libc::SOCK_SEQPACKET as u64];
const SOCKET_TYPE_MASK: u64 = 0xF;
/// Every flag of `clone` that makes a namespace: time, mount, cgroup, uts, ipc, user, pid, net.
const CLONE_NAMESPACES: u64 =
    0x80 | 0x2_0000 | 0x200_0000 | 0x400_0000 | 0x800_0000 | 0x1000_0000 | 0x2000_0000 | 0x4000_0000;
const CLONE_PARENT: u64 = 0x8000;
/// The signal in the flags of `clone`.
const CLONE_SIGNAL: u64 = 0xFF;
const SIGCONT: u64 = libc::SIGCONT as u64;
const MAP_SHARED: u64 = 0x1;
const MAP_ANONYMOUS: u64 = 0x20;
const MAP_HUGETLB: u64 = 0x4_0000;
/// Of asm-generic/socket.h, as for both architectures.
const SOL_SOCKET: u64 = 1;
/// REUSEADDR, KEEPALIVE, LINGER, PASSCRED, and the timeouts. Not: programs for the kernel, and the size of buffers, which are
/// counted for nobody.
const SOCKET_OPTIONS: &[u64] = &[2, 9, 13, 16, 20, 21];

/// What is allowed whatever the arguments are.
pub(super) fn named(x86_64: bool, around: Around, who: Who) -> Vec<Value> {
    let in_namespaces = around == Around::Namespaces;
    let of = |condition: bool, names: &'static [&'static str]| if condition { names } else { &[] };
    let names = EVERYWHERE
        .iter()
        .chain(LEAVE_GROUP)
        .chain(of(who == Who::Snippet, TIMERS))
        .chain(of(in_namespaces, IN_NAMESPACES))
        .chain(of(around != Around::Node { signals: false }, &["pidfd_open"]))
        .chain(of(x86_64, X86_64_EVERYWHERE))
        .chain(of(x86_64 && in_namespaces, X86_64_IN_NAMESPACES));
    names.map(|call| json!({"syscall": call})).collect()
}

/// What is allowed with some arguments.
pub(super) fn by_argument(around: Around, who: Who) -> Vec<Value> {
    let mut rules = clones(around, who);
    // Shared memory without a file is counted for nobody once it is unmapped, and huge pages are not counted at all.
    let not = |flags: u64| argument(3, json!({"masked_eq": flags}), 0);
    rules.extend([MAP_ANONYMOUS, MAP_SHARED].map(|flag| when("mmap", &[not(flag | MAP_HUGETLB)])));
    rules.extend(any_of("ioctl", 1, IOCTLS));
    rules.extend(any_of("prctl", 0, PRCTLS));
    rules.extend(any_of("fcntl", 1, FCNTLS));
    rules.extend(
        SOCKET_OPTIONS.iter().map(|option| when("setsockopt", &[equal(1, SOL_SOCKET), equal(2, *option)])),
    );
    if around != (Around::Node { signals: false }) {
        rules.extend(SIGNALS.iter().map(|(call, signal)| match who {
            Who::Snippet => json!({"syscall": call}),
            Who::Head => when(call, &[argument(*signal, json!("ne"), SIGCONT)]),
        }));
    }
    if around == Around::Namespaces {
        rules.extend((who == Who::Snippet).then(|| when("prctl", &[equal(0, SET_PDEATHSIG)])));
        rules.extend(["socket", "socketpair"].map(|call| when(call, &[equal(0, UNIX)])));
        return rules;
    }
    let of_type = |kind: &u64| argument(1, json!({"masked_eq": SOCKET_TYPE_MASK}), *kind);
    rules.extend(CONNECTED.iter().map(|kind| when("socketpair", &[equal(0, UNIX), of_type(kind)])));
    rules.push(when("sendto", &[pointer(4, 0)]));
    rules.extend(["prlimit64", "sched_setaffinity"].map(|call| when(call, &[equal(0, 0)])));
    rules
}

/// Clones that make no namespace; of a snippet on the node, no sibling, which would be no descendant of the process whose
/// descendants are watched (in a pid namespace that one is the first, which cannot have siblings); of a head, none whose end
/// is told by another signal than SIGCHLD: one could make a stopped head go on.
fn clones(around: Around, who: Who) -> Vec<Value> {
    let without = |flags: u64| argument(0, json!({"masked_eq": flags}), 0);
    match who {
        Who::Snippet if around == Around::Namespaces => vec![when("clone", &[without(CLONE_NAMESPACES)])],
        Who::Snippet => vec![when("clone", &[without(CLONE_NAMESPACES | CLONE_PARENT)])],
        Who::Head => [0, libc::SIGCHLD as u64]
            .map(|signal| {
                let tells = argument(0, json!({"masked_eq": CLONE_SIGNAL}), signal);
                when("clone", &[without(CLONE_NAMESPACES), tells])
            })
            .to_vec(),
    }
}

fn any_of(call: &'static str, index: u8, values: &'static [u64]) -> impl Iterator<Item = Value> {
    values.iter().map(move |value| when(call, &[equal(index, *value)]))
}

fn equal(index: u8, value: u64) -> Value {
    argument(index, json!("eq"), value)
}

fn when(call: &str, arguments: &[Value]) -> Value {
    json!({"syscall": call, "args": arguments})
}

/// The lower half of an argument, which is all that the kernel looks at in those above.
fn argument(index: u8, operation: Value, value: u64) -> Value {
    json!({"index": index, "type": "dword", "op": operation, "val": value})
}

fn pointer(index: u8, value: u64) -> Value {
    json!({"index": index, "type": "qword", "op": "eq", "val": value})
}
