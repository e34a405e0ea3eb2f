//! Attention through a paged KV cache: which tokens continue which chain, checked and uploaded once a pass, and the
//! operator that each layer calls with it.
//!
//! What must stay true: a [`PagedStep`] is only made of places inside the cache that no two chains write to, and cannot
//! be changed but by a [`super::FixedStep`], which checks the same; so kernels take it on trust, and no layer looks at it
//! again or waits for a copy.

use std::collections::HashSet;

use tch::{Device, Tensor};

use super::attention::{Heads, PAGE_TOKENS, page_numbers, sequences};
use super::{expect, ffi, is, one, shown, size};
use crate::group::pointer;
use crate::{Error, Result, upload, upload_into};

/// Where chains continue: what their tokens write to and read from.
#[derive(Debug)]
pub struct PagedStep {
    pub(super) rows: i64,
    pub(super) pages: i64,
    pub(super) device: Device,
    pub(super) host: HostStep,
    pub(super) places: Places,
}

/// As the CPU's kernels read it; i64 on the CPU.
#[derive(Debug)]
pub(super) struct HostStep {
    /// `[S + 1]`.
    pub(super) starts: Tensor,
    /// `[S]`.
    pub(super) lengths: Tensor,
    /// `[S, P]`; what a chain does not need is its first page.
    pub(super) table: Tensor,
}

/// As libtorch's operators read it, on the device of the cache. S chains, n new tokens.
#[derive(Debug)]
pub(super) struct Places {
    /// `[n]` i64: the page that each new token is written to.
    pub(super) page_of: Tensor,
    /// `[n]` i64: its place in that page.
    pub(super) place_of: Tensor,
    /// `[S · P]` i64: the table, above.
    pub(super) own: Tensor,
    /// `[S]` i64: cached tokens.
    pub(super) seen: Tensor,
    /// `[G]` i64: the pages that each chain needs, one chain after another.
    pub(super) held: Tensor,
    /// For FlashAttention, `[S + 1]` i32: starts; where each chain's tokens start in `held`; `[S]` i32: cached tokens.
    pub(super) flash_starts: Tensor,
    pub(super) flash_held: Tensor,
    pub(super) flash_lengths: Tensor,
    /// The most new tokens of a chain, and the most cached ones.
    pub(super) most_new: i64,
    pub(super) longest: i64,
}

impl PagedStep {
    /// The new tokens of chain s are rows `starts[s]..starts[s + 1]`; with them it has `lengths[s]` tokens cached, in
    /// `tables[s]`, its pages in order, of the `pages` pages of a cache on `device`.
    ///
    /// # Errors
    /// [`crate::ErrorKind::InvalidArgument`] with the chain of which something lies outside the cache, or which writes
    /// to a page that another one, or itself at another place, writes or holds full. Whatever [`upload`] says.
    pub fn new(
        starts: &[i64],
        lengths: &[i64],
        tables: &[Vec<i64>],
        pages: i64,
        device: Device,
    ) -> Result<Self> {
        let rows = starts.last().copied().unwrap_or(0);
        let needed = check(starts, lengths, tables, pages)?;
        let most = needed.iter().map(|own| own.len()).max().unwrap_or(0);
        let mut own = Vec::with_capacity(needed.len() * most);
        for chain in &needed {
            own.extend_from_slice(chain);
            own.extend(std::iter::repeat_n(chain[0], most - chain.len()));
        }
        let places = Places::new(starts, lengths, &needed, &own, device)?;
        let host = HostStep::new(starts, lengths, &own, needed.len() as i64)?;
        Ok(Self { rows, pages, device, host, places })
    }

    fn raw(&self) -> ffi::RawPagedStep {
        let (host, places) = (&self.host, &self.places);
        ffi::RawPagedStep {
            starts: pointer(&host.starts),
            lengths: pointer(&host.lengths),
            table: pointer(&host.table),
            page_of: pointer(&places.page_of),
            place_of: pointer(&places.place_of),
            own: pointer(&places.own),
            seen: pointer(&places.seen),
            held: pointer(&places.held),
            flash_starts: pointer(&places.flash_starts),
            flash_held: pointer(&places.flash_held),
            flash_lengths: pointer(&places.flash_lengths),
            most_new: places.most_new,
            longest: places.longest,
        }
    }
}

impl HostStep {
    /// Of as many `chains`, whose tables in `own` are equally long.
    pub(super) fn new(starts: &[i64], lengths: &[i64], own: &[i64], chains: i64) -> Result<Self> {
        let tensors = || {
            let table = Tensor::f_from_slice(own)?.f_view([chains, -1])?;
            let (starts, lengths) = (Tensor::f_from_slice(starts)?, Tensor::f_from_slice(lengths)?);
            Ok(Self { starts, lengths, table })
        };
        tensors().map_err(|e| Error::of_libtorch("paged attention", &e))
    }

    /// Other lengths and tables of as many chains.
    pub(super) fn set(&self, lengths: &[i64], own: &[i64]) -> Result<()> {
        let flat = self.table.f_view([-1]).map_err(|e| Error::of_libtorch("paged attention", &e))?;
        upload_into(lengths, &self.lengths)?;
        upload_into(own, &flat)
    }
}

/// The pages that each chain needs, when all places are sound.
pub(super) fn check<'a>(
    starts: &[i64],
    lengths: &[i64],
    tables: &'a [Vec<i64>],
    pages: i64,
) -> Result<Vec<&'a [i64]>> {
    let operation = "paged attention";
    let count = sequences(operation, starts, starts.last().copied().unwrap_or(0))?;
    expect(operation, lengths.len() == count && tables.len() == count, || {
        format!("{count} chains with {} lengths and {} tables", lengths.len(), tables.len())
    })?;
    let page = PAGE_TOKENS as i64;
    // Not a place for each of the cache's pages: their number is a caller's, too.
    let mut written = HashSet::with_capacity(count);
    let (mut full, mut all) = (Vec::new(), Vec::with_capacity(count));
    for s in 0..count {
        let (new, length, own) = (starts[s + 1] - starts[s], lengths[s], &tables[s]);
        // Divided, not multiplied, and in this order: no number of a caller's can wrap around.
        let inside = length >= new && (length - 1) / page < own.len() as i64 && {
            let needed = &own[..((length - 1) / page + 1) as usize];
            let (held, to_write) = needed.split_at(((length - new) / page) as usize);
            full.extend_from_slice(held);
            all.push(needed);
            needed.iter().all(|p| (0..pages).contains(p)) && to_write.iter().all(|&p| written.insert(p))
        };
        expect(operation, inside, || {
            format!("chain {s} has {new} of {length} tokens new in pages {own:?} of {pages}")
        })?;
    }
    let overwritten = full.into_iter().find(|p| written.contains(p));
    expect(operation, overwritten.is_none(), || {
        let page = overwritten.unwrap_or_default();
        format!(
            "page {page} is full in one chain's table and would be written to in another's, of {count} chains"
        )
    })?;
    Ok(all)
}

impl Places {
    fn new(starts: &[i64], lengths: &[i64], needed: &[&[i64]], own: &[i64], device: Device) -> Result<Self> {
        let page = PAGE_TOKENS as i64;
        let (mut page_of, mut place_of) = (Vec::new(), Vec::new());
        let (mut held, mut flash_held) = (Vec::new(), vec![0]);
        for (s, pages) in needed.iter().enumerate() {
            for position in lengths[s] - (starts[s + 1] - starts[s])..lengths[s] {
                page_of.push(pages[(position / page) as usize]);
                place_of.push(position % page);
            }
            held.extend_from_slice(pages);
            flash_held.push(held.len() as i64 * page);
        }
        let new = starts.windows(2).map(|pair| pair[1] - pair[0]);
        let (most_new, longest) = (new.max().unwrap_or(0), lengths.iter().copied().max().unwrap_or(0));
        let fits = i32::try_from(held.len() as i64 * page).is_ok() && i32::try_from(page_of.len()).is_ok();
        expect("paged attention", fits, || format!("{} pages in one step", held.len()))?;
        // One copy for each kind of number.
        let wide = split(&[&page_of, &place_of, own, lengths, &held], |all| upload(all, device))?;
        let narrow = split(&[starts, &flash_held, lengths], |all| {
            upload(&all.iter().map(|&x| x as i32).collect::<Vec<_>>(), device)
        })?;
        let ([page_of, place_of, own, seen, held], [flash_starts, flash_held, flash_lengths]) =
            (wide, narrow);
        Ok(Self {
            page_of,
            place_of,
            own,
            seen,
            held,
            flash_starts,
            flash_held,
            flash_lengths,
            most_new,
            longest,
        })
    }
}

/// The parts of one tensor that `make` gives for all of them, one after another.
pub(super) fn split<const N: usize>(
    parts: &[&[i64]; N],
    make: impl FnOnce(&[i64]) -> Result<Tensor>,
) -> Result<[Tensor; N]> {
    let all = make(&parts.concat())?;
    let mut first = 0;
    let mut tensors = Vec::with_capacity(N);
    for part in parts {
        let count = part.len() as i64;
        let part = all.f_narrow(0, first, count).map_err(|e| Error::of_libtorch("paged attention", &e))?;
        tensors.push(part);
        first += count;
    }
    tensors.try_into().map_err(|_| Error::invalid("paged attention", "parts were lost"))
}

/// Stores the new tokens' keys and values in `pages` `[P, layers, keys · page_numbers]` and attends to all that is
/// cached → `[n, queries · dim]`. No autograd. What a page holds behind a chain's last token is multiplied by 0, so
/// it must be finite: hand out pages of zeros.
///
/// # Errors
/// When the shapes do not fit, the step was made for other rows, a larger cache or another device, or memory is out.
pub fn paged_attention(
    qkv: &Tensor,
    pages: &Tensor,
    layer: i64,
    step: &PagedStep,
    heads: Heads,
) -> Result<Tensor> {
    let operation = "paged attention";
    let rows = heads.check(operation, qkv)?;
    let &[count, layers, numbers] = size(pages).as_slice() else {
        return Err(Error::invalid(operation, format!("the cache is {}", shown(pages))));
    };
    let sound = (0..layers).contains(&layer)
        && numbers == heads.keys * page_numbers(qkv, heads.dim)?
        && is(pages, qkv.kind(), qkv.device())
        && pages.is_contiguous();
    expect(operation, sound, || format!("layer {layer} of a cache {} for {heads:?}", shown(pages)))?;
    expect(operation, step.rows == rows && step.pages <= count && step.device == qkv.device(), || {
        let (made, at) = (step.rows, step.device);
        format!("{} with a step for {made} rows and {} pages on {at:?}", shown(qkv), step.pages)
    })?;
    let raw = step.raw();
    // SAFETY: live tensors; the step's places lie inside the cache.
    one(
        || format!("{operation} of {}", shown(qkv)),
        |out| unsafe {
            ffi::af_paged_attention(
                pointer(qkv),
                pointer(pages),
                layer,
                &raw const raw,
                heads.queries,
                heads.keys,
                heads.dim,
                out,
            )
        },
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn values(x: &Tensor) -> Vec<i64> {
        Vec::try_from(x.to_kind(tch::Kind::Int64)).unwrap()
    }

    #[test]
    fn places_are_where_each_new_token_goes_and_what_each_chain_holds() {
        let tables = [vec![7, 3, 5], vec![2], vec![4, 9, -1]];
        let step = PagedStep::new(&[0, 3, 4, 6], &[130, 1, 66], &tables, 10, Device::Cpu).unwrap();
        let places = &step.places;
        assert_eq!(values(&places.page_of), [3, 5, 5, 2, 9, 9]);
        assert_eq!(values(&places.place_of), [63, 0, 1, 0, 0, 1]);
        assert_eq!(values(&places.own), [7, 3, 5, 2, 2, 2, 4, 9, 4], "what is not needed is the first page");
        assert_eq!(values(&places.seen), [130, 1, 66]);
        assert_eq!(values(&places.held), [7, 3, 5, 2, 4, 9]);
        assert_eq!(values(&places.flash_starts), [0, 3, 4, 6]);
        assert_eq!(values(&places.flash_held), [0, 192, 256, 384]);
        assert_eq!(values(&places.flash_lengths), [130, 1, 66]);
        assert_eq!(places.flash_lengths.kind(), tch::Kind::Int);
        assert_eq!((places.most_new, places.longest), (3, 130));
    }
}
