//! Who trains on what: a step's batch cut into mini-batches, and each mini-batch dealt to the ranks so that
//! all have about equally many tokens.
//!
//! Called when a step's advantages are known. Pure and deterministic: the same batch gives the same shards.
//!
//! - Rows are taken in the order (group, chain); every `mini_batch_rows` of them are one optimizer step.
//! - Within a mini-batch, longest first, each row goes to the rank with the fewest tokens so far (greedy
//!   longest-processing-time scheduling, at most 4/3 of the best possible maximum; Graham 1969).
//! - Rows without a sampled token have no loss and are left out; a mini-batch of only such rows too.
//! - The denominators of the loss are counted over all ranks, so that a gradient summed over ranks does not
//!   depend on how rows are dealt.

use agentfly_common::batch::{MiniBatch, TrainRow, TrainShard};
use agentfly_common::ids::PolicyVersion;
use agentfly_common::trajectory::Trajectory;

/// Deals `weights` to `bins`, heaviest first, each to the lightest bin. Returns the indices of each bin in
/// ascending order. Ties go to the bin with fewer items, then to the lower one.
#[must_use]
pub fn balance(weights: &[usize], bins: usize) -> Vec<Vec<usize>> {
    let mut order: Vec<usize> = (0..weights.len()).collect();
    order.sort_by_key(|&index| (std::cmp::Reverse(weights[index]), index));
    let mut dealt: Vec<(usize, Vec<usize>)> = vec![(0, Vec::new()); bins];
    for index in order {
        if let Some((load, items)) = dealt.iter_mut().min_by_key(|(load, items)| (*load, items.len())) {
            *load += weights[index];
            items.push(index);
        }
    }
    dealt
        .into_iter()
        .map(|(_, mut items)| {
            items.sort_unstable();
            items
        })
        .collect()
}

/// One shard per rank. `rows` are the batch in the order (group, chain), each with its advantage.
#[must_use]
pub fn shards(
    step: u64,
    policy_version: PolicyVersion,
    rows: &[(&Trajectory, f64)],
    mini_batch_rows: usize,
    world_size: u32,
) -> Vec<TrainShard> {
    let mut shards: Vec<TrainShard> =
        (0..world_size).map(|_| TrainShard { step, policy_version, mini_batches: Vec::new() }).collect();
    for chunk in rows.chunks(mini_batch_rows.max(1)) {
        let with_loss: Vec<_> = chunk.iter().filter(|(chain, _)| chain.sampled_tokens() > 0).collect();
        if with_loss.is_empty() {
            continue;
        }
        let global_loss_tokens = with_loss.iter().map(|(chain, _)| chain.sampled_tokens() as u64).sum();
        let global_rows = with_loss.len() as u64;
        let lengths: Vec<usize> = with_loss.iter().map(|(chain, _)| chain.token_ids.len()).collect();
        for (shard, items) in shards.iter_mut().zip(balance(&lengths, world_size as usize)) {
            let rows = items.iter().map(|&item| train_row(with_loss[item].0, with_loss[item].1)).collect();
            shard.mini_batches.push(MiniBatch { rows, global_loss_tokens, global_rows });
        }
    }
    shards
}

fn train_row(chain: &Trajectory, advantage: f64) -> TrainRow {
    TrainRow {
        key: chain.key,
        token_ids: chain.token_ids.clone(),
        loss_mask: chain.loss_mask.clone(),
        rollout_log_probs: chain.log_probs.clone(),
        advantages: chain
            .loss_mask
            .iter()
            .map(|&sampled| if sampled { advantage as f32 } else { 0.0 })
            .collect(),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::testing::chain;
    use super::*;

    #[test]
    fn mini_batches_are_in_order_and_balanced_by_tokens() {
        let chains: Vec<_> =
            [9, 2, 3, 4, 5, 5].iter().enumerate().map(|(i, &n)| chain(1, i as u32, 0, n, 0.0)).collect();
        let rows: Vec<_> = chains.iter().map(|chain| (chain, 0.5)).collect();
        let shards = shards(1, PolicyVersion(0), &rows, 4, 2);
        let groups = |rank: usize, batch: usize| -> Vec<u32> {
            shards[rank].mini_batches[batch].rows.iter().map(|row| row.key.group).collect()
        };
        assert_eq!((groups(0, 0), groups(1, 0)), (vec![0], vec![1, 2, 3]), "9 tokens against 2 + 3 + 4");
        assert_eq!((groups(0, 1), groups(1, 1)), (vec![4], vec![5]));
        let first = &shards[0].mini_batches[0];
        assert_eq!((first.global_rows, first.global_loss_tokens), (4, 9 + 2 + 3 + 4 - 4));
        assert_eq!(first.rows[0].advantages[0], 0.0, "the prompt has no advantage");
        assert_eq!(first.rows[0].advantages[1], 0.5);
    }

    #[test]
    fn rows_without_loss_are_left_out_and_an_empty_rank_still_has_every_mini_batch() {
        let chains = [chain(1, 0, 0, 1, 0.0), chain(1, 1, 0, 3, 0.0), chain(1, 2, 0, 1, 0.0)];
        let rows: Vec<_> = chains.iter().map(|chain| (chain, 1.0)).collect();
        let shards = shards(1, PolicyVersion(0), &rows, 2, 2);
        assert_eq!(shards.iter().map(|shard| shard.mini_batches.len()).collect::<Vec<_>>(), [1, 1]);
        assert_eq!(shards[0].mini_batches[0].rows.len(), 1);
        assert_eq!(shards[1].mini_batches[0].rows.len(), 0);
        assert_eq!(shards[1].mini_batches[0].global_rows, 1);
    }

    proptest! {
        #[test]
        fn every_item_is_dealt_once_and_no_bin_is_much_heavier(
            weights in proptest::collection::vec(1_usize..500, 0..40), bins in 1_usize..6,
        ) {
            let dealt = balance(&weights, bins);
            let mut all: Vec<usize> = dealt.iter().flatten().copied().collect();
            all.sort_unstable();
            prop_assert_eq!(all, (0..weights.len()).collect::<Vec<_>>());
            let loads: Vec<usize> = dealt.iter().map(|items| items.iter().map(|&i| weights[i]).sum()).collect();
            let (low, high) = (loads.iter().min().copied().unwrap_or(0), loads.iter().max().copied().unwrap_or(0));
            prop_assert!(high - low <= weights.iter().max().copied().unwrap_or(0), "{:?}", loads);
        }
    }
}
