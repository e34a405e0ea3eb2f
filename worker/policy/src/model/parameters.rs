//! The named weights of a model: what the optimizer updates, ranks compare and checkpoints hold.
//!
//! All lie in one flat buffer, so that an update, a share of it and its way to other ranks are each one piece of
//! memory. What must stay true: the order is the same on every rank and in every run, and a tied head occurs once,
//! as the embedding; whoever holds a parameter sees what is written to the buffer.

use tch::{Kind, Tensor};

use super::error::ModelError;

/// Bytes hashed or written at a time, so that a big tensor is never copied whole.
const CHUNK_BYTES: i64 = 16 << 20;

/// Where a parameter may start in the flat buffer: 128 bytes even in 16 bits, which is what kernels like.
const ALIGNMENT: i64 = 64;

/// Tensors under their Hugging Face names, in the order the model uses them.
#[derive(Debug)]
pub struct Parameters {
    named: Vec<(String, Tensor)>,
    flat: Tensor,
}

/// Where one parameter lies in the flat buffer. Between two there may be zeros that belong to none.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Slot {
    pub(crate) name: String,
    pub(crate) shape: Vec<i64>,
    pub(crate) start: i64,
    pub(crate) len: i64,
}

impl Slot {
    /// This parameter's part of a buffer laid out alike, in its shape, sharing memory.
    pub(crate) fn of(&self, flat: &Tensor) -> Result<Tensor, tch::TchError> {
        flat.f_narrow(0, self.start, self.len)?.f_view(self.shape.as_slice())
    }
}

impl Parameters {
    /// Moves the tensors, all of one kind on one device, into one buffer, of which they are views from now on: a change
    /// of the buffer counts the version of every view up, by which whoever packed one knows that it is stale.
    pub(crate) fn new(named: Vec<(String, Tensor)>) -> Result<Self, ModelError> {
        let _no_grad = tch::no_grad_guard();
        let slots = slots(&named);
        let len = slots.last().map_or(0, |slot| slot.start + slot.len);
        let options = named.first().map_or((Kind::Float, tch::Device::Cpu), |(_, t)| (t.kind(), t.device()));
        // Memory that nothing has touched is none, and each tensor's own is free once it has moved.
        let flat = Tensor::f_empty([len], options)?;
        let mut views = Vec::with_capacity(named.len());
        let mut end = 0;
        for (slot, (name, tensor)) in slots.iter().zip(named) {
            let _gap = flat.f_narrow(0, end, slot.start - end)?.f_zero_()?;
            let mut view = slot.of(&flat)?;
            view.f_copy_(&tensor)?;
            views.push((name, view));
            end = slot.start + slot.len;
        }
        Ok(Self { named: views, flat })
    }

    /// The buffer that all parameters are parts of, `[elements and padding]` in the model's kind.
    pub(crate) fn flat(&self) -> &Tensor {
        &self.flat
    }

    /// Where each parameter lies in [`Self::flat`], in order.
    pub(crate) fn slots(&self) -> Vec<Slot> {
        slots(&self.named)
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

fn slots(named: &[(String, Tensor)]) -> Vec<Slot> {
    let mut end: i64 = 0;
    let slot = |(name, tensor): &(String, Tensor)| {
        let (start, len) = ((end as u64).next_multiple_of(ALIGNMENT as u64) as i64, tensor.numel() as i64);
        end = start + len;
        Slot { name: name.clone(), shape: tensor.size(), start, len }
    };
    named.iter().map(slot).collect()
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

#[cfg(test)]
mod tests {
    use tch::Device;

    use super::*;

    #[test]
    fn parameters_are_parts_of_one_buffer() {
        for kind in [Kind::Float, Kind::BFloat16] {
            let named: Vec<(String, Tensor)> = [vec![3, 5], vec![7], vec![64, 2]]
                .into_iter()
                .enumerate()
                .map(|(i, shape)| (format!("p{i}"), Tensor::full(&shape, i as f64, (kind, Device::Cpu))))
                .collect();
            let parameters = Parameters::new(named).unwrap();
            let mut flat = parameters.flat().shallow_clone();
            assert_eq!(flat.numel(), 2 * 64 + 128);
            for (i, (slot, (_, held))) in parameters.slots().iter().zip(parameters.iter()).enumerate() {
                assert_eq!(slot.start % 64, 0);
                let mean = held.mean(Kind::Double).double_value(&[]);
                assert_eq!((held.size(), mean), (slot.shape.clone(), i as f64));
            }
            let _same = flat.fill_(9.0);
            assert!(parameters.iter().all(|(_, held)| held.min().double_value(&[]) == 9.0));
        }
    }

    #[test]
    fn a_linear_map_sees_what_is_written_to_a_part_of_the_buffer() {
        let weight = Tensor::ones([16, 64], (Kind::BFloat16, Device::Cpu));
        let parameters = Parameters::new(vec![("w".to_owned(), weight)]).unwrap();
        let map = agentfly_c10d::ops::Linear::new(&[&parameters.require("w").unwrap()], &[]).unwrap();
        let x = Tensor::ones([1, 64], (Kind::BFloat16, Device::Cpu));
        assert_eq!(map.apply(&x).unwrap().double_value(&[0, 15]), 64.0);
        // As an optimizer publishes a share.
        let masters = Tensor::full([512], 2.0, (Kind::Float, Device::Cpu));
        parameters.flat().narrow(0, 512, 512).copy_(&masters);
        assert_eq!(map.apply(&x).unwrap().double_value(&[0, 15]), 128.0);
        assert_eq!(map.apply(&x).unwrap().double_value(&[0, 0]), 64.0);
    }
}
