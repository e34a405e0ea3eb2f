//! The programs are run here as the kernel would run them, for both architectures.

use std::collections::BTreeSet;

use proptest::prelude::*;
use seccompiler::sock_filter;

use super::*;

const ARCHITECTURES: [TargetArch; 2] = [TargetArch::x86_64, TargetArch::aarch64];
const AUDIT: [u32; 2] = [AUDIT_ARCH_X86_64, AUDIT_ARCH_AARCH64];
const KILL_PROCESS: u32 = 0x8000_0000;
const ALLOW: u32 = 0x7FFF_0000;
const ERRNO: u32 = 0x0005_0000;

/// The classic BPF of `seccomp(2)`, as far as such programs use it: the value that `struct seccomp_data` returns.
fn verdict(program: &[sock_filter], audit: u32, call: u32, arguments: [u64; 6]) -> u32 {
    let mut data = Vec::new();
    data.extend(call.to_le_bytes());
    data.extend(audit.to_le_bytes());
    data.extend(0_u64.to_le_bytes()); // the instruction pointer
    data.extend(arguments.iter().flat_map(|argument| argument.to_le_bytes()));
    let word = |at: u32| u32::from_le_bytes(std::array::from_fn(|i| data[at as usize + i]));
    let (mut at, mut accumulator) = (0, 0);
    loop {
        let now = &program[at];
        at += 1;
        let jump = |holds: bool| usize::from(if holds { now.jt } else { now.jf });
        match now.code {
            0x20 => accumulator = word(now.k), // LD W ABS
            0x05 => at += now.k as usize,      // JMP JA
            0x15 => at += jump(accumulator == now.k),
            0x25 => at += jump(accumulator > now.k),
            0x35 => at += jump(accumulator >= now.k),
            0x54 => accumulator &= now.k,
            0x06 => return now.k,
            other => panic!("instruction {other:#x} is not one that this test knows"),
        }
    }
}

const EVERYWHERE: [Around; 3] =
    [Around::Namespaces, Around::Node { signals: true }, Around::Node { signals: false }];

fn lists(place: usize) -> impl Iterator<Item = (Around, Who, List)> {
    let all = EVERYWHERE.into_iter().flat_map(|around| [(around, Who::Snippet), (around, Who::Head)]);
    all.map(move |(around, who)| (around, who, list(ARCHITECTURES[place], around, who).expect("compiles")))
}

fn answer_of(list: &List, place: usize, call: i64, arguments: [u64; 6]) -> u32 {
    let program = dispatch::joined(list).expect("known instructions");
    verdict(&program, AUDIT[place], u32::try_from(call).expect("a small number"), arguments)
}

/// What a snippet's program answers.
fn answer_where(around: Around, place: usize, call: i64, arguments: [u64; 6]) -> u32 {
    let list = list(ARCHITECTURES[place], around, Who::Snippet).expect("compiles");
    answer_of(&list, place, call, arguments)
}

/// The answer where it is the same in namespaces and on the node.
fn answer(place: usize, call: i64, arguments: [u64; 6]) -> u32 {
    let all = EVERYWHERE.map(|around| answer_where(around, place, call, arguments));
    assert!(all.iter().all(|one| *one == all[0]), "call {call}: {all:x?}");
    all[0]
}

fn refused(errno: i32) -> u32 {
    ERRNO | errno.cast_unsigned()
}

/// Numbers on both architectures: arch/x86/entry/syscalls/syscall_64.tbl and include/uapi/asm-generic/unistd.h.
#[rustfmt::skip]
const DANGEROUS: &[(&str, i64, i64)] = &[
    ("ptrace", 101, 117), ("bpf", 321, 280), ("mount", 165, 40), ("umount2", 166, 39), ("unshare", 272, 97),
    ("setns", 308, 268), ("keyctl", 250, 219), ("add_key", 248, 217), ("userfaultfd", 323, 282),
    ("io_uring_setup", 425, 425), ("io_uring_enter", 426, 426), ("memfd_create", 319, 279), ("memfd_secret", 447, 447),
    ("shmget", 29, 194), ("shmat", 30, 196), ("msgget", 68, 186), ("semget", 64, 190), ("perf_event_open", 298, 241),
    ("process_vm_readv", 310, 270), ("process_vm_writev", 311, 271), ("pidfd_getfd", 438, 438),
    ("open_by_handle_at", 304, 265), ("pivot_root", 155, 41), ("chroot", 161, 51), ("personality", 135, 92),
    ("init_module", 175, 105), ("finit_module", 313, 273), ("kexec_load", 246, 104), ("mknodat", 259, 33),
    ("fsopen", 430, 430), ("move_mount", 429, 429), ("mount_setattr", 442, 442), ("seccomp", 317, 277),
    ("setuid", 105, 146), ("setresuid", 117, 147), ("capset", 126, 91), ("reboot", 169, 142), ("swapon", 167, 224),
    ("kcmp", 312, 272), ("quotactl", 179, 60), ("acct", 163, 89), ("clock_settime", 227, 112),
    ("landlock_create_ruleset", 444, 444), ("execveat", 322, 281), ("process_madvise", 440, 440),
    ("prctl", 157, 167), ("flock", 73, 32), ("inotify_add_watch", 254, 27),
];

#[test]
fn the_dangerous_calls_answer_eperm_on_both_architectures() {
    for (name, x86_64, aarch64) in DANGEROUS {
        for (place, call) in [x86_64, aarch64].into_iter().enumerate() {
            assert_eq!(
                answer(place, *call, [0; 6]),
                refused(libc::EPERM),
                "{name} on {:?}",
                ARCHITECTURES[place]
            );
        }
    }
}

#[test]
fn what_python_needs_is_allowed_on_both_architectures() {
    // read, write, openat, munmap, futex, execve, exit_group, getrandom, wait4, newfstatat
    for (place, calls) in
        [[0, 1, 257, 11, 202, 59, 231, 318, 61, 262], [63, 64, 56, 215, 98, 221, 94, 278, 260, 79]]
            .iter()
            .enumerate()
    {
        for call in calls {
            assert_eq!(answer(place, *call, [7; 6]), ALLOW, "call {call} on {:?}", ARCHITECTURES[place]);
        }
    }
}

#[test]
fn threads_may_be_made_and_namespaces_may_not() {
    const THREAD: u64 = 0x3D_0F00; // as the C library clones one
    for (place, clone) in [56, 220].into_iter().enumerate() {
        for flags in [THREAD, libc::SIGCHLD as u64] {
            assert_eq!(answer(place, clone, [flags, 0, 0, 0, 0, 0]), ALLOW);
        }
        for flag in [
            libc::CLONE_NEWUSER,
            libc::CLONE_NEWNS,
            libc::CLONE_NEWPID,
            libc::CLONE_NEWNET,
            libc::CLONE_NEWIPC,
            libc::CLONE_NEWUTS,
            libc::CLONE_NEWCGROUP,
            0x80, // CLONE_NEWTIME
        ] {
            let flags = u64::from(flag.cast_unsigned()) | 17;
            assert_eq!(answer(place, clone, [flags, 0, 0, 0, 0, 0]), refused(libc::EPERM), "{flag:#x}");
        }
        assert_eq!(answer(place, 435, [0; 6]), refused(libc::ENOSYS), "clone3");
    }
}

#[test]
fn sockets_are_local_alone_and_on_the_node_pairs() {
    let unix = u64::from(libc::AF_UNIX.cast_unsigned());
    let of =
        |around, call, place, family, kind| answer_where(around, place, call, [family, kind, 0, 0, 0, 0]);
    const CLOEXEC: u64 = 0o2_000_000;
    for (place, [socket, socketpair]) in [[41, 53], [198, 199]].into_iter().enumerate() {
        for around in EVERYWHERE {
            for family in (0..64).filter(|family| *family != unix) {
                for call in [socket, socketpair] {
                    assert_eq!(of(around, call, place, family, 1), refused(libc::EPERM), "family {family}");
                }
            }
            for kind in [1, 5, 1 | CLOEXEC] {
                assert_eq!(of(around, socketpair, place, unix, kind), ALLOW, "{around:?}, type {kind}");
            }
        }
        assert_eq!(of(Around::Namespaces, socket, place, unix, 1), ALLOW);
        for around in &EVERYWHERE[1..] {
            assert_eq!(of(*around, socket, place, unix, 1), refused(libc::EPERM));
            // A datagram socket of a pair could be sent to any other one.
            assert_eq!(of(*around, socketpair, place, unix, 2), refused(libc::EPERM));
        }
    }
}

/// What a process may do to files and processes of its own user, and Landlock does not control: by number on x86-64.
#[rustfmt::skip]
const OF_THE_SAME_USER: &[(&str, i64, [u64; 6])] = &[
    ("chmod", 90, [0; 6]), ("fchmod", 91, [0; 6]), ("fchmodat", 268, [0; 6]), ("fchmodat2", 452, [0; 6]),
    ("chown", 92, [0; 6]), ("fchownat", 260, [0; 6]), ("utimensat", 280, [0; 6]), ("utimes", 235, [0; 6]),
    ("setxattr", 188, [0; 6]), ("getxattr", 191, [0; 6]), 
    ("connect", 42, [0; 6]), ("sendmsg", 46, [0; 6]), ("bind", 49, [0; 6]), ("sendto with an address", 44, [3, 0, 0, 0, 0x7F00_0000_0000, 16]),
    ("prlimit64 of another", 302, [1, 0, 0, 0, 0, 0]), ("setpriority", 141, [0; 6]),
    ("sched_setaffinity of another", 203, [1, 0, 0, 0, 0, 0]), ("sched_setscheduler", 144, [0; 6]),
    ("fcntl F_SETOWN", 72, [3, 8, 1, 0, 0, 0]), ("fcntl F_SETSIG", 72, [3, 10, 9, 0, 0, 0]),
    ("fallocate", 285, [0; 6]), ("fcntl F_SETLEASE", 72, [3, 1024, 0, 0, 0, 0]), ("prctl SET_PDEATHSIG", 157, [1, 0, 0, 0, 0, 0]),
    ("clone of a sibling", 56, [0x8011, 0, 0, 0, 0, 0]),
];

#[test]
fn on_the_node_the_user_s_other_files_and_processes_are_out_of_reach() {
    for around in &EVERYWHERE[1..] {
        for (name, call, arguments) in OF_THE_SAME_USER {
            assert_eq!(answer_where(*around, 0, *call, *arguments), refused(libc::EPERM), "{name}");
        }
        // getrlimit by prlimit64, F_DUPFD_CLOEXEC, send without an address, a fork
        for (call, arguments) in
            [(302, [0; 6]), (72, [3, 1030, 0, 0, 0, 0]), (44, [3, 1, 1, 0, 0, 0]), (56, [17, 0, 0, 0, 0, 0])]
        {
            assert_eq!(answer_where(*around, 0, call, arguments), ALLOW, "call {call}");
        }
    }
    for signal in [62, 200, 234, 129, 424] {
        let of = |around| answer_where(around, 0, signal, [1, 9, 0, 0, 0, 0]);
        assert_eq!(EVERYWHERE.map(of), [ALLOW, ALLOW, refused(libc::EPERM)], "call {signal}");
    }
}

#[test]
fn a_terminal_cannot_be_written_to_by_its_ioctls() {
    const TIOCSTI: u64 = 0x5412;
    for (place, ioctl) in [16, 29].into_iter().enumerate() {
        assert_eq!(answer(place, ioctl, [0, 0x5413, 0, 0, 0, 0]), ALLOW, "the size of a window");
        assert_eq!(answer(place, ioctl, [0, TIOCSTI, 0, 0, 0, 0]), refused(libc::EPERM));
    }
}

#[test]
fn another_architecture_s_calls_end_the_process() {
    for (place, other) in [(0, AUDIT[1]), (0, 0x4000_0003), (1, AUDIT[0]), (1, 0x4000_0028)] {
        for (_, _, list) in lists(place) {
            let program = dispatch::joined(&list).expect("known instructions");
            assert_eq!(verdict(&program, other, 0, [0; 6]), KILL_PROCESS, "{other:#x}");
        }
    }
}

#[test]
fn no_call_is_named_twice() {
    let all = [
        table::EVERYWHERE,
        table::IN_NAMESPACES,
        table::LEAVE_GROUP,
        table::TIMERS,
        &table::SIGNALS.iter().map(|(call, _)| *call).collect::<Vec<_>>(),
        table::X86_64_EVERYWHERE,
        table::X86_64_IN_NAMESPACES,
    ]
    .concat();
    assert_eq!(all.iter().collect::<BTreeSet<_>>().len(), all.len());
}

#[test]
fn every_program_fits_the_kernel_s_bound_of_4096_instructions() {
    for (_, _, list) in [0, 1].into_iter().flat_map(lists) {
        let length = dispatch::joined(&list).expect("known instructions").len();
        assert!((2..=4096).contains(&length));
        assert!(length < list.allowed.len() * 2);
    }
}

/// setpgid and setsid on x86-64.
const LEAVE_GROUP: [i64; 2] = [109, 112];

#[test]
fn only_a_snippet_with_a_pid_namespace_can_leave_its_process_group_and_others_are_told_they_did() {
    for (around, who, list) in lists(0) {
        let may = around == Around::Namespaces && who == Who::Snippet;
        for call in LEAVE_GROUP {
            assert_eq!(answer_of(&list, 0, call, [0; 6]), if may { ALLOW } else { refused(0) }, "{around:?}");
        }
    }
}

#[test]
fn the_heads_of_a_session_may_clone_siblings_and_nothing_that_could_wake_them() {
    for around in EVERYWHERE {
        let list = list(TargetArch::x86_64, around, Who::Head).expect("compiles");
        let of = |call, arguments| answer_of(&list, 0, call, arguments);
        let clone = |flags: u64| of(56, [flags, 0, 0, 0, 0, 0]);
        assert_eq!([clone(17), clone(0x8011), clone(0x3D_0F00)], [ALLOW; 3], "a fork, a sibling, a thread");
        assert_eq!([clone(18), clone(0x8012)], [refused(libc::EPERM); 2], "its end told by SIGCONT");
        assert_eq!(of(222, [0; 6]), refused(libc::EPERM), "timer_create");
        assert_eq!(of(157, [1, 18, 0, 0, 0, 0]), refused(libc::EPERM), "the parent's end told by SIGCONT");
        for (call, place) in [(62, 1), (200, 1), (234, 2), (129, 1), (424, 1)] {
            let mut arguments = [5; 6];
            arguments[place] = 18;
            assert_eq!(of(call, arguments), refused(libc::EPERM), "call {call} with SIGCONT");
        }
    }
}

#[test]
fn memory_that_is_counted_for_nobody_cannot_be_had() {
    const PRIVATE: u64 = 2;
    const SHARED: u64 = 1;
    const ANONYMOUS: u64 = 0x20;
    const HUGE: u64 = 0x4_0000;
    for (_, _, list) in lists(0) {
        let mmap = |flags| answer_of(&list, 0, 9, [0, 4096, 3, flags, 0, 0]);
        assert_eq!([mmap(PRIVATE | ANONYMOUS), mmap(PRIVATE), mmap(SHARED)], [ALLOW; 3]);
        for flags in [SHARED | ANONYMOUS, 3 | ANONYMOUS, PRIVATE | ANONYMOUS | HUGE, SHARED | HUGE] {
            assert_eq!(mmap(flags), refused(libc::EPERM), "{flags:#x}");
        }
        let option = |level, name| answer_of(&list, 0, 54, [3, level, name, 0, 0, 0]);
        assert_eq!(option(1, 2), ALLOW, "SO_REUSEADDR");
        for (level, name) in [(1, 26), (1, 50), (1, 7), (1, 8), (6, 2)] {
            assert_eq!(option(level, name), refused(libc::EPERM), "level {level}, option {name}");
        }
    }
}

/// Arguments that some rule asks for, and others.
fn argument() -> impl Strategy<Value = u64> {
    prop_oneof![
        0..64_u64,
        any::<u64>(),
        (0..32_u32).prop_map(|bit| 1 << bit),
        Just(0x5413),
        Just(1030),
        Just(0x8011)
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    /// What bisection answers is what seccompiler's own programs would.
    #[test]
    fn the_joined_program_is_the_list(
        call in prop_oneof![0..600_u32, any::<u32>()],
        place in 0..2_usize,
        arguments in proptest::array::uniform6(argument()),
    ) {
        for (around, who, list) in lists(place) {
            let joined = dispatch::joined(&list).expect("known instructions");
            for call in [call, call % 512, [56, 220][place], [157, 167][place], [72, 25][place]] {
                let programs = list.exceptions.iter().chain([&list.allowed]);
                let mut verdicts = programs.map(|program| verdict(program, AUDIT[place], call, arguments));
                let expected = verdicts.find(|found| *found != ALLOW).unwrap_or(ALLOW);
                let found = verdict(&joined, AUDIT[place], call, arguments);
                prop_assert_eq!(found, expected, "call {} for {:?} in {:?}", call, who, around);
            }
        }
    }

    /// x32's numbers, those of calls to come, and any arguments.
    #[test]
    fn a_number_that_nobody_named_is_refused(call in 470_i64.., place in 0..2_usize, arguments: [u64; 6]) {
        let call = call & i64::from(u32::MAX) | 1 << 20;
        prop_assert_eq!(answer(place, call, arguments), refused(libc::EPERM));
    }
}
