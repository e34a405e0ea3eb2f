//! Keys of verl and AgentFly that set nothing here: accepted, so that their scripts run, and listed once with
//! the reason; or refused where ignoring them would change what is trained.
//!
//! The one table of them, and the rules for keys that matter only beside others (`without_effect`).

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::config::choices::{Logger, LossAggMode, LrSchedule};
use crate::config::layers::Setting;
use crate::config::schema::Config;
use crate::config::value;

/// A setting that was accepted and changes nothing.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Notice {
    /// The key as given.
    pub key: String,
    /// The value as text.
    pub value: String,
    /// Why it has no effect.
    pub why: String,
}

/// Which values are accepted.
pub(crate) enum Accept {
    /// Every value: it could only cost or save time or memory elsewhere.
    Any,
    /// These alone (as `value::render` writes them, without case); others ask for something that is not here.
    Only(&'static [&'static str]),
}

/// Keys with one reason.
pub(crate) struct Rule {
    /// A key; `a.{b,c}` stands for several and `a.*` for everything below `a`.
    keys: &'static str,
    pub(crate) accept: Accept,
    /// Why it has no effect; for refused values what they ask for.
    pub(crate) why: &'static str,
}

const fn any(keys: &'static str, why: &'static str) -> Rule {
    Rule { keys, accept: Accept::Any, why }
}

const fn only(keys: &'static str, values: &'static [&'static str], why: &'static str) -> Rule {
    Rule { keys, accept: Accept::Only(values), why }
}

const OFF: &[&str] = &["False", "null"];
const UNSET: &[&str] = &["null", "{}", "[]", "\"\""];
const ONE: &[&str] = &["1", "null"];

const WINDOW: &str = "chains are bounded by rollout.max_model_len and turns by rollout.max_tokens";
const LOADER: &str = "questions are few and text: they are read once and kept in memory";
const FIELDS: &str =
    "the question is the first of prompt, question, instruction, problem; the other fields go to the reward";
const PICTURES: &str = "questions are text here";
const ENGINE: &str =
    "the rollout engine is this project's own and shares memory and weights with the learner";
const LOG_PROBS: &str = "log-probs are computed in the actor's micro-batches";
const PLACEMENT: &str =
    "weights stay on their device: ranks hold whole models, and share the optimizer's state (fsdp_size)";
const KERNELS: &str = "it selects kernels or memory use of another implementation";
const NO_CRITIC: &str = "no critic is trained: the advantage estimators here need none";
const AGENT_DECIDES: &str = "agent.* decides how chains run";
const NO_CODE: &str = "no Python of a model or a plug-in is run";
const AGENT_REWARD: &str = "rewards come from agent.reward_name";
const UNUSED_LOSS: &str = "read by loss modes that are not supported here";

pub(crate) const RULES: &[Rule] = &[
    // agent
    only("agent.use_agent", &["True"], "every rollout is an agent's"),
    only("agent.{init_config.task_info,task_info}", UNSET, "extra text of the react agent's system message"),
    any("agent.{log_file,project_name}", "logs and metrics go to the run folder"),
    any("agent.{init_config.tool_parser_name,tool_parser_name}", "the code agent parses code blocks"),
    only(
        "agent.run_config.context_config.resource_backend",
        &["local"],
        "tools run on the worker's own node",
    ),
    only("agent.train_on_last_turn", OFF, "training on the last turn alone"),
    only(
        "agent.{generation_config.n,run_config.generation_config.n}",
        ONE,
        "several replies a turn; for more chains a prompt set agent.num_chains",
    ),
    // data
    any(
        "data.{max_prompt_length,max_response_length,truncation,filter_overlong_prompts,filter_overlong_prompts_workers}",
        WINDOW,
    ),
    any("data.{dataloader_num_workers,use_shm,cache_dir,gen_batch_size,tokenizer}", LOADER),
    any(
        "data.{val_batch_size,validation_shuffle}",
        "all validation questions run together, and their mean has no order",
    ),
    any(
        "data.{prompt_key,reward_fn_key,return_raw_chat,return_full_prompt,return_raw_input_ids,return_multi_modal_inputs}",
        FIELDS,
    ),
    any("data.{image_key,video_key,image_patch_size}", PICTURES),
    any("data.trust_remote_code", NO_CODE),
    only(
        "data.{custom_cls.path,custom_cls.name,sampler.class_path,sampler.class_name,datagen.path,datagen.name}",
        UNSET,
        "a Python plug-in",
    ),
    only(
        "data.{apply_chat_template_kwargs,tool_config_path}",
        UNSET,
        "the template and the tools are agent.template and agent.tools",
    ),
    // algorithm
    only(
        "algorithm.{use_kl_in_reward,use_pf_ppo,filter_groups.enable}",
        OFF,
        "KL in the reward, PF-PPO resampling and DAPO's group filter",
    ),
    any(
        "algorithm.{kl_penalty,kl_ctrl.type,kl_ctrl.kl_coef,kl_ctrl.horizon,kl_ctrl.target_kl}",
        "read only with algorithm.use_kl_in_reward=True (verl too); the KL in the loss is actor.kl_loss_coef",
    ),
    any("algorithm.{pf_ppo.reweight_method,pf_ppo.weight_pow}", "read only with algorithm.use_pf_ppo=True"),
    any(
        "algorithm.{filter_groups.metric,filter_groups.max_num_gen_batches}",
        "read only with algorithm.filter_groups.enable=True",
    ),
    only(
        "algorithm.{rollout_correction.rollout_is,rollout_correction.rollout_rs,rollout_correction.rollout_token_veto_threshold,rollout_correction.bypass_mode,rollout_correction.use_policy_gradient}",
        OFF,
        "corrections for a rollout engine whose numbers differ from the learner's",
    ),
    any(
        "algorithm.rollout_correction.{rollout_is_threshold,rollout_rs_threshold,rollout_rs_threshold_lower,loss_type,rollout_is_batch_normalize}",
        "read only with rollout_correction.rollout_is or rollout_rs",
    ),
    only("algorithm.{gdpo_reward_keys,gdpo_reward_weights}", UNSET, "the gdpo estimator"),
    // model
    only("actor_rollout_ref.hybrid_engine", &["True"], "rollout and training share the ranks"),
    only("actor_rollout_ref.model.lora_rank", &["0", "null"], "low-rank adapters"),
    any(
        "actor_rollout_ref.model.{lora_alpha,target_modules,exclude_modules}",
        "read only with lora_rank > 0",
    ),
    only(
        "actor_rollout_ref.model.{lora_adapter_path,override_config,tokenizer_path,hf_config_path,custom_chat_template,external_lib}",
        UNSET,
        "the model is what its directory says",
    ),
    any(
        "actor_rollout_ref.model.{use_remove_padding,enable_activation_offload,use_liger,use_fused_kernels,use_shm}",
        KERNELS,
    ),
    any("actor_rollout_ref.model.trust_remote_code", NO_CODE),
    // actor
    only(
        "actor_rollout_ref.actor.strategy",
        &["fsdp", "fsdp2"],
        "whole models on every rank, gradients summed; megatron's pipeline and tensor parallelism is not supported",
    ),
    only(
        "actor_rollout_ref.actor.ppo_micro_batch_size",
        UNSET,
        "deprecated in verl: set ppo_micro_batch_size_per_gpu",
    ),
    only("actor_rollout_ref.{actor,ref}.ulysses_sequence_parallel_size", ONE, "sequences split over ranks"),
    any(
        "actor_rollout_ref.actor.{calculate_entropy,shuffle}",
        "the entropy is always computed; chains keep their order, as in verl's FSDP actor",
    ),
    any(
        "actor_rollout_ref.actor.{use_torch_compile,entropy_from_logits_with_chunking,entropy_checkpointing,freeze_vision_tower}",
        KERNELS,
    ),
    any(
        "actor_rollout_ref.actor.fsdp_config.{param_offload,optimizer_offload,offload_policy,reshard_after_forward,forward_prefetch,model_dtype,dtype,mixed_precision,use_orig_params,forward_only,full_determinism,seed,strategy,use_torch_compile,entropy_checkpointing,entropy_from_logits_with_chunking,ulysses_sequence_parallel_size}",
        PLACEMENT,
    ),
    any("actor_rollout_ref.actor.fsdp_config.wrap_policy.*", PLACEMENT),
    any(
        "actor_rollout_ref.actor.checkpoint.*",
        "a checkpoint holds model, optimizer, schedule, seeds and data cursor, the model in Hugging Face layout",
    ),
    any(
        "actor_rollout_ref.actor.policy_loss.{clip_cov_ratio,clip_cov_lb,clip_cov_ub,kl_cov_ratio,ppo_kl_coef}",
        UNUSED_LOSS,
    ),
    any("actor_rollout_ref.actor.{tau_pos,tau_neg}", UNUSED_LOSS),
    only("actor_rollout_ref.actor.optim.optimizer", &["AdamW"], "the optimizer is AdamW"),
    only("actor_rollout_ref.actor.optim.optimizer_impl", &["torch.optim"], "the optimizer is AdamW"),
    only("actor_rollout_ref.actor.optim.override_optimizer_config", UNSET, "further settings of AdamW"),
    any("actor_rollout_ref.actor.optim.total_training_steps", "it follows trainer.total_training_steps"),
    // rollout
    any(
        "actor_rollout_ref.rollout.{name,mode,gpu_memory_utilization,max_num_batched_tokens,free_cache_engine,enable_chunked_prefill,enable_prefix_caching,load_format,layered_summon,update_weights_bucket_megabytes,disable_log_stats}",
        ENGINE,
    ),
    any("actor_rollout_ref.rollout.engine_kwargs.*", ENGINE),
    any("actor_rollout_ref.rollout.prompt_length", WINDOW),
    only("actor_rollout_ref.rollout.n", ONE, "chains a prompt are agent.num_chains"),
    only("actor_rollout_ref.rollout.do_sample", &["True"], "greedy training chains would all be the same"),
    only(
        "actor_rollout_ref.rollout.{tensor_model_parallel_size,data_parallel_size,pipeline_model_parallel_size,expert_parallel_size}",
        ONE,
        "a rank holds a whole model: set it to 1 and trainer.n_gpus_per_node to the number of ranks",
    ),
    only("actor_rollout_ref.rollout.{ignore_eos,skip_rollout}", OFF, "rollouts that are not the model's own"),
    only("actor_rollout_ref.rollout.val_kwargs.n", ONE, "several validation chains a question"),
    any("actor_rollout_ref.rollout.calculate_log_probs", "the sampled tokens' log-probs are always kept"),
    any(
        "actor_rollout_ref.{rollout,ref}.{log_prob_micro_batch_size_per_gpu,log_prob_micro_batch_size,log_prob_use_dynamic_bsz,log_prob_max_token_len_per_gpu}",
        LOG_PROBS,
    ),
    any("actor_rollout_ref.rollout.multi_turn.*", AGENT_DECIDES),
    any("actor_rollout_ref.rollout.agent.{num_workers,default_agent_loop}", AGENT_DECIDES),
    only("actor_rollout_ref.rollout.chat_template", UNSET, "the template is agent.template"),
    any("actor_rollout_ref.ref.{strategy,use_torch_compile}", KERNELS),
    any("actor_rollout_ref.ref.fsdp_config.*", PLACEMENT),
    // critic, reward model, reward function
    only("critic.enable", OFF, "a critic"),
    any(
        "critic.{strategy,ppo_mini_batch_size,ppo_micro_batch_size,ppo_micro_batch_size_per_gpu,ppo_max_token_len_per_gpu,forward_micro_batch_size_per_gpu,ppo_epochs,use_dynamic_bsz,shuffle,grad_clip,cliprange_value,loss_agg_mode,ulysses_sequence_parallel_size,rollout_n}",
        NO_CRITIC,
    ),
    any(
        "critic.optim.{lr,lr_warmup_steps,lr_warmup_steps_ratio,lr_scheduler_type,warmup_style,min_lr_ratio,num_cycles,weight_decay,betas,optimizer,optimizer_impl,override_optimizer_config,total_training_steps}",
        NO_CRITIC,
    ),
    any("critic.model.*", NO_CRITIC),
    any("critic.checkpoint.*", NO_CRITIC),
    only("reward_model.enable", OFF, "a reward model"),
    any("reward_model.{reward_manager,launch_reward_fn_async}", AGENT_REWARD),
    any("reward_model.model.*", AGENT_REWARD),
    any("reward_model.sandbox_fusion.*", AGENT_REWARD),
    only("custom_reward_function.path", UNSET, "a Python reward; rewards come from agent.reward_name"),
    any("custom_reward_function.{name,reward_kwargs}", AGENT_REWARD),
    // trainer
    only("trainer.critic_warmup", &["0"], "steps that train the critic alone"),
    only("trainer.default_hdfs_dir", UNSET, "checkpoints on HDFS"),
    only("trainer.del_local_ckpt_after_load", OFF, "removing the checkpoint that was resumed"),
    any("trainer.max_critic_ckpt_to_keep", NO_CRITIC),
    any("trainer.balance_batch", "chains are always dealt to the ranks by their tokens"),
    any(
        "trainer.{rollout_data_dir,validation_data_dir,log_val_generations}",
        "every chain is kept in trajectories/ of the run folder",
    ),
    any(
        "trainer.{esi_redundant_time,ray_wait_register_center_timeout,use_legacy_worker_impl}",
        "there is no Ray here",
    ),
    any(
        "trainer.device",
        "ranks take the devices that the workers offer: coordinator --head --num-gpus N or --num-cpu-ranks N",
    ),
];

/// The rule of `key`, if it is in the table.
pub(crate) fn rule(key: &str) -> Option<&'static Rule> {
    RULES.iter().find(|rule| {
        expand(rule.keys).iter().any(|known| match known.strip_suffix(".*") {
            Some(group) => key.strip_prefix(group).is_some_and(|rest| rest.starts_with('.')),
            None => known == key,
        })
    })
}

/// Every key of the table, wildcards as written.
pub(crate) fn keys() -> impl Iterator<Item = String> {
    RULES.iter().flat_map(|rule| expand(rule.keys))
}

/// `a.{b,c}.d` as `a.b.d` and `a.c.d`.
fn expand(keys: &str) -> Vec<String> {
    let Some((before, rest)) = keys.split_once('{') else {
        return vec![keys.to_owned()];
    };
    let Some((inner, after)) = rest.split_once('}') else {
        return vec![keys.to_owned()];
    };
    inner.split(',').flat_map(|key| expand(&format!("{before}{key}{after}"))).collect()
}

impl Rule {
    /// Accepts `value` or says why not.
    pub(crate) fn judge(&self, value: &Value) -> Result<(), String> {
        match self.accept {
            Accept::Any => Ok(()),
            Accept::Only(values) => {
                let given = value::render(value);
                if values.iter().any(|allowed| allowed.eq_ignore_ascii_case(&given)) {
                    return Ok(());
                }
                let allowed: Vec<_> = values
                    .iter()
                    .map(|text| text.trim_matches('"'))
                    .filter(|text| !text.is_empty())
                    .collect();
                Err(format!("known but not supported here: {}; accepted: {}", self.why, allowed.join(", ")))
            }
        }
    }
}

/// Settings of the schema that were given and that other settings make void.
pub(crate) fn without_effect(config: &Config, settings: &BTreeMap<String, Setting>) -> Vec<Notice> {
    let actor = &config.actor_rollout_ref.actor;
    let constant = actor.optim.lr_scheduler_type == LrSchedule::Constant;
    let greedy = !config.actor_rollout_ref.rollout.val_kwargs.do_sample;
    let rules: [(bool, &[&str], &str); 7] = [
        (
            true,
            &["algorithm.gamma", "algorithm.lam"],
            "no estimator here discounts: each gives every token of a chain the same advantage",
        ),
        (
            !actor.use_kl_loss,
            &["actor_rollout_ref.actor.kl_loss_coef", "actor_rollout_ref.actor.kl_loss_type"],
            "read only with actor.use_kl_loss=True",
        ),
        (
            actor.loss_agg_mode != LossAggMode::SeqMeanTokenSumNorm,
            &["actor_rollout_ref.actor.loss_scale_factor"],
            "read only with actor.loss_agg_mode=seq-mean-token-sum-norm",
        ),
        (
            constant,
            &["actor_rollout_ref.actor.optim.num_cycles", "actor_rollout_ref.actor.optim.min_lr_ratio"],
            "read only with lr_scheduler_type=cosine",
        ),
        (
            actor.optim.lr_warmup_steps >= 0,
            &["actor_rollout_ref.actor.optim.lr_warmup_steps_ratio"],
            "lr_warmup_steps is given and wins",
        ),
        (
            actor.use_dynamic_bsz,
            &["actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu"],
            "use_dynamic_bsz=True fills micro-batches by tokens",
        ),
        (
            greedy,
            &[
                "actor_rollout_ref.rollout.val_kwargs.temperature",
                "actor_rollout_ref.rollout.val_kwargs.top_p",
                "actor_rollout_ref.rollout.val_kwargs.top_k",
            ],
            "validation is greedy unless val_kwargs.do_sample=True",
        ),
    ];
    let mut notices = Vec::new();
    for (applies, keys, why) in rules {
        let given = keys.iter().filter_map(|key| settings.get(*key)).filter(|_| applies);
        notices.extend(given.map(|setting| Notice::of(setting, why)));
    }
    notices.extend(loggers_elsewhere(settings));
    notices
}

fn loggers_elsewhere(settings: &BTreeMap<String, Setting>) -> Option<Notice> {
    let setting = settings.get("trainer.logger")?;
    let given = value::render(&setting.value).to_ascii_lowercase();
    let names: Vec<_> = Logger::UNSUPPORTED.iter().filter(|(name, _)| given.contains(name)).collect();
    let what: Vec<_> = names.iter().map(|(_, what)| *what).collect();
    (!names.is_empty()).then(|| {
        Notice::of(
            setting,
            &format!("nothing is sent to {}: metrics.jsonl is in the run folder", what.join(", ")),
        )
    })
}

impl Notice {
    pub(crate) fn of(setting: &Setting, why: &str) -> Self {
        Self { key: setting.spelled.clone(), value: value::render(&setting.value), why: why.to_owned() }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;
    use crate::config::{aliases, known};

    #[test]
    fn no_key_both_has_and_lacks_an_effect() {
        let mut seen = BTreeSet::new();
        for key in keys() {
            assert!(seen.insert(key.clone()), "{key} is listed twice");
            assert_eq!(aliases::canonical(&key), key, "{key} is another spelling of a setting");
            let group = key.trim_end_matches(".*");
            let within = known::schema_keys()
                .keys()
                .find(|setting| setting.as_str() == key || key.ends_with(".*") && setting.starts_with(group));
            assert_eq!(within, None, "{key} is a setting");
        }
    }
}
