//! Weights from safetensors files, read from where [`ModelDir::inspect`] found them.
//!
//! What must stay true: exactly the tensors that it lists are read, and one tensor at a time is in host memory
//! beside the model.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use agentfly_common::model_dir::{ModelDir, StoredDtype, StoredTensor};
use tch::{Device, Kind, Tensor};

use super::error::ModelError;

/// Every parameter of `model`, in its order.
pub(crate) fn read_weights(
    model: &ModelDir,
    kind: Kind,
    device: Device,
) -> Result<Vec<(String, Tensor)>, ModelError> {
    let mut named = Vec::with_capacity(model.tensors.len());
    let mut open: Option<(&Path, File)> = None;
    for stored in &model.tensors {
        let file = match open.take() {
            Some((path, file)) if path == stored.path => file,
            _ => open_file(stored)?,
        };
        named.push((stored.name.clone(), read_tensor(&file, stored, kind, device)?));
        open = Some((&stored.path, file));
    }
    if let Some(copy) = &model.tied_copy {
        check_tied(copy, &named)?;
    }
    Ok(named)
}

/// The stored copy of a tied head holds the embedding's numbers: a checkpoint in which it does not was trained
/// untied, whatever its `config.json` says.
fn check_tied(copy: &StoredTensor, named: &[(String, Tensor)]) -> Result<(), ModelError> {
    let embedding = named.iter().find(|(name, _)| name == "model.embed_tokens.weight");
    let Some((name, embedding)) = embedding else { return Ok(()) };
    let head = read_tensor(&open_file(copy)?, copy, embedding.kind(), embedding.device())?;
    if head.f_equal(embedding)? {
        return Ok(());
    }
    Err(ModelError::Input {
        what: "weights",
        got: format!(
            "`{}` of {} with other numbers than `{name}`, to which `tie_word_embeddings` in config.json ties it",
            copy.name,
            copy.path.display()
        ),
        needed: "the same numbers, or `tie_word_embeddings`: false".to_owned(),
    })
}

fn open_file(stored: &StoredTensor) -> Result<File, ModelError> {
    File::open(&stored.path).map_err(|e| ModelError::io("cannot open", &stored.path, e))
}

fn read_tensor(file: &File, stored: &StoredTensor, kind: Kind, device: Device) -> Result<Tensor, ModelError> {
    let stored_kind = match stored.dtype {
        StoredDtype::F32 => Kind::Float,
        StoredDtype::Bf16 => Kind::BFloat16,
        StoredDtype::F16 => Kind::Half,
    };
    let mut bytes = vec![0; stored.bytes];
    file.read_exact_at(&mut bytes, stored.offset)
        .map_err(|e| ModelError::io("cannot read", &stored.path, e))?;
    let tensor = Tensor::f_from_data_size(&bytes, &stored.shape, stored_kind)?;
    if tensor.f_isfinite()?.f_all()?.f_int64_value(&[])? == 0 {
        return Err(ModelError::Input {
            what: "weights",
            got: format!("NaN or infinities in `{}` of {}", stored.name, stored.path.display()),
            needed: "numbers; the training that wrote them went wrong: take an earlier checkpoint".to_owned(),
        });
    }
    Ok(tensor.f_to_device(device)?.f_to_kind(kind)?)
}
