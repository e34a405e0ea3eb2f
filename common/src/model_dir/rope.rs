//! The rotary part of a `config.json`, in any of the layouts `transformers` reads.
//!
//! What must stay true: the same object gives the same angles as there: which of two keys wins, what an absent
//! one counts as. What is not computed here is refused by name.

use serde_json::{Map, Value, json};

use super::error::ModelDirError;
use super::json::Reader;

/// The base where no key names one, in every family here.
const DEFAULT_THETA: f64 = 10_000.0;

/// Llama 3's `rope_scaling`.
#[derive(Debug, Clone, PartialEq)]
pub struct RopeScaling {
    /// By how much long wavelengths are stretched.
    pub factor: f64,
    /// Wavelengths beyond context / this are stretched.
    pub low_freq_factor: f64,
    /// Wavelengths below context / this are kept.
    pub high_freq_factor: f64,
    /// The context the model was first trained with, in tokens.
    pub original_max_position_embeddings: i64,
}

impl Reader<'_> {
    /// Base and stretching, in the older layout (`rope_theta`, `rope_scaling`) or the newer one
    /// (`rope_parameters` holds both). Where a file has both objects `rope_scaling` counts, and a base inside
    /// the object before one outside.
    pub(super) fn rope(&self, max_positions: i64) -> Result<(f64, Option<RopeScaling>), ModelDirError> {
        let empty = Map::new();
        let object = |key: &'static str| match self.get(key) {
            None => Ok(None),
            Some(value) => match value.as_object() {
                Some(map) => Ok((!map.is_empty()).then_some((key, map))),
                None => Err(self.wrong(key, "an object, or null")),
            },
        };
        let found = object("rope_scaling")?.or(object("rope_parameters")?);
        let (key, map) = found.unwrap_or(("rope_parameters", &empty));
        let inside = Reader { path: self.path, map };
        if let Some((name, value)) = map.iter().find(|(_, value)| value.is_object()) {
            return Err(self.unsupported(
                &format!("{key}.{name}"),
                value,
                "one set of numbers for all layers",
            ));
        }
        for read in [self, &inside] {
            if let Some(part) = read.get("partial_rotary_factor").filter(|part| part.as_f64() != Some(1.0)) {
                return Err(read.unsupported("partial_rotary_factor", part, "1.0"));
            }
        }
        let theta = match inside.optional_number("rope_theta")? {
            Some(theta) => theta,
            None => self.optional_number("rope_theta")?.unwrap_or(DEFAULT_THETA),
        };
        let kind = inside.get("rope_type").or_else(|| inside.get("type"));
        match kind {
            None if inside.get("factor").is_some() => Err(inside.wrong("rope_type", "default, llama3")),
            None => Ok((theta, None)),
            Some(kind) if *kind == json!("default") => Ok((theta, None)),
            Some(kind) if *kind == json!("llama3") => {
                let context = match self.optional_positive("original_max_position_embeddings")? {
                    Some(context) => context,
                    None => {
                        inside.optional_positive("original_max_position_embeddings")?.unwrap_or(max_positions)
                    }
                };
                let scaling = RopeScaling {
                    factor: inside.number("factor")?,
                    low_freq_factor: inside.number("low_freq_factor")?,
                    high_freq_factor: inside.number("high_freq_factor")?,
                    original_max_position_embeddings: context,
                };
                Ok((theta, Some(scaling)))
            }
            Some(kind) => Err(self.unsupported(&format!("{key}.rope_type"), kind, "default, llama3")),
        }
    }
}

/// As `transformers` writes it in the older layout, which every version reads.
pub(super) fn scaling_json(scaling: Option<&RopeScaling>) -> Value {
    scaling.map_or(Value::Null, |s| {
        json!({
            "rope_type": "llama3", "factor": s.factor, "low_freq_factor": s.low_freq_factor,
            "high_freq_factor": s.high_freq_factor,
            "original_max_position_embeddings": s.original_max_position_embeddings,
        })
    })
}
