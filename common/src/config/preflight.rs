//! Files and folders that the settings name, looked at before anything starts. Reads no contents.
//!
//! Called by the coordinator after `resolve`, on the machine whose paths they are.

use std::path::Path;

use rustix::fs::{Access, AtFlags, CWD, accessat};

use crate::config::error::{ConfigError, ConfigErrors};
use crate::config::schema::Config;

/// What every model directory holds beside its weights.
const MODEL_FILES: [&str; 2] = ["config.json", "tokenizer.json"];
/// One of these says where the weights are.
const WEIGHT_FILES: [&str; 2] = ["model.safetensors", "model.safetensors.index.json"];

/// Checks that the data files, the model and the checkpoint to resume are there, and that the run folder can
/// be made. A model that is `on_the_hub` is not looked for.
///
/// # Errors
/// Every path that is missing or of the wrong kind, with its key and what to do.
pub fn preflight(config: &Config, on_the_hub: bool) -> Result<(), ConfigErrors> {
    let mut errors = Vec::new();
    for (key, files) in
        [("data.train_files", &config.data.train_files), ("data.val_files", &config.data.val_files)]
    {
        let wrong = files.iter().filter_map(|path| Some((path, file_problem(path)?)));
        errors.extend(wrong.map(|(path, problem)| ConfigError::Path { key, path: path.clone(), problem }));
    }
    let model = &config.actor_rollout_ref.model.path;
    if let Some(problem) = model_problem(model).filter(|_| !on_the_hub) {
        errors.push(ConfigError::Path { key: "actor_rollout_ref.model.path", path: model.clone(), problem });
    }
    if let Some(checkpoint) = config.trainer.resume_from_path.as_ref().filter(|path| !path.is_dir()) {
        errors.push(ConfigError::Path {
            key: "trainer.resume_from_path",
            path: checkpoint.clone(),
            problem: "there is no such folder; give a checkpoint folder, …/global_step_N".to_owned(),
        });
    }
    for (key, folder) in [
        ("trainer.run_dir", config.trainer.run_dir()),
        ("trainer.default_local_dir", config.trainer.checkpoint_dir()),
    ] {
        if let Some(problem) = output_problem(&folder) {
            errors.push(ConfigError::Path { key, path: folder, problem });
            break;
        }
    }
    if errors.is_empty() { Ok(()) } else { Err(ConfigErrors(errors)) }
}

fn file_problem(path: &Path) -> Option<String> {
    match std::fs::metadata(path) {
        Err(error) => Some(format!("cannot be read ({error}); give a .json or .jsonl file of questions")),
        Ok(found) if found.is_dir() => {
            Some("is a folder; give a .json or .jsonl file of questions".to_owned())
        }
        Ok(_) => std::fs::File::open(path).err().map(|error| format!("cannot be opened ({error})")),
    }
}

fn model_problem(model: &Path) -> Option<String> {
    if !model.is_dir() {
        return Some(
            "there is no such folder; give a Hugging Face model directory, or a model's name on the hub (org/name)"
                .to_owned(),
        );
    }
    let missing: Vec<_> = MODEL_FILES.iter().filter(|file| !model.join(file).is_file()).copied().collect();
    if !missing.is_empty() {
        return Some(format!("holds no {}; give a Hugging Face model directory", missing.join(", no ")));
    }
    let weights = WEIGHT_FILES.iter().any(|file| model.join(file).is_file());
    (!weights)
        .then(|| format!("holds no weights ({}); convert them to safetensors", WEIGHT_FILES.join(" or ")))
}

/// Finds the nearest folder above that exists: the rest can be made in it if it is a writable folder.
fn output_problem(folder: &Path) -> Option<String> {
    let exists = folder.ancestors().find(|above| above.exists());
    match exists.map(|above| (above, std::fs::metadata(above))) {
        // A relative path none of whose parts exists is made in the working folder.
        None => None,
        Some((above, Err(error))) => Some(format!("{} cannot be read ({error})", above.display())),
        Some((above, Ok(found))) if !found.is_dir() => {
            Some(format!("cannot be made: {} is a file", above.display()))
        }
        // Asked of the kernel: a read-only disk and another user's folder show in no mode bits of ours.
        Some((above, Ok(_))) => {
            let may = accessat(CWD, above, Access::WRITE_OK | Access::EXEC_OK, AtFlags::EACCESS);
            may.err().map(|error| format!("cannot be made: {} cannot be written ({error})", above.display()))
        }
    }
}
