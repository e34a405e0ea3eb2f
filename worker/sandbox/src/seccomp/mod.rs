//! The system calls a snippet may make, as a table, and the BPF programs made from it.
//!
//! The zygote's child installs both programs just before it runs the snippet. The list is an allowlist: a call not
//! named here answers EPERM, so a call that a future kernel adds is refused until somebody names it. `clone3` answers
//! ENOSYS, which makes the C library fall back to `clone`, whose flags a filter can see (those of `clone3` lie behind
//! a pointer). Calls that make namespaces or mounts, trace processes, load programs into the kernel or hold memory
//! outside the accounting (memfd, System V shared memory) must stay out of the table.

use std::collections::BTreeMap;

use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule,
    TargetArch,
};

use crate::error::SandboxError;

/// One architecture's numbers. Another architecture is another value of this type.
pub(crate) struct Table {
    arch: TargetArch,
    /// Allowed with any arguments.
    plain: &'static [libc::c_long],
    /// Allowed if one argument has one of the values: (call, argument's index, values).
    by_argument: &'static [(libc::c_long, u8, &'static [u64])],
    clone: libc::c_long,
    clone3: libc::c_long,
}

/// Every flag of `clone` that makes a namespace: time, mount, cgroup, uts, ipc, user, pid, net.
const CLONE_NAMESPACES: u64 =
    0x80 | 0x2_0000 | 0x200_0000 | 0x400_0000 | 0x800_0000 | 0x1000_0000 | 0x2000_0000 | 0x4000_0000;

/// The table of the architecture this program was compiled for.
///
/// # Errors
/// [`SandboxError::Unsupported`] on an architecture without a table.
pub(crate) fn native() -> Result<&'static Table, SandboxError> {
    #[cfg(target_arch = "x86_64")]
    return Ok(&x86_64::TABLE);
    #[cfg(not(target_arch = "x86_64"))]
    Err(SandboxError::Unsupported(format!(
        "there is no list of allowed system calls for {}; the sandbox runs on x86_64",
        std::env::consts::ARCH
    )))
}

impl Table {
    /// The programs, in the order of installation, each as the kernel's `struct sock_filter` array in bytes.
    ///
    /// # Errors
    /// [`SandboxError::Config`] if the table contradicts itself.
    pub(crate) fn programs(&self) -> Result<Vec<Vec<u8>>, SandboxError> {
        let fault = |e: seccompiler::BackendError| SandboxError::Config(format!("system call table: {e}"));
        let no_clone3 = SeccompFilter::new(
            BTreeMap::from([(self.clone3, Vec::new())]),
            SeccompAction::Allow,
            SeccompAction::Errno(libc::ENOSYS as u32),
            self.arch,
        );
        let allowed = SeccompFilter::new(
            self.rules().map_err(fault)?,
            SeccompAction::Errno(libc::EPERM as u32),
            SeccompAction::Allow,
            self.arch,
        );
        [no_clone3, allowed]
            .into_iter()
            .map(|filter| Ok(bytes_of(&filter.map_err(fault)?.try_into().map_err(fault)?)))
            .collect()
    }

    fn rules(&self) -> Result<BTreeMap<i64, Vec<SeccompRule>>, seccompiler::BackendError> {
        let mut rules: BTreeMap<i64, Vec<SeccompRule>> = BTreeMap::new();
        rules.extend(self.plain.iter().map(|call| (*call, Vec::new())));
        for (call, index, values) in self.by_argument {
            for value in *values {
                let equal = SeccompCondition::new(*index, SeccompCmpArgLen::Dword, SeccompCmpOp::Eq, *value)?;
                rules.entry(*call).or_default().push(SeccompRule::new(vec![equal])?);
            }
        }
        let none = SeccompCmpOp::MaskedEq(CLONE_NAMESPACES);
        let no_namespace = SeccompCondition::new(0, SeccompCmpArgLen::Qword, none, 0)?;
        rules.insert(self.clone, vec![SeccompRule::new(vec![no_namespace])?]);
        // The first program answers it; here it only must not turn into EPERM, which would win over ENOSYS.
        rules.insert(self.clone3, Vec::new());
        Ok(rules)
    }
}

fn bytes_of(program: &BpfProgram) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(program.len() * 8);
    for instruction in program {
        bytes.extend(instruction.code.to_ne_bytes());
        bytes.extend([instruction.jt, instruction.jf]);
        bytes.extend(instruction.k.to_ne_bytes());
    }
    bytes
}

#[cfg(target_arch = "x86_64")]
mod x86_64 {
    use super::{Table, TargetArch};
    use libc::*;

    const UNIX: u64 = AF_UNIX as u64;

    /// TCGETS (is it a terminal), TIOCGWINSZ, FIONREAD, FIONBIO, FIONCLEX, FIOCLEX.
    const IOCTLS: &[u64] = &[0x5401, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451];
    /// PDEATHSIG (set, get), GET_DUMPABLE, NAME (set, get), CAPBSET_READ, SET_VMA (names of malloc's areas).
    const PRCTLS: &[u64] = &[1, 2, 3, 15, 16, 23, 0x5356_4d41];

    pub(super) const TABLE: Table = Table {
        arch: TargetArch::x86_64,
        plain: PLAIN,
        by_argument: &[
            (SYS_socket, 0, &[UNIX]),
            (SYS_socketpair, 0, &[UNIX]),
            (SYS_ioctl, 1, IOCTLS),
            (SYS_prctl, 0, PRCTLS),
        ],
        clone: SYS_clone,
        clone3: SYS_clone3,
    };

    #[rustfmt::skip]
    const PLAIN: &[c_long] = &[
        // files that are open
        SYS_read, SYS_write, SYS_close, SYS_lseek, SYS_pread64, SYS_pwrite64, SYS_readv, SYS_writev, SYS_preadv,
        SYS_pwritev, SYS_preadv2, SYS_pwritev2, SYS_sendfile, SYS_splice, SYS_tee, SYS_copy_file_range, SYS_fcntl,
        SYS_flock, SYS_fsync, SYS_fdatasync, SYS_truncate, SYS_ftruncate, SYS_fallocate, SYS_fadvise64, SYS_dup,
        SYS_dup2, SYS_dup3, SYS_close_range, SYS_pipe, SYS_pipe2,
        // names of files
        SYS_open, SYS_openat, SYS_creat, SYS_stat, SYS_fstat, SYS_lstat, SYS_newfstatat, SYS_statx, SYS_statfs,
        SYS_fstatfs, SYS_access, SYS_faccessat, SYS_faccessat2, SYS_getdents, SYS_getdents64, SYS_getcwd, SYS_chdir,
        SYS_fchdir, SYS_rename, SYS_renameat, SYS_renameat2, SYS_mkdir, SYS_mkdirat, SYS_rmdir, SYS_link, SYS_linkat,
        SYS_unlink, SYS_unlinkat, SYS_symlink, SYS_symlinkat, SYS_readlink, SYS_readlinkat, SYS_chmod, SYS_fchmod,
        SYS_fchmodat, SYS_umask, SYS_utime, SYS_utimes, SYS_utimensat, SYS_futimesat, SYS_getxattr, SYS_lgetxattr,
        SYS_fgetxattr, SYS_listxattr, SYS_llistxattr, SYS_flistxattr, SYS_inotify_init1, SYS_inotify_add_watch,
        SYS_inotify_rm_watch,
        // memory
        SYS_mmap, SYS_munmap, SYS_mprotect, SYS_mremap, SYS_msync, SYS_mincore, SYS_madvise, SYS_brk, SYS_membarrier,
        // waiting
        SYS_poll, SYS_ppoll, SYS_select, SYS_pselect6, SYS_epoll_create, SYS_epoll_create1, SYS_epoll_ctl,
        SYS_epoll_wait, SYS_epoll_pwait, SYS_epoll_pwait2, SYS_eventfd, SYS_eventfd2, SYS_signalfd4,
        SYS_timerfd_create, SYS_timerfd_settime, SYS_timerfd_gettime, SYS_futex, SYS_pause, SYS_nanosleep,
        SYS_clock_nanosleep, SYS_sched_yield, SYS_restart_syscall,
        // local sockets (which families: by_argument)
        SYS_bind, SYS_listen, SYS_connect, SYS_accept, SYS_accept4, SYS_getsockname, SYS_getpeername, SYS_setsockopt,
        SYS_getsockopt, SYS_shutdown, SYS_sendto, SYS_recvfrom, SYS_sendmsg, SYS_recvmsg, SYS_sendmmsg, SYS_recvmmsg,
        // processes and threads (which clone: rules)
        SYS_fork, SYS_vfork, SYS_execve, SYS_exit, SYS_exit_group, SYS_wait4, SYS_waitid, SYS_set_tid_address,
        SYS_set_robust_list, SYS_get_robust_list, SYS_rseq, SYS_arch_prctl, SYS_getpid, SYS_gettid, SYS_getppid,
        SYS_setpgid, SYS_getpgid, SYS_getpgrp, SYS_setsid, SYS_getsid, SYS_pidfd_open, SYS_pidfd_send_signal,
        SYS_sched_getaffinity, SYS_sched_setaffinity, SYS_sched_getparam, SYS_sched_getscheduler,
        SYS_sched_get_priority_max, SYS_sched_get_priority_min, SYS_getpriority, SYS_setpriority, SYS_getcpu,
        // signals (of its own pid namespace)
        SYS_kill, SYS_tkill, SYS_tgkill, SYS_rt_sigaction, SYS_rt_sigprocmask, SYS_rt_sigreturn, SYS_rt_sigpending,
        SYS_rt_sigtimedwait, SYS_rt_sigsuspend, SYS_rt_sigqueueinfo, SYS_sigaltstack,
        // time
        SYS_gettimeofday, SYS_time, SYS_times, SYS_clock_gettime, SYS_clock_getres, SYS_alarm, SYS_getitimer,
        SYS_setitimer, SYS_timer_create, SYS_timer_settime, SYS_timer_gettime, SYS_timer_getoverrun, SYS_timer_delete,
        // who and where am I
        SYS_uname, SYS_sysinfo, SYS_getuid, SYS_getgid, SYS_geteuid, SYS_getegid, SYS_getresuid, SYS_getresgid,
        SYS_getgroups, SYS_capget, SYS_getrlimit, SYS_setrlimit, SYS_prlimit64, SYS_getrusage, SYS_getrandom,
    ];
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_dangerous_calls_are_not_in_the_table() {
        let table = native().expect("this architecture has a table");
        for call in [
            libc::SYS_ptrace,
            libc::SYS_bpf,
            libc::SYS_mount,
            libc::SYS_umount2,
            libc::SYS_unshare,
            libc::SYS_setns,
            libc::SYS_keyctl,
            libc::SYS_userfaultfd,
            libc::SYS_io_uring_setup,
            libc::SYS_memfd_create,
            libc::SYS_shmget,
            libc::SYS_perf_event_open,
            libc::SYS_process_vm_readv,
            libc::SYS_process_vm_writev,
            libc::SYS_pidfd_getfd,
            libc::SYS_open_by_handle_at,
            libc::SYS_pivot_root,
            libc::SYS_chroot,
            libc::SYS_personality,
            libc::SYS_init_module,
            libc::SYS_kexec_load,
            libc::SYS_mknodat,
        ] {
            assert!(!table.plain.contains(&call), "call {call} must stay refused");
            assert!(table.by_argument.iter().all(|(c, ..)| *c != call), "call {call} must stay refused");
        }
    }

    #[test]
    fn no_call_is_named_twice() {
        let table = native().expect("this architecture has a table");
        let mut calls = table.plain.to_vec();
        calls.extend(table.by_argument.iter().map(|(call, ..)| *call));
        calls.extend([table.clone, table.clone3]);
        let count = calls.len();
        calls.sort_unstable();
        calls.dedup();
        assert_eq!(calls.len(), count);
    }

    #[test]
    fn both_programs_fit_the_kernel_s_bound_of_4096_instructions() {
        for program in native().expect("table").programs().expect("compiles") {
            assert!(program.len() % 8 == 0 && program.len() / 8 <= 4096 && !program.is_empty());
        }
    }
}
