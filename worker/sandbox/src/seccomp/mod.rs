//! The system calls a snippet may make, as BPF programs for an architecture.
//!
//! The zygote's child installs its program just before it runs the snippet. The list ([`table`]) is an allowlist: a
//! call not named there answers EPERM, so a call that a future kernel adds is refused until somebody names it. `clone3`
//! answers ENOSYS, which makes the C library fall back to `clone`, whose flags a filter can see (those of `clone3` lie
//! behind a pointer).

mod dispatch;
mod table;

use seccompiler::{BpfProgram, TargetArch};
use serde_json::{Value, json};

use crate::error::SandboxError;
use dispatch::List;

/// Of linux/audit.h.
const AUDIT_ARCH_X86_64: u32 = 0xC000_003E;
const AUDIT_ARCH_AARCH64: u32 = 0xC000_00B7;

/// What of the node is around a snippet, and with it what its calls could reach.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Around {
    /// Namespaces of its own.
    Namespaces,
    /// The node itself, as a process among others of the same user. `signals`: Landlock keeps signals to the snippet's own
    /// processes (from its version 6).
    Node { signals: bool },
}

/// The two programs for this architecture, each as the kernel's `struct sock_filter` array in bytes: that of a snippet, and
/// that of the heads of a session (`python/session.py`), which clone siblings.
///
/// # Errors
/// [`SandboxError::Unsupported`] on an architecture without a table, [`SandboxError::Config`] if the table contradicts
/// itself.
pub(crate) fn programs(around: Around) -> Result<Vec<Vec<u8>>, SandboxError> {
    let arch = TargetArch::try_from(std::env::consts::ARCH).ok().filter(|arch| *arch != TargetArch::riscv64);
    let arch = arch.ok_or_else(|| {
        SandboxError::Unsupported(format!(
            "there is no list of allowed system calls for {}; the sandbox runs on x86_64 and aarch64",
            std::env::consts::ARCH
        ))
    })?;
    let of_both = [Who::Snippet, Who::Head].map(|who| {
        let list = list(arch, around, who)?;
        let program = dispatch::joined(&list)
            .ok_or_else(|| fault(arch, "a program has an instruction that is not known".into()))?;
        Ok(bytes_of(&program))
    });
    of_both.into_iter().collect()
}

/// An errno with which a call is not made, and told that it was.
const SUCCESS: i32 = 0;

/// Whose program.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Who {
    Snippet,
    Head,
}

fn list(arch: TargetArch, around: Around, who: Who) -> Result<List, SandboxError> {
    // A snippet's pid namespace ends with it. Elsewhere its group is how its processes are found.
    let keeps_its_group = around != Around::Namespaces || who == Who::Head;
    let named = table::named(arch == TargetArch::x86_64, around, who);
    let by_argument = table::by_argument(around, who);
    let allow = |rules: &[Value]| json!({"mismatch_action": {"errno": libc::EPERM}, "match_action": "allow", "filter": rules});
    let except = |errno: i32, calls: &[&str]| {
        let calls: Vec<_> = calls.iter().map(|call| json!({"syscall": call})).collect();
        json!({"mismatch_action": "allow", "match_action": {"errno": errno}, "filter": calls})
    };
    let mut exceptions = vec![compile(&except(libc::ENOSYS, &["clone3"]), arch)?];
    if keeps_its_group {
        exceptions.push(compile(&except(SUCCESS, table::LEAVE_GROUP), arch)?);
    }
    Ok(List {
        exceptions,
        allowed: compile(&allow(&[named, by_argument.clone()].concat()), arch)?,
        by_argument: compile(&allow(&by_argument), arch)?,
        architecture: if arch == TargetArch::x86_64 { AUDIT_ARCH_X86_64 } else { AUDIT_ARCH_AARCH64 },
    })
}

fn fault(arch: TargetArch, what: String) -> SandboxError {
    SandboxError::Config(format!("system call table of {arch:?}: {what}"))
}

fn compile(filter: &Value, arch: TargetArch) -> Result<BpfProgram, SandboxError> {
    let text = json!({"snippet": filter}).to_string();
    let mut all =
        seccompiler::compile_from_json(text.as_bytes(), arch).map_err(|e| fault(arch, e.to_string()))?;
    all.remove("snippet").ok_or_else(|| fault(arch, "no program was made".into()))
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

#[cfg(test)]
mod tests;
