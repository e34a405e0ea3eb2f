//! A decode step of a fixed shape, at fixed addresses: one new token of each of some chains, padded, written over the
//! step before. It is what a recorded graph reads ([`crate::CudaGraph`]).
//!
//! What must stay true: chains pass the checks that [`PagedStep::new`] makes, and none of them has the cache's last
//! page, which belongs to padding. Padding is one and the same token many times over, in the same place: whichever of
//! its rows writes last writes what the others did, and no chain reads it.

use tch::{Device, Tensor};

use super::attention::PAGE_TOKENS;
use super::expect;
use super::paged::{HostStep, PagedStep, Places, check, split};
use crate::{Result, upload, upload_into};

/// What does not change from one use of a [`FixedStep`] to the next.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct StepShape {
    /// Chains, one new token each.
    pub rows: usize,
    /// Pages that a chain may have at most.
    pub pages_each: usize,
    /// Pages that all may have together; each row of padding counts as one.
    pub pages_all: usize,
}

/// Where chains continue by one token each.
#[derive(Debug)]
pub struct FixedStep {
    shape: StepShape,
    /// The page of padding.
    spare: i64,
    /// All i64 numbers, and all i32 ones, on the device: the tensors below and those of `step` are parts of them.
    wide: Tensor,
    narrow: Tensor,
    ids: Tensor,
    positions: Tensor,
    step: PagedStep,
}

const OPERATION: &str = "a step of a fixed shape";

impl FixedStep {
    /// A step of padding alone, in a cache of `pages` pages on `device`, of which the last is kept for padding: it must
    /// hold numbers, such as zeros.
    ///
    /// # Errors
    /// [`crate::ErrorKind::InvalidArgument`] for a shape without room for its rows. Whatever [`upload`] says.
    pub fn new(shape: StepShape, pages: i64, device: Device) -> Result<Self> {
        let StepShape { rows, pages_each, pages_all } = shape;
        let fits = |numbers: Option<usize>| numbers.is_some_and(|n| i32::try_from(n).is_ok());
        let sound = rows > 0
            && pages_each > 0
            && pages_all >= rows
            && pages > 0
            && fits(pages_all.checked_mul(PAGE_TOKENS))
            && fits(rows.checked_mul(pages_each));
        expect(OPERATION, sound, || format!("{shape:?} in {pages} pages"))?;
        let spare = pages - 1;
        let numbers = Numbers::new(shape, spare, &[], &[], &[]);
        let (mut wide, mut narrow) = (Tensor::new(), Tensor::new());
        let [ids, positions, page_of, place_of, own, seen, held] =
            split(&numbers.wide.each_ref().map(Vec::as_slice), |all| {
                wide = upload(all, device)?;
                Ok(wide.shallow_clone())
            })?;
        let [flash_starts, flash_held, flash_lengths] =
            split(&numbers.narrow.each_ref().map(Vec::as_slice), |all| {
                narrow = upload(&to_i32(all), device)?;
                Ok(narrow.shallow_clone())
            })?;
        let places = Places {
            page_of,
            place_of,
            own,
            seen,
            held,
            flash_starts,
            flash_held,
            flash_lengths,
            most_new: 1,
            longest: (pages_each * PAGE_TOKENS) as i64,
        };
        let host = HostStep::new(numbers.starts(), numbers.lengths(), numbers.table(), rows as i64)?;
        let step = PagedStep { rows: rows as i64, pages, device, host, places };
        Ok(Self { shape, spare, wide, narrow, ids, positions, step })
    }

    /// Chain s has `lengths[s]` tokens with its new one, `ids[s]`, in `tables[s]`, its pages in order. What was launched
    /// with the numbers before still reads those.
    ///
    /// # Errors
    /// As [`PagedStep::new`], and [`crate::ErrorKind::InvalidArgument`] for chains that do not fit the shape.
    pub fn fill(&mut self, ids: &[i64], lengths: &[i64], tables: &[Vec<i64>]) -> Result<()> {
        let StepShape { rows, pages_each, pages_all } = self.shape;
        let starts: Vec<i64> = (0..=ids.len() as i64).collect();
        let needed = check(&starts, lengths, tables, self.spare)?;
        let most = needed.iter().map(|own| own.len()).max().unwrap_or(0);
        let all: usize = needed.iter().map(|own| own.len()).sum();
        let fits = ids.len() <= rows && most <= pages_each && all + (rows - ids.len()) <= pages_all;
        expect(OPERATION, fits, || {
            format!("{} chains with {most} pages at most and {all} in all, for {:?}", ids.len(), self.shape)
        })?;
        let numbers = Numbers::new(self.shape, self.spare, ids, lengths, &needed);
        upload_into(&numbers.wide.concat(), &self.wide)?;
        upload_into(&to_i32(&numbers.narrow.concat()), &self.narrow)?;
        self.step.host.set(numbers.lengths(), numbers.table())
    }

    /// The new tokens `[rows]` i64 on the device; padding is token 0.
    pub fn ids(&self) -> &Tensor {
        &self.ids
    }

    /// Their positions in their chains `[rows]` i64 on the device; padding is at 0.
    pub fn positions(&self) -> &Tensor {
        &self.positions
    }

    /// For [`super::paged_attention`].
    #[must_use]
    pub fn step(&self) -> &PagedStep {
        &self.step
    }
}

/// A step's numbers with padding.
struct Numbers {
    /// Ids, positions; page of each new token and its place there; tables; lengths; pages, one chain after another.
    wide: [Vec<i64>; 7],
    /// Starts of the chains; where their tokens start in the last of the above; lengths.
    narrow: [Vec<i64>; 3],
}

impl Numbers {
    /// Of chains that fit the shape, `needed` being the pages of each.
    fn new(shape: StepShape, spare: i64, ids: &[i64], lengths: &[i64], needed: &[&[i64]]) -> Self {
        let StepShape { rows, pages_each, pages_all } = shape;
        let padding = rows - ids.len();
        let padded = |values: &[i64], with: i64| {
            values.iter().copied().chain(std::iter::repeat_n(with, padding)).collect::<Vec<i64>>()
        };
        let page = PAGE_TOKENS as i64;
        let (ids, lengths) = (padded(ids, 0), padded(lengths, 1));
        let positions: Vec<i64> = lengths.iter().map(|length| length - 1).collect();
        let only_spare = [spare];
        let chains = needed.iter().copied().chain(std::iter::repeat_n(&only_spare[..], padding));
        let (mut page_of, mut table) = (Vec::with_capacity(rows), Vec::with_capacity(rows * pages_each));
        let (mut held, mut held_starts) = (Vec::with_capacity(pages_all), vec![0]);
        for own in chains {
            page_of.push(own[own.len() - 1]);
            // What a chain does not need is its first page, as in a step of any shape.
            table.extend_from_slice(own);
            table.extend(std::iter::repeat_n(own[0], pages_each - own.len()));
            held.extend_from_slice(own);
            held_starts.push(held.len() as i64 * page);
        }
        held.resize(pages_all, spare);
        let place_of = positions.iter().map(|position| position % page).collect();
        let starts = (0..=rows as i64).collect();
        Self {
            narrow: [starts, held_starts, lengths.clone()],
            wide: [ids, positions, page_of, place_of, table, lengths, held],
        }
    }

    fn starts(&self) -> &[i64] {
        &self.narrow[0]
    }

    fn table(&self) -> &[i64] {
        &self.wide[4]
    }

    fn lengths(&self) -> &[i64] {
        &self.wide[5]
    }
}

/// Numbers that [`FixedStep::new`] has found to fit.
fn to_i32(values: &[i64]) -> Vec<i32> {
    values.iter().map(|&x| x as i32).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ErrorKind;

    fn values(x: &Tensor) -> Vec<i64> {
        Vec::try_from(x.to_kind(tch::Kind::Int64)).unwrap()
    }

    const SHAPE: StepShape = StepShape { rows: 4, pages_each: 2, pages_all: 6 };

    #[test]
    fn a_step_is_written_over_the_one_before_with_padding_on_the_last_page() {
        let mut fixed = FixedStep::new(SHAPE, 10, Device::Cpu).unwrap();
        assert_eq!(values(&fixed.step.places.own), [9; 8]);
        let address = fixed.ids().data_ptr();
        fixed.fill(&[50, 60, 70], &[1, 2, 3], &[vec![0], vec![1], vec![2]]).unwrap();
        fixed.fill(&[5, 6], &[66, 64], &[vec![7, 3], vec![2, 8]]).unwrap();
        assert_eq!(fixed.ids().data_ptr(), address, "a graph would read elsewhere");
        let (places, host) = (&fixed.step.places, &fixed.step.host);
        assert_eq!(values(fixed.ids()), [5, 6, 0, 0]);
        assert_eq!(values(fixed.positions()), [65, 63, 0, 0]);
        assert_eq!(values(&places.page_of), [3, 2, 9, 9]);
        assert_eq!(values(&places.place_of), [1, 63, 0, 0]);
        assert_eq!(values(&places.own), [7, 3, 2, 2, 9, 9, 9, 9], "what is not needed is the first page");
        assert_eq!(values(&places.seen), [66, 64, 1, 1]);
        assert_eq!(values(&places.held), [7, 3, 2, 9, 9, 9]);
        assert_eq!(values(&places.flash_starts), [0, 1, 2, 3, 4]);
        assert_eq!(values(&places.flash_held), [0, 128, 192, 256, 320]);
        assert_eq!(values(&places.flash_lengths), [66, 64, 1, 1]);
        assert_eq!((places.most_new, places.longest), (1, 128));
        assert_eq!(host.table.size(), [4, 2]);
        assert_eq!(values(&host.table.flatten(0, -1)), values(&places.own));
        assert_eq!(values(&host.starts), values(&places.flash_starts));
        assert_eq!(values(&host.lengths), values(&places.seen));
        assert!([&places.page_of, &places.held].iter().all(|x| x.kind() == tch::Kind::Int64));
        assert!([&places.flash_held, &places.flash_lengths].iter().all(|x| x.kind() == tch::Kind::Int));
    }

    #[test]
    fn chains_that_do_not_fit_or_have_the_page_of_padding_are_refused() {
        let mut fixed = FixedStep::new(SHAPE, 10, Device::Cpu).unwrap();
        fixed.fill(&[5], &[1], &[vec![4]]).unwrap();
        let own = |pages: &[i64]| pages.iter().map(|&page| vec![page]).collect::<Vec<_>>();
        for (why, ids, lengths, tables) in [
            ("the page of padding", vec![1], vec![1], own(&[9])),
            ("a page outside", vec![1], vec![1], own(&[-1])),
            ("one page written by two", vec![1, 2], vec![1, 1], own(&[3, 3])),
            ("more rows", vec![1; 5], vec![1; 5], own(&[0, 1, 2, 3, 4])),
            ("a longer chain", vec![1], vec![129], vec![vec![1, 2, 3]]),
            (
                "more pages in all",
                vec![1; 4],
                vec![65, 65, 65, 1],
                vec![vec![0, 1], vec![2, 3], vec![4, 5], vec![6]],
            ),
            ("lengths amiss", vec![1, 2], vec![1], own(&[1, 2])),
            ("no chain", vec![], vec![], vec![]),
        ] {
            let error = fixed.fill(&ids, &lengths, &tables).unwrap_err();
            assert_eq!(error.kind, ErrorKind::InvalidArgument, "{why}: {error}");
        }
        assert_eq!(values(fixed.ids()), [5, 0, 0, 0], "it is as it was");
        for (rows, pages_each, pages_all) in
            [(0, 1, 1), (1, 0, 1), (3, 1, 2), (1, 1, usize::MAX), (2, 1 << 62, 4)]
        {
            let shape = StepShape { rows, pages_each, pages_all };
            assert!(FixedStep::new(shape, 10, Device::Cpu).is_err(), "{shape:?}");
        }
        assert!(FixedStep::new(SHAPE, 0, Device::Cpu).is_err());
    }
}
