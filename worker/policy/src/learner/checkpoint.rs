//! The learner's part of a checkpoint: `optimizer.safetensors` (f32 master weights and both moments, a tensor
//! each per parameter) and `learner.json` (counters). The model's own files are the model's.
//!
//! What must stay true: a learner that loads what another saved continues bit for bit.

use std::fs;
use std::path::{Path, PathBuf};

use agentfly_common::ids::PolicyVersion;
use serde::{Deserialize, Serialize};
use tch::Tensor;

use super::Learner;
use super::error::LearnerError;
use super::optimizer::Optimizer;
use crate::model::Decoder;

const TENSORS: &str = "optimizer.safetensors";
const COUNTERS: &str = "learner.json";
const FORMAT: u32 = 1;

/// `learner.json`.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Counters {
    format: u32,
    policy_version: PolicyVersion,
    training_steps: u64,
    optimizer_steps: u64,
    skips_in_a_row: u32,
}

fn fault(path: &Path, problem: impl ToString) -> LearnerError {
    LearnerError::Checkpoint { path: path.display().to_string(), problem: problem.to_string() }
}

/// Every tensor of the state under its name, sharing memory with the optimizer.
fn named(optimizer: &Optimizer) -> Result<Vec<(String, Tensor)>, LearnerError> {
    let parts = [
        ("master", &optimizer.master),
        ("exp_avg", &optimizer.exp_avg),
        ("exp_avg_sq", &optimizer.exp_avg_sq),
    ];
    let mut tensors = Vec::with_capacity(3 * optimizer.slots.len());
    for (part, flat) in parts {
        for slot in &optimizer.slots {
            tensors.push((format!("{part}.{}", slot.name), slot.of(flat)?));
        }
    }
    Ok(tensors)
}

impl Learner {
    /// Writes the state into `dir`, which must exist; each file is complete or absent. All ranks hold the same
    /// state: one saves.
    ///
    /// # Errors
    /// When a file cannot be written.
    pub fn save(&self, dir: &Path) -> Result<(), LearnerError> {
        let path = dir.join(TENSORS);
        let partial = tempfile::Builder::new()
            .prefix(".optimizer-")
            .suffix(".partial")
            .tempfile_in(dir)
            .map_err(|e| fault(&path, e))?
            .into_temp_path();
        let tensors = named(&self.optimizer)?;
        Tensor::write_safetensors(&tensors, &partial).map_err(|e| fault(&path, e))?;
        publish(partial, &path)?;

        let counters = Counters {
            format: FORMAT,
            policy_version: self.version,
            training_steps: self.steps,
            optimizer_steps: self.optimizer.steps,
            skips_in_a_row: self.skips_in_a_row,
        };
        let path = dir.join(COUNTERS);
        let partial = tempfile::Builder::new()
            .prefix(".learner-")
            .suffix(".partial")
            .tempfile_in(dir)
            .map_err(|e| fault(&path, e))?
            .into_temp_path();
        let text = serde_json::to_string_pretty(&counters).map_err(|e| fault(&path, e))?;
        fs::write(&partial, text + "\n").map_err(|e| fault(&path, e))?;
        publish(partial, &path)
    }

    /// Continues from what [`Learner::save`] wrote into `dir`: state, counters, version, and the weights of
    /// `decoder`. Everything is checked before anything changes.
    ///
    /// # Errors
    /// Names the file and what is missing, extra or of another shape.
    pub fn load(&mut self, dir: &Path, decoder: &mut Decoder) -> Result<(), LearnerError> {
        let path = dir.join(COUNTERS);
        let text = fs::read_to_string(&path).map_err(|e| fault(&path, e))?;
        let counters: Counters = serde_json::from_str(&text).map_err(|e| fault(&path, e))?;
        if counters.format != FORMAT {
            return Err(fault(&path, format!("format {}, but this program reads {FORMAT}", counters.format)));
        }
        let path = dir.join(TENSORS);
        if !path.is_file() {
            return Err(fault(&path, "no such file"));
        }
        let found = Tensor::read_safetensors(&path).map_err(|e| fault(&path, e))?;
        let own = named(&self.optimizer)?;
        compare(&path, &own, &found)?;
        let _no_grad = tch::no_grad_guard();
        for (name, mut tensor) in own {
            if let Some((_, saved)) = found.iter().find(|(n, _)| *n == name) {
                tensor.f_copy_(saved)?;
            }
        }
        self.optimizer.steps = counters.optimizer_steps;
        self.optimizer.publish(decoder)?;
        self.version = counters.policy_version;
        self.steps = counters.training_steps;
        self.skips_in_a_row = counters.skips_in_a_row;
        self.broken = false;
        Ok(())
    }
}

/// Names the first tensor that differs.
fn compare(path: &Path, own: &[(String, Tensor)], found: &[(String, Tensor)]) -> Result<(), LearnerError> {
    for (name, tensor) in own {
        match found.iter().find(|(n, _)| n == name) {
            None => {
                return Err(fault(path, format!("tensor `{name}` {:?} is missing", tensor.size())));
            }
            Some((_, saved)) if (saved.size(), saved.kind()) != (tensor.size(), tensor.kind()) => {
                return Err(fault(
                    path,
                    format!(
                        "tensor `{name}` is {:?} {:?}, but this model's is {:?} {:?}",
                        saved.size(),
                        saved.kind(),
                        tensor.size(),
                        tensor.kind()
                    ),
                ));
            }
            Some(_) => {}
        }
    }
    match found.iter().find(|(name, _)| !own.iter().any(|(n, _)| n == name)) {
        Some((name, tensor)) => {
            Err(fault(path, format!("tensor `{name}` {:?} has no place in this model", tensor.size())))
        }
        None => Ok(()),
    }
}

/// Makes the finished file durable and gives it its name.
fn publish(partial: tempfile::TempPath, path: &PathBuf) -> Result<(), LearnerError> {
    fs::File::open(&partial).and_then(|file| file.sync_all()).map_err(|e| fault(path, e))?;
    partial.persist(path).map_err(|e| fault(path, e))
}
