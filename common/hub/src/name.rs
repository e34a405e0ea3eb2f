//! Names of models on the hub.

/// Longest name of a repository that the hub gives out.
const MAX_REPOSITORY: usize = 96;
/// The branch that a name without a revision means.
const DEFAULT_REVISION: &str = "main";

/// `org/name`, optionally with `@revision`: a branch, a tag or a commit.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ModelName {
    /// `org/name`.
    pub repository: String,
    /// The revision, if one was given.
    pub revision: Option<String>,
}

impl ModelName {
    /// Reads a name; `None` where the text cannot be one. A relative path of two parts looks like a name, so ask first
    /// whether it exists.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        let (repository, revision) = match text.split_once('@') {
            Some((repository, revision)) => (repository, Some(revision)),
            None => (text, None),
        };
        let (owner, name) = repository.split_once('/')?;
        let fits = is_part(owner) && is_part(name) && repository.len() <= MAX_REPOSITORY;
        let revision_fits = revision.is_none_or(|text| text.split('/').all(is_part));
        (fits && revision_fits)
            .then(|| Self { repository: repository.to_owned(), revision: revision.map(str::to_owned) })
    }

    /// The revision to fetch.
    #[must_use]
    pub fn revision(&self) -> &str {
        self.revision.as_deref().unwrap_or(DEFAULT_REVISION)
    }

    /// The commit it names, if it does: what that holds never changes.
    pub(crate) fn commit(&self) -> Option<&str> {
        self.revision.as_deref().filter(|revision| is_commit(revision))
    }
}

impl std::fmt::Display for ModelName {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match &self.revision {
            Some(revision) => write!(f, "{}@{revision}", self.repository),
            None => f.write_str(&self.repository),
        }
    }
}

/// A plain name: no separator, nothing hidden, nothing that climbs.
pub(crate) fn is_part(text: &str) -> bool {
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    !text.is_empty() && !text.starts_with('.') && !text.contains("..") && text.chars().all(plain)
}

/// A whole git commit id.
pub(crate) fn is_commit(text: &str) -> bool {
    text.len() == 40 && text.chars().all(|c| c.is_ascii_hexdigit())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_two_plain_parts_and_maybe_a_revision() {
        let name = ModelName::parse("Qwen/Qwen2.5-3B-Instruct@v1.0").unwrap();
        assert_eq!((name.repository.as_str(), name.revision()), ("Qwen/Qwen2.5-3B-Instruct", "v1.0"));
        assert_eq!(name.to_string(), "Qwen/Qwen2.5-3B-Instruct@v1.0");
        assert_eq!(ModelName::parse("a/b").unwrap().revision(), "main");
        assert_eq!(ModelName::parse("a/b@refs/pr/3").unwrap().revision(), "refs/pr/3");
        let commit = "0123456789abcdef0123456789abcdef01234567";
        assert_eq!(ModelName::parse(&format!("a/b@{commit}")).unwrap().commit(), Some(commit));
        for no in [
            "tiny", "/a/b", "./a/b", "../b", "a/../b", "a/b/c", "a/", "/b", "a b/c", "a/b@", "a/b@../c",
            "~/m",
        ] {
            assert_eq!(ModelName::parse(no), None, "{no}");
        }
    }
}
