//! Files of a model directory, and typed access to the JSON objects in them.
//!
//! What must stay true: nothing but a regular file is ever opened (a pipe would block for ever), and nothing is
//! read whole that is longer than a JSON file of a model can be.

use std::fs::File;
use std::io::Read as _;
use std::path::Path;

use serde_json::{Map, Value};

use super::error::ModelDirError;

/// Longest text read whole; the largest tokenizers have some 30 MB.
const MAX_TEXT_BYTES: u64 = 512 << 20;

/// A regular file, open, and its length in bytes.
pub(super) fn open(path: &Path) -> Result<(File, u64), ModelDirError> {
    let found = std::fs::metadata(path).map_err(|e| ModelDirError::io("cannot open", path, e))?;
    if !found.is_file() {
        return Err(ModelDirError::malformed(path, "is not a regular file"));
    }
    let file = File::open(path).map_err(|e| ModelDirError::io("cannot open", path, e))?;
    Ok((file, found.len()))
}

pub(super) fn read_text(path: &Path) -> Result<String, ModelDirError> {
    let (file, bytes) = open(path)?;
    if bytes > MAX_TEXT_BYTES {
        let reason = format!("is {bytes} bytes long; at most {MAX_TEXT_BYTES} are read");
        return Err(ModelDirError::malformed(path, reason));
    }
    let mut text = String::new();
    file.take(MAX_TEXT_BYTES)
        .read_to_string(&mut text)
        .map_err(|e| ModelDirError::io("cannot read", path, e))?;
    Ok(text)
}

/// Reads a file that must hold one JSON object.
///
/// # Errors
/// The file, and why it does not.
pub fn read_object(path: &Path) -> Result<Map<String, Value>, ModelDirError> {
    match serde_json::from_str(&read_text(path)?) {
        Ok(Value::Object(map)) => Ok(map),
        Ok(_) => Err(ModelDirError::malformed(path, "is not a JSON object")),
        Err(e) => Err(ModelDirError::malformed(path, format!("is not JSON: {e}"))),
    }
}

/// Typed access to a JSON object, with errors that name the file and the key.
pub(super) struct Reader<'a> {
    pub(super) path: &'a Path,
    pub(super) map: &'a Map<String, Value>,
}

impl Reader<'_> {
    /// The value, unless it is absent or null.
    pub(super) fn get(&self, key: &str) -> Option<&Value> {
        self.map.get(key).filter(|value| !value.is_null())
    }

    pub(super) fn wrong(&self, key: &str, expected: &str) -> ModelDirError {
        let problem = match self.get(key) {
            Some(value) => format!("is {value}"),
            None => "is missing".to_owned(),
        };
        ModelDirError::Config {
            path: self.path.to_owned(),
            key: key.to_owned(),
            problem,
            expected: expected.to_owned(),
        }
    }

    pub(super) fn unsupported(&self, key: &str, value: &Value, supported: &'static str) -> ModelDirError {
        ModelDirError::Unsupported {
            path: self.path.to_owned(),
            key: key.to_owned(),
            value: value.to_string(),
            supported,
        }
    }

    /// The key is absent, or has this one value.
    pub(super) fn only(
        &self,
        key: &str,
        value: &Value,
        supported: &'static str,
    ) -> Result<(), ModelDirError> {
        match self.get(key) {
            Some(found) if found != value => Err(self.unsupported(key, found, supported)),
            _ => Ok(()),
        }
    }

    /// A number that may be a dimension: products of two fit an `i64`.
    pub(super) fn optional_positive(&self, key: &str) -> Result<Option<i64>, ModelDirError> {
        let Some(value) = self.get(key) else { return Ok(None) };
        match value.as_i64().filter(|&number| (1..=i64::from(i32::MAX)).contains(&number)) {
            Some(number) => Ok(Some(number)),
            None => Err(self.wrong(key, "a positive integer below 2^31")),
        }
    }

    pub(super) fn positive(&self, key: &str) -> Result<i64, ModelDirError> {
        self.optional_positive(key)?.ok_or_else(|| self.wrong(key, "a positive integer"))
    }

    pub(super) fn optional_number(&self, key: &str) -> Result<Option<f64>, ModelDirError> {
        match self.get(key) {
            None => Ok(None),
            Some(value) => match value.as_f64() {
                Some(number) if number > 0.0 => Ok(Some(number)),
                _ => Err(self.wrong(key, "a positive number")),
            },
        }
    }

    pub(super) fn number(&self, key: &str) -> Result<f64, ModelDirError> {
        self.optional_number(key)?.ok_or_else(|| self.wrong(key, "a positive number"))
    }

    pub(super) fn flag(&self, key: &str, default: bool) -> Result<bool, ModelDirError> {
        match self.get(key) {
            None => Ok(default),
            Some(value) => value.as_bool().ok_or_else(|| self.wrong(key, "true or false")),
        }
    }

    /// No id, one id or a list of ids.
    pub(super) fn ids(&self, key: &str) -> Result<Vec<u32>, ModelDirError> {
        let one = |value: &Value| value.as_u64().and_then(|id| u32::try_from(id).ok());
        match self.get(key) {
            None => Some(Vec::new()),
            Some(Value::Array(list)) => list.iter().map(one).collect::<Option<Vec<u32>>>(),
            Some(value) => one(value).map(|id| vec![id]),
        }
        .ok_or_else(|| self.wrong(key, "a token id or a list of them"))
    }
}
