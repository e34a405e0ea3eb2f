//! Causal grouped-query attention over [packed sequences](super::Packed) (training, scoring). Through a cache:
//! [`super::paged`].

use tch::{Kind, Tensor};

use super::packed::Packed;
use super::{expect, expect_rows, ffi, one, shown};
use crate::Result;
use crate::error::check;
use crate::group::pointer;

/// Tokens of a page of the KV cache.
pub const PAGE_TOKENS: usize = 64;

/// Numbers of a head that no model has, and whose page can still be counted.
const MOST_NUMBERS: i64 = 1 << 30;

/// The heads of a row `[queries | keys | values]`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Heads {
    /// Query heads, a multiple of `keys`.
    pub queries: i64,
    /// Key heads, and as many value heads.
    pub keys: i64,
    /// Numbers a head.
    pub dim: i64,
}

impl Heads {
    /// The width of a row.
    #[must_use]
    pub fn row(&self) -> i64 {
        (self.queries + 2 * self.keys) * self.dim
    }

    pub(super) fn check(&self, operation: &'static str, qkv: &Tensor) -> Result<i64> {
        let (rows, width) = expect_rows(operation, qkv)?;
        let sound = self.keys > 0 && self.dim > 0 && self.queries > 0 && self.queries % self.keys == 0;
        // In i128: a product could wrap around.
        let row = (i128::from(self.queries) + 2 * i128::from(self.keys)).checked_mul(self.dim.into());
        expect(operation, sound && row == Some(width.into()), || format!("rows {} of {self:?}", shown(qkv)))?;
        Ok(rows)
    }
}

/// An error unless `starts` runs from 0 to `rows` without an empty sequence; the number of sequences.
pub(super) fn sequences(operation: &'static str, starts: &[i64], rows: i64) -> Result<usize> {
    let count = starts.len().saturating_sub(1);
    let ends = (starts.first(), starts.last());
    let sound = count > 0 && ends == (Some(&0), Some(&rows));
    expect(operation, sound, || {
        format!("{count} sequences from {ends:?} of {rows} rows, not from 0 to their end")
    })?;
    let empty = starts.windows(2).position(|pair| pair[0] >= pair[1]);
    expect(operation, empty.is_none(), || {
        let s = empty.unwrap_or_default();
        format!("sequence {s} is rows {} to {}: each must have one at least", starts[s], starts[s + 1])
    })?;
    Ok(count)
}

/// Each token attends to its own sequence up to itself: rows `[n, heads.row()]` with rotated queries and keys →
/// `[n, queries · dim]`. A beginning that sequences share is computed once, and on the way back gets the sum of what
/// they give it.
///
/// # Errors
/// When the rows are not those that `packed` was made for, or memory is out.
pub fn attention(qkv: &Tensor, packed: &Packed, heads: Heads) -> Result<Tensor> {
    let operation = "attention";
    let rows = heads.check(operation, qkv)?;
    let fits = rows == packed.rows() && qkv.device() == packed.device();
    expect(operation, fits, || {
        format!("{} in packed sequences of {} rows on {:?}", shown(qkv), packed.rows(), packed.device())
    })?;
    // SAFETY: live tensors; the rows, heads and places fit each other.
    one(
        || format!("{operation} of {}", shown(qkv)),
        |out| unsafe {
            let raw = packed.raw();
            ffi::af_attention(pointer(qkv), &raw const raw, heads.queries, heads.keys, heads.dim, out)
        },
    )
}

/// Numbers that one key head of one layer takes in a page, for rows like `like`.
///
/// # Errors
/// [`crate::ErrorKind::InvalidArgument`] for a kind other than f32, bf16 and f16, or a head without a size.
pub fn page_numbers(like: &Tensor, dim: i64) -> Result<i64> {
    let kinds = [Kind::Float, Kind::BFloat16, Kind::Half];
    let sound = like.defined() && kinds.contains(&like.kind()) && (1..=MOST_NUMBERS).contains(&dim);
    expect("page size", sound, || format!("of heads of {dim} numbers like {}", shown(like)))?;
    let mut out = 0;
    // SAFETY: a live tensor and an out-pointer to a live local.
    let code = unsafe { ffi::af_page_numbers(pointer(like), dim, &raw mut out) };
    check(code, || "page size".to_owned())?;
    Ok(out)
}
