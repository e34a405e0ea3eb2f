//! Questions: read from files, checked whole, and dealt in a seeded order.
//!
//! The coordinator calls [`Dataset::load`] before anything starts and [`Order::next_batch`] every step. What must
//! stay true: rows never change after loading; the order depends on (seed, epoch) alone, on every platform and in
//! every version; a [`Cursor`] from a checkpoint gives exactly the rest.

#[cfg(test)]
mod edges;
mod order;
mod read;

use std::path::{Path, PathBuf};

use agentfly_common::row::{QUESTION_FIELDS, Reference};
use serde::Serialize;
use serde_json::{Map, Value};

pub use order::{Cursor, Order};

/// One question. Immutable once loaded.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Row {
    /// Its `id`, or its number in the file counted from 0. Unique in the data set.
    pub id: String,
    /// The user's turn, exactly as in the file: LaTeX and line breaks kept.
    pub text: String,
    /// Every other field, what the reward compares with among them, in the file's order.
    pub extra: Map<String, Value>,
    /// The row's `data_source`, or its file's name without the extension: names it in metrics.
    pub data_source: String,
}

/// What the reward of a job needs of every row.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Need<'a> {
    /// The reward's name, for errors.
    pub reward: &'a str,
    /// The field it compares with.
    pub reference: Reference,
}

/// What is refused without being read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Size of a file.
    pub file_bytes: u64,
}

impl Default for Limits {
    /// 2 GiB: far more than any list of questions, far less than a disk image.
    fn default() -> Self {
        Self { file_bytes: 2 << 30 }
    }
}

/// Rows of one or more files.
#[derive(Debug, Clone, PartialEq)]
pub struct Dataset {
    rows: Vec<Row>,
}

impl Dataset {
    /// Reads `.json` (an array of objects) and `.jsonl` (an object a line) files, in this order. Every row must have
    /// what `reward` compares a reply with.
    ///
    /// # Errors
    /// The first thing that is wrong, with file, row (counted from 1) and field.
    pub fn load(paths: &[PathBuf], reward: &Need<'_>, limits: Limits) -> Result<Self, DataError> {
        let mut rows = Vec::new();
        let mut seen = read::SeenIds::default();
        for path in paths {
            read::file(path, reward, limits, &mut seen, &mut rows)?;
        }
        Ok(Self { rows })
    }

    /// The first `limit` rows (`data.val_max_samples`); `None` keeps all.
    #[must_use]
    pub fn first(mut self, limit: Option<usize>) -> Self {
        self.rows.truncate(limit.unwrap_or(usize::MAX));
        self
    }

    /// The rows, in file order. Indices of [`Order::next_batch`] count in it.
    #[must_use]
    pub fn rows(&self) -> &[Row] {
        &self.rows
    }

    /// How many.
    #[must_use]
    pub fn len(&self) -> usize {
        self.rows.len()
    }

    /// Whether there is none (no files were given: an empty file is an error).
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.rows.is_empty()
    }
}

/// Where in the data something is wrong.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Place {
    /// The file.
    pub path: PathBuf,
    /// The row, counted from 1 (in .jsonl: the line).
    pub row: usize,
}

impl std::fmt::Display for Place {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}, row {}", self.path.display(), self.row)
    }
}

impl Place {
    fn new(path: &Path, row: usize) -> Self {
        Self { path: path.to_owned(), row }
    }
}

/// Why questions cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum DataError {
    /// The file cannot be opened or read.
    #[error("{}: {source}; check the path", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// The system's reason.
        source: std::io::Error,
    },
    /// Parquet, CSV, …
    #[error("{}: {found} is not supported; convert it to .jsonl, an object a line ({how})", path.display())]
    Format {
        /// The file.
        path: PathBuf,
        /// What it is.
        found: &'static str,
        /// A command that converts it.
        how: &'static str,
    },
    /// More bytes than any list of questions has.
    #[error("{}: {bytes} bytes, more than the {limit} that are read as questions; split it", path.display())]
    TooLarge {
        /// The file.
        path: PathBuf,
        /// Its size.
        bytes: u64,
        /// The limit.
        limit: u64,
    },
    /// Bytes that are not text.
    #[error("{}: byte {offset} is not UTF-8; save the file as UTF-8", path.display())]
    NotUtf8 {
        /// The file.
        path: PathBuf,
        /// Of the first wrong byte, counted from 0.
        offset: usize,
    },
    /// No rows.
    #[error("{}: no questions in it; expected objects with {} and \"{needed}\"", path.display(), question_fields())]
    Empty {
        /// The file.
        path: PathBuf,
        /// The field that the reward needs.
        needed: &'static str,
    },
    /// JSON of another shape than a list of objects.
    #[error("{}: expected a list of objects, found {found}", path.display())]
    NotAList {
        /// The file.
        path: PathBuf,
        /// What it holds.
        found: String,
    },
    /// Text that is not JSON.
    #[error("{}: not JSON at line {line}, column {column}: {problem}", path.display())]
    NotJson {
        /// The file.
        path: PathBuf,
        /// Counted from 1.
        line: usize,
        /// Counted from 1.
        column: usize,
        /// The parser's words.
        problem: String,
    },
    /// A row that is not an object.
    #[error("{place}: expected an object, found {found}")]
    NotAnObject {
        /// Which row.
        place: Place,
        /// What it is.
        found: String,
    },
    /// A field that every row needs.
    #[error("{place}: no {field}; the fields are: {found}")]
    MissingField {
        /// Which row.
        place: Place,
        /// The field, or the choice of fields.
        field: String,
        /// The fields it has.
        found: String,
    },
    /// A field of the wrong type.
    #[error("{place}: field \"{field}\" is {found}; expected {expected}")]
    WrongType {
        /// Which row.
        place: Place,
        /// The field.
        field: String,
        /// What it is.
        found: String,
        /// What it should be.
        expected: String,
    },
    /// Two rows with one id.
    #[error("{second}: field \"id\" is {id}, which {first} has already; ids must differ")]
    DuplicateId {
        /// The id.
        id: String,
        /// The row that had it first.
        first: Place,
        /// The row that has it again.
        second: Place,
    },
}

impl DataError {
    /// The operator must act: all of these are about the files that were given.
    #[must_use]
    pub fn whose(&self) -> agentfly_common::error::Whose {
        agentfly_common::error::Whose::Operator
    }
}

fn question_fields() -> String {
    let quoted: Vec<_> = QUESTION_FIELDS.iter().map(|field| format!("\"{field}\"")).collect();
    quoted.join(" or ")
}
