//! Checksums of files: SHA-256 for what the hub keeps as large files, git's blob id for the others.

use std::fs::File;
use std::io::Read as _;
use std::path::Path;

use sha1::Sha1;
use sha2::{Digest as _, Sha256};

/// Bytes read at a time.
const BUFFER: usize = 1 << 20;

/// What the hub says a file's bytes hash to; the text is also the file's name in the cache.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Checksum {
    /// Of a large file.
    Sha256(String),
    /// Git's id of a blob: SHA-1 over a header with the length, and the bytes.
    GitBlob(String),
}

impl Checksum {
    /// Lower-case hex.
    pub(crate) fn hex(&self) -> &str {
        match self {
            Self::Sha256(hex) | Self::GitBlob(hex) => hex,
        }
    }

    /// Its name, for people.
    pub(crate) fn kind(&self) -> &'static str {
        match self {
            Self::Sha256(_) => "SHA-256",
            Self::GitBlob(_) => "git blob id",
        }
    }

    /// Whether the text is a digest of this kind, so that it can be a file's name.
    pub(crate) fn is_whole(&self) -> bool {
        let digits = match self {
            Self::Sha256(_) => 64,
            Self::GitBlob(_) => 40,
        };
        self.hex().len() == digits && self.hex().chars().all(|c| matches!(c, '0'..='9' | 'a'..='f'))
    }

    /// The same digest of a file.
    pub(crate) fn of(&self, path: &Path) -> std::io::Result<String> {
        let file = File::open(path)?;
        match self {
            Self::Sha256(_) => digest(Sha256::new(), file),
            Self::GitBlob(_) => {
                let header = format!("blob {}\0", file.metadata()?.len());
                digest(Sha1::new_with_prefix(header), file)
            }
        }
    }
}

fn digest<D: sha2::Digest>(mut state: D, mut file: File) -> std::io::Result<String> {
    let mut buffer = vec![0; BUFFER];
    loop {
        match file.read(&mut buffer)? {
            0 => return Ok(hex::encode(state.finalize())),
            read => state.update(&buffer[..read]),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn digests_are_those_of_sha256sum_and_git_hash_object() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("f");
        std::fs::write(&file, "hello\n").unwrap();
        let sha256 = "5891b5b522d5df086d0ff0b110fbd9d21bb4fc7163af34d08286a2e846f6be03";
        assert_eq!(Checksum::Sha256(String::new()).of(&file).unwrap(), sha256);
        let blob = "ce013625030ba8dba906f756967f9e9ca394464a";
        assert_eq!(Checksum::GitBlob(String::new()).of(&file).unwrap(), blob);
        assert!(Checksum::Sha256(sha256.into()).is_whole() && Checksum::GitBlob(blob.into()).is_whole());
        assert!(
            !Checksum::Sha256(blob.into()).is_whole() && !Checksum::GitBlob("../../../x".into()).is_whole()
        );
    }
}
