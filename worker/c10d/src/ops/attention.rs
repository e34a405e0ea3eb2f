//! Causal grouped-query attention: over packed sequences (training, scoring), and through a paged KV cache.

use tch::{Kind, Tensor};

use super::{expect, expect_host_indices, expect_rows, ffi, is, one, shown, size};
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

    fn check(&self, operation: &'static str, qkv: &Tensor) -> Result<i64> {
        let (rows, width) = expect_rows(operation, qkv)?;
        let sound = self.keys > 0 && self.dim > 0 && self.queries > 0 && self.queries % self.keys == 0;
        // In i128: a product could wrap around.
        let row = (i128::from(self.queries) + 2 * i128::from(self.keys)).checked_mul(self.dim.into());
        expect(operation, sound && row == Some(width.into()), || format!("rows {} of {self:?}", shown(qkv)))?;
        Ok(rows)
    }
}

/// An error unless `starts` runs from 0 to `rows` without an empty sequence; the number of sequences.
fn sequences(operation: &'static str, starts: &Tensor, rows: i64) -> Result<usize> {
    let ends = size(starts).first().copied().unwrap_or(0);
    expect_host_indices(operation, "starts", starts, &[ends])?;
    let values = Vec::<i64>::try_from(starts).unwrap_or_default();
    let count = values.len().saturating_sub(1);
    let sound = count > 0
        && values.first() == Some(&0)
        && values.last() == Some(&rows)
        && values.windows(2).all(|pair| pair[0] < pair[1]);
    expect(operation, sound, || format!("starts {values:?} of {rows} rows"))?;
    Ok(count)
}

/// Each token attends to its own sequence up to itself: rows `[n, heads.row()]` with rotated queries and keys,
/// sequence s in rows `starts[s]..starts[s + 1]` (i64 on the CPU) → `[n, queries · dim]`.
///
/// # Errors
/// When the shapes do not fit, or memory is out.
pub fn attention(qkv: &Tensor, starts: &Tensor, heads: Heads) -> Result<Tensor> {
    let operation = "attention";
    let rows = heads.check(operation, qkv)?;
    sequences(operation, starts, rows)?;
    // SAFETY: live tensors; rows, starts and heads fit each other.
    one(
        || format!("{operation} of {}", shown(qkv)),
        |out| unsafe {
            ffi::af_attention(pointer(qkv), pointer(starts), heads.queries, heads.keys, heads.dim, out)
        },
    )
}

/// Where chains continue: what their tokens write to and read from.
#[derive(Debug)]
pub struct PagedStep {
    /// `[S + 1]` i64 on the CPU: the new tokens of chain s are rows `starts[s]..starts[s + 1]`.
    pub starts: Tensor,
    /// `[S]` i64 on the CPU: cached tokens of each chain, new ones included.
    pub lengths: Tensor,
    /// `[S, P]` i64 on the CPU: each chain's pages in order.
    pub table: Tensor,
}

impl PagedStep {
    /// Every place that will be written or read is inside the cache, and no chain writes to a page that another
    /// one, or itself at another place, writes or holds full.
    ///
    /// # Errors
    /// [`crate::ErrorKind::InvalidArgument`] with the chain that does not fit.
    pub fn check(&self, rows: i64, pages: i64) -> Result<()> {
        let operation = "paged attention";
        let count = sequences(operation, &self.starts, rows)?;
        expect_host_indices(operation, "lengths", &self.lengths, &[count as i64])?;
        let most = size(&self.table).get(1).copied().unwrap_or(0);
        expect_host_indices(operation, "table", &self.table, &[count as i64, most])?;
        let values = |t: &Tensor| Vec::<i64>::try_from(t.flatten(0, -1)).unwrap_or_default();
        let (starts, lengths, table) = (values(&self.starts), values(&self.lengths), values(&self.table));
        let page = PAGE_TOKENS as i64;
        let mut written = vec![false; usize::try_from(pages).unwrap_or(0)];
        let mut full = Vec::new();
        for s in 0..count {
            let (new, length) = (starts[s + 1] - starts[s], lengths[s]);
            let own = &table[s * most as usize..(s + 1) * most as usize];
            // Divided, not multiplied, and in this order: no number of a caller's can wrap around.
            let inside = length >= new && (length - 1) / page < most && {
                let needed = &own[..((length - 1) / page + 1) as usize];
                let (held, to_write) = needed.split_at(((length - new) / page) as usize);
                full.extend_from_slice(held);
                needed.iter().all(|p| (0..pages).contains(p))
                    && to_write.iter().all(|&p| !std::mem::replace(&mut written[p as usize], true))
            };
            expect(operation, inside, || {
                format!("chain {s} has {new} of {length} tokens new in pages {own:?} of {pages}")
            })?;
        }
        let overwritten = full.into_iter().find(|&p| written[p as usize]);
        expect(operation, overwritten.is_none(), || {
            format!("page {overwritten:?} is full and would be written to, in the tables {table:?}")
        })
    }
}

/// Stores the new tokens' keys and values in `pages` `[P, layers, keys · page_numbers]` and attends to all that is
/// cached → `[n, queries · dim]`. No autograd. What a page holds behind a chain's last token is multiplied by 0, so
/// it must be finite: hand out pages of zeros.
///
/// # Errors
/// When the shapes do not fit, or memory is out.
pub fn paged_attention(
    qkv: &Tensor,
    pages: &Tensor,
    layer: i64,
    step: &PagedStep,
    heads: Heads,
) -> Result<Tensor> {
    let operation = "paged attention";
    heads.check(operation, qkv)?;
    let &[count, layers, numbers] = size(pages).as_slice() else {
        return Err(crate::Error::invalid(operation, format!("the cache is {}", shown(pages))));
    };
    let sound = (0..layers).contains(&layer)
        && numbers == heads.keys * page_numbers(qkv, heads.dim)?
        && is(pages, qkv.kind(), qkv.device())
        && pages.is_contiguous();
    expect(operation, sound, || format!("layer {layer} of a cache {} for {heads:?}", shown(pages)))?;
    // Cheap beside the work, and what keeps every write inside the cache.
    step.check(qkv.size()[0], count)?;
    // SAFETY: live tensors; the step's places lie inside the cache.
    one(
        || format!("{operation} of {}", shown(qkv)),
        |out| unsafe {
            ffi::af_paged_attention(
                pointer(qkv),
                pointer(pages),
                layer,
                pointer(&step.starts),
                pointer(&step.lengths),
                pointer(&step.table),
                heads.queries,
                heads.keys,
                heads.dim,
                out,
            )
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
