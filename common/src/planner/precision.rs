//! The numbers that weights, activations and the KV cache are kept in.

use serde::Serialize;

use crate::config::Dtype;

/// A number type of the network; the optimizer's numbers are always f32.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Precision {
    /// 32 bits.
    F32,
    /// 16 bits with f32's range.
    Bf16,
}

impl Precision {
    /// What is asked for; `auto` is f32 for a checkpoint saved in f32 (`stored`, from its config.json), otherwise bf16
    /// where the device computes that in hardware.
    #[must_use]
    pub fn choose(asked: Dtype, stored: Option<&str>, computes_bf16: bool) -> Self {
        match asked {
            Dtype::Float32 => Self::F32,
            Dtype::Bfloat16 => Self::Bf16,
            Dtype::Auto if stored == Some("float32") => Self::F32,
            Dtype::Auto if computes_bf16 => Self::Bf16,
            Dtype::Auto => Self::F32,
        }
    }

    /// Bytes of one number.
    #[must_use]
    pub fn bytes(self) -> u64 {
        match self {
            Self::F32 => 4,
            Self::Bf16 => 2,
        }
    }
}

impl std::fmt::Display for Precision {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::F32 => "float32",
            Self::Bf16 => "bfloat16",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn auto_keeps_f32_checkpoints_and_takes_bf16_where_it_is_fast() {
        let auto = |stored, fast| Precision::choose(Dtype::Auto, stored, fast);
        assert_eq!(auto(Some("float32"), true), Precision::F32);
        assert_eq!(auto(Some("bfloat16"), true), Precision::Bf16);
        assert_eq!(auto(None, false), Precision::F32);
        assert_eq!(Precision::choose(Dtype::Bfloat16, Some("float32"), false), Precision::Bf16);
    }
}
