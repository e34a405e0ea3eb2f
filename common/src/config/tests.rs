//! Stories of `resolve`: the commands people type, and what they are told.

use std::collections::BTreeMap;

use proptest::prelude::*;

use super::*;

const NO_ENV: [(String, String); 0] = [];

/// The training command of AgentFly's guide, for two CPU ranks.
const TRAIN_SH: &str = "algorithm.adv_estimator=grpo data.train_files=./data/train.json data.val_files=./data/val.json \
    data.train_batch_size=16 agent.agent_type=code agent.tools=[code_interpreter] agent.template=qwen-chat \
    agent.model_name_or_path=./model agent.max_steps=4 agent.backend=async_verl \
    agent.reward_name=math_reward_format agent.num_chains=8 agent.use_agent=True \
    actor_rollout_ref.actor.optim.lr=5e-7 actor_rollout_ref.model.path=./model \
    actor_rollout_ref.actor.use_kl_loss=True actor_rollout_ref.actor.kl_loss_type=mse \
    actor_rollout_ref.actor.kl_loss_coef=0.001 actor_rollout_ref.actor.entropy_coeff=0.001 \
    trainer.n_gpus_per_node=2 trainer.nnodes=1 trainer.total_training_steps=40 trainer.project_name=AgentRL";

fn words(command: &str) -> Vec<String> {
    command.split_whitespace().map(str::to_owned).collect()
}

fn given(settings: &[&str]) -> Result<Resolved, ConfigErrors> {
    let mut all = vec!["data.train_batch_size=16".to_owned()];
    all.extend(settings.iter().map(|s| (*s).to_owned()));
    resolve(&all, None, NO_ENV)
}

/// The errors of a command, as text.
fn refused(settings: &[&str]) -> String {
    given(settings).expect_err("these settings are refused").to_string()
}

#[test]
fn the_guides_command_resolves_and_is_explained() {
    let resolved = resolve(&words(TRAIN_SH), None, NO_ENV).unwrap();
    let config = &resolved.config;
    assert_eq!(config.agent.max_turns, 4);
    assert_eq!(config.actor_rollout_ref.actor.optim.lr, 5e-7);
    assert_eq!(config.actor_rollout_ref.actor.kl_loss_type, KlLossType::Mse);
    assert_eq!(config.world_size(), 2);
    assert!(config.needs_reference());
    assert_eq!(config.trainer.run_dir(), Path::new("runs/AgentRL/default"));
    assert_eq!(explain(&resolved, Some(1000)), include_str!("testdata/explain_train_sh.txt"));
}

#[test]
fn the_full_scripts_run_too_and_say_what_is_idle() {
    let more = "actor_rollout_ref.model.use_remove_padding=False actor_rollout_ref.model.enable_gradient_checkpointing=False \
        actor_rollout_ref.actor.ppo_mini_batch_size=128 actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=2 \
        actor_rollout_ref.actor.fsdp_config.param_offload=True actor_rollout_ref.actor.fsdp_config.optimizer_offload=True \
        actor_rollout_ref.rollout.tensor_model_parallel_size=1 actor_rollout_ref.rollout.name=vllm \
        actor_rollout_ref.rollout.response_length=512 actor_rollout_ref.rollout.gpu_memory_utilization=0.5 \
        actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu=4 actor_rollout_ref.ref.log_prob_micro_batch_size_per_gpu=4 \
        actor_rollout_ref.ref.fsdp_config.param_offload=True critic.model.path=./model critic.ppo_mini_batch_size=128 \
        critic.ppo_micro_batch_size_per_gpu=2 algorithm.kl_ctrl.kl_coef=0.001 trainer.critic_warmup=0 \
        trainer.logger=['console','wandb'] trainer.experiment_name=test trainer.save_freq=50 trainer.test_freq=10 \
        trainer.val_before_train=False";
    let resolved = resolve(&words(&format!("{TRAIN_SH} {more}")), None, NO_ENV).unwrap();
    assert_eq!(resolved.config.actor_rollout_ref.rollout.max_tokens, 512);
    assert_eq!(resolved.config.trainer.logger, [Logger::Console]);
    let why: BTreeMap<_, _> = resolved.notices.iter().map(|n| (n.key.as_str(), n.why.as_str())).collect();
    assert_eq!(why["critic.model.path"], "no critic is trained: the advantage estimators here need none");
    assert_eq!(
        why["trainer.logger"],
        "nothing is sent to Weights & Biases: metrics.jsonl is in the run folder"
    );
    assert!(!why.contains_key("trainer.save_freq"), "{why:?}");
    let plan = batch_plan(&resolved.config, None).unwrap();
    assert_eq!((plan.mini_batch_chains, plan.updates_per_step), (128, 1));
    assert_eq!(plan.micro_batch, MicroBatch::Chains(2));
}

#[test]
fn layers_win_over_each_other_in_any_spelling() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("job.toml");
    std::fs::write(
        &file,
        "[agent]\nmax_steps = 2\nnum_chains = 3\n[agent.init_config]\ntools = ['code_interpreter']\n\
         [data]\ntrain_batch_size = 4\nseed = 9\n",
    )
    .unwrap();
    let env = [
        ("AGENTFLY_AGENT__NUM_CHAINS".to_owned(), "6".to_owned()),
        ("AGENTFLY_AGENT__MAX_TURNS".to_owned(), "5".to_owned()),
        ("AGENTFLY_LOG".to_owned(), "debug".to_owned()),
        ("AGENTFLY_RUNTIME_DIR".to_owned(), "/tmp".to_owned()),
        ("HOME".to_owned(), "/root".to_owned()),
    ];
    let resolved = resolve(&words("agent.run_config.max_turns=7 ~data.seed"), Some(&file), env).unwrap();
    assert_eq!(resolved.config.agent.max_turns, 7);
    assert_eq!(resolved.config.agent.num_chains, 6);
    assert_eq!(resolved.config.data.train_batch_size, 4);
    assert_eq!(resolved.config.data_seed(), 1, "`~data.seed` takes the file's seed away");
    assert_eq!(
        resolved.provenance["agent.num_chains"],
        Source::Environment("AGENTFLY_AGENT__NUM_CHAINS".into())
    );
    assert_eq!(resolved.provenance["data.train_batch_size"], Source::File(file));
    assert_eq!(resolved.provenance["agent.max_turns"], Source::CommandLine);
}

#[test]
fn a_setting_of_the_environment_with_too_few_underscores_is_not_passed_over() {
    let env = [("AGENTFLY_AGENT_NUM_CHAINS".to_owned(), "6".to_owned())];
    let told = resolve(&[], None, env).unwrap_err().to_string();
    assert!(told.contains("AGENTFLY_AGENT__NUM_CHAINS is agent.num_chains"), "{told}");
}

#[test]
fn everything_that_is_wrong_is_said_at_once() {
    let told = refused(&[
        "agent.num_chain=8",
        "agent.num_chains=many",
        "actor_rollout_ref.actor.optim.lr=-1",
        "actor_rollout_ref.rollout.tensor_model_parallel_size=2",
        "trainer.nnodes",
        "agent.tools=[code_interpreter",
        "algorithm.adv_estimator=gae",
        "agent.max_turns=0",
    ]);
    assert_eq!(told, include_str!("testdata/all_wrong.txt").trim_end());
}

#[test]
fn two_spellings_must_agree() {
    given(&["agent.max_steps=3", "agent.max_turns=3"]).unwrap();
    assert_eq!(
        refused(&["agent.max_steps=3", "agent.run_config.max_turns=4"]),
        "agent.max_steps=3 and agent.run_config.max_turns=4 (on the command line) are two spellings of \
         agent.max_turns: give one"
    );
    let last_wins = given(&["agent.max_turns=3", "agent.max_turns=4"]).unwrap();
    assert_eq!(last_wins.config.agent.max_turns, 4);
}

#[test]
fn hydras_plus_forms_mean_the_plain_form_and_maps_set_groups() {
    let resolved =
        given(&["+agent.num_chains=2", "++agent.max_turns=3", "agent.generation_config={max_tokens: 99}"]);
    let config = resolved.unwrap().config;
    assert_eq!((config.agent.num_chains, config.agent.max_turns), (2, 3));
    assert_eq!(config.actor_rollout_ref.rollout.max_tokens, 99);
    assert!(refused(&["+foo.bar=1"]).starts_with("foo.bar (on the command line): there is no such key"));
    assert!(refused(&["agent=code"]).contains("this is a group of keys"));
}

#[test]
fn what_looks_like_a_number_can_be_a_name() {
    let config = given(&["trainer.experiment_name=007", "actor_rollout_ref.model.path=42"]).unwrap().config;
    assert_eq!(config.trainer.experiment_name, "007");
    assert_eq!(config.actor_rollout_ref.model.path, Path::new("42"));
}

#[test]
fn features_that_are_not_here_say_what_they_are() {
    for (setting, what) in [
        ("agent.agent_type=react", "thought/action/input text"),
        ("agent.backend=client", "OpenAI-compatible server"),
        ("agent.tools=[google_search]", "google_search: known but not supported here: a web search service"),
        ("agent.reward_name=qa_f1_reward_format", "known but not supported here: word overlap of answers"),
        (
            "actor_rollout_ref.actor.strategy=megatron",
            "megatron's pipeline and tensor parallelism is not supported",
        ),
        (
            "actor_rollout_ref.actor.policy_loss.loss_mode=gspo",
            "known but not supported here: ratios per sequence",
        ),
        (
            "actor_rollout_ref.model.lora_rank=8",
            "known but not supported here: low-rank adapters; accepted: 0, null",
        ),
        ("algorithm.use_kl_in_reward=True", "KL in the reward"),
        ("critic.enable=True", "known but not supported here: a critic"),
        ("actor_rollout_ref.rollout.n=8", "chains a prompt are agent.num_chains"),
    ] {
        let told = refused(&[setting]);
        assert!(told.contains(what), "{setting}: {told}");
    }
}

#[test]
fn a_reward_must_be_named_and_the_error_names_them() {
    let told = refused(&["agent.reward_name=null"]);
    assert!(
        told.starts_with(
            "agent.reward_name=null (on the command line): training needs a reward for every chain: name one of: \
             math_reward_format, "
        ),
        "{told}"
    );
    assert!(told.contains("qa_em_reward"), "{told}");
    let told = refused(&["agent.reward_name=7"]);
    assert!(told.contains("expected one of: math_reward_format"), "{told}");
    assert_eq!(reward_reference("QA_EM_Reward").map(crate::row::Reference::field), Some("golden_answers"));
}

#[test]
fn a_chain_may_be_shorter_than_the_default_cap_of_a_turn() {
    let rollout = given(&["agent.max_model_len=100"]).unwrap().config.actor_rollout_ref.rollout;
    assert_eq!((rollout.max_model_len, rollout.max_tokens), (Some(100), 1024));
}

#[test]
fn discounts_are_said_to_be_idle_whatever_the_estimator() {
    for estimator in AdvEstimator::ALL {
        let estimator = format!("algorithm.adv_estimator={estimator}");
        let notices = given(&[&estimator, "algorithm.gamma=0.9", "algorithm.lam=0.5"]).unwrap().notices;
        let idle: Vec<_> = notices.iter().map(|notice| notice.key.as_str()).collect();
        assert_eq!(idle, ["algorithm.gamma", "algorithm.lam"], "{estimator}");
    }
}

#[test]
fn settings_that_exclude_each_other_say_the_way_out() {
    for (settings, told) in [
        (vec!["agent.model_name_or_path=a", "actor_rollout_ref.model.path=b"], "give both the same path"),
        (vec!["trainer.resume_mode=resume_path"], "give trainer.resume_from_path=…/global_step_N"),
        (
            vec!["actor_rollout_ref.actor.loss_agg_mode=seq-mean-token-sum-norm"],
            "give actor_rollout_ref.actor.loss_scale_factor",
        ),
        (
            vec!["algorithm.adv_estimator=grpo_passk", "agent.num_chains=1"],
            "the best chain of a group against the second best, and agent.num_chains=1 gives it one; set \
             agent.num_chains to 2 or more",
        ),
        (
            vec!["agent.num_chains=8", "actor_rollout_ref.actor.ppo_mini_batch_size=48"],
            "the 128 chains of a step do not divide into mini-batches of 48; set \
             actor_rollout_ref.actor.ppo_mini_batch_size (it counts chains) to 32 or 128",
        ),
        (vec!["actor_rollout_ref.actor.ppo_mini_batch_size=1000"], "is larger than a step, which has 80"),
        (
            vec!["trainer.n_gpus_per_node=8", "trainer.nnodes=16"],
            "80 chains leaves some of 128 ranks without any",
        ),
    ] {
        let text = refused(&settings);
        assert!(text.contains(told), "{settings:?}: {text}");
    }
}

#[test]
fn batches_follow_the_data() {
    let config = given(&["data.train_max_samples=50"]).unwrap().config;
    let plan = batch_plan(&config, Some(1000)).unwrap();
    assert_eq!((plan.questions, plan.steps_per_epoch, plan.total_steps), (Some(50), Some(3), Some(90)));
    for (asked, in_all) in [(40, 40), (90, 90), (100, 90)] {
        let asked = format!("trainer.total_training_steps={asked}");
        let config = given(&["data.train_max_samples=50", &asked]).unwrap().config;
        let plan = batch_plan(&config, Some(1000)).unwrap();
        assert_eq!(plan.total_steps, Some(in_all), "{asked}");
        let cut = "90 optimizer steps: trainer.total_epochs=30 end before the 100 of trainer.total_training_steps; \
                   raise trainer.total_epochs for more";
        assert_eq!(plan.in_words().concat().contains(cut), asked.ends_with("=100"), "{:?}", plan.in_words());
    }
    let too_few = batch_plan(&config, Some(10)).unwrap_err().to_string();
    assert_eq!(
        too_few,
        "data.train_batch_size=16 needs more than the 10 questions to train on; set data.train_batch_size to 10 \
         or less, or give more questions"
    );
    let large = given(&["data.train_batch_size=100", "agent.num_chains=8"]).unwrap().config;
    let plan = batch_plan(&large, None).unwrap();
    assert_eq!((plan.mini_batch_chains, plan.mini_batches), (200, 4), "the largest divisor of 800 up to 256");
    assert!(
        refused(&["data.train_batch_size=1021", "agent.num_chains=1"]).contains("no divisor from 32 to 256")
    );
}

#[test]
fn a_configuration_travels_as_json() {
    let system = r"agent.system_prompt='Be brief.\nThink.'";
    let resolved = given(&[system, "actor_rollout_ref.actor.optim.min_lr_ratio=null"]).unwrap();
    assert_eq!(resolved.config.agent.system_prompt.as_deref(), Some("Be brief.\nThink."));
    let text = serde_json::to_string(&resolved).unwrap();
    assert_eq!(serde_json::from_str::<Resolved>(&text).unwrap(), resolved);
}

#[test]
fn a_file_that_cannot_be_read_is_named() {
    let missing = resolve(&[], Some(Path::new("no/such.toml")), NO_ENV).unwrap_err().to_string();
    assert!(missing.contains("configuration file no/such.toml: No such file"), "{missing}");
    let wrong = resolve(&[], Some(Path::new("src/lib.rs")), NO_ENV).unwrap_err().to_string();
    assert!(wrong.contains(".toml or .json"), "{wrong}");
}

#[test]
fn preflight_names_every_missing_path() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    let mut config = given(&[]).unwrap().config;
    config.data.train_files = vec![at("train.json")];
    config.data.val_files = vec![];
    config.actor_rollout_ref.model.path = at("model");
    config.trainer.run_dir = Some(at("train.json/run"));
    let told = preflight(&config, false).unwrap_err().to_string();
    assert!(told.contains("data.train_files=") && told.contains("actor_rollout_ref.model.path="), "{told}");

    std::fs::write(at("train.json"), "[]").unwrap();
    std::fs::create_dir(at("model")).unwrap();
    std::fs::write(at("model/config.json"), "{}").unwrap();
    let told = preflight(&config, false).unwrap_err().to_string();
    assert!(told.contains("holds no tokenizer.json"), "{told}");
    assert!(told.contains("train.json is a file"), "{told}");

    for file in ["tokenizer.json", "model.safetensors"] {
        std::fs::write(at("model").join(file), "{}").unwrap();
    }
    config.trainer.run_dir = Some(at("runs/new"));
    assert_eq!(preflight(&config, false), Ok(()));

    // Not even root makes folders there.
    config.trainer.run_dir = Some("/proc/self/runs".into());
    let told = preflight(&config, false).unwrap_err().to_string();
    assert!(told.contains("trainer.run_dir=") && told.contains("/proc/self cannot be written"), "{told}");
}

proptest! {
    #[test]
    fn a_plan_uses_every_chain_exactly_once_a_pass(prompts in 1u32..300, chains in 1u32..17, ranks in 1u32..9) {
        let mut config = given(&[]).unwrap().config;
        config.data.train_batch_size = prompts;
        config.agent.num_chains = chains;
        config.trainer.n_gpus_per_node = ranks;
        if let Ok(plan) = batch_plan(&config, None) {
            prop_assert_eq!(plan.mini_batches * plan.mini_batch_chains, u64::from(prompts * chains));
            prop_assert!(plan.mini_batch_chains >= u64::from(ranks) && plan.mini_batch_chains <= 256);
        }
    }
}
