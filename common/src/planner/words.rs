//! Bytes and plans for people.

use crate::config::MicroBatch;

use super::workload::DeviceKind;
use super::{Plan, Precision, RankBytes};

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
    parts.push(match rank.rollout() > rank.training() {
        true => ("KV cache of one chain and prefill", rank.rollout()),
        false => ("activations and head", rank.training()),
    });
    let words = parts.into_iter().filter(|(_, bytes)| *bytes > 0);
    words.map(|(name, bytes)| format!("{} of {name}", bytes_in_words(bytes))).collect::<Vec<_>>().join(", ")
}

/// A plan's parts as rows: name, bytes, and how they come about.
#[must_use]
pub fn rows(plan: &Plan) -> Vec<(&'static str, u64, String)> {
    let rank = &plan.rank;
    let state = match plan.precision {
        Precision::F32 => "both moments",
        Precision::Bf16 => "f32 master weights and both moments",
    };
    let optimizer = match plan.optimizer_shards {
        1 => format!("{state}, whole on each rank"),
        shards => format!("{state}, a part in {shards}"),
    };
    let again = match plan.kind {
        DeviceKind::Cpu => ", and the matrices again as products read them",
        DeviceKind::Cuda => "",
    };
    let weights = format!("{}{again}", plan.precision);
    let cache = format!("{} tokens in up to {} chains; while chains run", plan.cache_tokens, plan.slots);
    let recompute = plan.recompute_above_tokens.is_some_and(|above| plan.micro_batch_tokens > above);
    let again = if recompute { ", computed again layer by layer" } else { "" };
    let activations = format!("a micro-batch of {} tokens{again}; while training", plan.micro_batch_tokens);
    vec![
        ("weights", rank.weights, weights),
        ("reference", rank.reference, "frozen copy for the KL loss".to_owned()),
        ("gradients", rank.gradients, "summed in float32".to_owned()),
        ("optimizer", rank.optimizer, optimizer),
        ("process", rank.fixed, "libtorch, tokenizer, chains".to_owned()),
        ("KV cache", rank.kv_cache, cache),
        ("rollout workspace", rank.rollout_workspace, "prefill and sampling; while chains run".to_owned()),
        ("activations", rank.activations, activations),
        ("head and loss", rank.head, "in pieces; while training".to_owned()),
    ]
}

impl Plan {
    /// The peak of a rank, also with a chain that fills its window.
    #[must_use]
    pub fn peak_bytes(&self) -> u64 {
        self.longest_chain_bytes.unwrap_or(0).max(self.rank.total_bytes)
    }

    /// What all ranks that share the memory need, where that is more than is free now.
    #[must_use]
    pub fn lacks_now(&self, free_bytes: u64) -> Option<String> {
        let all = self.peak_bytes().saturating_mul(u64::from(self.ranks.max(1)));
        let (free, peak) = (bytes_in_words(free_bytes), bytes_in_words(self.peak_bytes()));
        let whose = match self.kind {
            DeviceKind::Cpu if self.ranks > 1 => {
                format!(
                    "{} ranks need {peak} each at their peak, {} together",
                    self.ranks,
                    bytes_in_words(all)
                )
            }
            _ => format!("a rank needs {peak} at its peak"),
        };
        (all > free_bytes).then(|| {
            format!("{whose}, and {free} are free now: what else runs here must end, or a rank may be killed")
        })
    }

    /// The Python processes beside each rank.
    fn sandbox_in_words(&self) -> String {
        let (calls, most) = (self.sandbox.slots, self.sandbox.at_most);
        let mut words = format!(
            "tools and rewards: {} kept free beside each rank, {} if {calls} calls reach sandbox.memory_mb at a time",
            bytes_in_words(self.sandbox.kept_free),
            bytes_in_words(most)
        );
        if self.sandbox.idle > 0 {
            words.push_str(" and chains between their calls sandbox.idle_sessions_mb");
        }
        let with_tools = self.peak_bytes().saturating_add(most).saturating_mul(u64::from(self.ranks.max(1)));
        if self.kind == DeviceKind::Cpu && self.memory_bytes.is_some_and(|memory| with_tools > memory) {
            words.push_str(
                if self.sandbox.idle > 0 {
                    ", for which there is no room: lower sandbox.slots, sandbox.memory_mb or sandbox.idle_sessions_mb to be safe"
                } else {
                    ", for which there is no room: lower sandbox.slots or sandbox.memory_mb to be safe"
                },
            );
        }
        words
    }

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
        let mut lines = vec![format!("a rank needs {} at its peak{of}", bytes_in_words(self.peak_bytes()))];
        lines.push(match self.micro_batch {
            MicroBatch::Chains(chains) => {
                format!("micro-batches of {chains} chains, up to {} tokens", self.micro_batch_tokens)
            }
            _ => format!("micro-batches of up to {} tokens", self.micro_batch_tokens),
        });
        if self.longest_chain_bytes.is_some() {
            lines.push(format!(
                "{} of that if no chain is longer than a micro-batch: one that fills its window is a micro-batch alone",
                bytes_in_words(self.rank.total_bytes)
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
        lines.push(self.sandbox_in_words());
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
