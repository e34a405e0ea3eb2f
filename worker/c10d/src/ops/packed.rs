//! Sequences whose tokens lie in rows one after another, without padding; several may share the rows of their beginning.
//!
//! What must stay true: every row belongs to some sequence, and exactly one of them computes it. Checked once, when it is
//! made; every layer reads it as it is.

use std::collections::HashSet;
use std::ops::Range;

use tch::{Device, Tensor};

use super::attention::sequences;
use super::{expect, ffi};
use crate::group::pointer;
use crate::{Error, Result, upload};

const OPERATION: &str = "packed sequences";

/// Where the tokens of a sequence lie.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sequence {
    /// The rows it begins with; other sequences may begin with the same. May be empty.
    pub beginning: Range<usize>,
    /// The rows that follow, its own; at least one.
    pub rest: Range<usize>,
}

/// Which rows are which sequence's: see [`super::attention()`].
#[derive(Debug)]
pub struct Packed {
    rows: i64,
    device: Device,
    /// `[s + 1]` i64 on the CPU, in tokens of all sequences.
    starts: Tensor,
    /// None where token i is row i.
    shared: Option<Shared>,
}

/// Beginnings that several have. A token is one of all sequences' tokens, one sequence after another.
#[derive(Debug)]
struct Shared {
    /// `[tokens]` i64: each token's row.
    rows: Tensor,
    /// `[rows]` i64: the token that is computed for each row.
    kept: Tensor,
    /// `[s]` i64 on the CPU: tokens that each sequence begins with and another computes.
    skip: Tensor,
}

impl Packed {
    /// Whole sequences one after another: sequence s is rows `starts[s]..starts[s + 1]` of a tensor on `device`.
    ///
    /// # Errors
    /// [`crate::ErrorKind::InvalidArgument`] unless `starts` rises from 0; when memory is out.
    pub fn new(starts: &[i64], device: Device) -> Result<Self> {
        let rows = starts.last().copied().unwrap_or(0);
        sequences(OPERATION, starts, rows)?;
        Ok(Self { rows, device, starts: on_host(starts)?, shared: None })
    }

    /// Sequences that may begin alike, in `rows` rows of a tensor on `device`.
    ///
    /// # Errors
    /// [`crate::ErrorKind::InvalidArgument`] when a row is no sequence's, or several's and not of a beginning that they
    /// have as a whole; when memory is out.
    pub fn sharing(all: &[Sequence], rows: usize, device: Device) -> Result<Self> {
        let inside = |range: &Range<usize>| range.start <= range.end && range.end <= rows;
        expect(OPERATION, !all.is_empty(), || format!("no sequence of {rows} rows"))?;
        for (s, Sequence { beginning, rest }) in all.iter().enumerate() {
            let sound = inside(beginning) && inside(rest) && !rest.is_empty();
            let told = || format!("sequence {s} is rows {beginning:?} and {rest:?} of {rows}");
            expect(OPERATION, sound, told)?;
        }
        let mut kept: Vec<Option<i64>> = Vec::new();
        let room = kept.try_reserve_exact(rows);
        expect(OPERATION, room.is_ok(), || format!("{rows} rows are more than memory holds"))?;
        kept.resize(rows, None);
        let (mut starts, mut of_token, mut skip) = (vec![0_i64], Vec::new(), Vec::new());
        let mut beginnings = HashSet::new();
        for (s, Sequence { beginning, rest }) in all.iter().enumerate() {
            let known = !beginnings.insert(beginning);
            skip.push(if known { beginning.len() as i64 } else { 0 });
            for (range, computed) in [(beginning, known), (rest, false)] {
                let free = computed || kept[range.clone()].iter().all(Option::is_none);
                expect(OPERATION, free, || {
                    format!("rows {range:?} of sequence {s} are partly another's, too")
                })?;
                for row in range.clone() {
                    kept[row].get_or_insert(of_token.len() as i64);
                    of_token.push(row as i64);
                }
            }
            starts.push(of_token.len() as i64);
        }
        if let Some(row) = kept.iter().position(Option::is_none) {
            let told = format!("row {row} of {rows} is of none of {} sequences", all.len());
            return Err(Error::invalid(OPERATION, told));
        }
        let kept: Vec<i64> = kept.into_iter().flatten().collect();
        let apart = of_token.iter().zip(0..).any(|(row, token)| *row != token);
        let shared = || {
            let (rows, kept) = (upload(&of_token, device)?, upload(&kept, device)?);
            Ok::<_, Error>(Shared { rows, kept, skip: on_host(&skip)? })
        };
        let shared = if apart { Some(shared()?) } else { None };
        Ok(Self { rows: rows as i64, device, starts: on_host(&starts)?, shared })
    }

    /// Rows there are.
    #[must_use]
    pub fn rows(&self) -> i64 {
        self.rows
    }

    pub(super) fn device(&self) -> Device {
        self.device
    }

    pub(super) fn raw(&self) -> ffi::RawPacked {
        let [rows, kept, skip] = match &self.shared {
            Some(shared) => [&shared.rows, &shared.kept, &shared.skip].map(pointer),
            None => [std::ptr::null_mut(); 3],
        };
        ffi::RawPacked { starts: pointer(&self.starts), rows, kept, skip }
    }
}

fn on_host(numbers: &[i64]) -> Result<Tensor> {
    Tensor::f_from_slice(numbers).map_err(|e| Error::of_libtorch(OPERATION, &e))
}
