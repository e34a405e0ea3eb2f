//! Bytes and plans for people.

use crate::config::MicroBatch;

use super::{Plan, RankBytes};

/// `1.5 GiB`, `12 MiB`, `3 KiB`.
#[must_use]
#[expect(clippy::cast_precision_loss, reason = "three digits are shown")]
pub fn bytes_in_words(bytes: u64) -> String {
    match bytes {
        u64::MAX => "an unknown amount".to_owned(),
        0..1024 => format!("{bytes} B"),
        1024..1_048_576 => format!("{} KiB", bytes >> 10),
        1_048_576..1_073_741_824 => format!("{} MiB", bytes >> 20),
        _ => format!("{:.1} GiB", bytes as f64 / f64::from(1_u32 << 30)),
    }
}

/// The parts of a peak, largest sums first as they are held.
pub(super) fn sum_in_words(rank: &RankBytes) -> String {
    let mut parts = vec![
        ("weights", rank.weights),
        ("frozen reference", rank.reference),
        ("gradients", rank.gradients),
        ("optimizer", rank.optimizer),
        ("libtorch and process", rank.fixed),
    ];
    parts.push(match rank.update_scratch > rank.rollout().max(rank.training()) {
        true => ("scratch of an update", rank.update_scratch),
        false if rank.rollout() > rank.training() => ("KV cache of one chain and prefill", rank.rollout()),
        false => ("activations and head", rank.training()),
    });
    let words = parts.into_iter().filter(|(_, bytes)| *bytes > 0);
    words.map(|(name, bytes)| format!("{} of {name}", bytes_in_words(bytes))).collect::<Vec<_>>().join(", ")
}

/// A plan's parts as rows: name, bytes, and how they come about.
#[must_use]
pub fn rows(plan: &Plan) -> Vec<(&'static str, u64, String)> {
    let rank = &plan.rank;
    let optimizer = match plan.optimizer_shards {
        1 => "f32 master weights and both moments, whole on each rank".to_owned(),
        shards => format!("f32 master weights and both moments, a part in {shards}"),
    };
    let cache = format!("{} tokens in up to {} chains; while chains run", plan.cache_tokens, plan.slots);
    let recompute = plan.recompute_above_tokens.is_some_and(|above| plan.micro_batch_tokens > above);
    let again = if recompute { ", computed again layer by layer" } else { "" };
    let activations = format!("a micro-batch of {} tokens{again}; while training", plan.micro_batch_tokens);
    vec![
        (
            "weights",
            rank.weights,
            format!("{}, and the matrices again as products read them", plan.precision),
        ),
        ("reference", rank.reference, "frozen copy for the KL loss".to_owned()),
        ("gradients", rank.gradients, "summed in float32".to_owned()),
        ("optimizer", rank.optimizer, optimizer),
        ("process", rank.fixed, "libtorch, tokenizer, chains".to_owned()),
        ("KV cache", rank.kv_cache, cache),
        ("rollout workspace", rank.rollout_workspace, "prefill and sampling; while chains run".to_owned()),
        ("activations", rank.activations, activations),
        ("head and loss", rank.head, "in pieces; while training".to_owned()),
        ("update scratch", rank.update_scratch, "for a moment of an update".to_owned()),
    ]
}

impl Plan {
    /// What was decided, one fact a line.
    #[must_use]
    pub fn in_words(&self) -> Vec<String> {
        let of = match (self.budget_bytes, self.memory_bytes) {
            (Some(budget), Some(memory)) => format!(
                ", of {} that it may take ({}{})",
                bytes_in_words(budget),
                bytes_in_words(memory),
                if self.ranks > 1 { format!(" for {} ranks", self.ranks) } else { String::new() }
            ),
            _ => "; how much there is is not known".to_owned(),
        };
        let mut lines =
            vec![format!("a rank needs {} at its peak{of}", bytes_in_words(self.rank.total_bytes))];
        lines.push(match self.micro_batch {
            MicroBatch::Chains(chains) => {
                format!("micro-batches of {chains} chains, up to {} tokens", self.micro_batch_tokens)
            }
            _ => format!("micro-batches of up to {} tokens", self.micro_batch_tokens),
        });
        if let Some(bytes) = self.longest_chain_bytes {
            lines.push(format!(
                "a longer chain is a micro-batch alone: {} at its peak if it fills its window",
                bytes_in_words(bytes)
            ));
        }
        if let Some(above) = self.recompute_above_tokens {
            lines
                .push(format!("activations are computed again in micro-batches of more than {above} tokens"));
        }
        lines.push(format!(
            "KV cache for {} tokens: {} chains at a time, {} tokens a chain",
            self.cache_tokens, self.slots, self.window
        ));
        if let Some(trained) = self.shortened_from {
            lines.push(format!(
                "chains end at {} tokens, for more do not fit (the model knows {trained}): set \
                 actor_rollout_ref.rollout.max_model_len to have the length that you mean",
                self.window
            ));
        }
        lines
    }
}
