//! Where a model lives and in which numbers: devices and dtypes in words that need no libtorch type.
//!
//! Called by the rank and by `worker score|generate|warmup`, so that none of them names a tensor library.

use std::path::Path;
use std::str::FromStr;

use agentfly_c10d::{Float32MatmulPrecision, set_float32_matmul_precision};
use agentfly_common::config::Dtype as Asked;
use agentfly_common::machine::{cpu_computes_bf16, cpu_has_bf16_matrix_unit};
use agentfly_common::planner::Precision;
use tch::{Device, Kind, Tensor};

use crate::model::{Decoder, ModelConfig, ModelError, export, invariance};

/// The device a rank owns.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Place {
    /// The CPU.
    Cpu,
    /// One GPU, by index.
    Cuda(usize),
}

/// A place that is written wrongly.
#[derive(Debug, thiserror::Error)]
#[error("{0:?} is no device; expected cpu, cpu:N, cuda or cuda:N")]
pub struct UnknownPlace(String);

impl FromStr for Place {
    type Err = UnknownPlace;

    fn from_str(text: &str) -> Result<Self, UnknownPlace> {
        let (kind, index) = text.split_once(':').unwrap_or((text, "0"));
        let index = index.parse().map_err(|_| UnknownPlace(text.to_owned()))?;
        match kind {
            "cpu" => Ok(Self::Cpu),
            "cuda" => Ok(Self::Cuda(index)),
            _ => Err(UnknownPlace(text.to_owned())),
        }
    }
}

impl Place {
    pub(crate) fn device(self) -> Device {
        match self {
            Self::Cpu => Device::Cpu,
            Self::Cuda(index) => Device::Cuda(index),
        }
    }
}

/// The numbers weights and activations are kept in; the optimizer's are always f32.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Dtype {
    /// What the checkpoint was saved in, where the device computes that well; f32 otherwise.
    Auto,
    /// 32 bits.
    F32,
    /// 16 bits with f32's range.
    Bf16,
}

impl Dtype {
    /// What a model's weights are kept in on a place.
    #[must_use]
    pub fn precision(self, config: &ModelConfig, place: Place) -> Precision {
        let asked = match self {
            Self::Auto => Asked::Auto,
            Self::F32 => Asked::Float32,
            Self::Bf16 => Asked::Bfloat16,
        };
        let computes_bf16 = matches!(place, Place::Cuda(_)) || cpu_computes_bf16();
        Precision::choose(asked, config.torch_dtype.as_deref(), computes_bf16)
    }

    /// The tensor kind for a model on a place.
    pub(crate) fn kind(self, config: &ModelConfig, place: Place) -> Kind {
        kind_of(self.precision(config, place))
    }
}

/// Whether products in this precision are the same bits for a row whatever rows are beside it.
#[must_use]
pub fn products_are_batch_invariant(place: Place, precision: Precision) -> bool {
    invariance::of_products(kind_of(precision), place.device())
}

/// The same of all that a model computes.
#[must_use]
pub fn computes_batch_invariantly(config: &ModelConfig, place: Place, precision: Precision) -> bool {
    invariance::of_model(config, kind_of(precision), place.device())
}

/// The widths of a model, by their keys in `config.json`, for which it does not on any CPU in this precision.
#[must_use]
pub fn odd_widths(config: &ModelConfig, precision: Precision) -> Vec<(&'static str, i64)> {
    invariance::odd_widths(config, kind_of(precision))
}

fn kind_of(precision: Precision) -> Kind {
    match precision {
        Precision::F32 => Kind::Float,
        Precision::Bf16 => Kind::BFloat16,
    }
}

/// Whether this program was built with a CUDA libtorch.
#[must_use]
pub fn cuda_built() -> bool {
    agentfly_c10d::has_nccl()
}

/// GPUs that CUDA finds here.
#[must_use]
pub fn cuda_devices() -> usize {
    usize::try_from(tch::Cuda::device_count()).unwrap_or(0)
}

/// Sets libtorch up for this process: threads, and on CPUs the faster f32 kernels, which are still f32-accurate
/// (largest error 1e-6 of the largest result) wherever the CPU has no matrix unit that would round to bf16.
///
/// # Errors
/// When libtorch refuses the setting.
pub fn set_up(threads: u32, place: Place) -> agentfly_c10d::Result<()> {
    tch::set_num_threads(i32::try_from(threads.max(1)).unwrap_or(i32::MAX));
    match place {
        Place::Cpu if !cpu_has_bf16_matrix_unit() => {
            set_float32_matmul_precision(Float32MatmulPrecision::Medium)
        }
        _ => set_float32_matmul_precision(Float32MatmulPrecision::Highest),
    }
}

/// Reads a Hugging Face directory onto a place.
///
/// # Errors
/// What is wrong with the directory, by file and tensor.
pub fn open(dir: &Path, dtype: Dtype, place: Place) -> Result<Decoder, ModelError> {
    let config = ModelConfig::from_dir(dir)?;
    Decoder::load(dir, dtype.kind(&config, place), place.device())
}

/// A model of the directory's configuration with freshly drawn f32 weights on the CPU.
///
/// # Errors
/// What is wrong with `config.json`.
pub fn random(dir: &Path, seed: u64) -> Result<Decoder, ModelError> {
    Decoder::random(ModelConfig::from_dir(dir)?, seed, Kind::Float, Device::Cpu)
}

/// Writes a model in Hugging Face layout; the tokenizer's files come from `source`.
///
/// # Errors
/// The file that could not be written.
pub fn save(dir: &Path, decoder: &Decoder, source: &Path) -> Result<(), ModelError> {
    let named: Vec<(String, Tensor)> =
        decoder.parameters().iter().map(|(name, tensor)| (name.to_owned(), tensor.shallow_clone())).collect();
    export(dir, decoder.config(), &named, Some(source))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_are_read_or_refused_by_name() {
        assert_eq!("cpu:3".parse::<Place>().unwrap(), Place::Cpu);
        assert_eq!("cuda:7".parse::<Place>().unwrap(), Place::Cuda(7));
        assert!("tpu".parse::<Place>().unwrap_err().to_string().contains("tpu"));
    }
}
