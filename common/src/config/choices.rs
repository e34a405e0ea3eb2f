//! Settings with a closed set of values: what is supported, and what verl and AgentFly have that is not.
//!
//! The one place to extend when a feature arrives: add the variant, remove it from `unsupported`. The schema
//! holds these enums, so the rest of the program matches on them and never compares strings.

/// Declares an enum with its spellings (the first is the canonical one), and the values that are known
/// elsewhere but not supported here, each with what it is.
macro_rules! choice {
    (
        $(#[$meta:meta])* $name:ident {
            $( $(#[$variant_meta:meta])* $variant:ident = $text:literal $(| $other:literal)* ),+ $(,)?
        }
        unsupported { $( $unsupported:literal: $what:literal ),* $(,)? }
    ) => {
        $(#[$meta])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
        pub enum $name { $( $(#[$variant_meta])* $variant ),+ }

        impl $name {
            /// Every supported value.
            pub const ALL: &[Self] = &[$(Self::$variant),+];
            /// Values known from verl or AgentFly that are not supported, with what each is.
            pub const UNSUPPORTED: &[(&str, &str)] = &[$(($unsupported, $what)),*];

            /// The canonical spelling.
            #[must_use]
            pub fn as_str(self) -> &'static str {
                match self { $(Self::$variant => $text),+ }
            }
        }

        impl std::str::FromStr for $name {
            type Err = String;

            /// Reads a spelling, in any case; the error says what is supported.
            fn from_str(text: &str) -> Result<Self, String> {
                match text.to_ascii_lowercase().as_str() {
                    $($text $(| $other)* => Ok(Self::$variant),)+
                    other => Err(refuse(other, &[$($text),+], Self::UNSUPPORTED)),
                }
            }
        }

        impl std::fmt::Display for $name {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str(self.as_str())
            }
        }

        impl serde::Serialize for $name {
            fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.serialize_str(self.as_str())
            }
        }

        impl<'de> serde::Deserialize<'de> for $name {
            fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                let text = String::deserialize(deserializer)?;
                text.parse().map_err(serde::de::Error::custom)
            }
        }
    };
}

/// Why `value` is refused: known elsewhere (and what it is), or simply not one of `supported`.
pub(crate) fn refuse(value: &str, supported: &[&str], unsupported: &[(&str, &str)]) -> String {
    let list = supported.join(", ");
    match unsupported.iter().find(|(name, _)| *name == value) {
        Some((_, what)) => format!("known but not supported here: {what}; supported: {list}"),
        None => format!("expected one of: {list}"),
    }
}

choice! {
    /// `algorithm.adv_estimator`: how rewards become advantages (verl `core_algos.AdvantageEstimator`).
    AdvEstimator {
        /// Group-relative: the reward against the mean and deviation of its prompt's group.
        Grpo = "grpo",
        /// Only the best chain of a group earns, by its lead over the second best.
        GrpoPassK = "grpo_passk",
        /// Leave-one-out baseline.
        Rloo = "rloo",
        /// Length-weighted baseline.
        Opo = "opo",
        /// Group policy gradient: the group's mean as baseline, scaled by the share of non-zero rewards.
        Gpg = "gpg",
        /// The group's mean as baseline, whitened over the batch.
        ReinforcePlusPlusBaseline = "reinforce_plus_plus_baseline",
    }
    unsupported {
        "gae": "generalised advantage estimation, which trains a critic",
        "grpo_vectorized": "a variant of grpo that differs only on groups of almost equal rewards",
        "rloo_vectorized": "leave-one-out baseline",
        "reinforce_plus_plus": "discounted returns, whitened over the batch",
        "remax": "the reward of a greedy chain as baseline",
        "gdpo": "grpo per part of the reward",
        "optimal_token_baseline": "a baseline per token from the actor's probabilities",
        "tir_optimal_token_baseline": "a baseline per token from the actor's probabilities",
        "gigpo": "step-level groups, of the verl-agent project",
    }
}

choice! {
    /// `agent.agent_type`: how a reply is parsed and its tools are called.
    AgentType {
        /// A reply's code block is run by `code_interpreter`.
        Code = "code",
    }
    unsupported {
        "react": "thought/action/input text with JSON arguments",
        "openai": "tool calls parsed by an OpenAI-compatible server",
        "think": "replies with <think> sections",
        "gui": "screenshots and mouse actions",
        "hf": "tool calls in the model's own template",
        "searchr1": "<search> tags answered by a retriever",
        "action": "environment actions",
        "bash_swe": "shell commands in a repository's container",
        "qwen3coder_swe": "Qwen3-Coder tool calls in a repository's container",
    }
}

choice! {
    /// `agent.backend`: where a chain's replies come from.
    AgentBackend {
        /// The policy being trained; chains run concurrently (there is no slower synchronous form here).
        AsyncVerl = "async_verl" | "verl",
    }
    unsupported {
        "transformers": "a model inside the driver process, which training never updates",
        "vllm": "a separate vLLM engine, which training never updates",
        "async_vllm": "a separate vLLM engine, which training never updates",
        "client": "a remote OpenAI-compatible server, which training never updates",
    }
}

choice! {
    /// `actor.kl_loss_type`: estimator of the KL divergence to the reference (Schulman's k1, k2, k3); with a `+` its
    /// value stays and its gradient is k2's.
    KlLossType {
        /// k1: the difference of the log-probs.
        Kl = "kl" | "k1",
        /// Its absolute value.
        Abs = "abs",
        /// k2: half its square.
        Mse = "mse" | "k2",
        /// k3: e^−d + d − 1, clamped.
        LowVarKl = "low_var_kl" | "k3",
        /// k1 with k2's gradient (straight-through).
        KlStraightThrough = "kl+" | "k1+",
        /// `abs` with k2's gradient.
        AbsStraightThrough = "abs+",
        /// k2 with its own gradient: `mse` under another name.
        MseStraightThrough = "mse+" | "k2+",
        /// k3 with k2's gradient.
        LowVarKlStraightThrough = "low_var_kl+" | "k3+",
    }
    unsupported {
        "full": "KL over the whole vocabulary",
    }
}

choice! {
    /// `actor.loss_agg_mode`: how per-token losses become one number (verl `agg_loss`).
    LossAggMode {
        /// Mean over all tokens of the mini-batch.
        TokenMean = "token-mean",
        /// Sum over a row's tokens, mean over rows.
        SeqMeanTokenSum = "seq-mean-token-sum",
        /// Mean over a row's tokens, mean over rows.
        SeqMeanTokenMean = "seq-mean-token-mean",
        /// Sum over a row's tokens divided by a constant, mean over rows (Dr. GRPO).
        SeqMeanTokenSumNorm = "seq-mean-token-sum-norm",
    }
    unsupported {}
}

choice! {
    /// `actor.policy_loss.loss_mode` (verl `core_algos`).
    PolicyLossMode {
        /// PPO-clip with dual clip.
        Vanilla = "vanilla",
    }
    unsupported {
        "gspo": "ratios per sequence",
        "sapo": "soft gates instead of clipping",
        "gpg": "plain policy gradient without a ratio",
        "clip_cov": "drops tokens of high covariance",
        "kl_cov": "a KL term on tokens of high covariance",
        "geo_mean": "geometric mean of ratios (GMPO)",
        "cispo": "clipped importance weights on the policy gradient",
        "dppo_tv": "total-variation trust region",
        "dppo_kl": "KL trust region",
        "rollout_correction": "importance weights against the rollout policy",
        "bypass_mode": "rollout log-probs in place of the old policy's",
    }
}

choice! {
    /// `actor.optim.lr_scheduler_type`: the learning rate after the warm-up.
    LrSchedule {
        /// Stays.
        Constant = "constant",
        /// Falls along a cosine to `min_lr_ratio`.
        Cosine = "cosine",
    }
    unsupported {}
}

choice! {
    /// `rollout.dtype`: number type of the weights, the same in rollout and training.
    Dtype {
        /// bfloat16 on GPUs, float32 on CPUs.
        Auto = "auto",
        /// 32-bit floats.
        Float32 = "float32" | "fp32",
        /// 16-bit floats with the range of 32-bit ones.
        Bfloat16 = "bfloat16" | "bf16",
    }
    unsupported {
        "float16": "16-bit floats whose gradients need loss scaling",
        "fp16": "16-bit floats whose gradients need loss scaling",
        "half": "16-bit floats whose gradients need loss scaling",
    }
}

choice! {
    /// `trainer.resume_mode`.
    ResumeMode {
        /// The run folder's newest checkpoint, if there is one.
        Auto = "auto",
        /// From the start.
        Disable = "disable",
        /// `trainer.resume_from_path`.
        ResumePath = "resume_path",
    }
    unsupported {}
}

choice! {
    /// `sandbox.tier`: how a node must isolate code to run any.
    SandboxTier {
        /// The strongest that the node offers.
        Auto = "auto",
        /// A jail made with root's rights.
        Root = "root",
        /// A jail in an ordinary user's namespaces.
        UserNamespaces = "user_namespaces",
        /// Without namespaces: Landlock, a list of system calls and limits.
        Landlock = "landlock",
    }
    unsupported { "none": "code that nobody has read never runs unprotected" }
}

choice! {
    /// One of `trainer.logger`.
    Logger {
        /// A line a step on the terminal.
        Console = "console",
        /// `metrics.jsonl` in the run folder.
        File = "file",
    }
    unsupported {
        "wandb": "Weights & Biases", "mlflow": "MLflow", "swanlab": "SwanLab", "vemlp_wandb": "Volcengine",
        "tensorboard": "TensorBoard", "clearml": "ClearML", "trackio": "Trackio",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_known_feature_that_is_missing_says_what_it_is() {
        let error = "gae".parse::<AdvEstimator>().unwrap_err();
        assert_eq!(
            error,
            "known but not supported here: generalised advantage estimation, which trains a critic; supported: grpo, \
             grpo_passk, rloo, opo, gpg, reinforce_plus_plus_baseline"
        );
        let error = "grop".parse::<AdvEstimator>().unwrap_err();
        assert_eq!(error, "expected one of: grpo, grpo_passk, rloo, opo, gpg, reinforce_plus_plus_baseline");
    }

    #[test]
    fn spellings_read_back_to_the_canonical_one() {
        for (given, canonical) in
            [("K3", "low_var_kl"), ("k3+", "low_var_kl+"), ("kl+", "kl+"), ("k2", "mse")]
        {
            assert_eq!(given.parse::<KlLossType>().map(KlLossType::as_str), Ok(canonical));
        }
        for choice in LossAggMode::ALL {
            assert_eq!(choice.as_str().parse(), Ok(*choice));
        }
    }
}
