//! Chat templates as token deltas: what the policy reads before its first turn and between two turns.
//!
//! The chain loop appends these ids to what was sampled; it never renders a sampled turn again, so no
//! retokenisation drift can occur. What must stay true: `prompt_ids` and `observation_ids(…, Next::Generate)`
//! end with the generation prompt, all of it outside the loss, and text never becomes a special token.

mod jinja;
mod json;
mod named;

use std::sync::Arc;

use agentfly_common::model_dir::{TemplateMisfit, check_template};
use serde_json::Value;

use crate::tokenizer::{ChatTokenizer, TokenizerError};

pub use json::{to_python_json, to_python_json_indented};
pub use named::NamedTemplate;

/// A template could not be found or rendered.
#[derive(Debug, thiserror::Error)]
pub enum TemplateError {
    /// No template has this name.
    #[error("unknown chat template {name:?}; known: {}. Leave agent.template unset for the model's own template", known.join(", "))]
    Unknown {
        /// The name asked for.
        name: String,
        /// The names there are.
        known: Vec<&'static str>,
    },
    /// What the named template writes are no special tokens of the model.
    #[error(transparent)]
    Misfit(Box<TemplateMisfit>),
    /// The model ships no template of its own.
    #[error("the model has no chat template (neither chat_template.jinja nor chat_template in tokenizer_config.json); set agent.template to one of: {}", known.join(", "))]
    NoOwnTemplate {
        /// The named templates.
        known: Vec<&'static str>,
    },
    /// The model's own template failed.
    #[error("the model's chat template failed while {action}: {cause}")]
    Jinja {
        /// What was being rendered.
        action: &'static str,
        /// The engine's words.
        cause: String,
    },
    /// The model's own template rewrites the past when a tool answers, so a delta does not exist.
    #[error(
        "the model's chat template changes the text after an assistant turn once a tool message follows \
         (without: {without:?}, with: {with:?}); set agent.template to a named template"
    )]
    PrefixChanged {
        /// The text after the assistant's content when nothing follows.
        without: String,
        /// The text after the assistant's content when a tool message follows.
        with: String,
    },
    /// The tokenizer refused.
    #[error(transparent)]
    Tokenizer(#[from] TokenizerError),
}

impl From<TemplateMisfit> for TemplateError {
    fn from(misfit: TemplateMisfit) -> Self {
        Self::Misfit(Box::new(misfit))
    }
}

/// One tool's answer, as a template renders it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ToolReply {
    /// The tool's name.
    pub tool: String,
    /// The observation.
    pub text: String,
}

/// What follows the observations.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Next {
    /// Another turn: the ids end with the generation prompt.
    Generate,
    /// Nothing: the chain ends with its tool messages.
    End,
}

/// Observations that fit a budget of tokens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FittedObservations {
    /// The observations, cut where they had to be.
    pub shown: Vec<ToolReply>,
    /// Their ids, frame included.
    pub ids: Vec<u32>,
}

enum Kind {
    Named(NamedTemplate),
    Own(Box<jinja::OwnTemplate>),
}

/// A chat template bound to a tokenizer.
pub struct ChatTemplate {
    kind: Kind,
    tokenizer: Arc<ChatTokenizer>,
}

impl ChatTemplate {
    /// The template called `name` (`qwen2.5`, alias `qwen-chat`; `qwen2.5-no-system-tool`; `chatml`), or with
    /// `None` the model's own.
    ///
    /// # Errors
    /// An unknown name with the known ones; a named template whose markup the tokenizer would read as text; a missing
    /// or malformed template of the model's own.
    pub fn new(name: Option<&str>, tokenizer: Arc<ChatTokenizer>) -> Result<Self, TemplateError> {
        let known = NamedTemplate::NAMES.to_vec();
        let kind = match name {
            Some(name) => match NamedTemplate::from_name(name) {
                Some(named) => {
                    let has_own = tokenizer.chat_template().is_some();
                    check_template(name, tokenizer.dir(), has_own, |token| tokenizer.is_special(token))?;
                    Kind::Named(named)
                }
                None => {
                    return Err(TemplateError::Unknown { name: name.to_owned(), known });
                }
            },
            None => match tokenizer.chat_template() {
                Some(source) => Kind::Own(Box::new(jinja::OwnTemplate::new(source, &tokenizer)?)),
                None => return Err(TemplateError::NoOwnTemplate { known }),
            },
        };
        Ok(Self { kind, tokenizer })
    }

    /// The tokenizer it encodes with.
    #[must_use]
    pub fn tokenizer(&self) -> &Arc<ChatTokenizer> {
        &self.tokenizer
    }

    /// Ids of the prompt, generation prompt included. `tools` are OpenAI function schemas.
    ///
    /// # Errors
    /// The template's or the tokenizer's refusal.
    pub fn prompt_ids(
        &self,
        system: Option<&str>,
        user: &str,
        tools: &[Value],
    ) -> Result<Vec<u32>, TemplateError> {
        let escape = |text: &str| self.tokenizer.escape(text);
        let (system, user) = (system.map(escape), escape(user));
        let rendered = match &self.kind {
            Kind::Named(named) => named.prompt(system.as_deref(), &user, tools),
            Kind::Own(own) => own.prompt(system.as_deref(), &user, tools)?,
        };
        Ok(self.tokenizer.encode_rendered(&rendered)?)
    }

    /// Ids between a sampled turn and what follows it: the rest of the turn's own frame, the observations and,
    /// for [`Next::Generate`], the next generation prompt. `after_stop` says that the turn's last sampled id
    /// is the end of turn; otherwise (it ended by length) the end of turn comes first here, outside the loss.
    ///
    /// # Errors
    /// The template's or the tokenizer's refusal.
    pub fn observation_ids(
        &self,
        observations: &[ToolReply],
        after_stop: bool,
        next: Next,
    ) -> Result<Vec<u32>, TemplateError> {
        let escaped: Vec<ToolReply> = observations
            .iter()
            .map(|o| ToolReply { tool: self.tokenizer.escape(&o.tool), text: self.tokenizer.escape(&o.text) })
            .collect();
        let rendered = match &self.kind {
            Kind::Named(named) => named.after_assistant(&escaped, next),
            Kind::Own(own) => own.after_assistant(&escaped, next)?,
        };
        let end_of_turn = self.tokenizer.end_of_turn_text();
        let rendered = match rendered.strip_prefix(end_of_turn) {
            Some(rest) if after_stop => rest,
            _ => &rendered,
        };
        Ok(self.tokenizer.encode_rendered(rendered)?)
    }

    /// As [`Self::observation_ids`], with the observations cut (from the last one back) so that there are at
    /// most `budget` ids. `None`: not even empty observations fit.
    ///
    /// # Errors
    /// The template's or the tokenizer's refusal.
    pub fn observation_ids_within(
        &self,
        observations: &[ToolReply],
        after_stop: bool,
        next: Next,
        budget: usize,
    ) -> Result<Option<FittedObservations>, TemplateError> {
        let ids = self.observation_ids(observations, after_stop, next)?;
        if ids.len() <= budget {
            return Ok(Some(FittedObservations { shown: observations.to_vec(), ids }));
        }
        let total: usize = observations.iter().map(|o| o.text.chars().count()).sum();
        let mut best = None;
        let (mut low, mut high) = (0, total); // `low` characters may fit, `high` do not
        while low < high {
            let keep = low + (high - low) / 2;
            let cut = first_characters(observations, keep);
            let ids = self.observation_ids(&cut, after_stop, next)?;
            if ids.len() <= budget {
                best = Some(FittedObservations { shown: cut, ids });
                low = keep + 1;
            } else {
                high = keep;
            }
        }
        Ok(best)
    }
}

fn first_characters(observations: &[ToolReply], mut keep: usize) -> Vec<ToolReply> {
    let mut cut = Vec::with_capacity(observations.len());
    for o in observations {
        let text: String = o.text.chars().take(keep).collect();
        keep -= text.chars().count();
        cut.push(ToolReply { tool: o.tool.clone(), text });
    }
    cut
}

#[cfg(test)]
mod tests;
