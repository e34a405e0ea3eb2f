//! Rows into micro-batches, and a micro-batch into tensors.
//!
//! Alignment, which everything else relies on: the hidden state at position j − 1 predicts token j, so a token
//! with `loss_mask[j]` takes its log-prob from there, and only those positions reach the head.

use agentfly_c10d::upload;
use tch::{Device, Tensor};

use super::config::MicroBatchLimit;
use super::error::{LearnerError, RowName};
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

/// Groups rows (by their place in `lengths`) under the limit: longest first, each into the first micro-batch with
/// room for it. Rows of length 0 are left out.
pub(super) fn plan(lengths: &[usize], limit: MicroBatchLimit) -> Vec<Vec<usize>> {
    let mut order: Vec<usize> = (0..lengths.len()).filter(|&i| lengths[i] > 0).collect();
    order.sort_by_key(|&i| std::cmp::Reverse(lengths[i])); // stable: equal rows stay in order
    let mut batches: Vec<(usize, Vec<usize>)> = Vec::new();
    for index in order {
        let length = lengths[index];
        let fits = |(held, batch): &&mut (usize, Vec<usize>)| match limit {
            MicroBatchLimit::Rows(rows) => batch.len() < rows,
            MicroBatchLimit::Tokens(tokens) => *held + length <= tokens,
        };
        match batches.iter_mut().find(fits) {
            Some((held, batch)) => {
                *held += length;
                batch.push(index);
            }
            None => batches.push((length, vec![index])),
        }
    }
    batches.into_iter().map(|(_, batch)| batch).collect()
}

/// A micro-batch on the device: T tokens of R rows, one row after another, N tokens with loss in all.
#[derive(Debug)]
pub(super) struct TokenBatch {
    /// `[T]` i64.
    pub(super) ids: Tensor,
    /// `[T]` i64: 0, 1, 2, … in each row.
    pub(super) positions: Tensor,
    /// `[R + 1]` i64 on the CPU: where rows start.
    pub(super) starts: Tensor,
    /// `[N]` i64: the tokens that predict the N tokens with loss.
    pub(super) predicting: Tensor,
    /// `[N]` i64: their ids.
    pub(super) targets: Tensor,
    /// N.
    pub(super) tokens: usize,
}

impl TokenBatch {
    /// `rows` in this order; their targets one row after another.
    pub(super) fn new(rows: &[&Row<'_>], device: Device) -> Result<Self, ModelError> {
        let (mut ids, mut positions, mut starts) = (Vec::new(), Vec::new(), vec![0_i64]);
        let (mut predicting, mut targets) = (Vec::new(), Vec::new());
        for row in rows.iter().filter(|row| row.span() > 0) {
            let start = ids.len();
            ids.extend(row.token_ids[..row.span()].iter().map(|&id| i64::from(id)));
            positions.extend(0..row.span() as i64);
            starts.push(ids.len() as i64);
            for &j in &row.targets {
                predicting.push((start + j - 1) as i64);
                targets.push(i64::from(row.token_ids[j]));
            }
        }
        Ok(Self {
            ids: upload(&ids, device)?,
            positions: upload(&positions, device)?,
            starts: Tensor::f_from_slice(&starts)?,
            predicting: upload(&predicting, device)?,
            targets: upload(&targets, device)?,
            tokens: targets.len(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn the_state_before_a_token_predicts_it() {
        let name = RowName::Supervised(0);
        let long = Row::new(name, &[5, 6, 7, 8, 9], &[false, true, false, true, false], 10).unwrap();
        let short = Row::new(name, &[1, 2], &[false, true], 10).unwrap();
        let batch = TokenBatch::new(&[&long, &short], Device::Cpu).unwrap();
        let ints = |t: &Tensor| Vec::<i64>::try_from(t.flatten(0, -1)).unwrap();
        assert_eq!(
            ints(&batch.ids),
            [5, 6, 7, 1],
            "tokens that predict nothing are cut, and nothing is padded"
        );
        assert_eq!(ints(&batch.positions), [0, 1, 2, 0]);
        assert_eq!(ints(&batch.starts), [0, 3, 4]);
        assert_eq!(ints(&batch.predicting), [0, 2, 3]);
        assert_eq!(ints(&batch.targets), [6, 8, 2]);
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

    proptest! {
        #[test]
        fn a_plan_holds_every_row_once_and_keeps_its_limit(
            lengths in proptest::collection::vec(0_usize..50, 0..40), tokens in 1_usize..200, rows in 1_usize..9,
        ) {
            for limit in [MicroBatchLimit::Tokens(tokens), MicroBatchLimit::Rows(rows)] {
                let plan = plan(&lengths, limit);
                let mut seen: Vec<usize> = plan.iter().flatten().copied().collect();
                seen.sort_unstable();
                let all: Vec<usize> = (0..lengths.len()).filter(|&i| lengths[i] > 0).collect();
                prop_assert_eq!(seen, all);
                for batch in &plan {
                    let held: usize = batch.iter().map(|&i| lengths[i]).sum();
                    match limit {
                        MicroBatchLimit::Tokens(n) => prop_assert!(held <= n || batch.len() == 1),
                        MicroBatchLimit::Rows(n) => prop_assert!(batch.len() <= n),
                    }
                }
            }
        }
    }
}
