//! From what there is to what is done with it: window, micro-batch, recomputation, KV cache.

use crate::config::MicroBatch;

use super::parts::{Rollout, bytes_a_token, rank_bytes, rollout_workspace, sandbox_bytes, training_bytes};
use super::refusal::{Lacking, Refusal};
use super::workload::{DeviceKind, Machine, Workload};
use super::{Plan, RankBytes};

/// Micro-batches that are chosen: the largest of these that fits, and that the device is not slower with.
const SIZES: [u32; 6] = [16_384, 8192, 4096, 2048, 1024, 512];
/// On a CPU larger ones are not faster, and take the memory (deploy/docs/benchmarks.md).
const LARGEST_ON_CPU: u32 = 2048;
/// A window that memory shortens stays at least this long.
const LEAST_WINDOW: u32 = 1024;
/// A shortened window is a multiple of this.
const WINDOW_STEP: u32 = 256;
/// The KV caches of CPU ranks may together take one part in this many of the node's memory: files that are read and
/// other programs want the rest.
const CPU_CACHE_SHARE: u64 = 4;
/// Tokens of a chain that the KV cache has room for even where training needs less memory than that.
const SHORT_CHAIN: u64 = 1024;
/// More tokens than any micro-batch.
const MOST_TOKENS: u64 = 1 << 24;

/// Plans a rank's memory.
///
/// # Errors
/// Which part is how big, what there is, and the changes that would fit.
pub fn plan(work: &Workload<'_>, machine: &Machine) -> Result<Plan, Box<Refusal>> {
    attempt(work, machine).map_err(|(rank, lacking)| Box::new(Refusal::new(work, machine, rank, lacking)))
}

/// What one rank may take of the memory: on a CPU node not the kernel's, the sandboxes' and other programs' share.
pub(super) fn budget(work: &Workload<'_>, machine: &Machine) -> Option<u64> {
    let memory = machine.memory_bytes?;
    Some(match machine.kind {
        DeviceKind::Cpu => {
            let share = (memory - memory / 16).saturating_sub(512 << 20) / u64::from(machine.ranks.max(1));
            share.saturating_sub(sandbox_bytes(work, machine).kept_free)
        }
        DeviceKind::Cuda => memory - memory / 16,
    })
}

/// A plan, or the least that would be needed and what it lacks.
pub(super) fn attempt(work: &Workload<'_>, machine: &Machine) -> Result<Plan, (RankBytes, Lacking)> {
    let budget = budget(work, machine);
    let most =
        work.window.unwrap_or_else(|| u32::try_from(work.model.max_position_embeddings).unwrap_or(u32::MAX));
    let least_window = u64::from(work.window.unwrap_or(LEAST_WINDOW).min(most));
    let least = least_tokens(work, least_window);
    // One chain that fills its window, and the smallest micro-batch.
    let one = Rollout { slots: 1, window: least_window, cache_tokens: least_window };
    let least_rank = rank_bytes(work, machine.kind, one, (least, work.may_recompute));
    let free = match budget {
        None => u64::MAX,
        Some(budget) if least_rank.total_bytes > budget => {
            let lacking =
                if least_rank.resident() > budget { Lacking::Weights } else { Lacking::Tokens { least } };
            return Err((least_rank, lacking));
        }
        Some(budget) => budget - least_rank.resident(),
    };

    let plain = tokens_that_fit(work, machine.kind, free, false);
    let frugal = if work.may_recompute { tokens_that_fit(work, machine.kind, free, true) } else { plain };
    let a_token = bytes_a_token(work, machine.kind).max(1);
    let for_cache = free.saturating_sub(rollout_workspace(work, machine.kind, 1)) / a_token;
    let window = window(work, most, frugal, for_cache).ok_or((least_rank, Lacking::Tokens { least }))?;
    let (micro_batch, tokens) = micro_batch(work, machine.kind, window, (plain, frugal));
    let longest = u64::from(tokens).max(u64::from(window));
    let recompute_above_tokens = (longest > plain).then(|| u32::try_from(plain).unwrap_or(u32::MAX));

    let recompute = u64::from(tokens) > plain;
    let slots = slots_that_fit(work, machine.kind, free, (window, a_token));
    let training = training_bytes(work, machine.kind, u64::from(tokens), recompute);
    let cache_tokens = cache_tokens(work, machine, (slots, window), (free, training));
    let rollout = Rollout { slots, window: u64::from(window), cache_tokens };
    let rank = rank_bytes(work, machine.kind, rollout, (u64::from(tokens), recompute));
    let of_window = (u64::from(window), u64::from(window) > plain);
    let longest = rank_bytes(work, machine.kind, rollout, of_window).total_bytes;
    Ok(Plan {
        rank,
        longest_chain_bytes: (longest > rank.total_bytes).then_some(longest),
        kind: machine.kind,
        ranks: machine.ranks,
        memory_bytes: machine.memory_bytes,
        budget_bytes: budget,
        precision: work.precision,
        optimizer_shards: work.optimizer_shards.max(1),
        sandbox: sandbox_bytes(work, machine),
        window,
        shortened_from: (window < most).then_some(most),
        slots: u32::try_from(slots).unwrap_or(u32::MAX),
        cache_tokens,
        micro_batch,
        micro_batch_tokens: tokens,
        recompute_above_tokens,
    })
}

/// Room for every chain's whole window where there is as much. The cache is given back before training, so on a CPU
/// it takes what training needs in any case, and more only for short chains: the rest of a node's memory is of use to
/// files and to other programs. A GPU's is of no other use.
fn cache_tokens(
    work: &Workload<'_>,
    machine: &Machine,
    (slots, window): (u64, u32),
    (free, training): (u64, u64),
) -> u64 {
    let (a_token, workspace, window) = (
        bytes_a_token(work, machine.kind).max(1),
        rollout_workspace(work, machine.kind, slots),
        u64::from(window),
    );
    let all = slots.saturating_mul(window);
    let room = free.saturating_sub(workspace) / a_token;
    if machine.kind == DeviceKind::Cuda {
        return all.min(room);
    }
    let share = machine
        .memory_bytes
        .map_or(u64::MAX, |memory| memory / CPU_CACHE_SHARE / u64::from(machine.ranks.max(1)) / a_token);
    let in_training = training.saturating_sub(workspace) / a_token;
    let short_chains = slots.saturating_mul(window.min(SHORT_CHAIN));
    all.min(in_training.max(short_chains).min(share).max(window)).min(room)
}

/// Tokens of the smallest micro-batch that the settings allow.
fn least_tokens(work: &Workload<'_>, window: u64) -> u64 {
    match work.micro_batch {
        MicroBatch::Planned => window.max(u64::from(SIZES[SIZES.len() - 1])),
        MicroBatch::Tokens(tokens) => window.max(u64::from(tokens)),
        MicroBatch::Chains(chains) => window.saturating_mul(u64::from(chains)),
    }
}

/// The most tokens whose activations and head fit.
fn tokens_that_fit(work: &Workload<'_>, kind: DeviceKind, free: u64, recompute: bool) -> u64 {
    let (mut fits, mut too_many) = (0, MOST_TOKENS);
    while too_many - fits > 1 {
        let middle = fits.midpoint(too_many);
        match training_bytes(work, kind, middle, recompute) <= free {
            true => fits = middle,
            false => too_many = middle,
        }
    }
    fits
}

/// The window as set, or what memory leaves of the model's.
fn window(work: &Workload<'_>, most: u32, trainable: u64, cacheable: u64) -> Option<u32> {
    let chains = match work.micro_batch {
        MicroBatch::Chains(chains) => u64::from(chains.max(1)),
        MicroBatch::Tokens(_) | MicroBatch::Planned => 1,
    };
    let fits = u32::try_from((trainable / chains).min(cacheable)).unwrap_or(u32::MAX);
    if fits >= most {
        return Some(most);
    }
    let shortened = fits / WINDOW_STEP * WINDOW_STEP;
    (work.window.is_none() && shortened >= LEAST_WINDOW.min(most)).then_some(shortened)
}

/// The micro-batch, and the tokens it has when it is full.
fn micro_batch(
    work: &Workload<'_>,
    kind: DeviceKind,
    window: u32,
    (plain, frugal): (u64, u64),
) -> (MicroBatch, u32) {
    match work.micro_batch {
        MicroBatch::Tokens(tokens) => (work.micro_batch, tokens),
        MicroBatch::Chains(chains) => (work.micro_batch, chains.saturating_mul(window)),
        MicroBatch::Planned => {
            let cap = match kind {
                DeviceKind::Cpu => LARGEST_ON_CPU,
                DeviceKind::Cuda => SIZES[0],
            };
            let largest =
                |fitting: u64| SIZES.into_iter().find(|size| *size <= cap && u64::from(*size) <= fitting);
            // Computing again costs a third more time: only where nothing fits without it.
            let tokens = largest(plain).or_else(|| largest(frugal)).unwrap_or(SIZES[SIZES.len() - 1]);
            (MicroBatch::Tokens(tokens), tokens)
        }
    }
}

/// Chains at a time: as many as are asked for, within the room for their logits and a first piece of cache.
fn slots_that_fit(work: &Workload<'_>, kind: DeviceKind, free: u64, (window, a_token): (u32, u64)) -> u64 {
    let asked = u64::from(work.chains);
    let piece = u64::from(window.min(WINDOW_STEP));
    let fits = |slots: u64| {
        let first_pieces = a_token
            .saturating_mul(piece)
            .saturating_mul(slots)
            .max(a_token.saturating_mul(u64::from(window)));
        rollout_workspace(work, kind, slots).saturating_add(first_pieces) <= free
    };
    let (mut good, mut bad) = (1, asked + 1);
    while bad - good > 1 {
        let middle = good.midpoint(bad);
        match fits(middle) {
            true => good = middle,
            false => bad = middle,
        }
    }
    good
}
