//! The system calls a snippet may make, as BPF programs for an architecture.
//!
//! The zygote's child installs both programs just before it runs the snippet. The list ([`table`]) is an allowlist: a
//! call not named there answers EPERM, so a call that a future kernel adds is refused until somebody names it. `clone3`
//! answers ENOSYS, which makes the C library fall back to `clone`, whose flags a filter can see (those of `clone3` lie
//! behind a pointer).

mod table;

use seccompiler::{BpfProgram, TargetArch};
use serde_json::{Value, json};

use crate::error::SandboxError;

/// What of the node is around a snippet, and with it what its calls could reach.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Around {
    /// Namespaces of its own.
    Namespaces,
    /// The node itself, as a process among others of the same user. `signals`: Landlock keeps signals to the snippet's own
    /// processes (from its version 6).
    Node { signals: bool },
}

/// The programs for this architecture, in the order of installation, each as the kernel's `struct sock_filter` array in
/// bytes. The last two are for everybody; one before them is not for the heads of a session (`python/session.py`), which clone
/// siblings.
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
    Ok(compiled(arch, around)?.iter().map(bytes_of).collect())
}

fn compiled(arch: TargetArch, around: Around) -> Result<Vec<BpfProgram>, SandboxError> {
    let refuse = |errno: i32, rules: &[Value]| json!({"mismatch_action": "allow", "match_action": {"errno": errno}, "filter": rules});
    let allowed = json!({
        "mismatch_action": {"errno": libc::EPERM},
        "match_action": "allow",
        "filter": table::rules(arch == TargetArch::x86_64, around),
    });
    // The last one refuses to install another.
    let mut programs = vec![
        compile(&refuse(libc::ENOSYS, &[json!({"syscall": "clone3"})]), arch)?,
        compile(&allowed, arch)?,
    ];
    if around != Around::Namespaces {
        // A sibling would be no descendant of the process whose descendants are watched. In a pid namespace that process
        // is the first, which cannot have siblings.
        programs.insert(0, compile(&refuse(libc::EPERM, &[table::clone_of_a_sibling()]), arch)?);
    }
    Ok(programs)
}

fn compile(filter: &Value, arch: TargetArch) -> Result<BpfProgram, SandboxError> {
    let fault = |what: String| SandboxError::Config(format!("system call table of {arch:?}: {what}"));
    let text = json!({"snippet": filter}).to_string();
    let mut all = seccompiler::compile_from_json(text.as_bytes(), arch).map_err(|e| fault(e.to_string()))?;
    all.remove("snippet").ok_or_else(|| fault("no program was made".into()))
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
