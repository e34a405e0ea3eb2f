//! Models by their hub name: `Qwen/Qwen2.5-3B-Instruct`, `org/name@revision`, downloaded once and kept.
//!
//! ```text
//! org/name@rev ─▶ listing (files, sizes, checksums, commit) ─▶ small files ─▶ config.json understood? ─▶ weights
//!                   │ no network, or the hub is overloaded       each: resume, verify, rename, link
//!                   └─▶ the newest whole copy in the cache, else what to do about it
//! ```
//!
//! The coordinator calls [`local_model`] once a job, before anything starts, and ranks get the folder; `worker
//! score|generate|warmup|doctor` call it for themselves. The cache is the one that Python's `huggingface_hub` uses,
//! so a model that is there already is not fetched again. Blocking calls; nothing here knows libtorch.
//!
//! What must stay true:
//! - a file gets its name in the cache only after its length and checksum were right;
//! - a broken transfer goes on where it broke, in this process or the next;
//! - every wait has a deadline; no name from the server becomes a path unless it is a plain file name;
//! - the token goes to the hub's own host alone, and into no log and no error.
#![forbid(unsafe_code)]

mod cache;
mod error;
mod fetch;
mod hub;
mod listing;
mod lock;
mod meter;
mod name;
mod settings;
mod verify;

use std::path::{Path, PathBuf};

pub use error::HubError;
pub use hub::{Hub, Want};
pub use name::ModelName;
pub use settings::{HubSettings, Patience};

/// The folder of a model that is given as a folder or by its hub name. A folder that is there, and a text that is no
/// hub name, come back as they are; what is wrong with those is the model directory's reader's to say.
///
/// # Errors
/// A hub name whose model cannot be had, with what was tried and what to do.
pub fn local_model(given: &Path, want: Want) -> Result<PathBuf, HubError> {
    match hub_name(given) {
        None => Ok(given.to_owned()),
        Some(name) => {
            let settings = HubSettings::from_variables(|variable| std::env::var(variable).ok())?;
            Hub::new(settings).model_dir(&name, want)
        }
    }
}

/// The hub name that `given` is, unless it is a path that exists.
#[must_use]
pub fn hub_name(given: &Path) -> Option<ModelName> {
    if given.exists() { None } else { ModelName::parse(given.to_str()?) }
}
