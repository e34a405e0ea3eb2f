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

/// The programs for this architecture, in the order of installation, each as the kernel's `struct sock_filter` array in
/// bytes.
///
/// # Errors
/// [`SandboxError::Unsupported`] on an architecture without a table, [`SandboxError::Config`] if the table contradicts
/// itself.
pub(crate) fn programs() -> Result<Vec<Vec<u8>>, SandboxError> {
    let arch = TargetArch::try_from(std::env::consts::ARCH).ok().filter(|arch| *arch != TargetArch::riscv64);
    let arch = arch.ok_or_else(|| {
        SandboxError::Unsupported(format!(
            "there is no list of allowed system calls for {}; the sandbox runs on x86_64 and aarch64",
            std::env::consts::ARCH
        ))
    })?;
    Ok(compiled(arch)?.iter().map(bytes_of).collect())
}

fn compiled(arch: TargetArch) -> Result<[BpfProgram; 2], SandboxError> {
    let no_clone3 = json!({
        "mismatch_action": "allow",
        "match_action": {"errno": libc::ENOSYS},
        "filter": [{"syscall": "clone3"}],
    });
    let of_this_arch = if arch == TargetArch::x86_64 { table::X86_64_ALONE } else { &[] };
    // The first program answers clone3; here it only must not turn into EPERM, which would win over ENOSYS.
    let plain = table::EVERYWHERE.iter().chain(of_this_arch).chain(&["clone3"]);
    let mut rules: Vec<Value> = plain.map(|call| json!({"syscall": call})).collect();
    rules.extend(table::by_argument());
    let allowed = json!({
        "mismatch_action": {"errno": libc::EPERM},
        "match_action": "allow",
        "filter": rules,
    });
    Ok([compile(&no_clone3, arch)?, compile(&allowed, arch)?])
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
