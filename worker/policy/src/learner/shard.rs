//! Which rank updates which weights: the flat order of all parameters, cut into one contiguous share a rank.
//!
//! Used by the optimizer, its checkpoints and the hash of the weights. What must stay true: the shares are in rank
//! order, disjoint and together everything, and a cut lies between two [`BLOCK`]s, whatever the number of ranks, so
//! that what is computed block by block does not depend on it.

use std::ops::Range;

use crate::model::Slot;

/// Weights that stay together. 16 KiB of f32: a norm over one is exact to f32, a hash of one costs no more a byte
/// than of much, and a share is at most that much larger than another.
pub(super) const BLOCK: i64 = 4096;

/// How the flat order of a model's parameters is cut.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Shards {
    /// Where each parameter lies.
    pub(super) slots: Vec<Slot>,
    /// This rank's number among those that share.
    pub(super) index: usize,
    /// How many ranks share.
    pub(super) count: usize,
    /// Elements of the model's flat buffer.
    len: i64,
}

/// The part of one parameter that lies in some share.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Piece<'a> {
    /// The parameter.
    pub(super) slot: &'a Slot,
    /// Its first element within the flat order, and how many.
    pub(super) start: i64,
    pub(super) len: i64,
}

impl Shards {
    pub(super) fn new(slots: Vec<Slot>, len: i64, index: usize, count: usize) -> Self {
        Self { slots, index, count, len }
    }

    /// Elements of a share with its padding, the same for every rank; at least one block.
    pub(super) fn share(&self) -> i64 {
        let blocks = (self.len as u64).div_ceil(BLOCK as u64);
        blocks.div_ceil(self.count as u64).max(1) as i64 * BLOCK
    }

    /// Elements of a buffer that holds every share with its padding.
    pub(super) fn padded(&self) -> i64 {
        self.share() * self.count as i64
    }

    /// The elements of the flat buffer that `rank` updates: shorter for the last, maybe none.
    pub(super) fn range(&self, rank: usize) -> Range<i64> {
        let start = (rank as i64 * self.share()).min(self.len);
        start..(start + self.share()).min(self.len)
    }

    /// What this rank updates.
    pub(super) fn own(&self) -> Range<i64> {
        self.range(self.index)
    }

    /// The parameters, or parts of them, that this rank updates, in order.
    pub(super) fn own_pieces(&self) -> impl Iterator<Item = Piece<'_>> {
        let own = self.own();
        self.slots.iter().filter_map(move |slot| {
            let (start, end) = (slot.start.max(own.start), (slot.start + slot.len).min(own.end));
            (start < end).then_some(Piece { slot, start, len: end - start })
        })
    }
}

impl Piece<'_> {
    /// Whether it is the whole parameter.
    pub(super) fn is_whole(&self) -> bool {
        self.len == self.slot.len
    }

    /// Its shape in a checkpoint: the parameter's, or flat where it is a part of one.
    pub(super) fn shape(&self) -> Vec<i64> {
        if self.is_whole() { self.slot.shape.clone() } else { vec![self.len] }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn slots(lengths: &[i64]) -> (Vec<Slot>, i64) {
        let mut start = 0;
        let slot = |(i, &len): (usize, &i64)| {
            let slot = Slot { name: format!("p{i}"), shape: vec![len], start, len };
            start += len;
            slot
        };
        (lengths.iter().enumerate().map(slot).collect(), lengths.iter().sum())
    }

    #[test]
    fn every_weight_has_one_owner_and_cuts_lie_between_blocks() {
        for (lengths, count) in [
            (vec![10_000, 1, 5_000, 12_345], 1),
            (vec![10_000, 1, 5_000, 12_345], 2),
            (vec![10_000, 1, 5_000, 12_345], 3),
            (vec![4096, 4096], 2),
            (vec![100], 3),
        ] {
            let (slots, len) = slots(&lengths);
            let mut owners = vec![0; len as usize];
            for rank in 0..count {
                let shards = Shards::new(slots.clone(), len, rank, count);
                let own = shards.own();
                assert!(own.is_empty() || own.start % BLOCK == 0, "{own:?}");
                assert!(own.end - own.start <= shards.share() && shards.padded() >= len);
                let pieces: Vec<_> = shards.own_pieces().collect();
                let held: i64 = pieces.iter().map(|piece| piece.len).sum();
                assert_eq!(held, own.end - own.start);
                for piece in pieces {
                    assert_eq!(piece.is_whole(), piece.shape() == piece.slot.shape);
                    (piece.start..piece.start + piece.len).for_each(|i| owners[i as usize] += 1);
                }
            }
            assert!(owners.iter().all(|&n| n == 1), "{lengths:?} over {count} ranks");
        }
    }
}
