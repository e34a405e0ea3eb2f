//! Rows into micro-batches.
//!
//! The chains of a group begin with one prompt. It goes through the model once for those of them that are in a
//! micro-batch; only attention sees each chain whole:
//!
//! ```text
//! rows of a group ─▶ common beginning, rest of each row ─▶ projections, norms, MLPs: each of them once
//!                    beginning + rest, for each row     ─▶ attention, of the rest alone
//! ```
//!
//! What must stay true: every row that has a target is in one micro-batch; none is larger than the limit unless a single
//! row is.

use std::collections::BTreeMap;

use agentfly_common::planner::ATTENDED_FOR_EACH;

use super::config::MicroBatchLimit;
use super::error::RowName;
use super::microbatch::Row;

/// Rows of a micro-batch that begin alike.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Alike {
    /// How many tokens they begin with that are the same in all, and predict no token with loss in any.
    pub(super) common: usize,
    /// Their places.
    pub(super) rows: Vec<usize>,
}

/// A micro-batch under construction.
#[derive(Debug, Default)]
struct Filled {
    /// Tokens that go through the model.
    tokens: usize,
    /// Tokens that attention sees: all of each row.
    attended: usize,
    rows: usize,
}

impl Filled {
    fn fits(&self, more: &Self, limit: MicroBatchLimit) -> bool {
        match limit {
            MicroBatchLimit::Rows(rows) => self.rows + more.rows <= rows,
            MicroBatchLimit::Tokens(tokens) => {
                let attended = tokens.saturating_mul(ATTENDED_FOR_EACH as usize);
                self.tokens + more.tokens <= tokens && self.attended + more.attended <= attended
            }
        }
    }

    fn add(&mut self, more: &Self) {
        self.tokens += more.tokens;
        self.attended += more.attended;
        self.rows += more.rows;
    }
}

/// Micro-batches under the limit; with `share` what a group's rows have in common counts once in each. The largest
/// pieces first, each into the first micro-batch with room for it. Rows without targets are left out.
pub(super) fn plan(rows: &[Row<'_>], limit: MicroBatchLimit, share: bool) -> Vec<Vec<Alike>> {
    let mut pieces: Vec<(Filled, Alike)> = Vec::new();
    for (common, group) in groups(rows, share) {
        let mut open = false;
        for index in group {
            let rest = rows[index].span() - common;
            let row = Filled { tokens: rest, attended: common + rest, rows: 1 };
            match pieces.last_mut() {
                Some((filled, alike)) if open && filled.fits(&row, limit) => {
                    filled.add(&row);
                    alike.rows.push(index);
                }
                _ => {
                    let filled = Filled { tokens: common + rest, ..row };
                    pieces.push((filled, Alike { common, rows: vec![index] }));
                    open = true;
                }
            }
        }
    }
    pieces.sort_by_key(|(filled, _)| std::cmp::Reverse(filled.tokens)); // stable: equal ones stay in order
    let mut batches: Vec<(Filled, Vec<Alike>)> = Vec::new();
    for (filled, mut alike) in pieces {
        // A beginning that one row has for itself is part of it.
        if alike.rows.len() == 1 {
            alike.common = 0;
        }
        match batches.iter_mut().find(|(held, _)| held.fits(&filled, limit)) {
            Some((held, batch)) => {
                held.add(&filled);
                batch.push(alike);
            }
            None => batches.push((filled, vec![alike])),
        }
    }
    batches.into_iter().map(|(_, batch)| batch).collect()
}

/// The places of a micro-batch's rows, in its order.
pub(super) fn places(batch: &[Alike]) -> Vec<usize> {
    batch.iter().flat_map(|alike| alike.rows.iter().copied()).collect()
}

/// The rows that the model has to see, by group, with what a group's rows have in common; each alone unless `share`.
fn groups(rows: &[Row<'_>], share: bool) -> Vec<(usize, Vec<usize>)> {
    let seen = (0..rows.len()).filter(|&i| rows[i].span() > 0);
    let mut groups: BTreeMap<_, Vec<usize>> = BTreeMap::new();
    for index in seen {
        let group = match rows[index].name {
            RowName::Chain(key) if share => (Some((key.purpose, key.step, key.group)), 0),
            _ => (None, index),
        };
        groups.entry(group).or_default().push(index);
    }
    groups.into_values().map(|group| (common(rows, &group), group)).collect()
}

/// Tokens that all of these rows begin with, short of the first that predicts a token with loss.
fn common(rows: &[Row<'_>], group: &[usize]) -> usize {
    let Some((first, others)) = group.split_first() else { return 0 };
    if others.is_empty() {
        return 0;
    }
    let before_loss = |&i: &usize| rows[i].targets.first().map_or(0, |target| target - 1);
    let most = group.iter().map(before_loss).min().unwrap_or(0);
    let alike = |i: &usize| {
        let pairs = rows[*first].token_ids.iter().zip(rows[*i].token_ids);
        pairs.take_while(|(a, b)| a == b).count()
    };
    others.iter().map(alike).min().unwrap_or(0).min(most)
}

#[cfg(test)]
pub(super) mod tests;
