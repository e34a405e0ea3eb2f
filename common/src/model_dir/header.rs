//! The header of a safetensors file: which tensors it holds, and where.
//!
//! Takes bytes and lengths, so that it can be tested with every damage there is. What must stay true: what is
//! returned fills the file exactly, tensor after tensor, each as long as its shape and dtype say; so a file that
//! was cut, padded or shifted by a byte is refused here and not read as numbers.
//!
//! safetensors' own `Metadata` refuses holes, overlaps, overflowing and wrong lengths too, without saying which
//! tensor; it knows nothing of the file's length, and takes the last of two tensors of one name.

use std::collections::BTreeMap;
use std::fmt;

use safetensors::tensor::TensorInfo;
use serde::de::{Deserialize, Deserializer, Error as _, IgnoredAny, MapAccess, Visitor};

/// Longest header accepted, the safetensors format's own limit.
pub(super) const MAX_HEADER_BYTES: u64 = 100_000_000;
/// Bytes of the header's length, which come first.
pub(super) const LENGTH_BYTES: u64 = 8;

/// Length of the header as the file's `first` bytes announce it.
pub(super) fn header_bytes(first: [u8; LENGTH_BYTES as usize], file_bytes: u64) -> Result<u64, String> {
    if first == *b"version " {
        return Err(
            "is a Git-LFS pointer and not the weights themselves; fetch those with `git lfs pull`".to_owned()
        );
    }
    let length = u64::from_le_bytes(first);
    let room = file_bytes.checked_sub(LENGTH_BYTES);
    if room.is_none_or(|room| length > MAX_HEADER_BYTES.min(room)) {
        return Err(format!(
            "is no safetensors file, or is cut short: it announces a header of {length} bytes and is {file_bytes} bytes long"
        ));
    }
    Ok(length)
}

/// Bytes of data that the tensors of a header take, whether they are there or not.
pub(super) fn announced_data_bytes(header: &[u8]) -> Result<u64, String> {
    let Tensors(tensors) = read(header)?;
    Ok(tensors.values().map(|info| info.data_offsets.1 as u64).max().unwrap_or(0))
}

/// The tensors of a header, by name; `data_bytes` is what the file holds after the header, where their
/// `data_offsets` start to count.
pub(super) fn parse(header: &[u8], data_bytes: u64) -> Result<BTreeMap<String, TensorInfo>, String> {
    let Tensors(tensors) = read(header)?;
    let mut in_order: Vec<(&String, &TensorInfo)> = tensors.iter().collect();
    in_order.sort_by_key(|(_, info)| info.data_offsets);
    let mut end_of_last = 0;
    for (name, info) in in_order {
        let (start, end) = info.data_offsets;
        if start != end_of_last || end < start {
            return Err(format!(
                "is damaged: tensor `{name}` lies at {start}..{end} of the data, and the one before ends at {end_of_last}"
            ));
        }
        let needed = bytes_needed(info);
        if needed != Some(end - start) {
            let needed =
                needed.map_or("no whole number of bytes".to_owned(), |bytes| format!("{bytes} bytes"));
            return Err(format!(
                "is damaged: tensor `{name}` {:?} in {:?} takes {needed}, and has {}",
                info.shape,
                info.dtype,
                end - start
            ));
        }
        if end as u64 > data_bytes {
            return Err(format!(
                "is cut short: tensor `{name}` ends at byte {end} of the data, the file at {data_bytes}"
            ));
        }
        end_of_last = end;
    }
    if end_of_last as u64 != data_bytes {
        return Err(format!(
            "is damaged: its tensors end at byte {end_of_last} of the data, the file at {data_bytes}"
        ));
    }
    Ok(tensors)
}

fn read(header: &[u8]) -> Result<Tensors, String> {
    serde_json::from_slice(header).map_err(|e| format!("has no safetensors header: {e}"))
}

/// Elements × size, where both can be counted and give whole bytes.
fn bytes_needed(info: &TensorInfo) -> Option<usize> {
    let elements = info.shape.iter().try_fold(1_usize, |all, &dim| all.checked_mul(dim))?;
    let bits = elements.checked_mul(info.dtype.bitsize())?;
    bits.is_multiple_of(8).then_some(bits / 8)
}

/// A header as it stands in the file, names unique.
struct Tensors(BTreeMap<String, TensorInfo>);

impl<'de> Deserialize<'de> for Tensors {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_map(TensorsVisitor).map(Self)
    }
}

struct TensorsVisitor;

impl<'de> Visitor<'de> for TensorsVisitor {
    type Value = BTreeMap<String, TensorInfo>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object of tensors")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
        let mut tensors = BTreeMap::new();
        while let Some(name) = map.next_key::<String>()? {
            if name == "__metadata__" {
                map.next_value::<IgnoredAny>()?;
                continue;
            }
            let info = map.next_value().map_err(|e| A::Error::custom(format!("tensor `{name}`: {e}")))?;
            if tensors.contains_key(&name) {
                return Err(A::Error::custom(format!("tensor `{name}` occurs twice")));
            }
            tensors.insert(name, info);
        }
        Ok(tensors)
    }
}
