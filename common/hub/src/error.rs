//! What can keep a model from being fetched, and what to do about it.

use std::path::{Path, PathBuf};

use agentfly_common::error::Whose;
use agentfly_common::model_dir::ModelDirError;

/// A model that cannot be had by its name.
#[derive(Debug, thiserror::Error)]
pub enum HubError {
    /// `HF_ENDPOINT` is no URL.
    #[error("HF_ENDPOINT={endpoint} is no address of a hub; write https://…, or leave it out")]
    Endpoint {
        /// As given.
        endpoint: String,
    },
    /// Nowhere to keep models.
    #[error("there is no place for downloaded models: HOME is not set; set HF_HOME to a folder with room")]
    NoCache,
    /// Nothing is here and nobody may be asked.
    #[error(
        "{name} is not on this machine: there is no folder of that name here, and no whole copy in {}{}; {tried}. {}",
        cache.display(),
        cut_short.as_deref().map(|cut| format!(": {cut}")).unwrap_or_default(),
        way_out(name, cache)
    )]
    NotHere {
        /// The model.
        name: String,
        /// The cache.
        cache: PathBuf,
        /// What was tried, or why nothing was.
        tried: String,
        /// A file that is there in part, with its lengths.
        cut_short: Option<String>,
    },
    /// The hub knows no such model or revision.
    #[error(
        "there is no folder {name} here, and {endpoint} has no model of that name and revision; check the spelling \
         (org/name, or org/name@revision); a private model needs HF_TOKEN"
    )]
    NotFound {
        /// The model.
        name: String,
        /// The hub.
        endpoint: String,
    },
    /// The hub wants to know who asks.
    #[error(
        "{endpoint} gives {name} only to those it knows (status {status}{}); accept its terms on {endpoint}/{repository} \
         and set HF_TOKEN to a token of your account",
        if *with_token { ": the token given may not read it" } else { ": no token was given" }
    )]
    Denied {
        /// The model.
        name: String,
        /// `org/name`.
        repository: String,
        /// The hub.
        endpoint: String,
        /// 401 or 403.
        status: u16,
        /// Whether a token went with the request.
        with_token: bool,
    },
    /// The hub answered, but not with what was asked for.
    #[error("{url} answered with status {status}{}; {}", said(detail), later(*status))]
    Status {
        /// What was asked.
        url: String,
        /// The status.
        status: u16,
        /// The hub's words, if it said any.
        detail: String,
    },
    /// The answer is no listing, or one that cannot be used.
    #[error("{endpoint} lists {name} in a way that cannot be used: {reason}")]
    Listing {
        /// The model.
        name: String,
        /// The hub.
        endpoint: String,
        /// What is wrong, and what to do.
        reason: String,
    },
    /// The model's configuration is not one that can be computed; its weights were not fetched.
    #[error("{name} cannot be used, so its weights were not fetched")]
    Unsupported {
        /// The model.
        name: String,
        /// File and key.
        source: Box<ModelDirError>,
    },
    /// The disk is too small.
    #[error(
        "no room for {name} in {}: {need_bytes} bytes are still to be fetched, {free_bytes} are free; free some, or set \
         HF_HOME to a folder with room",
        cache.display()
    )]
    NoRoom {
        /// The model.
        name: String,
        /// The cache.
        cache: PathBuf,
        /// What is missing of it.
        need_bytes: u64,
        /// What there is.
        free_bytes: u64,
    },
    /// The transfer broke too often.
    #[error(
        "{file} of {name} broke off at {have_bytes} of {total_bytes} bytes ({cause}), again after {tries} tries; what \
         came is kept: run the same command again to go on from there"
    )]
    Broken {
        /// The model.
        name: String,
        /// The file.
        file: String,
        /// Bytes on disk.
        have_bytes: u64,
        /// Bytes of the whole.
        total_bytes: u64,
        /// The last break.
        cause: String,
        /// Tries in a row that brought nothing.
        tries: usize,
    },
    /// The bytes are not those the hub has.
    #[error(
        "{file} of {name} arrived damaged: its {kind} is {found}, the hub says {expected}; the file was removed: run the \
         same command again. If it happens again, something between here and {endpoint} changes what passes"
    )]
    Checksum {
        /// The model.
        name: String,
        /// The file.
        file: String,
        /// The checksum's name.
        kind: &'static str,
        /// What the hub says.
        expected: Box<str>,
        /// What came.
        found: Box<str>,
        /// The hub.
        endpoint: Box<str>,
    },
    /// Another process holds the model and does not get on.
    #[error(
        "another process is fetching {name} and brought nothing for {seconds} s; wait for it or end it, then run this \
         again ({} is locked)",
        lock.display()
    )]
    Locked {
        /// The model.
        name: String,
        /// The lock's file.
        lock: PathBuf,
        /// How long it was waited for.
        seconds: u64,
    },
    /// Something is missing in a cache that cannot be written.
    #[error(
        "not all of {name} is in {}, and this user cannot write there; let someone fetch it who can, or set HF_HOME to a \
         folder of your own",
        cache.display()
    )]
    ReadOnly {
        /// The model.
        name: String,
        /// The cache.
        cache: PathBuf,
        /// The system's reason.
        source: std::io::Error,
    },
    /// The cache cannot be read or written.
    #[error("{action} {}; HF_HOME names the folder for downloaded models", path.display())]
    Io {
        /// What was tried.
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// The system's reason.
        source: std::io::Error,
    },
    /// The client could not be made: a bug, or a proxy setting that is none.
    #[error("the HTTP client could not be set up: {0}; are HTTPS_PROXY and ALL_PROXY proper URLs?")]
    Client(String),
}

fn way_out(name: &str, cache: &Path) -> String {
    let folder = name.rsplit('/').next().unwrap_or(name).split('@').next().unwrap_or(name);
    let (repository, revision) = name.split_once('@').unwrap_or((name, ""));
    let revision = if revision.is_empty() { String::new() } else { format!(" --revision {revision}") };
    format!(
        "On a machine with a network run `hf download {repository}{revision} --local-dir {folder}`, copy that folder to \
         this machine and give its path; or copy the folder models--{} of its cache into {}",
        repository.replace('/', "--"),
        cache.display()
    )
}

fn said(detail: &str) -> String {
    if detail.is_empty() { String::new() } else { format!(" ({detail})") }
}

fn later(status: u16) -> &'static str {
    if is_passing(status) { "try again later" } else { "is HF_ENDPOINT a whole mirror of the hub?" }
}

/// Statuses of a hub that may have an answer in a moment.
fn is_passing(status: u16) -> bool {
    status == 429 || status >= 500
}

impl HubError {
    /// Who must act.
    #[must_use]
    pub fn whose(&self) -> Whose {
        match self {
            Self::Checksum { .. } | Self::Locked { .. } => Whose::Outside,
            passing if passing.is_passing() => Whose::Outside,
            _ => Whose::Operator,
        }
    }

    /// Whether the hub, or the way to it, may do in a moment what it did not do now.
    pub(crate) fn is_passing(&self) -> bool {
        match self {
            Self::Broken { .. } => true,
            Self::Status { status, .. } => is_passing(*status),
            _ => false,
        }
    }

    pub(crate) fn io(action: &'static str, path: &Path, source: std::io::Error) -> Self {
        Self::Io { action, path: path.to_owned(), source }
    }
}
