//! The model of a job, before anything starts: do its files belong together, and does what the settings ask of it
//! fit.
//!
//! Called by [`crate::submission::check`]. Each rank checks again what it loads, on its own machine.

use std::path::Path;

use agentfly_common::config::Config;
use agentfly_common::model_dir::{
    ModelConfig, ModelDir, chat_template, check_template, fitting_templates, special_tokens,
};
use agentfly_hub::{HubError, Want, local_model};
use anyhow::anyhow;

use crate::failure::{Failure, Outcome};

/// The shape of the model that `actor_rollout_ref.model.path` names, a folder or a hub's: of that the configuration
/// alone is fetched. Checks what it can tell: chat template where none is set, and the window.
///
/// # Errors
/// What keeps it from being read, or the settings the model has no room for.
pub fn model_shape(config: &Config) -> Outcome<ModelConfig> {
    let dir = local_model(&config.actor_rollout_ref.model.path, Want::Configuration).map_err(not_fetched)?;
    let model = ModelConfig::from_dir(&dir).map_err(cannot_be_trained)?;
    check_chat_template(config.agent.template.as_deref(), &dir).map_err(cannot_be_trained)?;
    model.window(&config.actor_rollout_ref.rollout).map_err(Failure::operator)?;
    Ok(model)
}

/// Fetches the weights of a hub's model, and puts its folder into the settings.
///
/// # Errors
/// What keeps it from being fetched.
pub fn fetch_model(config: &mut Config) -> Outcome {
    let dir = local_model(&config.actor_rollout_ref.model.path, Want::Everything).map_err(not_fetched)?;
    config.agent.model_name_or_path = config.agent.model_name_or_path.take().map(|_| dir.clone());
    config.actor_rollout_ref.model.path = dir;
    Ok(())
}

/// Inspects the folder `actor_rollout_ref.model.path`: configuration, weights, tokenizer, chat template where none is
/// set, and the window.
///
/// # Errors
/// The file, key or tensor that is wrong, or the settings the model has no room for.
pub fn check_model(config: &Config) -> Outcome<ModelDir> {
    let dir = &config.actor_rollout_ref.model.path;
    let model = ModelDir::inspect(dir).map_err(cannot_be_trained)?;
    model.config.check_tokenizer(dir).map_err(cannot_be_trained)?;
    check_chat_template(config.agent.template.as_deref(), dir).map_err(cannot_be_trained)?;
    model.config.window(&config.actor_rollout_ref.rollout).map_err(Failure::operator)?;
    Ok(model)
}

fn not_fetched(error: HubError) -> Failure {
    let whose = error.whose();
    Failure { whose, error: error.into() }
        .context("the model cannot be fetched (actor_rollout_ref.model.path)")
}

fn cannot_be_trained(error: impl Into<anyhow::Error>) -> Failure {
    Failure::operator(error).context("the model cannot be trained (actor_rollout_ref.model.path)")
}

/// A named template must fit the tokenizer; without a name the model must have its own.
fn check_chat_template(name: Option<&str>, dir: &Path) -> anyhow::Result<()> {
    let has_own = chat_template(dir)?.is_some();
    let special = special_tokens(dir)?;
    let is_special = |token: &str| special.contains(token);
    if let Some(name) = name {
        return Ok(check_template(name, dir, has_own, is_special)?);
    }
    if has_own {
        return Ok(());
    }
    let way_out = match fitting_templates(is_special).join(", ") {
        none if none.is_empty() => "add one: no named template fits its tokenizer".to_owned(),
        names => format!("set agent.template to one of: {names}"),
    };
    Err(anyhow!(
        "{} holds no chat template (neither chat_template.jinja nor chat_template in tokenizer_config.json); {way_out}",
        dir.display()
    ))
}

#[cfg(test)]
mod tests {
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

    /// Replaces `from`, which must be there, in a file.
    fn edit(file: &Path, from: &str, to: &str) {
        let text = std::fs::read_to_string(file).unwrap();
        assert!(text.contains(from), "{from} is in {}", file.display());
        std::fs::write(file, text.replace(from, to)).unwrap();
    }

    #[test]
    fn a_named_template_whose_markup_the_tokenizer_reads_as_text_is_refused() {
        // The markers of another family of models.
        let other = |dir: &Path| {
            edit(&dir.join("tokenizer.json"), "<|im_start|>", "<|start_header_id|>");
            edit(&dir.join("tokenizer.json"), "<|im_end|>", "<|eot_id|>");
        };
        assert_eq!(said(&[], other), None, "its own template is its own affair");
        let told = said(&["agent.template=qwen-chat"], other).unwrap();
        for part in [
            "agent.template=qwen-chat",
            "<|im_start|> and <|im_end|>",
            "plain text",
            "leave agent.template unset",
        ] {
            assert!(told.contains(part), "{part}: {told}");
        }
        let plain = |dir: &Path| {
            let file = dir.join("tokenizer.json");
            edit(&file, r#""special": true"#, r#""special": false"#);
            std::fs::remove_file(dir.join("tokenizer_config.json")).unwrap();
        };
        let told = said(&["agent.template=chatml"], plain).unwrap();
        assert!(told.contains("no named template fits"), "a token that is not special is text: {told}");
        let told = said(&[], plain).unwrap();
        assert!(told.contains("holds no chat template") && told.contains("no named template fits"), "{told}");
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
    }

    #[test]
    fn a_model_whose_window_is_shorter_than_the_default_cap_of_a_turn_is_as_good_as_any() {
        let short = |dir: &Path| {
            edit(
                &dir.join("config.json"),
                r#""max_position_embeddings": 1024"#,
                r#""max_position_embeddings": 512"#,
            )
        };
        assert_eq!(said(&[], short), None);
        assert_eq!(said(&["actor_rollout_ref.rollout.max_tokens=2000"], short), None);
        let told = said(&["actor_rollout_ref.rollout.max_model_len=1024"], short).unwrap();
        assert!(told.contains("trained for 512 tokens"), "{told}");
    }
}
