//! Finds a call's rule by bisection of its number, where seccompiler's programs compare one number after another.
//!
//! When a filter is installed the kernel runs it for every call's number, to know which need no filter at all; with some
//! two hundred comparisons for each of some five hundred numbers that takes longer than anything else in isolating a
//! snippet. The verdicts are still seccompiler's: its programs are asked for them here.

use seccompiler::{BpfProgram, sock_filter};

/// Beyond the largest number of a call on any architecture; those from here on get the verdict of this one.
const NUMBERS: u32 = 512;

const LOAD_WORD: u16 = 0x20;
const JUMP: u16 = 0x05;
const JUMP_IF_EQUAL: u16 = 0x15;
const JUMP_IF_GREATER: u16 = 0x25;
const JUMP_IF_AT_LEAST: u16 = 0x35;
const AND: u16 = 0x54;
const RETURN: u16 = 0x06;

/// Where `struct seccomp_data` has the call's number, the architecture, and the first argument.
const NUMBER: u32 = 0;
const ARCHITECTURE: u32 = 4;
const FIRST_ARGUMENT: u32 = 16;

/// What a program says of a number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    /// This, whatever the arguments are.
    Return(u32),
    /// It looks at the arguments.
    ByArgument,
}

/// What `program` says of a number on the architecture that it is for, without its arguments; `None` if it has an
/// instruction that seccompiler does not make.
pub(super) fn verdict(program: &[sock_filter], architecture: u32, number: u32) -> Option<Verdict> {
    let (mut at, mut accumulator) = (0_usize, 0_u32);
    loop {
        let now = program.get(at)?;
        at += 1;
        let jump = |holds: bool| usize::from(if holds { now.jt } else { now.jf });
        match now.code {
            LOAD_WORD if now.k >= FIRST_ARGUMENT => return Some(Verdict::ByArgument),
            LOAD_WORD if now.k == NUMBER => accumulator = number,
            LOAD_WORD if now.k == ARCHITECTURE => accumulator = architecture,
            JUMP => at += now.k as usize,
            JUMP_IF_EQUAL => at += jump(accumulator == now.k),
            JUMP_IF_GREATER => at += jump(accumulator > now.k),
            JUMP_IF_AT_LEAST => at += jump(accumulator >= now.k),
            AND => accumulator &= now.k,
            RETURN => return Some(Verdict::Return(now.k)),
            _ => return None,
        }
    }
}

/// The programs of one list of calls.
pub(super) struct List {
    /// Of these the first that does not allow a number decides; otherwise `allowed`.
    pub(super) exceptions: Vec<BpfProgram>,
    /// The whole list.
    pub(super) allowed: BpfProgram,
    /// The part of the list that depends on arguments.
    pub(super) by_argument: BpfProgram,
    /// The kernel's number of the architecture (`AUDIT_ARCH_*`).
    pub(super) architecture: u32,
}

/// One program for the list; `None` if there is an instruction that seccompiler does not make.
pub(super) fn joined(list: &List) -> Option<BpfProgram> {
    const ALLOW: Verdict = Verdict::Return(libc::SECCOMP_RET_ALLOW);
    let architecture = list.architecture;
    let mut leaves: Vec<(u32, Verdict)> = Vec::new();
    for number in 0..=NUMBERS {
        let programs = list.exceptions.iter().chain([&list.allowed]);
        let mut verdicts = programs.map(|program| verdict(program, architecture, number));
        let found = verdicts.find(|found| *found != Some(ALLOW)).unwrap_or(Some(ALLOW))?;
        if leaves.last().is_none_or(|(_, before)| *before != found) {
            leaves.push((number, found));
        }
    }
    let mut program = vec![
        step(LOAD_WORD, ARCHITECTURE),
        sock_filter { code: JUMP_IF_EQUAL, jt: 1, jf: 0, k: architecture },
        step(RETURN, libc::SECCOMP_RET_KILL_PROCESS),
        step(LOAD_WORD, NUMBER),
    ];
    let mut to_arguments = Vec::new();
    bisect(&leaves, &mut program, &mut to_arguments);
    for place in to_arguments {
        let distance = program.len() - place - 1;
        program.get_mut(place)?.k = u32::try_from(distance).ok()?;
    }
    program.extend(list.by_argument.iter().cloned());
    Some(program)
}

/// Appends the search among leaves, each of which begins at its number. Notes the jumps that go to what follows it all.
fn bisect(leaves: &[(u32, Verdict)], program: &mut BpfProgram, to_arguments: &mut Vec<usize>) {
    match leaves {
        [] => {}
        [(_, Verdict::Return(value))] => program.push(step(RETURN, *value)),
        [(_, Verdict::ByArgument)] => {
            to_arguments.push(program.len());
            program.push(step(JUMP, 0));
        }
        _ => {
            let (low, high) = leaves.split_at(leaves.len() / 2);
            let first_of_high = high.first().map_or(0, |(number, _)| *number);
            program.push(sock_filter { code: JUMP_IF_AT_LEAST, jt: 0, jf: 1, k: first_of_high });
            // A conditional jump reaches 255 instructions; this one all.
            let over = program.len();
            program.push(step(JUMP, 0));
            bisect(low, program, to_arguments);
            let distance = program.len() - over - 1;
            if let Some(jump) = program.get_mut(over) {
                jump.k = u32::try_from(distance).unwrap_or(u32::MAX);
            }
            bisect(high, program, to_arguments);
        }
    }
}

fn step(code: u16, k: u32) -> sock_filter {
    sock_filter { code, jt: 0, jf: 0, k }
}
