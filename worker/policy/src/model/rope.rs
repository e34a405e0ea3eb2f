//! Rotary position embedding (Su et al. 2021) in Hugging Face's half-split layout, with Llama 3's stretching
//! of long wavelengths.
//!
//! What must stay true: angles are computed in f32 whatever the model's kind, as `transformers` does.

use agentfly_common::model_dir::{ModelConfig, RopeScaling};
use tch::{Device, Kind, Tensor};

use super::error::ModelError;
use super::host;

/// The model's rotation frequencies.
#[derive(Debug)]
pub(crate) struct Rope {
    /// `[head_dim / 2]` f32, radians per position.
    inverse_frequencies: Tensor,
}

/// Cosines and sines of some positions, f32 `[N, head_dim / 2]` each, rounded to the model's kind as `transformers`
/// rounds them.
pub(crate) struct Rotation {
    pub(crate) cos: Tensor,
    pub(crate) sin: Tensor,
}

impl Rope {
    pub(crate) fn new(config: &ModelConfig, device: Device) -> Result<Self, ModelError> {
        Ok(Self { inverse_frequencies: inverse_frequencies(config)?.f_to_device(device)? })
    }

    /// The rotation of `positions`, `[N]`.
    pub(crate) fn rotation(&self, positions: &Tensor, kind: Kind) -> Result<Rotation, ModelError> {
        let angles = positions.f_to_kind(Kind::Float)?.f_unsqueeze(-1)?.f_mul(&self.inverse_frequencies)?;
        let round = |x: Tensor| -> Result<Tensor, ModelError> {
            Ok(x.f_to_kind(kind)?.f_to_kind(Kind::Float)?.f_contiguous()?)
        };
        Ok(Rotation { cos: round(angles.f_cos()?)?, sin: round(angles.f_sin()?)? })
    }
}

/// Radians per position of each pair of channels, f32 on the CPU, by the operators that `transformers` calls: another
/// power function's last bit, times a position in the hundreds, is an angle that shows in the logits.
fn inverse_frequencies(config: &ModelConfig) -> Result<Tensor, ModelError> {
    let channels = Tensor::f_arange_start_step(0, config.head_dim, 2, (Kind::Float, Device::Cpu))?;
    let exponents = channels.f_div_scalar(config.head_dim)?;
    let plain = Tensor::f_pow_scalar(config.rope_theta, &exponents)?.f_reciprocal()?;
    let Some(scaling) = &config.rope_scaling else { return Ok(plain) };
    let stretched: Vec<f32> =
        host(&plain)?.into_iter().map(|frequency| stretch(frequency, scaling)).collect();
    Ok(Tensor::from_slice(&stretched))
}

/// Llama 3.1's rule: long wavelengths are stretched by `factor`, short ones kept, those between blended.
fn stretch(frequency: f32, scaling: &RopeScaling) -> f32 {
    let context = scaling.original_max_position_embeddings as f32;
    let (low, high) = (scaling.low_freq_factor as f32, scaling.high_freq_factor as f32);
    // An inverse and a product, as libtorch divides a number by a tensor.
    let wavelength = frequency.recip() * (2.0 * std::f32::consts::PI);
    if wavelength > context / low {
        frequency / scaling.factor as f32
    } else if wavelength < context / high {
        frequency
    } else {
        let smooth = (wavelength.recip() * context - low) / (high - low);
        (1.0 - smooth) * frequency / scaling.factor as f32 + smooth * frequency
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn wavelengths_between_the_two_bounds_are_stretched_in_part() {
        let scaling = RopeScaling {
            factor: 8.0,
            low_freq_factor: 1.0,
            high_freq_factor: 4.0,
            original_max_position_embeddings: 64,
        };
        // The wavelength in positions, and by what its frequency is multiplied; bounds at 64 / 4 and 64 / 1.
        for (wavelength, expected) in [
            (8.0, 1.0),
            (15.9, 1.0),
            (64.0 / 3.0, 2.0 / 3.0 + 1.0 / 3.0 / 8.0),
            (32.0, 1.0 / 3.0 + 2.0 / 3.0 / 8.0),
            (64.1, 1.0 / 8.0),
            (1000.0, 1.0 / 8.0),
        ] {
            let frequency = 2.0 * std::f32::consts::PI / wavelength;
            let factor = stretch(frequency, &scaling) / frequency;
            assert!((factor - expected).abs() < 1e-4, "wavelength {wavelength}: {factor}, not {expected}");
        }
    }
}
