//! The named weights of a model: what the optimizer updates, ranks compare and checkpoints hold.
//!
//! What must stay true: the order is the same on every rank and in every run, and a tied head occurs once,
//! as the embedding.

use tch::{Kind, Tensor};

use super::error::ModelError;

/// Bytes hashed or written at a time, so that a big tensor is never copied whole.
const CHUNK_BYTES: i64 = 16 << 20;

/// Tensors under their Hugging Face names, in the order the model uses them.
#[derive(Debug)]
pub struct Parameters {
    named: Vec<(String, Tensor)>,
}

impl Parameters {
    pub(crate) fn new(named: Vec<(String, Tensor)>) -> Self {
        Self { named }
    }

    /// Name and tensor of each parameter, in order.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = (&str, &Tensor)> {
        self.named.iter().map(|(name, tensor)| (name.as_str(), tensor))
    }

    /// The parameter of that name.
    #[must_use]
    pub fn get(&self, name: &str) -> Option<&Tensor> {
        self.named.iter().find(|(n, _)| n == name).map(|(_, tensor)| tensor)
    }

    /// The tensors in order, sharing storage with the model.
    #[must_use]
    pub fn tensors(&self) -> Vec<Tensor> {
        self.named.iter().map(|(_, tensor)| tensor.shallow_clone()).collect()
    }

    /// Number of tensors.
    #[must_use]
    pub fn len(&self) -> usize {
        self.named.len()
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.named.is_empty()
    }

    /// Number of weights.
    #[must_use]
    pub fn elements(&self) -> usize {
        self.named.iter().map(|(_, tensor)| tensor.numel()).sum()
    }

    /// The parameter of that name, sharing storage.
    pub(crate) fn require(&self, name: &str) -> Result<Tensor, ModelError> {
        self.get(name).map(Tensor::shallow_clone).ok_or_else(|| ModelError::Input {
            what: "weights",
            got: format!("{} tensors without `{name}`", self.len()),
            needed: format!("`{name}`"),
        })
    }

    /// BLAKE3 over every name, kind, shape and byte, as hex: equal on two ranks iff their weights are
    /// bit-equal.
    ///
    /// # Errors
    /// When a tensor cannot be copied to the host.
    pub fn hash(&self) -> Result<String, ModelError> {
        let mut hasher = blake3::Hasher::new();
        for (name, tensor) in &self.named {
            let kind = format!("{:?}", tensor.kind());
            for text in [name.as_str(), &kind] {
                hasher.update(&(text.len() as u64).to_le_bytes());
                hasher.update(text.as_bytes());
            }
            let shape = tensor.size();
            hasher.update(&(shape.len() as u64).to_le_bytes());
            for dim in shape {
                hasher.update(&dim.to_le_bytes());
            }
            for_each_chunk(tensor, |bytes| {
                hasher.update(bytes);
                Ok(())
            })?;
        }
        Ok(hasher.finalize().to_hex().to_string())
    }
}

/// The little-endian bytes of a tensor in row-major order, whatever its device and strides.
///
/// # Errors
/// When it cannot be copied to the host.
pub fn tensor_bytes(tensor: &Tensor) -> Result<Vec<u8>, ModelError> {
    let mut all = Vec::with_capacity(tensor.numel() * element_bytes(tensor.kind()));
    for_each_chunk(tensor, |bytes| {
        all.extend_from_slice(bytes);
        Ok(())
    })?;
    Ok(all)
}

/// Size of one element of the kinds models are stored in.
pub(crate) fn element_bytes(kind: Kind) -> usize {
    match kind {
        Kind::Double | Kind::Int64 => 8,
        Kind::Half | Kind::BFloat16 | Kind::Int16 => 2,
        Kind::Uint8 | Kind::Int8 | Kind::Bool => 1,
        _ => 4,
    }
}

/// Hands a tensor's bytes to `f`, some megabytes at a time.
pub(crate) fn for_each_chunk(
    tensor: &Tensor,
    mut f: impl FnMut(&[u8]) -> Result<(), ModelError>,
) -> Result<(), ModelError> {
    let _no_grad = tch::no_grad_guard();
    let bytes_each = element_bytes(tensor.kind()) as i64;
    let flat = tensor.f_contiguous()?.f_view([-1])?;
    let (total, per_chunk) = (flat.numel() as i64, CHUNK_BYTES / bytes_each);
    let mut buffer = Vec::new();
    let mut start = 0;
    while start < total {
        let count = per_chunk.min(total - start);
        let chunk = flat.f_narrow(0, start, count)?.f_to_device(tch::Device::Cpu)?;
        buffer.resize((count * bytes_each) as usize, 0);
        chunk.f_copy_data_u8(&mut buffer, count as usize)?;
        f(&buffer)?;
        start += count;
    }
    Ok(())
}
