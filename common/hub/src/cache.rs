//! A model's place in the cache, in the layout that Python's `huggingface_hub` reads and writes.
//!
//! ```text
//! models--org--name/
//!   blobs/<checksum>                 verified bytes;  <checksum>.part while they arrive
//!   snapshots/<commit>/<file>        links to blobs
//!   refs/<revision>                  the commit it last meant
//! ```

use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use agentfly_common::model_dir::announced_bytes;
use hf_hub::{Cache, CacheRepo, Repo, RepoType};
use serde::de::IgnoredAny;

use crate::error::HubError;
use crate::fetch::length;
use crate::hub::Want;
use crate::listing::{INDEX, RemoteFile, SINGLE, SMALL, indexed_files};
use crate::name::ModelName;
use crate::verify::Checksum;

/// What a copy lacks.
#[derive(Debug)]
pub(crate) enum Lack {
    /// A file.
    File,
    /// The end of a file: its path, and its lengths.
    End(String),
}

/// One model in a cache.
pub(crate) struct Cached {
    repo: CacheRepo,
    root: PathBuf,
}

impl Cached {
    pub(crate) fn new(cache: &Path, name: &ModelName) -> Self {
        let repo = repo_of(name);
        let root = cache.join(repo.folder_name());
        Self { repo: Cache::new(cache.to_owned()).repo(repo), root }
    }

    /// Where the files of a commit are linked.
    pub(crate) fn snapshot(&self, commit: &str) -> PathBuf {
        self.repo.pointer_path(commit)
    }

    pub(crate) fn blob(&self, checksum: &Checksum) -> PathBuf {
        self.repo.blob_path(checksum.hex())
    }

    /// Where the bytes of a file arrive.
    pub(crate) fn part(&self, checksum: &Checksum) -> PathBuf {
        self.repo.blob_path(&format!("{}.part", checksum.hex()))
    }

    pub(crate) fn lock_file(&self) -> PathBuf {
        self.root.join(".agentfly.lock")
    }

    /// Makes the folders that a commit's files go to.
    pub(crate) fn make_folders(&self, commit: &str) -> Result<(), HubError> {
        for folder in [self.root.join("blobs"), self.snapshot(commit)] {
            std::fs::create_dir_all(&folder)
                .map_err(|e| HubError::io("cannot make the folder", &folder, e))?;
        }
        Ok(())
    }

    /// Bytes that have arrived, of all files.
    pub(crate) fn fetched_bytes(&self) -> u64 {
        let entries = std::fs::read_dir(self.root.join("blobs")).into_iter().flatten().flatten();
        entries.filter_map(|entry| Some(entry.metadata().ok()?.len())).sum()
    }

    /// The copy that the revision last meant, if all that is wanted of it is there.
    pub(crate) fn whole_copy(&self, name: &ModelName, want: Want) -> Result<PathBuf, Lack> {
        let config = || self.repo.get("config.json");
        let folder = match name.commit() {
            Some(commit) => self.snapshot(commit),
            None => config().as_deref().and_then(Path::parent).ok_or(Lack::File)?.to_owned(),
        };
        check_whole(&folder, want).map(|()| folder)
    }

    /// Whether a commit has these files, whole: what has a name here was verified before it got it.
    pub(crate) fn holds(&self, commit: &str, files: &[RemoteFile]) -> bool {
        let folder = self.snapshot(commit);
        files.iter().all(|file| length(&folder.join(&file.name)) == Some(file.bytes))
    }

    /// Gives a verified blob its name in a commit.
    pub(crate) fn link(&self, commit: &str, file: &str, checksum: &Checksum) -> Result<(), HubError> {
        let place = self.snapshot(commit).join(file);
        if length(&place).is_some_and(|bytes| length(&self.blob(checksum)) == Some(bytes)) {
            return Ok(());
        }
        // A link that leads nowhere is in the way, or a copy that broke off.
        let _was_not_there = std::fs::remove_file(&place);
        let target = Path::new("../../blobs").join(checksum.hex());
        std::os::unix::fs::symlink(&target, &place)
            .or_else(|_| std::fs::hard_link(self.blob(checksum), &place)) // file systems without symbolic links
            .map_err(|e| HubError::io("cannot link", &place, e))
    }

    /// Keeps which commit the revision means, for when there is no network.
    pub(crate) fn remember(&self, name: &ModelName, commit: &str) -> Result<(), HubError> {
        if name.commit().is_some() {
            return Ok(());
        }
        let refs = self.root.join("refs");
        self.repo.create_ref(commit).map_err(|e| HubError::io("cannot write below", &refs, e))
    }

    /// The same in a cache that may belong to someone else: who may write there keeps it.
    pub(crate) fn remember_if_writable(&self, name: &ModelName, commit: &str) -> Result<(), HubError> {
        let known = std::fs::read_to_string(self.root.join("refs").join(name.revision()));
        if known.is_ok_and(|known| known == commit) {
            return Ok(());
        }
        match self.remember(name, commit) {
            Err(HubError::Io { source, .. }) if is_read_only(&source) => Ok(()),
            remembered => remembered,
        }
    }
}

/// Whether writing failed because this user may not, or nobody.
pub(crate) fn is_read_only(error: &std::io::Error) -> bool {
    matches!(error.kind(), ErrorKind::PermissionDenied | ErrorKind::ReadOnlyFilesystem)
}

/// The repository in hf-hub's words.
pub(crate) fn repo_of(name: &ModelName) -> Repo {
    Repo::with_revision(name.repository.clone(), RepoType::Model, name.revision().to_owned())
}

/// Whether a folder holds what is wanted of a model, each file to its end: a copy between machines may have broken off, and a
/// commit that is here is asked about nowhere. What is wrong inside whole files is for their reader.
fn check_whole(folder: &Path, want: Want) -> Result<(), Lack> {
    let has = |file: &str| folder.join(file).exists();
    let needed: &[&str] = match want {
        Want::Configuration => &["config.json"],
        Want::Everything => &["config.json", "tokenizer.json"],
    };
    if !needed.iter().all(|file| has(file)) {
        return Err(Lack::File);
    }
    let texts = SMALL.iter().filter(|file| file.ends_with(".json") && has(file));
    texts.map(|file| folder.join(file)).try_for_each(|path| check_text(&path))?;
    if want == Want::Configuration {
        return Ok(());
    }
    let weights = match std::fs::read_to_string(folder.join(INDEX)) {
        Ok(index) => indexed_files(&index).map_err(|_| Lack::File)?,
        Err(_) => vec![SINGLE.to_owned()],
    };
    weights.iter().map(|file| folder.join(file)).try_for_each(|path| check_weights(&path))
}

/// What JSON should be is known by its last bracket alone.
fn check_text(path: &Path) -> Result<(), Lack> {
    // One that cannot be read is for its reader, too.
    let Ok(text) = std::fs::read(path) else { return Ok(()) };
    match serde_json::from_slice::<IgnoredAny>(&text) {
        Err(error) if error.is_eof() => {
            let (path, bytes) = (path.display(), text.len());
            Err(Lack::End(format!("{path} is cut short: its {bytes} bytes end within its JSON")))
        }
        _ => Ok(()),
    }
}

/// Weights say in their header how long they are.
fn check_weights(path: &Path) -> Result<(), Lack> {
    let found = length(path).ok_or(Lack::File)?;
    match announced_bytes(path) {
        Ok(announced) if announced == found => Ok(()),
        Ok(announced) => {
            let path = path.display();
            Err(Lack::End(format!("{path} has {found} bytes, and by its header {announced}")))
        }
        Err(error) => Err(Lack::End(error.to_string())),
    }
}
