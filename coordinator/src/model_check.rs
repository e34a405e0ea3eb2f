//! The model of a job, before anything starts: do its files belong together, and does what the settings ask of it
//! fit.
//!
//! Called by [`crate::submission::check`]. Each rank checks again what it loads, on its own machine.

use agentfly_common::config::{Config, TEMPLATES};
use agentfly_common::model_dir::{ModelDir, chat_template};
use anyhow::anyhow;

use crate::failure::{Failure, Outcome};

/// Inspects `actor_rollout_ref.model.path`: configuration, weights, tokenizer, chat template where none is set, and
/// the window.
///
/// # Errors
/// The file, key or tensor that is wrong, or the settings the model has no room for.
pub fn check_model(config: &Config) -> Outcome<ModelDir> {
    let dir = &config.actor_rollout_ref.model.path;
    let wrong = |error: anyhow::Error| {
        Failure::operator(error).context("the model cannot be trained (actor_rollout_ref.model.path)")
    };
    let model = ModelDir::inspect(dir).map_err(|e| wrong(e.into()))?;
    model.check_tokenizer().map_err(|e| wrong(e.into()))?;
    if config.agent.template.is_none() && chat_template(dir).map_err(|e| wrong(e.into()))?.is_none() {
        return Err(wrong(anyhow!(
            "{} holds no chat template (neither chat_template.jinja nor chat_template in tokenizer_config.json); \
             set agent.template to one of: {}",
            dir.display(),
            TEMPLATES.join(", ")
        )));
    }
    model.config.window(&config.actor_rollout_ref.rollout).map_err(Failure::operator)?;
    Ok(model)
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    /// What is said of the tiny model after `change` in a copy of its folder, with these settings.
    fn said(settings: &[&str], change: impl FnOnce(&Path)) -> Option<String> {
        let folder = tempfile::tempdir().unwrap();
        let tiny = Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy/models/tiny");
        for entry in std::fs::read_dir(tiny).unwrap() {
            let entry = entry.unwrap();
            std::fs::copy(entry.path(), folder.path().join(entry.file_name())).unwrap();
        }
        change(folder.path());
        let settings: Vec<String> = settings.iter().map(|&setting| setting.to_owned()).collect();
        let mut config = agentfly_common::config::resolve(&settings, None, []).unwrap().config;
        config.actor_rollout_ref.model.path = folder.path().to_owned();
        check_model(&config).err().map(|failure| {
            assert_eq!(failure.whose, agentfly_common::error::Whose::Operator);
            failure.to_string()
        })
    }

    #[test]
    fn the_tiny_model_passes_with_its_own_template_and_a_named_one() {
        assert_eq!(said(&[], |_| ()), None);
        assert_eq!(said(&["agent.template=qwen-chat"], |_| ()), None);
    }

    #[test]
    fn a_model_without_a_template_needs_one_named() {
        let no_template = |dir: &Path| std::fs::remove_file(dir.join("tokenizer_config.json")).unwrap();
        let told = said(&[], no_template).unwrap();
        assert!(told.contains("holds no chat template") && told.contains("qwen-chat"), "{told}");
        assert_eq!(said(&["agent.template=qwen-chat"], no_template), None);
    }

    #[test]
    fn weights_and_tokenizer_are_held_against_the_configuration() {
        let told = said(&[], |dir| {
            let weights = dir.join("model.safetensors");
            let bytes = std::fs::read(&weights).unwrap();
            std::fs::write(weights, &bytes[..bytes.len() / 2]).unwrap();
        });
        assert!(told.unwrap().contains("model.safetensors: is cut short"));
        let told = said(&[], |dir| std::fs::write(dir.join("tokenizer.json"), "{}").unwrap()).unwrap();
        assert!(told.contains("tokenizer.json: is no tokenizer"), "{told}");
    }

    #[test]
    fn a_window_the_model_was_not_trained_for_is_refused_with_both_numbers() {
        let window = |tokens: u32| format!("actor_rollout_ref.rollout.max_model_len={tokens}");
        assert_eq!(said(&[&window(1024)], |_| ()), None);
        let told = said(&[&window(1025)], |_| ()).unwrap();
        assert!(told.contains("max_model_len=1025") && told.contains("trained for 1024 tokens"), "{told}");
        let told = said(&["actor_rollout_ref.rollout.max_tokens=1025"], |_| ()).unwrap();
        assert!(told.contains("max_tokens=1025") && told.contains("trained for 1024 tokens"), "{told}");
    }
}
