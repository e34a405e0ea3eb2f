//! Weights to a Hugging Face directory that `transformers` (and [`super::Decoder::load`]) reads.
//!
//! What must stay true: when [`export`] returns, every byte is on disk; a caller that wants all or nothing
//! exports into a directory beside and renames it.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::Path;

use agentfly_common::model_dir::{ModelConfig, ModelDirError, read_object};
use serde_json::{Map, Value, json};
use tch::{Kind, Tensor};

use super::error::ModelError;
use super::parameters::{element_bytes, for_each_chunk};

/// Above this a model is written as several files, as `transformers` does.
pub(crate) const MAX_FILE_BYTES: u64 = 5_000_000_000;

/// What else makes a model directory, copied from the model training started from.
const COPIED: [&str; 10] = [
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
    "chat_template.json",
];

/// Writes `config.json`, the weights and, from `source_dir`, the tokenizer's files into `dir` (created if
/// need be), and syncs them. All tensors must be of one kind: f32, bf16 or f16.
///
/// # Errors
/// Names the tensor that does not fit the configuration, or the file that could not be written.
pub fn export(
    dir: &Path,
    config: &ModelConfig,
    named: &[(String, Tensor)],
    source_dir: Option<&Path>,
) -> Result<(), ModelError> {
    export_in_files(dir, config, named, source_dir, MAX_FILE_BYTES)
}

/// [`export`] with another limit on a file's size.
pub(crate) fn export_in_files(
    dir: &Path,
    config: &ModelConfig,
    named: &[(String, Tensor)],
    source_dir: Option<&Path>,
    max_file_bytes: u64,
) -> Result<(), ModelError> {
    let kind = check(dir, config, named)?;
    std::fs::create_dir_all(dir).map_err(|e| ModelError::io("cannot create", dir, e))?;
    write_config(dir, config, kind, source_dir)?;
    if let Some(source) = source_dir {
        for name in COPIED {
            let from = source.join(name);
            if from.exists() {
                let bytes = std::fs::read(&from).map_err(|e| ModelError::io("cannot read", &from, e))?;
                write_synced(&dir.join(name), |file| file.write_all(&bytes))?;
            }
        }
    }
    let files = split(named, max_file_bytes);
    if let [one] = files.as_slice() {
        write_safetensors(&dir.join("model.safetensors"), one)?;
    } else {
        let mut weight_map = Map::new();
        for (i, tensors) in files.iter().enumerate() {
            let name = format!("model-{:05}-of-{:05}.safetensors", i + 1, files.len());
            write_safetensors(&dir.join(&name), tensors)?;
            for (tensor, _) in tensors.iter() {
                weight_map.insert(tensor.clone(), json!(name));
            }
        }
        let total: u64 = named.iter().map(|(_, tensor)| bytes_of(tensor)).sum();
        let index = json!({ "metadata": { "total_size": total }, "weight_map": weight_map });
        write_json(&dir.join("model.safetensors.index.json"), &index)?;
    }
    File::open(dir).and_then(|d| d.sync_all()).map_err(|e| ModelError::io("cannot sync", dir, e))
}

/// Every tensor of the configuration, once, in its shape, all of one kind: that kind.
fn check(dir: &Path, config: &ModelConfig, named: &[(String, Tensor)]) -> Result<Kind, ModelError> {
    let expected = config.tensors();
    let kind = named.first().map_or(Kind::Float, |(_, tensor)| tensor.kind());
    for (name, shape) in &expected {
        let Some((_, tensor)) = named.iter().find(|(n, _)| n == name) else {
            return Err(ModelDirError::MissingTensor {
                path: dir.to_owned(),
                name: name.clone(),
                shape: shape.clone(),
                found: named.len(),
                nearest: None,
            }
            .into());
        };
        if tensor.size() != *shape {
            return Err(ModelDirError::ShapeMismatch {
                path: dir.to_owned(),
                name: name.clone(),
                found: tensor.size(),
                expected: shape.clone(),
            }
            .into());
        }
        if tensor.kind() != kind || dtype(kind).is_none() {
            return Err(ModelError::Input {
                what: "weights to export",
                got: format!("`{name}` in {:?}", tensor.kind()),
                needed: "all in one of Float, BFloat16, Half".to_owned(),
            });
        }
    }
    match named.iter().find(|(name, _)| !expected.iter().any(|(n, _)| n == name)) {
        None if named.len() == expected.len() => Ok(kind),
        None => Err(ModelError::Input {
            what: "weights to export",
            got: format!("{} tensors, some twice", named.len()),
            needed: format!("{} tensors", expected.len()),
        }),
        Some((name, tensor)) => Err(ModelDirError::ExtraTensor {
            path: dir.to_owned(),
            name: name.clone(),
            shape: tensor.size(),
            architecture: config.architecture.class_name().to_owned(),
        }
        .into()),
    }
}

/// safetensors' and `transformers`' names of a kind.
fn dtype(kind: Kind) -> Option<(&'static str, &'static str)> {
    match kind {
        Kind::Float => Some(("F32", "float32")),
        Kind::BFloat16 => Some(("BF16", "bfloat16")),
        Kind::Half => Some(("F16", "float16")),
        _ => None,
    }
}

fn bytes_of(tensor: &Tensor) -> u64 {
    (tensor.numel() * element_bytes(tensor.kind())) as u64
}

/// The source's `config.json` (it may hold keys other programs read), or the configuration's own, with the
/// kind the weights now have.
fn write_config(
    dir: &Path,
    config: &ModelConfig,
    kind: Kind,
    source_dir: Option<&Path>,
) -> Result<(), ModelError> {
    let source = source_dir.map(|s| s.join("config.json")).filter(|path| path.exists());
    let mut map = match source {
        Some(path) => read_object(&path)?,
        None => config.to_json(),
    };
    let (_, name) = dtype(kind).unwrap_or(("F32", "float32"));
    let key = if map.contains_key("dtype") { "dtype" } else { "torch_dtype" };
    map.insert(key.to_owned(), json!(name));
    write_json(&dir.join("config.json"), &Value::Object(map))
}

/// Cuts the list, in order, into files of at most `max_bytes` (a bigger tensor has one to itself).
fn split(named: &[(String, Tensor)], max_bytes: u64) -> Vec<&[(String, Tensor)]> {
    let (mut files, mut start, mut bytes) = (Vec::new(), 0, 0);
    for (i, (_, tensor)) in named.iter().enumerate() {
        if i > start && bytes + bytes_of(tensor) > max_bytes {
            files.push(&named[start..i]);
            (start, bytes) = (i, 0);
        }
        bytes += bytes_of(tensor);
    }
    files.push(&named[start..]);
    files
}

/// One file of tensors in this order, synced to disk.
///
/// # Errors
/// When the file cannot be written.
pub(crate) fn write_safetensors(path: &Path, tensors: &[(String, Tensor)]) -> Result<(), ModelError> {
    let mut header = Map::new();
    header.insert("__metadata__".to_owned(), json!({ "format": "pt" }));
    let mut offset = 0;
    for (name, tensor) in tensors {
        let (dtype, _) = dtype(tensor.kind()).unwrap_or(("F32", "float32"));
        let end = offset + bytes_of(tensor);
        let info = json!({ "dtype": dtype, "shape": tensor.size(), "data_offsets": [offset, end] });
        header.insert(name.clone(), info);
        offset = end;
    }
    let mut header = Value::Object(header).to_string().into_bytes();
    // The data starts at a multiple of 8 bytes, so that readers can map it.
    header.resize(header.len().next_multiple_of(8), b' ');
    let file = File::create(path).map_err(|e| ModelError::io("cannot create", path, e))?;
    let failed = |e| ModelError::io("cannot write", path, e);
    let mut out = BufWriter::new(file);
    out.write_all(&(header.len() as u64).to_le_bytes()).map_err(failed)?;
    out.write_all(&header).map_err(failed)?;
    for (_, tensor) in tensors {
        for_each_chunk(tensor, |bytes| out.write_all(bytes).map_err(failed))?;
    }
    let file = out.into_inner().map_err(|e| failed(e.into_error()))?;
    file.sync_all().map_err(failed)
}

fn write_json(path: &Path, value: &Value) -> Result<(), ModelError> {
    write_synced(path, |file| writeln!(file, "{value:#}"))
}

fn write_synced(path: &Path, f: impl FnOnce(&mut File) -> std::io::Result<()>) -> Result<(), ModelError> {
    let mut file = File::create(path).map_err(|e| ModelError::io("cannot create", path, e))?;
    f(&mut file).and_then(|()| file.sync_all()).map_err(|e| ModelError::io("cannot write", path, e))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::Decoder;
    use tch::Device;

    #[test]
    fn a_big_model_is_written_as_several_files_that_load_as_one() {
        let map = json!({
            "architectures": ["Qwen2ForCausalLM"], "hidden_size": 16, "num_hidden_layers": 3,
            "num_attention_heads": 2, "num_key_value_heads": 2, "intermediate_size": 32, "vocab_size": 50, "rms_norm_eps": 1e-6,
            "max_position_embeddings": 64,
        });
        let config = ModelConfig::from_json(map.as_object().unwrap(), Path::new("config.json")).unwrap();
        let model = Decoder::random(config, 1, Kind::Float, Device::Cpu).unwrap();
        let named: Vec<(String, Tensor)> = model
            .parameters()
            .iter()
            .map(|(name, tensor)| (name.to_owned(), tensor.shallow_clone()))
            .collect();
        let dir = tempfile::tempdir().unwrap();
        export_in_files(dir.path(), model.config(), &named, None, 8_000).unwrap();
        let mut sizes = Vec::new();
        for entry in std::fs::read_dir(dir.path()).unwrap() {
            let entry = entry.unwrap();
            if entry.file_name().to_string_lossy().ends_with(".safetensors") {
                sizes.push(entry.metadata().unwrap().len());
            }
        }
        assert!(sizes.len() > 3 && sizes.iter().all(|&bytes| bytes < 8_000 + 2_000), "{sizes:?}");
        assert!(!dir.path().join("model.safetensors").exists());
        let again = Decoder::load(dir.path(), Kind::Float, Device::Cpu).unwrap();
        assert_eq!(again.weights_hash().unwrap(), model.weights_hash().unwrap());
        let lacking = export(dir.path(), model.config(), &named[1..], None).unwrap_err().to_string();
        assert!(lacking.contains("`model.embed_tokens.weight` [50, 16] is missing"), "{lacking}");
    }
}
