//! Micro-batches hold every row once, within their limit, and beginnings where they are common.

use agentfly_common::ids::{ChainKey, Purpose};
use proptest::prelude::*;

use super::*;

pub(in crate::learner) const VOCAB: i64 = 50;

/// A group's number, its prompt's length, and of each chain the tokens after it. Every third of those has no loss.
type Group<'a> = (u32, usize, &'a [usize]);

/// Ids and mask of each chain, named.
pub(in crate::learner) fn chains(groups: &[Group<'_>]) -> Vec<(RowName, Vec<u32>, Vec<bool>)> {
    let mut all = Vec::new();
    for &(group, prompt, rests) in groups {
        for (chain, &rest) in rests.iter().enumerate() {
            let key = ChainKey { purpose: Purpose::Train, step: 3, group, chain: chain as u32 };
            let token = |i: usize| {
                let of_chain = if i < prompt { 0 } else { chain * 17 + 5 };
                ((i * i * 7 + i * 31 + group as usize * 13 + of_chain) % VOCAB as usize) as u32
            };
            let ids = (0..prompt + rest).map(token).collect();
            let mask = (0..prompt + rest).map(|i| i >= prompt && (i - prompt) % 3 != 2).collect();
            all.push((RowName::Chain(key), ids, mask));
        }
    }
    all
}

/// Tokens that go through the model for rows that begin alike.
fn tokens_of(alike: &Alike, rows: &[Row<'_>]) -> usize {
    alike.common + alike.rows.iter().map(|&i| rows[i].span() - alike.common).sum::<usize>()
}

pub(in crate::learner) fn rows(chains: &[(RowName, Vec<u32>, Vec<bool>)]) -> Vec<Row<'_>> {
    chains.iter().map(|(name, ids, mask)| Row::new(*name, ids, mask, VOCAB).unwrap()).collect()
}

#[test]
fn micro_batches_are_filled_to_their_limit() {
    let (ids, mut mask) = (vec![1_u32; 40], vec![false; 40]);
    let mut planned = |lengths: &[usize], limit| -> Vec<Vec<usize>> {
        let rows: Vec<Row<'_>> = lengths
            .iter()
            .enumerate()
            .map(|(i, &length)| {
                mask.fill(false);
                mask[length] = length > 0;
                Row::new(RowName::Supervised(i), &ids, &mask, VOCAB).unwrap()
            })
            .collect();
        plan(&rows, limit, true).iter().map(|batch| places(batch)).collect()
    };
    assert_eq!(planned(&[5, 5, 5, 5, 5], MicroBatchLimit::Rows(2)), [vec![0, 1], vec![2, 3], vec![4]]);
    assert_eq!(planned(&[5, 5, 5], MicroBatchLimit::Tokens(10)), [vec![0, 1], vec![2]]);
    assert_eq!(planned(&[3, 5, 4, 0], MicroBatchLimit::Tokens(10)), [vec![1, 2], vec![0]], "longest first");
    assert_eq!(planned(&[30], MicroBatchLimit::Tokens(10)), [vec![0]], "a row is never cut");
    let without_loss = Row::new(RowName::Supervised(0), &[1, 2, 3], &[false; 3], 7).unwrap();
    assert_eq!(without_loss.span(), 0, "nothing of it needs the model");
}

#[test]
fn a_prompt_goes_through_the_model_once_for_its_micro_batch() {
    let chains = chains(&[(7, 100, &[30, 30, 30, 30]), (8, 10, &[20])]);
    let rows = rows(&chains);
    let tokens = |limit, share| {
        let plan = plan(&rows, limit, share);
        plan.iter()
            .map(|batch| batch.iter().map(|alike| tokens_of(alike, &rows)).sum())
            .collect::<Vec<usize>>()
    };
    // A row's last token with loss, and what comes after it, need not be seen.
    let (rest, other) = (rows[0].span() - 99, rows[4].span());
    assert_eq!(tokens(MicroBatchLimit::Tokens(2048), true), [99 + 4 * rest + other]);
    assert_eq!(tokens(MicroBatchLimit::Tokens(2048), false), [4 * (99 + rest) + other]);
    assert_eq!(
        tokens(MicroBatchLimit::Tokens(99 + 2 * rest), true),
        [99 + 2 * rest, 99 + 2 * rest, other],
        "again for another micro-batch"
    );
    assert_eq!(tokens(MicroBatchLimit::Rows(3), true), [99 + 3 * rest, 99 + rest + other]);
}

#[test]
fn attention_sees_no_more_than_is_planned_for() {
    // Of each chain 200 tokens are the prompt's, and 2 its own: the model would see 200 + 100 · 2.
    let chains = chains(&[(1, 200, &[3; 100])]);
    let rows = rows(&chains);
    let plan = plan(&rows, MicroBatchLimit::Tokens(500), true);
    let attended = plan.iter().map(|batch| places(batch).iter().map(|&i| rows[i].span()).sum::<usize>());
    assert!(plan.len() > 5 && attended.max() <= Some(4 * 500), "{plan:?}");
}

#[test]
fn nothing_is_shared_that_predicts_a_token_with_loss_or_differs() {
    let ids = [[1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 5, 7], [1, 2, 3, 9, 5, 6]];
    let key = |chain| RowName::Chain(ChainKey { purpose: Purpose::Train, step: 1, group: 0, chain });
    let mask = |first: usize| (0..6).map(|i| i >= first).collect::<Vec<bool>>();
    let masks = [mask(4), mask(5), mask(3)];
    let row = |i: usize| Row::new(key(i as u32), &ids[i], &masks[i], VOCAB).unwrap();
    let common = |chosen: &[usize]| {
        let rows: Vec<Row<'_>> = chosen.iter().map(|&i| row(i)).collect();
        super::common(&rows, &(0..rows.len()).collect::<Vec<_>>())
    };
    assert_eq!(common(&[0, 1]), 3, "token 3 predicts the first one's loss");
    assert_eq!(common(&[1, 2]), 2, "token 2 predicts the second one's loss");
    assert_eq!(common(&[0]), 0, "nobody to share with");
    let supervised = |i: usize| Row::new(RowName::Supervised(i), &ids[0], &masks[0], VOCAB).unwrap();
    let plan = plan(&[supervised(0), supervised(1)], MicroBatchLimit::Rows(8), true);
    assert!(plan.iter().flatten().all(|alike| alike.common == 0), "{plan:?}");
}

proptest! {
    #[test]
    fn a_plan_holds_every_row_once_and_keeps_its_limit(
        sizes in proptest::collection::vec((1_usize..90, proptest::collection::vec(0_usize..60, 1..6)), 1..6),
        tokens in 1_usize..300, count in 1_usize..5, share: bool,
    ) {
        let groups: Vec<Group<'_>> =
            sizes.iter().enumerate().map(|(i, (prompt, rests))| (i as u32, *prompt, rests.as_slice())).collect();
        let chains = chains(&groups);
        let rows = rows(&chains);
        for limit in [MicroBatchLimit::Tokens(tokens), MicroBatchLimit::Rows(count)] {
            let plan = plan(&rows, limit, share);
            let mut seen: Vec<usize> = plan.iter().flatten().flat_map(|alike| alike.rows.clone()).collect();
            seen.sort_unstable();
            let all: Vec<usize> = (0..rows.len()).filter(|&i| rows[i].span() > 0).collect();
            prop_assert_eq!(seen, all);
            for batch in &plan {
                let held: usize = batch.iter().map(|alike| tokens_of(alike, &rows)).sum();
                let rows_held: usize = batch.iter().map(|alike| alike.rows.len()).sum();
                let attended: usize = places(batch).iter().map(|&i| rows[i].span()).sum();
                match limit {
                    MicroBatchLimit::Tokens(n) => prop_assert!(held <= n && attended <= 4 * n || rows_held == 1),
                    MicroBatchLimit::Rows(n) => prop_assert!(rows_held <= n),
                }
                for alike in batch {
                    prop_assert!(share || alike.common == 0);
                    let first = &rows[alike.rows[0]];
                    for &i in &alike.rows {
                        prop_assert_eq!(&rows[i].token_ids[..alike.common], &first.token_ids[..alike.common]);
                        prop_assert!(alike.common < rows[i].targets[0]);
                    }
                }
            }
        }
    }
}
