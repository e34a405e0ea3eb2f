//! Rows, and a micro-batch of them as tensors.
//!
//! Alignment, which everything else relies on: the hidden state at position j − 1 predicts token j, so a token
//! with `loss_mask[j]` takes its log-prob from there, and only those positions reach the head.

use std::ops::Range;

use agentfly_c10d::ops::{Packed, Sequence};
use agentfly_c10d::upload;
use tch::{Device, Tensor};

use super::error::{LearnerError, RowName};
use super::plan::Alike;
use crate::model::ModelError;

/// A row as the model sees it: its tokens, and which of them have loss.
#[derive(Debug)]
pub(super) struct Row<'a> {
    /// For errors.
    pub(super) name: RowName,
    /// Length T.
    pub(super) token_ids: &'a [u32],
    /// Positions of the tokens with loss, ascending, all at least 1.
    pub(super) targets: Vec<usize>,
}

impl<'a> Row<'a> {
    /// Checks ids and mask and finds the targets.
    pub(super) fn new(
        name: RowName,
        token_ids: &'a [u32],
        loss_mask: &[bool],
        vocab: i64,
    ) -> Result<Self, LearnerError> {
        let refuse = |problem: String| Err(LearnerError::Row { row: name, problem });
        if loss_mask.len() != token_ids.len() {
            return refuse(format!("{} token ids but {} mask entries", token_ids.len(), loss_mask.len()));
        }
        if loss_mask.first() == Some(&true) {
            return refuse("the first token has loss, but nothing predicts it".to_owned());
        }
        if let Some((at, id)) = token_ids.iter().enumerate().find(|(_, id)| i64::from(**id) >= vocab) {
            return refuse(format!("token {at} has id {id}, but the vocabulary has {vocab}"));
        }
        let targets = (0..loss_mask.len()).filter(|&j| loss_mask[j]).collect();
        Ok(Self { name, token_ids, targets })
    }

    /// How many leading tokens the model has to see: those after the last target change nothing.
    pub(super) fn span(&self) -> usize {
        self.targets.last().copied().unwrap_or(0)
    }
}

/// A micro-batch on the device: T tokens, N of them with loss. Rows that begin alike have their beginning once, and the rest
/// of each after it.
#[derive(Debug)]
pub(super) struct TokenBatch {
    /// `[T]` i64.
    pub(super) ids: Tensor,
    /// `[T]` i64: 0, 1, 2, … in each row.
    pub(super) positions: Tensor,
    /// Which tokens are which row's.
    pub(super) packed: Packed,
    /// `[N]` i64: the tokens that predict the N tokens with loss.
    pub(super) predicting: Tensor,
    /// `[N]` i64: their ids.
    pub(super) targets: Tensor,
    /// N.
    pub(super) tokens: usize,
}

impl TokenBatch {
    /// The rows of a planned micro-batch, in its order; their targets one row after another.
    pub(super) fn new(rows: &[Row<'_>], planned: &[Alike], device: Device) -> Result<Self, ModelError> {
        let (mut ids, mut positions, mut sequences) = (Vec::new(), Vec::new(), Vec::new());
        let (mut predicting, mut targets) = (Vec::new(), Vec::new());
        let mut add = |row: &Row<'_>, tokens: Range<usize>| {
            let start = ids.len();
            ids.extend(row.token_ids[tokens.clone()].iter().map(|&id| i64::from(id)));
            positions.extend(tokens.map(|position| position as i64));
            start..ids.len()
        };
        for Alike { common, rows: places } in planned {
            let beginning = places.first().map_or(0..0, |&first| add(&rows[first], 0..*common));
            for row in places.iter().map(|&place| &rows[place]) {
                let rest = add(row, *common..row.span());
                for &j in &row.targets {
                    predicting.push((rest.start + j - 1 - common) as i64);
                    targets.push(i64::from(row.token_ids[j]));
                }
                sequences.push(Sequence { beginning: beginning.clone(), rest });
            }
        }
        Ok(Self {
            ids: upload(&ids, device)?,
            positions: upload(&positions, device)?,
            packed: Packed::sharing(&sequences, ids.len(), device)?,
            predicting: upload(&predicting, device)?,
            targets: upload(&targets, device)?,
            tokens: targets.len(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_state_before_a_token_predicts_it() {
        let name = RowName::Supervised(0);
        let long = Row::new(name, &[5, 6, 7, 8, 9], &[false, true, false, true, false], 10).unwrap();
        let short = Row::new(name, &[1, 2], &[false, true], 10).unwrap();
        let planned = [0, 1].map(|row| Alike { common: 0, rows: vec![row] });
        let batch = TokenBatch::new(&[long, short], &planned, Device::Cpu).unwrap();
        let ints = |t: &Tensor| Vec::<i64>::try_from(t.flatten(0, -1)).unwrap();
        assert_eq!(
            ints(&batch.ids),
            [5, 6, 7, 1],
            "tokens that predict nothing are cut, and nothing is padded"
        );
        assert_eq!(ints(&batch.positions), [0, 1, 2, 0]);
        assert_eq!(ints(&batch.predicting), [0, 2, 3]);
        assert_eq!(ints(&batch.targets), [6, 8, 2]);
    }

    #[test]
    fn a_common_beginning_is_there_once() {
        let row = |ids: &'static [u32]| {
            Row::new(RowName::Supervised(0), ids, &[false, false, false, true, true], 10).unwrap()
        };
        let rows = [row(&[1, 2, 3, 4, 5]), row(&[1, 2, 3, 6, 7])];
        let planned = [Alike { common: 2, rows: vec![1, 0] }];
        let batch = TokenBatch::new(&rows, &planned, Device::Cpu).unwrap();
        let ints = |t: &Tensor| Vec::<i64>::try_from(t).unwrap();
        assert_eq!(ints(&batch.ids), [1, 2, 3, 6, 3, 4]);
        assert_eq!(ints(&batch.positions), [0, 1, 2, 3, 2, 3]);
        assert_eq!(ints(&batch.predicting), [2, 3, 4, 5]);
        assert_eq!(ints(&batch.targets), [6, 7, 4, 5]);
    }

    #[test]
    fn rows_that_cannot_be_trained_on_are_refused_with_values() {
        let row = |ids: &[u32], mask: &[bool]| {
            Row::new(RowName::Supervised(4), ids, mask, 10).map(|_| ()).unwrap_err().to_string()
        };
        assert_eq!(row(&[1, 2], &[false]), "supervised row 4: 2 token ids but 1 mask entries");
        assert!(row(&[1], &[true]).contains("the first token has loss"));
        assert!(row(&[1, 10], &[false, true]).contains("token 1 has id 10, but the vocabulary has 10"));
    }
}
