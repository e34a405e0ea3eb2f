//! Whether two configurations describe the same training, so that one may go on where the other stopped.
//!
//! The coordinator stores a job's settings in its checkpoints and asks here when it is to resume one. What must
//! stay true: a setting counts unless [`FREE`] says that it changes how a job runs, but not what it trains.

use std::collections::BTreeMap;

use serde_json::Value;

use super::Config;

/// Keys, or groups of keys, that may differ: how long and how often, what is validated and how, where things lie,
/// and how fast it goes.
const FREE: [&str; 42] = [
    "data.val_files",
    "data.val_max_samples",
    "actor_rollout_ref.rollout.val_kwargs",
    // No estimator reads them.
    "algorithm.gamma",
    "algorithm.lam",
    "trainer.total_training_steps",
    "trainer.total_epochs",
    "trainer.save_freq",
    "trainer.test_freq",
    "trainer.val_before_train",
    "trainer.val_only",
    "trainer.logger",
    "trainer.max_actor_ckpt_to_keep",
    "trainer.trace_freq",
    "trainer.max_traces_to_keep",
    "trainer.resume_mode",
    "trainer.resume_from_path",
    "trainer.run_dir",
    "trainer.default_local_dir",
    "trainer.project_name",
    "trainer.experiment_name",
    "trainer.n_gpus_per_node",
    "trainer.nnodes",
    "trainer.chain_timeout_seconds",
    "trainer.rollout_timeout_seconds",
    "trainer.startup_timeout_seconds",
    "trainer.train_timeout_seconds",
    "trainer.checkpoint_timeout_seconds",
    "actor_rollout_ref.nccl_timeout",
    "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu",
    "actor_rollout_ref.actor.ppo_max_token_len_per_gpu",
    "actor_rollout_ref.actor.use_dynamic_bsz",
    "actor_rollout_ref.actor.fsdp_config",
    "actor_rollout_ref.model.enable_gradient_checkpointing",
    "actor_rollout_ref.rollout.max_num_seqs",
    "actor_rollout_ref.rollout.enforce_eager",
    "actor_rollout_ref.rollout.full_determinism",
    "agent.max_concurrent_chains",
    // The model that is trained under another name: `actor_rollout_ref.model.path` counts.
    "agent.model_name_or_path",
    "agent.backend",
    "sandbox.slots",
    "sandbox.tier",
];

/// A setting that differs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Difference {
    /// Canonical key.
    pub key: String,
    /// Its value in the stored settings, as JSON.
    pub stored: String,
    /// Its value now, as JSON.
    pub now: String,
}

impl std::fmt::Display for Difference {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} was {} and is {}", self.key, self.stored, self.now)
    }
}

/// The settings of `config` that change what is trained and are not as in `stored`, the JSON of an earlier
/// [`Config`]; sorted by key. Keys that only `stored` knows are ignored: they mean nothing any more.
///
/// # Errors
/// When `config` cannot be written as JSON: a number in it is not finite.
pub fn differences(stored: &Value, config: &Config) -> Result<Vec<Difference>, serde_json::Error> {
    // Both go through text, so that a number reads the same on both sides.
    let now: Value = serde_json::from_str(&serde_json::to_string(config)?)?;
    let (mut before, mut after) = (BTreeMap::new(), BTreeMap::new());
    leaves("", stored, &mut before);
    leaves("", &now, &mut after);
    let differs = |(key, now): (String, String)| {
        let stored = before.get(&key).cloned().unwrap_or_else(|| "unknown".to_owned());
        (!is_free(&key) && stored != now).then_some(Difference { key, stored, now })
    };
    Ok(after.into_iter().filter_map(differs).collect())
}

fn is_free(key: &str) -> bool {
    let within = |rest: &str| rest.is_empty() || rest.starts_with('.');
    FREE.iter().any(|free| key.strip_prefix(free).is_some_and(within))
}

fn leaves(prefix: &str, value: &Value, out: &mut BTreeMap<String, String>) {
    match value {
        Value::Object(fields) => {
            for (name, value) in fields {
                let key = if prefix.is_empty() { name.clone() } else { format!("{prefix}.{name}") };
                leaves(&key, value, out);
            }
        }
        value => drop(out.insert(prefix.to_owned(), value.to_string())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(settings: &[&str]) -> Config {
        let settings: Vec<String> = settings.iter().map(|&setting| setting.to_owned()).collect();
        crate::config::resolve(&settings, None, []).unwrap().config
    }

    fn stored(config: &Config) -> Value {
        serde_json::from_str(&serde_json::to_string(config).unwrap()).unwrap()
    }

    #[test]
    fn what_is_trained_counts_and_how_long_or_how_fast_does_not() {
        let lr = "actor_rollout_ref.actor.optim.lr=3.3e-7";
        let old = stored(&config(&[lr, "data.train_batch_size=16"]));
        let same = config(&[
            lr,
            "data.train_batch_size=16",
            "trainer.total_training_steps=9",
            "trainer.save_freq=2",
            "trainer.experiment_name=other",
            "trainer.n_gpus_per_node=2",
            "sandbox.slots=3",
            "sandbox.tier=landlock",
        ]);
        assert_eq!(differences(&old, &same).unwrap(), []);
        let other = config(&[lr, "data.train_batch_size=16", "trainer.seed=2", "data.train_files=x.json"]);
        let said: Vec<_> = differences(&old, &other).unwrap().iter().map(ToString::to_string).collect();
        assert_eq!(
            said,
            [
                r#"data.train_files was ["deploy/data/train.json"] and is ["x.json"]"#,
                "trainer.seed was 1 and is 2"
            ]
        );
    }

    /// What is trained: a setting that arrives is put here or in `FREE`, on purpose.
    const COUNTS: [&str; 55] = [
        "actor_rollout_ref.actor.clip_ratio",
        "actor_rollout_ref.actor.clip_ratio_c",
        "actor_rollout_ref.actor.clip_ratio_high",
        "actor_rollout_ref.actor.clip_ratio_low",
        "actor_rollout_ref.actor.entropy_coeff",
        "actor_rollout_ref.actor.grad_clip",
        "actor_rollout_ref.actor.kl_loss_coef",
        "actor_rollout_ref.actor.kl_loss_type",
        "actor_rollout_ref.actor.loss_agg_mode",
        "actor_rollout_ref.actor.loss_scale_factor",
        "actor_rollout_ref.actor.optim.betas",
        "actor_rollout_ref.actor.optim.lr",
        "actor_rollout_ref.actor.optim.lr_scheduler_type",
        "actor_rollout_ref.actor.optim.lr_warmup_steps",
        "actor_rollout_ref.actor.optim.lr_warmup_steps_ratio",
        "actor_rollout_ref.actor.optim.min_lr_ratio",
        "actor_rollout_ref.actor.optim.num_cycles",
        "actor_rollout_ref.actor.optim.weight_decay",
        "actor_rollout_ref.actor.policy_loss.loss_mode",
        "actor_rollout_ref.actor.ppo_epochs",
        "actor_rollout_ref.actor.ppo_mini_batch_size",
        "actor_rollout_ref.actor.use_kl_loss",
        "actor_rollout_ref.model.path",
        "actor_rollout_ref.rollout.dtype",
        "actor_rollout_ref.rollout.max_model_len",
        "actor_rollout_ref.rollout.max_tokens",
        "actor_rollout_ref.rollout.temperature",
        "actor_rollout_ref.rollout.top_k",
        "actor_rollout_ref.rollout.top_p",
        "agent.agent_type",
        "agent.max_turns",
        "agent.num_chains",
        "agent.reward_name",
        "agent.system_prompt",
        "agent.template",
        "agent.tools",
        "algorithm.adv_estimator",
        "algorithm.norm_adv_by_std_in_grpo",
        "data.seed",
        "data.shuffle",
        "data.train_batch_size",
        "data.train_files",
        "data.train_max_samples",
        "sandbox.cpu_seconds",
        "sandbox.echo_last",
        "sandbox.idle_sessions",
        "sandbox.idle_sessions_mb",
        "sandbox.memory_mb",
        "sandbox.output_kb",
        "sandbox.partial_output",
        "sandbox.stateful",
        "sandbox.tasks",
        "sandbox.tmp_mb",
        "sandbox.wall_seconds",
        "trainer.seed",
    ];

    #[test]
    fn every_setting_either_counts_or_is_free() {
        let mut keys = BTreeMap::new();
        leaves("", &stored(&config(&[])), &mut keys);
        for free in FREE {
            assert!(keys.keys().any(|key| key.starts_with(free)), "{free} is no setting");
        }
        let counting: Vec<_> = keys.keys().filter(|key| !is_free(key)).map(String::as_str).collect();
        assert_eq!(counting, COUNTS);
    }

    #[test]
    fn an_interrupted_job_may_be_validated_otherwise_when_it_goes_on() {
        let old = stored(&config(&[]));
        let now = config(&[
            "data.val_files=other.json",
            "data.val_max_samples=7",
            "actor_rollout_ref.rollout.val_kwargs.do_sample=True",
            "actor_rollout_ref.rollout.val_kwargs.temperature=0.6",
            "actor_rollout_ref.rollout.val_kwargs.top_p=0.9",
            "actor_rollout_ref.rollout.val_kwargs.top_k=20",
            "trainer.test_freq=3",
            "trainer.val_before_train=False",
            "trainer.logger=[console]",
        ]);
        assert_eq!(differences(&old, &now).unwrap(), []);
    }

    #[test]
    fn a_setting_that_the_stored_ones_lack_differs() {
        let (mut old, now) = (stored(&config(&[])), config(&[]));
        old["trainer"].as_object_mut().unwrap().remove("seed");
        assert_eq!(differences(&old, &now).unwrap()[0].to_string(), "trainer.seed was unknown and is 1");
    }
}
