//! Weights from safetensors files, one or several.
//!
//! What must stay true: nothing is read that the configuration does not call for, nothing called for is left
//! unread, and one tensor at a time is in host memory beside the model.

use std::collections::BTreeMap;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use safetensors::Dtype;
use safetensors::tensor::Metadata;
use tch::{Device, Kind, Tensor};

use super::config::{ModelConfig, read_object};
use super::error::ModelError;

/// Longest header accepted, the safetensors format's own limit.
const MAX_HEADER_BYTES: u64 = 100_000_000;

/// Where one tensor lies.
struct Entry {
    path: PathBuf,
    dtype: Dtype,
    shape: Vec<i64>,
    /// From the start of the file.
    offset: u64,
    bytes: usize,
}

/// Every parameter of `config`, in its order.
pub(crate) fn read_weights(
    dir: &Path,
    config: &ModelConfig,
    kind: Kind,
    device: Device,
) -> Result<Vec<(String, Tensor)>, ModelError> {
    let mut entries = BTreeMap::new();
    for path in weight_files(dir)? {
        read_header(&path, &mut entries)?;
    }
    let found = entries.len();
    let mut named = Vec::new();
    let mut open: Option<(PathBuf, File)> = None;
    for (name, expected) in config.tensors() {
        let Some(entry) = entries.remove(&name) else {
            return Err(ModelError::MissingTensor { path: dir.to_owned(), name, shape: expected, found });
        };
        if entry.shape != expected {
            return Err(ModelError::ShapeMismatch { path: entry.path, name, found: entry.shape, expected });
        }
        let file = match open.take() {
            Some((path, file)) if path == entry.path => file,
            _ => File::open(&entry.path).map_err(|e| ModelError::io("cannot open", &entry.path, e))?,
        };
        named.push((name.clone(), read_tensor(&file, &entry, &name, kind, device)?));
        open = Some((entry.path, file));
    }
    // Derived buffers some exporters write, and the copy of a tied head, say nothing new.
    entries.retain(|name, _| {
        !(name.ends_with("rotary_emb.inv_freq") || (config.tie_word_embeddings && name == "lm_head.weight"))
    });
    match entries.into_iter().next() {
        None => Ok(named),
        Some((name, entry)) => Err(ModelError::ExtraTensor {
            path: entry.path,
            name,
            shape: entry.shape,
            architecture: config.architecture.class_name().to_owned(),
        }),
    }
}

/// The files that hold the weights: those of the index if there is one, else the single file.
fn weight_files(dir: &Path) -> Result<Vec<PathBuf>, ModelError> {
    let index = dir.join("model.safetensors.index.json");
    if !index.exists() {
        return Ok(vec![dir.join("model.safetensors")]);
    }
    let map = read_object(&index)?;
    let weight_map = map
        .get("weight_map")
        .and_then(|value| value.as_object())
        .ok_or_else(|| ModelError::malformed(&index, "has no object `weight_map`"))?;
    let mut files = std::collections::BTreeSet::new();
    for (tensor, file) in weight_map {
        match file.as_str() {
            Some(file) if !file.contains('/') => files.insert(dir.join(file)),
            _ => {
                return Err(ModelError::malformed(
                    &index,
                    format!(
                        "`weight_map` sends tensor `{tensor}` to {file}, not to a file in the same directory"
                    ),
                ));
            }
        };
    }
    Ok(files.into_iter().collect())
}

/// Adds the tensors of one file.
fn read_header(path: &Path, entries: &mut BTreeMap<String, Entry>) -> Result<(), ModelError> {
    let file = File::open(path).map_err(|e| ModelError::io("cannot open", path, e))?;
    let file_bytes = file.metadata().map_err(|e| ModelError::io("cannot read", path, e))?.len();
    let mut length = [0; 8];
    file.read_exact_at(&mut length, 0).map_err(|e| ModelError::io("cannot read", path, e))?;
    let length = u64::from_le_bytes(length);
    if length > MAX_HEADER_BYTES || length + 8 > file_bytes {
        let reason = format!(
            "is no safetensors file, or is cut short: it announces a header of {length} bytes and is {file_bytes} bytes long"
        );
        return Err(ModelError::malformed(path, reason));
    }
    let mut header = vec![0; length as usize];
    file.read_exact_at(&mut header, 8).map_err(|e| ModelError::io("cannot read", path, e))?;
    let metadata: Metadata = serde_json::from_slice(&header)
        .map_err(|e| ModelError::malformed(path, format!("has no safetensors header: {e}")))?;
    for (name, info) in metadata.tensors() {
        let (start, end) = info.data_offsets;
        if 8 + length + end as u64 > file_bytes {
            let reason = format!(
                "is cut short: tensor `{name}` ends at byte {}, the file at byte {file_bytes}",
                8 + length + end as u64
            );
            return Err(ModelError::malformed(path, reason));
        }
        let entry = Entry {
            path: path.to_owned(),
            dtype: info.dtype,
            shape: info.shape.iter().map(|&dim| dim as i64).collect(),
            offset: 8 + length + start as u64,
            bytes: end - start,
        };
        if let Some(earlier) = entries.insert(name.clone(), entry) {
            let reason = format!("tensor `{name}` is in {} too", earlier.path.display());
            return Err(ModelError::malformed(path, reason));
        }
    }
    Ok(())
}

fn read_tensor(
    file: &File,
    entry: &Entry,
    name: &str,
    kind: Kind,
    device: Device,
) -> Result<Tensor, ModelError> {
    let stored = match entry.dtype {
        Dtype::F32 => Kind::Float,
        Dtype::BF16 => Kind::BFloat16,
        Dtype::F16 => Kind::Half,
        other => {
            return Err(ModelError::Unsupported {
                path: entry.path.clone(),
                key: format!("dtype of {name}"),
                value: format!("{other:?}"),
                supported: "F32, BF16, F16",
            });
        }
    };
    let mut bytes = vec![0; entry.bytes];
    file.read_exact_at(&mut bytes, entry.offset)
        .map_err(|e| ModelError::io("cannot read", &entry.path, e))?;
    let tensor = Tensor::f_from_data_size(&bytes, &entry.shape, stored)?;
    Ok(tensor.f_to_device(device)?.f_to_kind(kind)?)
}
