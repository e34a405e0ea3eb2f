//! Where the hub is, where models are kept, and who asks: Hugging Face's own environment variables.

use std::path::PathBuf;
use std::time::Duration;

use agentfly_common::secret::Secret;

use crate::error::HubError;

/// The hub that names are looked up on when nothing else is said.
const ENDPOINT: &str = "https://huggingface.co";

/// How the hub is reached.
#[derive(Debug, Clone)]
pub struct HubSettings {
    /// `HF_ENDPOINT`, without a slash at its end.
    pub endpoint: String,
    /// `HF_HUB_CACHE`, else `HF_HOME/hub`, else `~/.cache/huggingface/hub`.
    pub cache: PathBuf,
    /// `HF_TOKEN`, else what `hf auth login` left in `HF_HOME/token`.
    pub token: Option<Secret>,
    /// `HF_HUB_OFFLINE`: take what is in the cache and ask nobody.
    pub offline: bool,
    /// How long to wait and how often to try again.
    pub patience: Patience,
}

/// Deadlines and tries.
#[derive(Debug, Clone)]
pub struct Patience {
    /// To find and reach the host.
    pub connect: Duration,
    /// For the head of an answer.
    pub answer: Duration,
    /// For the next bytes of a body.
    pub silence: Duration,
    /// Further tries of a request that broke without bringing anything.
    pub tries: usize,
    /// Before the first further try; doubles.
    pub pause: Duration,
    /// For another process's download of the same model while that brings nothing.
    pub lock: Duration,
}

impl Default for Patience {
    fn default() -> Self {
        Self {
            connect: Duration::from_secs(20),
            answer: Duration::from_secs(30),
            silence: Duration::from_secs(60),
            tries: 5,
            pause: Duration::from_secs(1),
            lock: Duration::from_secs(300),
        }
    }
}

impl HubSettings {
    /// Reads the environment through `variable`.
    ///
    /// # Errors
    /// An endpoint that is no URL; no place for the cache.
    pub fn from_variables(variable: impl Fn(&str) -> Option<String>) -> Result<Self, HubError> {
        let given = |name: &str| variable(name).filter(|value| !value.trim().is_empty());
        let endpoint = given("HF_ENDPOINT").unwrap_or_else(|| ENDPOINT.to_owned());
        let endpoint = endpoint.trim_end_matches('/').to_owned();
        if !endpoint.starts_with("https://") && !endpoint.starts_with("http://") {
            return Err(HubError::Endpoint { endpoint });
        }
        let home = given("HF_HOME").map(PathBuf::from).or_else(|| {
            let cache = given("XDG_CACHE_HOME").map(PathBuf::from);
            let cache = cache.or_else(|| Some(PathBuf::from(given("HOME")?).join(".cache")));
            Some(cache?.join("huggingface"))
        });
        let cache = given("HF_HUB_CACHE").map(PathBuf::from).or_else(|| Some(home.as_ref()?.join("hub")));
        let from_file = || {
            let file = home.as_ref()?.join("token");
            std::fs::read_to_string(file).ok().filter(|text| !text.trim().is_empty())
        };
        let token = given("HF_TOKEN").or_else(from_file).map(|text| Secret::new(text.trim()));
        let offline = given("HF_HUB_OFFLINE")
            .is_some_and(|text| matches!(text.to_ascii_lowercase().as_str(), "1" | "true" | "yes" | "on"));
        let cache = cache.ok_or(HubError::NoCache)?;
        Ok(Self { endpoint, cache, token, offline, patience: Patience::default() })
    }

    /// Whether the token may go there: encrypted, or within this machine.
    pub(crate) fn may_send_token(&self) -> bool {
        let rest = self.endpoint.strip_prefix("http://");
        rest.is_none_or(|host| {
            ["127.0.0.1", "localhost", "[::1]"].iter().any(|own| {
                host.strip_prefix(own).is_some_and(|after| after.is_empty() || after.starts_with([':', '/']))
            })
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settings(variables: &[(&str, &str)]) -> Result<HubSettings, HubError> {
        HubSettings::from_variables(|name| {
            variables.iter().find(|(known, _)| *known == name).map(|(_, value)| (*value).to_owned())
        })
    }

    #[test]
    fn the_variables_of_hugging_face_are_honoured() {
        let plain = settings(&[("HOME", "/home/me")]).unwrap();
        assert_eq!((plain.endpoint.as_str(), plain.offline), (ENDPOINT, false));
        assert_eq!(plain.cache, PathBuf::from("/home/me/.cache/huggingface/hub"));
        let home = settings(&[("HOME", "/home/me"), ("HF_HOME", "/big"), ("HF_HUB_OFFLINE", "1")]).unwrap();
        assert_eq!((home.cache, home.offline), (PathBuf::from("/big/hub"), true));
        let own =
            settings(&[("HF_HUB_CACHE", "/c"), ("HF_ENDPOINT", "http://mirror:81/"), ("HF_TOKEN", "hf_x\n")]);
        let own = own.unwrap();
        assert_eq!(
            (own.cache.as_path(), own.endpoint.as_str()),
            (std::path::Path::new("/c"), "http://mirror:81")
        );
        assert_eq!(own.token.as_ref().unwrap().expose(), "hf_x");
        assert!(!format!("{own:?}").contains("hf_x"), "a token is printed nowhere");
        assert!(settings(&[]).is_err() && settings(&[("HOME", "/"), ("HF_ENDPOINT", "mirror")]).is_err());
    }

    #[test]
    fn a_token_goes_nowhere_in_the_clear_but_to_this_machine() {
        let may =
            |endpoint: &str| settings(&[("HOME", "/"), ("HF_ENDPOINT", endpoint)]).unwrap().may_send_token();
        assert!(may("https://huggingface.co") && may("http://127.0.0.1:80") && may("http://localhost"));
        assert!(!may("http://mirror.example") && !may("http://localhost.example"));
    }
}
