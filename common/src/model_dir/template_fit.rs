//! Whether a named chat template fits a tokenizer: whether what it writes around messages are special tokens there.
//!
//! Where they are not, the markup would be read as plain text, no turn would end where the template says, and the
//! model would learn from that. The coordinator asks before a job is queued, each rank when it loads its tokenizer:
//! both with [`check_template`], each with what it knows of the special tokens.

use std::path::{Path, PathBuf};

use crate::config::{TEMPLATES, template_tokens};

/// A named template whose markup is plain text to the model's tokenizer.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "agent.template={template} writes {}, which the tokenizer in {} would read as plain text: it has no such special \
     token (added_tokens in tokenizer.json, with \"special\": true); {}",
    missing.join(" and "),
    dir.display(),
    way_out(*has_own, fitting)
)]
pub struct TemplateMisfit {
    /// The template's name.
    pub template: String,
    /// What it writes and the tokenizer lacks.
    pub missing: Vec<&'static str>,
    /// The model directory.
    pub dir: PathBuf,
    /// Whether the model has a template of its own.
    pub has_own: bool,
    /// The named templates that fit.
    pub fitting: Vec<&'static str>,
}

fn way_out(has_own: bool, fitting: &[&str]) -> String {
    match (has_own, fitting.join(", ")) {
        (true, named) if named.is_empty() => "leave agent.template unset to take the model's own".to_owned(),
        (true, named) => {
            format!("leave agent.template unset to take the model's own, or set it to one that fits: {named}")
        }
        (false, named) if named.is_empty() => {
            "no named template fits: add the model's own to that folder, as chat_template.jinja".to_owned()
        }
        (false, named) => format!("set agent.template to one that fits: {named}"),
    }
}

/// The named templates all of whose tokens `is_special` knows.
#[must_use]
pub fn fitting_templates(is_special: impl Fn(&str) -> bool) -> Vec<&'static str> {
    let fits = |name: &&str| template_tokens(name).iter().all(|token| is_special(token));
    TEMPLATES.iter().copied().filter(fits).collect()
}

/// Demands that the special tokens of the named template are such in the tokenizer of `dir`. `has_own`: the model
/// has a template of its own, which the error then recommends.
///
/// # Errors
/// The tokens that are missing, and the templates that fit.
pub fn check_template(
    name: &str,
    dir: &Path,
    has_own: bool,
    is_special: impl Fn(&str) -> bool,
) -> Result<(), TemplateMisfit> {
    let missing: Vec<_> = template_tokens(name).iter().copied().filter(|token| !is_special(token)).collect();
    if missing.is_empty() {
        return Ok(());
    }
    let (template, dir, fitting) = (name.to_owned(), dir.to_owned(), fitting_templates(is_special));
    Err(TemplateMisfit { template, missing, dir, has_own, fitting })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_named_template_needs_the_tokens_it_writes() {
        for name in TEMPLATES {
            assert_eq!(check_template(name, Path::new("m"), true, |_| true), Ok(()));
            let told = check_template(name, Path::new("m"), true, |token| token != "<|im_end|>").unwrap_err();
            assert_eq!(
                told.to_string(),
                format!(
                    "agent.template={name} writes <|im_end|>, which the tokenizer in m would read as plain text: it \
                     has no such special token (added_tokens in tokenizer.json, with \"special\": true); leave \
                     agent.template unset to take the model's own"
                )
            );
        }
    }

    #[test]
    fn the_way_out_names_what_fits() {
        assert_eq!(way_out(false, &["chatml"]), "set agent.template to one that fits: chatml");
        assert!(way_out(true, &["chatml"]).ends_with("model's own, or set it to one that fits: chatml"));
        assert!(way_out(false, &[]).contains("chat_template.jinja"));
    }
}
