//! What a step reports, under verl's and AgentFly's names.
//!
//! Everything that can be known from chains is computed here; `actor/*`, `rollout_corr/*`, `perf/*` of the
//! ranks are passed through by `step`. Definitions where names alone do not say enough:
//!
//! - `response_length`: tokens the policy sampled. `prompt_length`: real tokens before the first sampled one;
//!   no padding and no observations are counted (AgentFly counts both).
//! - `response_length/clip_ratio`: part of the chains that were cut short: by the window of the chain, by their
//!   time, or in their last turn by the tokens a turn may have. (verl: rows as long as the longest response
//!   allowed.)
//! - `critic/score`, `critic/rewards`: one number a chain, over chains with at least one sampled token; equal,
//!   as no KL penalty enters the reward here. `critic/advantages`, `critic/returns`: over sampled tokens; equal
//!   for outcome rewards.
//! - `timing_s/gen` contains tools and rewards, which run inside the rollout.

use std::collections::BTreeMap;
use std::time::Duration;

use agentfly_common::batch::TrainShard;
use agentfly_common::trajectory::{FinishReason, Outcome, Trajectory};

use super::advantage::is_constant;

/// Names and values.
pub(super) type Metrics = BTreeMap<String, f64>;

/// The chains of a training step with their advantages.
pub(super) struct Batch<'a> {
    pub(super) step: u64,
    /// In the order (group, chain).
    pub(super) rows: &'a [(&'a Trajectory, f64)],
    /// Chains that ended by a fault of the machinery.
    pub(super) faults: u64,
    /// Groups that were asked more than once.
    pub(super) groups_rerun: usize,
    pub(super) rollout_seconds: f64,
    /// Tokens a turn may have.
    pub(super) max_turn_tokens: usize,
}

impl Batch<'_> {
    /// All that is known of a batch before it is trained on.
    pub(super) fn metrics(&self) -> Metrics {
        let mut out = Metrics::new();
        let chains: Vec<&Trajectory> = self.rows.iter().map(|(chain, _)| *chain).collect();
        self.judgement(&mut out);
        lengths(&mut out, &chains, self.max_turn_tokens);
        turns(&mut out, &chains);
        extras(&mut out, "reward_extra", &chains);
        self.agent(&mut out, &chains);
        let scores: Vec<(u32, f64)> =
            chains.iter().map(|chain| (chain.key.group, chain.reward.value)).collect();
        let groups = scores.chunk_by(|a, b| a.0 == b.0);
        let flat =
            groups.filter(|group| is_constant(&group.iter().map(|(_, score)| *score).collect::<Vec<_>>()));
        put(&mut out, "training/zero_variance_groups", flat.count() as f64);
        put(&mut out, "training/infrastructure_faults", self.faults as f64);
        put(&mut out, "training/groups_rerun", self.groups_rerun as f64);
        put(&mut out, "training/global_step", self.step as f64);
        put(&mut out, "timing_s/gen", self.rollout_seconds);
        let sampled: usize = chains.iter().map(|chain| chain.sampled_tokens()).sum();
        put(&mut out, "timing_per_token_ms/gen", self.rollout_seconds * 1e3 / sampled.max(1) as f64);
        let tokens: usize = chains.iter().map(|chain| chain.token_ids.len()).sum();
        put(&mut out, "perf/total_num_tokens", tokens as f64);
        out
    }

    fn judgement(&self, out: &mut Metrics) {
        let sampling: Vec<_> = self.rows.iter().filter(|(chain, _)| chain.sampled_tokens() > 0).collect();
        let scores: Vec<f64> = sampling.iter().map(|(chain, _)| chain.reward.value).collect();
        spread(out, "critic/score", &scores);
        spread(out, "critic/rewards", &scores);
        let tokens: f64 = sampling.iter().map(|(chain, _)| chain.sampled_tokens() as f64).sum();
        let sum: f64 =
            sampling.iter().map(|(chain, advantage)| advantage * chain.sampled_tokens() as f64).sum();
        let advantages: Vec<f64> = sampling.iter().map(|(_, advantage)| *advantage).collect();
        for name in ["critic/advantages", "critic/returns"] {
            spread(out, name, &advantages);
            if tokens > 0.0 {
                put(out, &format!("{name}/mean"), sum / tokens);
            }
        }
    }

    fn agent(&self, out: &mut Metrics, chains: &[&Trajectory]) {
        let mean_of = |value: &dyn Fn(&Trajectory) -> f64| mean(chains.iter().map(|chain| value(chain)));
        put(out, "agent/rollout/step", self.step as f64);
        put(out, "agent/rollout/avg_turns", mean_of(&|chain| f64::from(chain.timings.turns)));
        put(out, "agent/rollout/avg_tool_calls", mean_of(&|chain| f64::from(chain.timings.tool_calls)));
        put(out, "agent/rollout/reward", mean_of(&|chain| chain.reward.value));
        for (key, values) in parts(chains) {
            put(out, &format!("agent/rollout/{key}"), mean(values.into_iter()));
        }
        let seconds: Vec<f64> = chains.iter().map(|chain| chain.timings.total_seconds).collect();
        if let (Some(low), Some(high)) =
            (seconds.iter().copied().reduce(f64::min), seconds.iter().copied().reduce(f64::max))
        {
            put(out, "agent/rollout/time/min", low);
            put(out, "agent/rollout/time/max", high);
            put(out, "agent/rollout/time/avg", mean(seconds.into_iter()));
        }
        let mut calls: BTreeMap<&str, u64> = BTreeMap::new();
        for tool in
            chains.iter().flat_map(|chain| &chain.messages).filter_map(|message| message.tool.as_deref())
        {
            *calls.entry(tool).or_default() += 1;
        }
        for (tool, count) in calls {
            put(out, &format!("agent/rollout/tool_calls/{tool}"), count as f64 / chains.len() as f64);
        }
    }
}

/// `global_seqlen/*`: tokens of a rank if rows were cut into equal runs, and as they were dealt.
pub(super) fn balance(rows: &[(&Trajectory, f64)], shards: &[TrainShard]) -> Metrics {
    let mut out = Metrics::new();
    let run = rows.len().div_ceil(shards.len().max(1)).max(1);
    let tokens =
        |rows: &[(&Trajectory, f64)]| rows.iter().map(|(chain, _)| chain.token_ids.len() as f64).sum();
    let plain: Vec<f64> = rows.chunks(run).map(tokens).collect();
    let of_shard = |shard: &TrainShard| {
        let rows = shard.mini_batches.iter().flat_map(|batch| &batch.rows);
        rows.map(|row| row.token_ids.len() as f64).sum()
    };
    let dealt: Vec<f64> = shards.iter().map(of_shard).collect();
    spread(&mut out, "global_seqlen", &plain);
    if let (Some(low), Some(high)) =
        (out.get("global_seqlen/min").copied(), out.get("global_seqlen/max").copied())
    {
        put(&mut out, "global_seqlen/minmax_diff", high - low);
    }
    let mut balanced = Metrics::new();
    spread(&mut balanced, "balanced", &dealt);
    for end in ["min", "max"] {
        if let Some(value) = balanced.get(&format!("balanced/{end}")) {
            put(&mut out, &format!("global_seqlen/balanced_{end}"), *value);
        }
    }
    out
}

/// Adds what is known when a step is over: how long it took, and the throughput per rank.
pub(super) fn time(out: &mut Metrics, training: Duration, step: Duration, ranks: usize) {
    let (training, step) = (training.as_secs_f64(), step.as_secs_f64());
    let tokens = out.get("perf/total_num_tokens").copied().unwrap_or_default();
    put(out, "timing_s/update_actor", training);
    put(out, "timing_s/step", step);
    put(out, "timing_per_token_ms/update_actor", training * 1e3 / tokens.max(1.0));
    put(out, "perf/time_per_step", step);
    if step > 0.0 {
        put(out, "perf/throughput", tokens / (step * ranks as f64));
    }
}

/// `val-core/{source}/{variable}/mean@1` of each source's core variable, which is `acc` where its rewards have that
/// part and else `reward`; `val-aux/…` of the others; and the time. Chains come with the source of their row. A part
/// that only some chains have is averaged over those.
pub(super) fn validation<'a>(
    chains: impl Iterator<Item = (&'a str, &'a Trajectory)>,
    seconds: f64,
) -> Metrics {
    let mut by_source: BTreeMap<&str, Vec<&Trajectory>> = BTreeMap::new();
    for (source, chain) in chains {
        by_source.entry(source).or_default().push(chain);
    }
    let mut out = Metrics::new();
    for (source, chains) in &by_source {
        let mut variables = parts(chains);
        let core = if variables.contains_key("acc") { "acc" } else { "reward" };
        variables.insert("reward", chains.iter().map(|chain| chain.reward.value).collect());
        for (key, values) in variables {
            let kind = if key == core { "val-core" } else { "val-aux" };
            put(&mut out, &format!("{kind}/{source}/{key}/mean@1"), mean(values.into_iter()));
        }
    }
    let turns: Vec<f64> = by_source.values().flatten().map(|chain| f64::from(chain.timings.turns)).collect();
    spread(&mut out, "val-aux/num_turns", &turns);
    put(&mut out, "timing_s/testing", seconds);
    out
}

fn lengths(out: &mut Metrics, chains: &[&Trajectory], max_turn_tokens: usize) {
    let sampled: Vec<f64> = chains.iter().map(|chain| chain.sampled_tokens() as f64).collect();
    spread(out, "response_length", &sampled);
    let prompts: Vec<f64> = chains.iter().map(|chain| prompt_tokens(chain) as f64).collect();
    spread(out, "prompt_length", &prompts);
    let whole: Vec<f64> = sampled.iter().copied().filter(|length| *length > 0.0).collect();
    spread(out, "response_length_non_aborted", &whole);
    let part = |count: usize| count as f64 / chains.len().max(1) as f64;
    put(out, "response/aborted_ratio", part(sampled.len() - whole.len()));
    let cut = chains.iter().filter(|chain| is_cut_short(chain, max_turn_tokens));
    put(out, "response_length/clip_ratio", part(cut.count()));
}

/// Whether the policy was stopped before it had said all it would: a last turn of `max_turn_tokens` was cut there (or,
/// rarely, ended with just that token).
fn is_cut_short(chain: &Trajectory, max_turn_tokens: usize) -> bool {
    use FinishReason::{MaxModelLen, Timeout};
    matches!(chain.outcome, Outcome::Finished { reason: MaxModelLen | Timeout })
        || last_turn_tokens(chain) >= max_turn_tokens
}

/// Tokens of the last turn: the last run of sampled ones.
fn last_turn_tokens(chain: &Trajectory) -> usize {
    let from_the_end = chain.loss_mask.iter().rev().skip_while(|&&sampled| !sampled);
    from_the_end.take_while(|&&sampled| sampled).count()
}

/// How many chains have a prompt that left no room for a turn: they hold nothing to train on.
pub(super) fn without_room<'a>(chains: impl Iterator<Item = &'a Trajectory>) -> usize {
    let ended_at_once = |chain: &&Trajectory| {
        chain.sampled_tokens() == 0
            && chain.outcome == Outcome::Finished { reason: FinishReason::MaxModelLen }
    };
    chains.filter(ended_at_once).count()
}

/// Tokens before the first sampled one.
fn prompt_tokens(chain: &Trajectory) -> usize {
    chain.loss_mask.iter().take_while(|&&sampled| !sampled).count()
}

fn turns(out: &mut Metrics, chains: &[&Trajectory]) {
    let turns: Vec<f64> = chains.iter().map(|chain| f64::from(chain.timings.turns)).collect();
    spread(out, "num_turns", &turns);
    let calls: Vec<f64> = chains.iter().map(|chain| f64::from(chain.timings.tool_calls)).collect();
    spread(out, "tool_call_counts", &calls);
}

fn extras(out: &mut Metrics, prefix: &str, chains: &[&Trajectory]) {
    for (key, values) in parts(chains) {
        spread(out, &format!("{prefix}/{key}"), &values);
    }
}

/// Named parts of the reward, each with the values of the chains that have it.
fn parts<'a>(chains: &[&'a Trajectory]) -> BTreeMap<&'a str, Vec<f64>> {
    let mut parts: BTreeMap<&str, Vec<f64>> = BTreeMap::new();
    for (key, value) in chains.iter().flat_map(|chain| &chain.reward.parts) {
        parts.entry(key).or_default().push(*value);
    }
    parts
}

/// `{name}/mean`, `/max` and `/min`; nothing of no values.
fn spread(out: &mut Metrics, name: &str, values: &[f64]) {
    let (Some(high), Some(low)) =
        (values.iter().copied().reduce(f64::max), values.iter().copied().reduce(f64::min))
    else {
        return;
    };
    put(out, &format!("{name}/mean"), mean(values.iter().copied()));
    put(out, &format!("{name}/max"), high);
    put(out, &format!("{name}/min"), low);
}

fn mean(values: impl ExactSizeIterator<Item = f64>) -> f64 {
    let count = values.len().max(1);
    values.sum::<f64>() / count as f64
}

fn put(out: &mut Metrics, name: &str, value: f64) {
    out.insert(name.to_owned(), value);
}

#[cfg(test)]
mod tests {
    use super::super::testing::chain;
    use super::*;

    #[test]
    fn a_batch_by_hand() {
        let mut chains =
            [chain(3, 0, 0, 5, 1.0), chain(3, 0, 1, 3, 0.0), chain(3, 1, 0, 4, 0.5), chain(3, 1, 1, 1, 0.5)];
        chains[0].reward.parts.insert("acc".to_owned(), 1.0);
        let rows: Vec<_> = chains.iter().zip([1.0, -1.0, 0.0, 0.0]).collect();
        let batch = Batch {
            step: 3,
            rows: &rows,
            faults: 2,
            groups_rerun: 1,
            rollout_seconds: 9.0,
            max_turn_tokens: 4,
        };
        let out = batch.metrics();
        for (name, value) in [
            ("critic/score/mean", 0.5),
            ("critic/score/max", 1.0),
            ("critic/advantages/mean", (4.0 - 2.0) / 9.0),
            ("critic/returns/min", -1.0),
            ("response_length/mean", 9.0 / 4.0),
            ("response_length/clip_ratio", 0.25),
            ("response_length_non_aborted/min", 2.0),
            ("response/aborted_ratio", 0.25),
            ("prompt_length/mean", 1.0),
            ("reward_extra/acc/mean", 1.0),
            ("training/zero_variance_groups", 1.0),
            ("training/infrastructure_faults", 2.0),
            ("training/groups_rerun", 1.0),
            ("timing_per_token_ms/gen", 1000.0),
            ("perf/total_num_tokens", 13.0),
            ("num_turns/max", 1.0),
            ("agent/rollout/reward", 0.5),
            ("agent/rollout/acc", 1.0),
        ] {
            assert_eq!(out.get(name), Some(&value), "{name}");
        }
    }

    #[test]
    fn a_chain_is_cut_short_by_the_window_its_time_or_the_length_of_its_last_turn() {
        let ended = |reason| Trajectory { outcome: Outcome::Finished { reason }, ..chain(1, 0, 0, 4, 0.0) };
        let masked = |mask: &[u8]| Trajectory {
            loss_mask: mask.iter().map(|&sampled| sampled == 1).collect(),
            ..chain(1, 0, 0, mask.len(), 0.0)
        };
        for (chain, cut) in [
            (ended(FinishReason::MaxModelLen), true),
            (ended(FinishReason::Timeout), true),
            (ended(FinishReason::Terminal), false),
            (ended(FinishReason::MaxTurns), false),
            (masked(&[0, 1, 1, 1, 1]), true),
            (masked(&[0, 1, 1, 0, 1, 1, 1, 1]), true),
            // The tool answered a turn that was long, and the last one is short.
            (masked(&[0, 1, 1, 1, 1, 0, 1]), false),
            (masked(&[0, 0, 1, 1, 1, 1, 0, 0]), true),
            (masked(&[0, 0]), false),
        ] {
            assert_eq!(is_cut_short(&chain, 4), cut, "{:?} {:?}", chain.outcome, chain.loss_mask);
        }
    }

    #[test]
    fn validation_names_its_data_set_and_its_core_variable() {
        let mut chains = [chain(0, 0, 0, 3, 0.25), chain(0, 1, 0, 3, 0.75), chain(0, 2, 0, 3, 0.5)];
        chains[2].reward.parts.insert("format".to_owned(), 1.0);
        chains[0].reward.parts.extend([("acc".to_owned(), 1.0), ("format".to_owned(), 0.5)]);
        chains[1].reward.parts.insert("acc".to_owned(), 0.0);
        let out = validation(["aime", "aime", "gsm"].into_iter().zip(&chains), 2.0);
        for (name, value) in [
            ("val-core/aime/acc/mean@1", 0.5),
            ("val-aux/aime/reward/mean@1", 0.5),
            ("val-aux/aime/format/mean@1", 0.5),
            ("val-core/gsm/reward/mean@1", 0.5),
            ("val-aux/gsm/format/mean@1", 1.0),
            ("timing_s/testing", 2.0),
        ] {
            assert_eq!(out.get(name), Some(&value), "{name}");
        }
        let core = out.keys().filter(|name| name.starts_with("val-core/"));
        assert_eq!(core.count(), 2, "one a source: {out:?}");
        assert_eq!(crate::store::metrics_file::validation_accuracy(&out), Some(0.5), "what people are shown");
    }

    #[test]
    fn tokens_of_ranks_before_and_after_balancing() {
        let chains =
            [chain(1, 0, 0, 9, 0.0), chain(1, 0, 1, 8, 0.0), chain(1, 1, 0, 2, 0.0), chain(1, 1, 1, 3, 0.0)];
        let rows: Vec<_> = chains.iter().map(|chain| (chain, 0.0)).collect();
        let shards = super::super::plan::shards(1, agentfly_common::ids::PolicyVersion(0), &rows, 4, 2);
        let out = balance(&rows, &shards);
        for (name, value) in
            [("min", 5.0), ("max", 17.0), ("mean", 11.0), ("minmax_diff", 12.0), ("balanced_min", 11.0)]
        {
            assert_eq!(out.get(&format!("global_seqlen/{name}")), Some(&value), "{name}");
        }
    }
}
