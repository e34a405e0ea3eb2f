//! Log-probs of rows without gradient: the frozen reference's, and the policy's before its updates.
//!
//! The chains of a group begin with one prompt. It goes through the model once for a micro-batch's rows of the group, and
//! each row continues from its cached keys and values, as chains do in the rollout:
//!
//! ```text
//! rows of a group ─┬▶ what they begin with ─▶ blocks ─▶ KV cache ─┐
//!                  └▶ the rest of each row ───────────────────────┴▶ blocks ─▶ head, in pieces ─▶ log-probs
//! ```
//!
//! What must stay true: a row's log-probs are the same to the bit whatever rows are beside it. So beginnings are shared
//! where attention through the cache gives a token the bits that attention over whole rows gives it: by this project's
//! kernels, and not by libtorch's.

use std::collections::BTreeMap;

use agentfly_c10d::ops::{self, PAGE_TOKENS, PagedStep, page_numbers};
use agentfly_c10d::upload;
use tch::Tensor;

use super::config::MicroBatchLimit;
use super::error::{LearnerError, RowName};
use super::forward::slice;
use super::microbatch::{Row, TokenBatch};
use crate::model::{Attention, Decoder, ModelError, host, visit_head};

/// Places in the cache for each token of a micro-batch's limit: short rows fill their pages badly. A token's keys and
/// values are a fifteenth and less of what training keeps of it.
const CACHED_FOR_EACH: usize = 8;

/// Rows of a micro-batch that begin alike.
#[derive(Debug, PartialEq, Eq)]
struct Alike {
    /// How many tokens they begin with that are the same in all, and predict no token with loss in any.
    common: usize,
    /// Their places.
    rows: Vec<usize>,
}

/// Log-probs of every row's targets; empty for rows without targets.
pub(super) fn log_probs(
    decoder: &Decoder,
    rows: &[Row<'_>],
    limit: MicroBatchLimit,
    temperature: f64,
) -> Result<Vec<Vec<f32>>, LearnerError> {
    let _no_grad = tch::no_grad_guard();
    let exact = ops::has_kernels(decoder.parameters().flat()) && decoder.config().head_dim % 2 == 0;
    let mut by_row = vec![Vec::new(); rows.len()];
    for batch in plan(rows, limit, exact) {
        let order: Vec<usize> = batch.iter().flat_map(|alike| alike.rows.iter().copied()).collect();
        let targets = order.iter().flat_map(|&i| rows[i].targets.iter().map(move |&j| rows[i].token_ids[j]));
        let targets: Vec<i64> = targets.map(i64::from).collect();
        let targets = upload(&targets, decoder.device()).map_err(ModelError::from)?;
        let hidden = match batch.iter().any(|alike| alike.common > 0) {
            true => through_cache(decoder, rows, &batch)?,
            false => whole(decoder, rows, &order)?,
        };
        let mut values = Vec::new();
        visit_head(decoder, &hidden, |range, logits| -> Result<(), LearnerError> {
            let terms =
                ops::token_terms(logits, &slice(&targets, &range)?, temperature).map_err(ModelError::from)?;
            values.extend(host(&terms.log_prob)?);
            Ok(())
        })?;
        let mut rest = values.as_slice();
        for index in order {
            let (own, others) = rest.split_at(rows[index].targets.len());
            by_row[index] = own.to_vec();
            rest = others;
        }
    }
    Ok(by_row)
}

/// Micro-batches under the limit, a group's rows one after another; with `share` beginnings count once in each.
fn plan(rows: &[Row<'_>], limit: MicroBatchLimit, share: bool) -> Vec<Vec<Alike>> {
    let mut batches: Vec<Vec<Alike>> = vec![Vec::new()];
    let (mut tokens, mut cached, mut count) = (0, 0, 0);
    for (common, group) in groups(rows, share) {
        let mut open = false;
        for index in group {
            let rest = rows[index].span() - common;
            let places = if share { rest.div_ceil(PAGE_TOKENS) * PAGE_TOKENS + PAGE_TOKENS } else { 0 };
            let fits = |more: usize| match limit {
                MicroBatchLimit::Rows(rows) => count < rows,
                MicroBatchLimit::Tokens(budget) => {
                    tokens + more <= budget && cached + places <= CACHED_FOR_EACH.saturating_mul(budget)
                }
            };
            if count > 0 && !fits(if open { rest } else { common + rest }) {
                batches.push(Vec::new());
                (tokens, cached, count, open) = (0, 0, 0, false);
            }
            let Some(batch) = batches.last_mut() else { continue };
            match batch.last_mut() {
                Some(alike) if open => alike.rows.push(index),
                _ => {
                    batch.push(Alike { common, rows: vec![index] });
                    tokens += common;
                }
            }
            (tokens, cached, count, open) = (tokens + rest, cached + places, count + 1, true);
        }
    }
    // A beginning that one row has for itself is part of it.
    for alike in batches.iter_mut().flatten().filter(|alike| alike.rows.len() == 1) {
        alike.common = 0;
    }
    batches.retain(|batch| !batch.is_empty());
    batches
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

/// Hidden states `[N, hidden]` of the tokens that predict the rows' targets, each row as a whole.
fn whole(decoder: &Decoder, rows: &[Row<'_>], order: &[usize]) -> Result<Tensor, ModelError> {
    let chosen: Vec<&Row<'_>> = order.iter().map(|&i| &rows[i]).collect();
    let batch = TokenBatch::new(&chosen, decoder.device())?;
    let hidden = decoder.hidden(&batch.ids, &batch.positions, Attention::Packed(&batch.starts))?;
    Ok(hidden.f_index_select(0, &batch.predicting)?)
}

/// The same, beginnings first and the rest of each row from there.
fn through_cache(decoder: &Decoder, rows: &[Row<'_>], batch: &[Alike]) -> Result<Tensor, ModelError> {
    let mut pages = 0;
    let mut take = |count: usize| -> Vec<i64> {
        let first = pages;
        pages += count as i64;
        (first..pages).collect()
    };
    let (mut beginnings, mut rests, mut predicting) = (Pass::new(), Pass::new(), Vec::new());
    // A page that a beginning fills in part is written on by each row: in a copy of its own.
    let (mut copied, mut copies) = (Vec::new(), Vec::new());
    for alike in batch {
        let (common, full) = (alike.common, alike.common / PAGE_TOKENS);
        let shared = take(common.div_ceil(PAGE_TOKENS));
        for &index in &alike.rows {
            let (row, span) = (&rows[index], rows[index].span());
            let mut own = shared[..full].to_vec();
            own.extend(take(span.div_ceil(PAGE_TOKENS) - full));
            if common % PAGE_TOKENS != 0 {
                copied.push(shared[full]);
                copies.push(own[full]);
            }
            let start = rests.ids.len();
            predicting.extend(row.targets.iter().map(|j| (start + j - 1 - common) as i64));
            rests.add(&row.token_ids[..span], common, own);
        }
        if let (true, Some(&first)) = (common > 0, alike.rows.first()) {
            beginnings.add(&rows[first].token_ids[..common], 0, shared);
        }
    }
    let (config, options) = (decoder.config(), (decoder.kind(), decoder.device()));
    let numbers = config.kv_heads * page_numbers(&Tensor::f_zeros([1], options)?, config.head_dim)?;
    let mut cache = Tensor::f_zeros([pages, config.layers, numbers], options)?;
    let _only_their_cache = beginnings.hidden(decoder, &cache)?;
    if !copies.is_empty() {
        let part = cache.f_index_select(0, &upload(&copied, decoder.device())?)?;
        let _same = cache.f_index_copy_(0, &upload(&copies, decoder.device())?, &part)?;
    }
    let hidden = rests.hidden(decoder, &cache)?;
    Ok(hidden.f_index_select(0, &upload(&predicting, decoder.device())?)?)
}

/// Tokens that go through the model together, each stretch after those of its row that are cached.
struct Pass {
    ids: Vec<i64>,
    positions: Vec<i64>,
    starts: Vec<i64>,
    lengths: Vec<i64>,
    tables: Vec<Vec<i64>>,
}

impl Pass {
    fn new() -> Self {
        let (ids, positions, lengths, tables) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        Self { ids, positions, starts: vec![0], lengths, tables }
    }

    /// `tokens` from place `from` on; those before are cached. `pages` has room for all.
    fn add(&mut self, tokens: &[u32], from: usize, pages: Vec<i64>) {
        self.ids.extend(tokens[from..].iter().map(|&id| i64::from(id)));
        self.positions.extend(from as i64..tokens.len() as i64);
        self.starts.push(self.ids.len() as i64);
        self.lengths.push(tokens.len() as i64);
        self.tables.push(pages);
    }

    /// `[n, hidden]` of the new tokens; their keys and values are cached.
    fn hidden(&self, decoder: &Decoder, cache: &Tensor) -> Result<Tensor, ModelError> {
        let (pages, device) = (cache.size()[0], decoder.device());
        let step = PagedStep::new(&self.starts, &self.lengths, &self.tables, pages, device)?;
        let (ids, positions) = (upload(&self.ids, device)?, upload(&self.positions, device)?);
        decoder.hidden(&ids, &positions, Attention::Paged { pages: cache, step: &step })
    }
}

#[cfg(test)]
mod tests;
