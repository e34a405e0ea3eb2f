//! What this machine has, each thing tried and not guessed where that costs little.

use agentfly_c10d::LIBTORCH_VERSION;
use agentfly_common::machine::{Memory, cores, cpu_computes_bf16, cpu_has_bf16_matrix_unit, memory};
use agentfly_common::planner::Precision;
use agentfly_policy::placement::{Place, cuda_built, products_are_batch_invariant};
use agentfly_sandbox::{Sandbox, SandboxConfig, Tier};
use serde::Serialize;

use crate::gpu::{self, Gpu};
use crate::rank::python::interpreter;

/// What there is.
#[derive(Debug, Serialize)]
pub(super) struct Facts {
    pub(super) cores: u32,
    pub(super) cpu: Option<String>,
    /// avx512_bf16: bf16 is multiplied in hardware.
    pub(super) cpu_bf16: bool,
    /// amx_bf16.
    pub(super) cpu_amx: bool,
    /// Number types in which a chain's tokens are the same bits in any batch on this CPU.
    pub(super) batch_invariant: Vec<Precision>,
    pub(super) memory_bytes: u64,
    pub(super) memory_available_bytes: u64,
    pub(super) gpus: Vec<Gpu>,
    /// Whether this program can use GPUs at all.
    pub(super) built_for_cuda: bool,
    pub(super) libtorch: &'static str,
    /// The tiers of the sandbox that work here, the strongest first; the first is used.
    pub(super) sandbox: Vec<Tier>,
    /// Why there is none.
    pub(super) sandbox_problem: Option<String>,
}

impl Facts {
    /// Looks around; the sandbox is started, used once and ended on each of its tiers.
    pub(super) fn gather() -> Self {
        let Memory { total_bytes, available_bytes } = memory();
        let (sandbox, sandbox_problem) = sandbox();
        Self {
            cores: cores(),
            cpu: cpu_name(),
            cpu_bf16: cpu_computes_bf16(),
            cpu_amx: cpu_has_bf16_matrix_unit(),
            batch_invariant: [Precision::F32, Precision::Bf16]
                .into_iter()
                .filter(|precision| products_are_batch_invariant(Place::Cpu, *precision))
                .collect(),
            memory_bytes: total_bytes,
            memory_available_bytes: available_bytes,
            gpus: gpu::list(),
            built_for_cuda: cuda_built(),
            libtorch: LIBTORCH_VERSION,
            sandbox,
            sandbox_problem,
        }
    }

    /// What must be mended before a job can run.
    pub(super) fn problems(&self) -> Vec<String> {
        let sandbox = self.sandbox_problem.as_ref();
        sandbox.map(|why| format!("tools and rewards cannot run: {why}")).into_iter().collect()
    }

    /// Whether GPUs are there and cannot be used.
    pub(super) fn idle_gpus(&self) -> bool {
        !self.gpus.is_empty() && !self.built_for_cuda
    }
}

/// The tiers on which a first snippet runs through every layer, and where there is none why.
fn sandbox() -> (Vec<Tier>, Option<String>) {
    let python = match interpreter() {
        Ok(python) => python,
        Err(error) => return (Vec::new(), Some(format!("{error:#}"))),
    };
    let start = |tier| {
        Sandbox::start(SandboxConfig { slots: 1, preload: Vec::new(), tier, ..SandboxConfig::new(&python) })
    };
    match start(None) {
        // Starting runs a first snippet.
        Ok(strongest) => {
            let weaker = Tier::ALL.into_iter().skip_while(|tier| *tier != strongest.tier()).skip(1);
            let weaker = weaker.filter(|tier| start(Some(*tier)).is_ok());
            (std::iter::once(strongest.tier()).chain(weaker).collect(), None)
        }
        Err(error) => (Vec::new(), Some(error.to_string())),
    }
}

fn cpu_name() -> Option<String> {
    let info = std::fs::read_to_string("/proc/cpuinfo").ok()?;
    let line = info.lines().find(|line| line.starts_with("model name"))?;
    Some(line.split_once(':')?.1.trim().to_owned())
}
