//! What `worker` does by hand, without a coordinator: score, generate, warm-up, doctor.

pub mod doctor;
pub mod generate;
pub mod score;
pub mod warmup;

use agentfly_policy::placement::Dtype;

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
