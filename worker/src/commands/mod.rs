//! What `worker` does by hand, without a coordinator: score, generate, warm-up, doctor, sandbox.

pub mod doctor;
pub mod generate;
pub mod sandbox;
pub mod score;
pub mod warmup;

use agentfly_policy::placement::{Dtype, Place, cuda_built, cuda_devices};
use anyhow::ensure;

/// Threads a core beyond which a request is a slip of the hand: starting them takes longer than any work.
const MOST_THREADS_PER_CORE: usize = 4;

/// Refuses a number of threads that no machine profits from, and a GPU that is not there.
fn check_place(threads: u32, device: Place) -> anyhow::Result<()> {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let most = MOST_THREADS_PER_CORE * cores;
    ensure!(
        (1..=most).contains(&(threads as usize)),
        "--threads {threads}: expected 1 to {most}; this machine has {cores} cores, and more threads than that are slower"
    );
    let Place::Cuda(index) = device else { return Ok(()) };
    ensure!(
        cuda_built(),
        "--device cuda:{index}: this program was built without CUDA; build it as deploy/docs/gpu.md says, or use \
         --device cpu"
    );
    let there = cuda_devices();
    ensure!(
        index < there,
        "--device cuda:{index}: CUDA finds {there} GPUs here, numbered from 0; see `worker doctor`, or use --device cpu"
    );
    Ok(())
}

/// A dtype on the command line.
#[derive(Debug, Clone, Copy, clap::ValueEnum)]
pub enum DtypeArg {
    /// What the checkpoint was saved in, where this device computes that well
    Auto,
    /// 32 bits
    F32,
    /// 16 bits with f32's range
    Bf16,
}

impl From<DtypeArg> for Dtype {
    fn from(arg: DtypeArg) -> Self {
        match arg {
            DtypeArg::Auto => Self::Auto,
            DtypeArg::F32 => Self::F32,
            DtypeArg::Bf16 => Self::Bf16,
        }
    }
}
