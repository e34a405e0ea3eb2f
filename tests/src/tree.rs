//! The project's own source, read as text: for the rules that the architecture test holds.

use std::path::{Path, PathBuf};

/// The repository's root.
#[must_use]
pub fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().map(Path::to_path_buf).unwrap_or_default()
}

/// A source file.
pub struct Source {
    /// Relative to the root, with `/`.
    pub path: String,
    /// Its text.
    pub text: String,
}

impl Source {
    /// The text up to the unit tests, which close a file. A `#[cfg(test)] mod tests;` among other modules closes
    /// nothing.
    #[must_use]
    pub fn production(&self) -> &str {
        self.text.split("#[cfg(test)]\nmod tests {").next().unwrap_or_default()
    }

    /// Whether it is only compiled for tests.
    #[must_use]
    pub fn is_test(&self) -> bool {
        self.path.starts_with("tests/") || self.path.contains("/tests/") || self.path.contains("/examples/")
    }
}

/// All Rust files of the project.
#[must_use]
pub fn rust_sources() -> Vec<Source> {
    let mut found = Vec::new();
    for folder in ["proto", "common", "coordinator", "worker", "tests"] {
        collect(&root().join(folder), &mut found);
    }
    found.sort_by(|a, b| a.path.cmp(&b.path));
    found
}

fn collect(folder: &Path, found: &mut Vec<Source>) {
    let Ok(entries) = std::fs::read_dir(folder) else { return };
    for path in entries.flatten().map(|entry| entry.path()) {
        if path.is_dir() {
            collect(&path, found);
        } else if path.extension().is_some_and(|e| e == "rs") {
            let text = std::fs::read_to_string(&path).unwrap_or_default();
            let path = path.strip_prefix(root()).unwrap_or(&path).display().to_string();
            found.push(Source { path, text });
        }
    }
}

/// The workspace crates that the crate in `folder` depends on, by their `agentfly-…` names, tests aside.
#[must_use]
pub fn dependencies(folder: &str) -> Vec<String> {
    let manifest = std::fs::read_to_string(root().join(folder).join("Cargo.toml")).unwrap_or_default();
    let normal = manifest.split("[dev-dependencies]").next().unwrap_or_default();
    let lines = normal.lines().filter_map(|line| line.split([' ', '=']).next());
    lines.filter(|name| !name.starts_with('[')).map(str::to_owned).collect()
}
