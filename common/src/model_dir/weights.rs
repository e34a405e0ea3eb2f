//! Which file holds which tensor: safetensors files, one or several, held against the configuration.
//!
//! What must stay true: nothing is left out that the configuration calls for, and nothing is in the files that
//! it does not; only headers are read.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};

use safetensors::Dtype;
use safetensors::tensor::TensorInfo;

use super::config::ModelConfig;
use super::error::ModelDirError;
use super::header::{self, LENGTH_BYTES, MAX_HEADER_BYTES};
use super::json::{open, read_object};

/// Says which of several files holds which tensor.
const INDEX: &str = "model.safetensors.index.json";

/// A kind of number that weights are stored in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StoredDtype {
    /// 32 bits.
    F32,
    /// 16 bits with f32's range.
    Bf16,
    /// 16 bits, IEEE 754.
    F16,
}

/// Where one parameter of the model lies.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StoredTensor {
    /// Its Hugging Face name.
    pub name: String,
    /// The file.
    pub path: PathBuf,
    /// How its numbers are stored, little-endian and row-major.
    pub dtype: StoredDtype,
    /// Its shape.
    pub shape: Vec<i64>,
    /// Its first byte, from the start of the file.
    pub offset: u64,
    /// Its length.
    pub bytes: usize,
}

/// A tensor of a header, and the byte its offsets count from.
struct Found {
    path: PathBuf,
    data_start: u64,
    info: TensorInfo,
}

impl Found {
    fn shape(&self) -> Vec<i64> {
        self.info.shape.iter().map(|&dim| i64::try_from(dim).unwrap_or(i64::MAX)).collect()
    }

    fn stored(self, name: String, expected: Vec<i64>) -> Result<StoredTensor, ModelDirError> {
        if self.shape() != expected {
            let found = self.shape();
            return Err(ModelDirError::ShapeMismatch { path: self.path, name, found, expected });
        }
        let dtype = match self.info.dtype {
            Dtype::F32 => StoredDtype::F32,
            Dtype::BF16 => StoredDtype::Bf16,
            Dtype::F16 => StoredDtype::F16,
            other => {
                return Err(ModelDirError::Unsupported {
                    path: self.path,
                    key: format!("dtype of {name}"),
                    value: format!("{other:?}"),
                    supported: "F32, BF16, F16",
                });
            }
        };
        let (start, end) = self.info.data_offsets;
        let offset = self.data_start + start as u64;
        Ok(StoredTensor { name, path: self.path, dtype, shape: expected, offset, bytes: end - start })
    }
}

/// Every tensor of one safetensors file, sorted by name; only the header is read.
///
/// # Errors
/// When the file is absent, cut short or damaged, or a tensor is of a dtype that is not known here.
pub fn stored_tensors(path: &Path) -> Result<Vec<StoredTensor>, ModelDirError> {
    let mut found = BTreeMap::new();
    read_header(path, &mut found)?;
    let stored = |(name, entry): (String, Found)| {
        let shape = entry.shape();
        entry.stored(name, shape)
    };
    found.into_iter().map(stored).collect()
}

/// Bytes that a safetensors file should have, by its own header; where the file ends within that, the bytes to the header's
/// end.
///
/// # Errors
/// When the file cannot be read, or begins with no header.
pub fn announced_bytes(path: &Path) -> Result<u64, ModelDirError> {
    let (file, file_bytes) = open(path)?;
    let first = first_bytes(&file, file_bytes, path)?;
    let announced = u64::from_le_bytes(first);
    if announced <= MAX_HEADER_BYTES && LENGTH_BYTES + announced > file_bytes {
        return Ok(LENGTH_BYTES + announced);
    }
    let text = header_text(&file, first, file_bytes, path)?;
    let data =
        header::announced_data_bytes(&text).map_err(|reason| ModelDirError::malformed(path, reason))?;
    Ok((LENGTH_BYTES + announced).saturating_add(data))
}

/// Every parameter of `config`, in its order, and the head where it is tied and stored all the same.
pub(super) fn locate(
    dir: &Path,
    config: &ModelConfig,
) -> Result<(Vec<StoredTensor>, Option<StoredTensor>), ModelDirError> {
    let mut all = BTreeMap::new();
    let files = weight_files(dir)?;
    for path in &files {
        read_header(path, &mut all)?;
    }
    let searched = match files.first() {
        Some(only) if files.len() == 1 => only.clone(),
        _ => dir.join(INDEX),
    };
    let found = all.len();
    let mut tensors = Vec::new();
    for (name, shape) in config.tensors() {
        let Some(entry) = all.remove(&name) else {
            let nearest = nearest(&name, &all).map(Box::new);
            return Err(ModelDirError::MissingTensor { path: searched, name, shape, found, nearest });
        };
        tensors.push(entry.stored(name, shape)?);
    }
    let mut tied_copy = None;
    if config.tie_word_embeddings
        && let Some(entry) = all.remove("lm_head.weight")
    {
        tied_copy = Some(entry.stored("lm_head.weight".to_owned(), vec![config.vocab, config.hidden])?);
    }
    // Derived buffers that some exporters write say nothing new.
    all.retain(|name, _| !name.ends_with("rotary_emb.inv_freq"));
    match all.into_iter().next() {
        None => Ok((tensors, tied_copy)),
        Some((name, entry)) => Err(ModelDirError::ExtraTensor {
            shape: entry.shape(),
            path: entry.path,
            name,
            architecture: config.architecture.class_name().to_owned(),
        }),
    }
}

/// A tensor whose name is the end of the one that is missing, or the other way round: prefixes differ between
/// exporters.
fn nearest(missing: &str, all: &BTreeMap<String, Found>) -> Option<(String, Vec<i64>)> {
    let alike = |name: &&String| missing.ends_with(name.as_str()) || name.ends_with(missing);
    let name = all.keys().find(alike)?;
    Some((name.clone(), all[name].shape()))
}

/// The files that hold the weights: those of the index if there is one, else the single file.
fn weight_files(dir: &Path) -> Result<BTreeSet<PathBuf>, ModelDirError> {
    let (index, single) = (dir.join(INDEX), dir.join("model.safetensors"));
    if !index.exists() {
        return if single.exists() { Ok(BTreeSet::from([single])) } else { Err(no_weights(dir, &single)) };
    }
    let map = read_object(&index)?;
    let weight_map = map
        .get("weight_map")
        .and_then(|value| value.as_object())
        .ok_or_else(|| ModelDirError::malformed(&index, "has no object `weight_map`"))?;
    let mut files = BTreeSet::new();
    for (tensor, file) in weight_map {
        match file.as_str() {
            Some(file) if !file.contains('/') => files.insert(dir.join(file)),
            _ => {
                let reason = format!(
                    "`weight_map` sends tensor `{tensor}` to {file}, not to a file in the same directory"
                );
                return Err(ModelDirError::malformed(&index, reason));
            }
        };
    }
    if let Some(missing) = files.iter().find(|file| !file.exists()) {
        let reason = format!("is not there, though {INDEX} names it as one of {}; copy it, too", files.len());
        return Err(ModelDirError::malformed(missing, reason));
    }
    if single.exists() && !files.contains(&single) {
        let reason = "does not name model.safetensors, which is there too: two models in one directory; remove the one that is not meant";
        return Err(ModelDirError::malformed(&index, reason));
    }
    Ok(files)
}

/// What to say of a directory without a safetensors file.
fn no_weights(dir: &Path, single: &Path) -> ModelDirError {
    let pickled = dir.join("pytorch_model.bin").exists() || dir.join("pytorch_model.bin.index.json").exists();
    let reason = if pickled {
        "is not there, only pytorch_model.bin, which is not read: loading it can run code; save the model with \
         save_pretrained(…, safe_serialization=True)"
    } else {
        "is not there, and no model.safetensors.index.json either: the directory holds no weights"
    };
    ModelDirError::malformed(single, reason)
}

/// Adds the tensors of one file.
fn read_header(path: &Path, all: &mut BTreeMap<String, Found>) -> Result<(), ModelDirError> {
    let (file, file_bytes) = open(path)?;
    let text = header_text(&file, first_bytes(&file, file_bytes, path)?, file_bytes, path)?;
    let data_start = LENGTH_BYTES + text.len() as u64;
    let tensors = header::parse(&text, file_bytes - data_start)
        .map_err(|reason| ModelDirError::malformed(path, reason))?;
    for (name, info) in tensors {
        let found = Found { path: path.to_owned(), data_start, info };
        if let Some(earlier) = all.insert(name.clone(), found) {
            let reason = format!("tensor `{name}` is in {} too", earlier.path.display());
            return Err(ModelDirError::malformed(path, reason));
        }
    }
    Ok(())
}

/// The bytes that say how long the header is; zeros for those that a shorter file lacks.
fn first_bytes(
    file: &File,
    file_bytes: u64,
    path: &Path,
) -> Result<[u8; LENGTH_BYTES as usize], ModelDirError> {
    let mut first = [0; LENGTH_BYTES as usize];
    let there = file_bytes.min(LENGTH_BYTES) as usize;
    let read = file.read_exact_at(&mut first[..there], 0);
    read.map_err(|e| ModelDirError::io("cannot read", path, e))?;
    Ok(first)
}

fn header_text(
    file: &File,
    first: [u8; LENGTH_BYTES as usize],
    file_bytes: u64,
    path: &Path,
) -> Result<Vec<u8>, ModelDirError> {
    let length =
        header::header_bytes(first, file_bytes).map_err(|reason| ModelDirError::malformed(path, reason))?;
    let mut text = vec![0; length as usize];
    let read = file.read_exact_at(&mut text, LENGTH_BYTES);
    read.map_err(|e| ModelDirError::io("cannot read", path, e))?;
    Ok(text)
}
