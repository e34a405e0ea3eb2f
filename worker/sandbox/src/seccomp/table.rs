//! The names: what a snippet may call. Numbers are the architecture's.
//!
//! Calls that make namespaces or mounts, trace processes, load programs into the kernel or hold memory outside the
//! accounting (memfd, System V shared memory) must stay out of it.

use serde_json::{Value, json};

/// Allowed with any arguments, on every architecture.
#[rustfmt::skip]
pub(super) const EVERYWHERE: &[&str] = &[
    // files that are open
    "read", "write", "close", "lseek", "pread64", "pwrite64", "readv", "writev", "preadv", "pwritev", "preadv2",
    "pwritev2", "sendfile", "splice", "tee", "copy_file_range", "fcntl", "flock", "fsync", "fdatasync", "truncate",
    "ftruncate", "fallocate", "fadvise64", "dup", "dup3", "close_range", "pipe2",
    // names of files
    "openat", "fstat", "newfstatat", "statx", "statfs", "fstatfs", "faccessat", "faccessat2", "getdents64", "getcwd",
    "chdir", "fchdir", "renameat", "renameat2", "mkdirat", "linkat", "unlinkat", "symlinkat", "readlinkat", "fchmod",
    "fchmodat", "umask", "utimensat", "getxattr", "lgetxattr", "fgetxattr", "listxattr", "llistxattr", "flistxattr",
    "inotify_init1", "inotify_add_watch", "inotify_rm_watch",
    // memory
    "mmap", "munmap", "mprotect", "mremap", "msync", "mincore", "madvise", "brk", "membarrier",
    // waiting
    "ppoll", "pselect6", "epoll_create1", "epoll_ctl", "epoll_pwait", "epoll_pwait2", "eventfd2", "signalfd4",
    "timerfd_create", "timerfd_settime", "timerfd_gettime", "futex", "nanosleep", "clock_nanosleep", "sched_yield",
    "restart_syscall",
    // local sockets (which families: by_argument)
    "bind", "listen", "connect", "accept", "accept4", "getsockname", "getpeername", "setsockopt", "getsockopt",
    "shutdown", "sendto", "recvfrom", "sendmsg", "recvmsg", "sendmmsg", "recvmmsg",
    // processes and threads (which clone: by_argument)
    "execve", "exit", "exit_group", "wait4", "waitid", "set_tid_address", "set_robust_list", "get_robust_list", "rseq",
    "getpid", "gettid", "getppid", "setpgid", "getpgid", "setsid", "getsid", "pidfd_open", "pidfd_send_signal",
    "sched_getaffinity", "sched_setaffinity", "sched_getparam", "sched_getscheduler", "sched_get_priority_max",
    "sched_get_priority_min", "getpriority", "setpriority", "getcpu",
    // signals (of its own pid namespace)
    "kill", "tkill", "tgkill", "rt_sigaction", "rt_sigprocmask", "rt_sigreturn", "rt_sigpending", "rt_sigtimedwait",
    "rt_sigsuspend", "rt_sigqueueinfo", "sigaltstack",
    // time
    "gettimeofday", "times", "clock_gettime", "clock_getres", "getitimer", "setitimer", "timer_create",
    "timer_settime", "timer_gettime", "timer_getoverrun", "timer_delete",
    // who and where am I
    "uname", "sysinfo", "getuid", "getgid", "geteuid", "getegid", "getresuid", "getresgid", "getgroups", "capget",
    "getrlimit", "setrlimit", "prlimit64", "getrusage", "getrandom",
];

/// Allowed with any arguments where they exist: the older forms of calls above, which newer architectures left out.
#[rustfmt::skip]
pub(super) const X86_64_ALONE: &[&str] = &[
    "open", "creat", "stat", "lstat", "access", "getdents", "rename", "mkdir", "rmdir", "link", "unlink", "symlink",
    "readlink", "chmod", "utime", "utimes", "futimesat", "dup2", "pipe", "poll", "select", "epoll_create",
    "epoll_wait", "eventfd", "pause", "fork", "vfork", "arch_prctl", "getpgrp", "time", "alarm",
];

/// TCGETS (is it a terminal), TIOCGWINSZ, FIONREAD, FIONBIO, FIONCLEX, FIOCLEX.
const IOCTLS: &[u64] = &[0x5401, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451];
/// PDEATHSIG (set, get), GET_DUMPABLE, NAME (set, get), CAPBSET_READ, SET_VMA (names of malloc's areas).
const PRCTLS: &[u64] = &[1, 2, 3, 15, 16, 23, 0x5356_4d41];
const UNIX: u64 = libc::AF_UNIX as u64;
/// Every flag of `clone` that makes a namespace: time, mount, cgroup, uts, ipc, user, pid, net.
const CLONE_NAMESPACES: u64 =
    0x80 | 0x2_0000 | 0x200_0000 | 0x400_0000 | 0x800_0000 | 0x1000_0000 | 0x2000_0000 | 0x4000_0000;

/// Allowed if an argument has one of some values.
pub(super) fn by_argument() -> Vec<Value> {
    let equal = |call: &'static str, index: u8, values: &'static [u64]| {
        values.iter().map(move |value| {
            json!({"syscall": call, "args": [{"index": index, "type": "dword", "op": "eq", "val": value}]})
        })
    };
    let no_namespace = json!({"masked_eq": CLONE_NAMESPACES});
    let mut rules: Vec<Value> = equal("socket", 0, &[UNIX])
        .chain(equal("socketpair", 0, &[UNIX]))
        .chain(equal("ioctl", 1, IOCTLS))
        .chain(equal("prctl", 0, PRCTLS))
        .collect();
    rules.push(
        json!({"syscall": "clone", "args": [{"index": 0, "type": "qword", "op": no_namespace, "val": 0}]}),
    );
    rules
}
