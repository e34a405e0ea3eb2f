//! What a model's repository holds, and which of it is needed.

use std::collections::BTreeMap;

use serde::Deserialize;

use crate::name::{is_commit, is_part};
use crate::verify::Checksum;

/// The small files of a model, as far as a repository has them.
pub(crate) const SMALL: [&str; 12] = [
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    INDEX,
];
/// Says which file holds which tensor.
pub(crate) const INDEX: &str = "model.safetensors.index.json";
/// The weights of a model in one file.
pub(crate) const SINGLE: &str = "model.safetensors";

/// One file of a repository.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct RemoteFile {
    /// Its plain name.
    pub(crate) name: String,
    pub(crate) bytes: u64,
    pub(crate) checksum: Checksum,
}

/// A repository at one commit.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Listing {
    pub(crate) commit: String,
    files: BTreeMap<String, RemoteFile>,
}

#[derive(Deserialize)]
struct Answer {
    sha: String,
    siblings: Vec<Sibling>,
}

#[derive(Deserialize)]
struct Sibling {
    rfilename: String,
    size: Option<u64>,
    #[serde(rename = "blobId")]
    blob_id: Option<String>,
    lfs: Option<LargeFile>,
}

#[derive(Deserialize)]
struct LargeFile {
    sha256: String,
    size: u64,
}

impl Sibling {
    /// `None` for what lies in a folder or has no plain name: none of it belongs to a model.
    fn file(self) -> Option<Result<RemoteFile, String>> {
        let name = self.rfilename;
        if !is_part(&name) {
            return None;
        }
        let (bytes, checksum) = match (self.lfs, self.size, self.blob_id) {
            (Some(lfs), ..) => (lfs.size, Checksum::Sha256(lfs.sha256)),
            (None, Some(size), Some(id)) => (size, Checksum::GitBlob(id)),
            _ => {
                return Some(Err(format!(
                    "{name} comes without size and checksum; is HF_ENDPOINT a whole mirror?"
                )));
            }
        };
        if !checksum.is_whole() {
            return Some(Err(format!(
                "the {} of {name} is {:?}, which is none",
                checksum.kind(),
                checksum.hex()
            )));
        }
        Some(Ok(RemoteFile { name, bytes, checksum }))
    }
}

impl Listing {
    /// Reads the hub's answer.
    ///
    /// # Errors
    /// What cannot be used in it.
    pub(crate) fn read(text: &str) -> Result<Self, String> {
        let answer: Answer =
            serde_json::from_str(text).map_err(|error| format!("the answer is no listing ({error})"))?;
        if !is_commit(&answer.sha) {
            return Err(format!("its commit is {:?}, which is none", answer.sha));
        }
        let files: Vec<RemoteFile> =
            answer.siblings.into_iter().filter_map(Sibling::file).collect::<Result<_, _>>()?;
        let files = files.into_iter().map(|file| (file.name.clone(), file)).collect();
        Ok(Self { commit: answer.sha, files })
    }

    /// Everything but the weights.
    pub(crate) fn small_files(&self) -> Vec<RemoteFile> {
        SMALL.iter().filter_map(|name| self.files.get(*name)).cloned().collect()
    }

    pub(crate) fn has(&self, name: &str) -> bool {
        self.files.contains_key(name)
    }

    /// The files of weights: those that the index names, or the single one.
    ///
    /// # Errors
    /// What is missing, and what is there instead.
    pub(crate) fn weights(&self, indexed: Option<&[String]>) -> Result<Vec<RemoteFile>, String> {
        let single = [SINGLE.to_owned()];
        let wanted = indexed.unwrap_or(&single);
        let found = |name: &String| self.files.get(name).cloned().ok_or_else(|| self.no_weights(name));
        wanted.iter().map(found).collect()
    }

    fn no_weights(&self, name: &str) -> String {
        let other = [".bin", ".pth", ".gguf", ".safetensors"];
        let there: Vec<&str> = self
            .files
            .keys()
            .map(String::as_str)
            .filter(|file| other.iter().any(|end| file.ends_with(end)))
            .take(4)
            .collect();
        let there = if there.is_empty() { "no weights at all".to_owned() } else { there.join(", ") };
        format!("it has no {name}, but {there}; only safetensors are read: convert it, or take another model")
    }
}

/// The files that an index names, each once.
///
/// # Errors
/// What is wrong with it.
pub(crate) fn indexed_files(index: &str) -> Result<Vec<String>, String> {
    #[derive(Deserialize)]
    struct Index {
        weight_map: BTreeMap<String, String>,
    }
    let index: Index = serde_json::from_str(index).map_err(|error| format!("{INDEX} is none ({error})"))?;
    let files: std::collections::BTreeSet<String> = index.weight_map.into_values().collect();
    match files.iter().find(|file| !is_part(file)) {
        Some(file) => Err(format!("{INDEX} names {file:?}, which is no file beside it")),
        None => Ok(files.into_iter().collect()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answer(siblings: &str) -> String {
        format!(r#"{{"sha": "{}", "siblings": [{siblings}]}}"#, "a".repeat(40))
    }

    #[test]
    fn a_listing_gives_sizes_and_checksums_of_plain_files_alone() {
        let (blob, sha256) = ("b".repeat(40), "c".repeat(64));
        let text = answer(&format!(
            r#"{{"rfilename": "config.json", "size": 12, "blobId": "{blob}"}},
               {{"rfilename": "../../evil", "size": 1, "blobId": "{blob}"}},
               {{"rfilename": "onnx/model.safetensors", "size": 1, "blobId": "{blob}"}},
               {{"rfilename": "model.safetensors", "size": 7, "blobId": "{blob}", "lfs": {{"sha256": "{sha256}", "size": 99, "pointerSize": 7}}}}"#
        ));
        let listing = Listing::read(&text).unwrap();
        assert_eq!(listing.files.len(), 2);
        let weights = listing.weights(None).unwrap();
        assert_eq!((weights[0].bytes, &weights[0].checksum), (99, &Checksum::Sha256(sha256)));
        assert_eq!(listing.small_files()[0].checksum, Checksum::GitBlob(blob));
    }

    #[test]
    fn what_cannot_be_used_is_said() {
        assert!(Listing::read("<html>").unwrap_err().contains("no listing"));
        assert!(Listing::read(r#"{"sha": "main", "siblings": []}"#).unwrap_err().contains("commit"));
        let bare = answer(r#"{"rfilename": "config.json"}"#);
        assert!(Listing::read(&bare).unwrap_err().contains("without size and checksum"));
        let climbing = answer(r#"{"rfilename": "config.json", "size": 1, "blobId": "../../../etc/passwd"}"#);
        assert!(Listing::read(&climbing).unwrap_err().contains("git blob id"));
        let old = answer(&format!(
            r#"{{"rfilename": "pytorch_model.bin", "size": 1, "blobId": "{}"}}"#,
            "d".repeat(40)
        ));
        let told = Listing::read(&old).unwrap().weights(None).unwrap_err();
        assert!(told.contains("pytorch_model.bin") && told.contains("safetensors"), "{told}");
    }

    #[test]
    fn an_index_names_each_file_once_and_none_elsewhere() {
        let index =
            r#"{"weight_map": {"a": "m-2.safetensors", "b": "m-1.safetensors", "c": "m-2.safetensors"}}"#;
        assert_eq!(indexed_files(index).unwrap(), ["m-1.safetensors", "m-2.safetensors"]);
        assert!(indexed_files(r#"{"weight_map": {"a": "../x"}}"#).unwrap_err().contains("../x"));
        assert!(indexed_files("{}").unwrap_err().contains("weight_map"));
    }
}
