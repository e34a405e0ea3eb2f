//! Settings at the edges of what they may be, settings that others make void, and batches that just fit.
#![allow(clippy::unwrap_used, reason = "helpers of tests fail by panicking")]

use agentfly_common::config::{Config, batch_plan, resolve};

fn given(settings: &[&str]) -> Result<(Config, Vec<String>), String> {
    let all: Vec<String> = settings.iter().map(|&setting| setting.to_owned()).collect();
    let resolved = resolve(&all, None, []).map_err(|errors| errors.to_string())?;
    let notices = resolved.notices.iter().map(|notice| format!("{}: {}", notice.key, notice.why)).collect();
    Ok((resolved.config, notices))
}

#[test]
fn numbers_are_taken_up_to_their_bounds_and_no_further() {
    let rollout = "actor_rollout_ref.rollout";
    let actor = "actor_rollout_ref.actor";
    for (key, fine, refused) in [
        (format!("{rollout}.top_p"), vec!["1.0", "0.01"], vec!["0", "-0.5", "1.01", "inf", "nan"]),
        (format!("{rollout}.val_kwargs.top_p"), vec!["1"], vec!["0", "1.5"]),
        (format!("{rollout}.top_k"), vec!["-1", "1", "50"], vec!["0", "-2", "4294967296"]),
        (format!("{rollout}.val_kwargs.top_k"), vec!["-1", "1"], vec!["0", "-7"]),
        (
            format!("{rollout}.temperature"),
            vec!["0.1", "2", "3e-39", "8.5e37"],
            vec!["0", "-1", "1e-39", "2.9e-39", "8.6e37", "1e39", "inf", "nan"],
        ),
        (
            format!("{rollout}.val_kwargs.temperature"),
            vec!["0", "0.6", "3e-39", "8.5e37"],
            vec!["-1", "1e-39", "1e39", "inf"],
        ),
        (format!("{actor}.grad_clip"), vec!["0.5"], vec!["0", "-1"]),
        (format!("{actor}.clip_ratio_c"), vec!["1.5"], vec!["1", "0.5"]),
        (format!("{actor}.clip_ratio_low"), vec!["0", "1"], vec!["-0.1", "1.1"]),
        (format!("{actor}.entropy_coeff"), vec!["0", "-0.5", "3"], vec!["nan"]),
        (format!("{actor}.optim.min_lr_ratio"), vec!["0", "1"], vec!["-0.1", "1.1"]),
        ("algorithm.gamma".to_owned(), vec!["0", "1"], vec!["-0.1", "1.1"]),
    ] {
        for value in fine {
            let got = given(&[&format!("{key}={value}")]);
            assert!(got.is_ok(), "{key}={value}: {}", got.unwrap_err());
        }
        for value in refused {
            let got = given(&[&format!("{key}={value}")]);
            let told = got.map(|_| ()).expect_err(&format!("{key}={value} is refused"));
            assert!(told.contains(&key), "{key}={value}: {told}");
        }
    }
}

#[test]
fn a_setting_that_another_one_makes_void_is_told_and_only_then() {
    for (key, value, with, void) in [
        ("algorithm.gamma", "0.9", "algorithm.adv_estimator=grpo", true),
        ("actor_rollout_ref.actor.kl_loss_coef", "0.1", "actor_rollout_ref.actor.use_kl_loss=False", true),
        ("actor_rollout_ref.actor.kl_loss_coef", "0.1", "actor_rollout_ref.actor.use_kl_loss=True", false),
        (
            "actor_rollout_ref.actor.loss_scale_factor",
            "9",
            "actor_rollout_ref.actor.loss_agg_mode=token-mean",
            true,
        ),
        (
            "actor_rollout_ref.actor.loss_scale_factor",
            "9",
            "actor_rollout_ref.actor.loss_agg_mode=seq-mean-token-sum-norm",
            false,
        ),
        (
            "actor_rollout_ref.actor.optim.num_cycles",
            "1.5",
            "actor_rollout_ref.actor.optim.lr_scheduler_type=constant",
            true,
        ),
        (
            "actor_rollout_ref.actor.optim.num_cycles",
            "1.5",
            "actor_rollout_ref.actor.optim.lr_scheduler_type=cosine",
            false,
        ),
        (
            "actor_rollout_ref.actor.optim.lr_warmup_steps_ratio",
            "0.1",
            "actor_rollout_ref.actor.optim.lr_warmup_steps=5",
            true,
        ),
        (
            "actor_rollout_ref.actor.optim.lr_warmup_steps_ratio",
            "0.1",
            "actor_rollout_ref.actor.optim.lr_warmup_steps=0",
            true,
        ),
        (
            "actor_rollout_ref.actor.optim.lr_warmup_steps_ratio",
            "0.1",
            "actor_rollout_ref.actor.optim.lr_warmup_steps=-1",
            false,
        ),
        (
            "actor_rollout_ref.rollout.val_kwargs.top_p",
            "0.9",
            "actor_rollout_ref.rollout.val_kwargs.do_sample=False",
            true,
        ),
        (
            "actor_rollout_ref.rollout.val_kwargs.top_p",
            "0.9",
            "actor_rollout_ref.rollout.val_kwargs.do_sample=True",
            false,
        ),
        // Both bound a job: verl's loop ends with whichever is first.
        ("trainer.total_epochs", "3", "trainer.total_training_steps=7", false),
    ] {
        let notices = given(&[&format!("{key}={value}"), with]).unwrap().1;
        let told = notices.iter().any(|notice| notice.starts_with(&format!("{key}: ")));
        assert_eq!(told, void, "{key} with {with}: {notices:?}");
    }
    assert!(
        given(&["trainer.total_training_steps=7"]).unwrap().1.is_empty(),
        "nothing is void that was not given"
    );
}

#[test]
fn text_that_only_looks_like_a_number_stays_text() {
    for (text, path) in
        [("1e999", "1e999"), ("inf", "inf"), ("nan", "nan"), ("-x", "-x"), ("infinity", "infinity")]
    {
        let config = given(&[&format!("trainer.experiment_name={text}")]).unwrap().0;
        assert_eq!(config.trainer.experiment_name, path);
    }
}

#[test]
fn what_is_taken_back_is_as_if_it_was_never_given() {
    let key = "actor_rollout_ref.actor.optim.lr";
    let (kept, removed) =
        (given(&[&format!("{key}=0.5")]).unwrap().0, given(&[&format!("{key}=0.5"), &format!("~{key}")]));
    let default = given(&[]).unwrap().0;
    assert_eq!(kept.actor_rollout_ref.actor.optim.lr, 0.5);
    assert_eq!(removed.unwrap().0.actor_rollout_ref.actor.optim.lr, default.actor_rollout_ref.actor.optim.lr);
}

#[test]
fn a_mini_batch_of_one_chain_a_rank_is_enough_and_one_less_is_not() {
    let batch =
        ["data.train_batch_size=2", "agent.num_chains=2", "actor_rollout_ref.actor.ppo_mini_batch_size=2"];
    let of =
        |ranks: &str| given(&[&batch[..], &[ranks]].concat()).map(|(config, _)| batch_plan(&config, None));
    assert_eq!(of("trainer.n_gpus_per_node=2").unwrap().unwrap().mini_batches, 2);
    let told = match of("trainer.n_gpus_per_node=3") {
        Ok(plan) => plan.unwrap_err().to_string(),
        Err(told) => told,
    };
    assert!(told.contains("a mini-batch of 2 chains leaves some of 3 ranks without any"), "{told}");
}

#[test]
fn updates_of_a_step_are_its_mini_batches_times_its_epochs() {
    let settings = [
        "data.train_batch_size=4",
        "agent.num_chains=2",
        "actor_rollout_ref.actor.ppo_mini_batch_size=4",
        "actor_rollout_ref.actor.ppo_epochs=3",
    ];
    let plan = batch_plan(&given(&settings).unwrap().0, None).unwrap();
    assert_eq!((plan.mini_batches, plan.ppo_epochs, plan.updates_per_step), (2, 3, 6));
}

#[test]
fn the_default_mini_batch_is_the_largest_divisor_from_32_to_256() {
    for (prompts, mini_batch) in [
        (1, Some(1)),
        (7, Some(7)),
        (31, Some(31)),
        (256, Some(256)),
        (512, Some(256)),
        (1024 + 32, Some(176)),
    ] {
        let config = given(&[
            &format!("data.train_batch_size={prompts}"),
            "agent.num_chains=1",
            "trainer.n_gpus_per_node=1",
        ]);
        let plan = batch_plan(&config.unwrap().0, None).unwrap();
        assert_eq!(Some(plan.mini_batch_chains), mini_batch, "{prompts} chains");
    }
    // 32 · 257 and 31 · 257: the largest divisor up to 256 is 32, which is enough, and 31, which is not.
    let of = |prompts: u32| {
        let settings =
            [&format!("data.train_batch_size={prompts}"), "agent.num_chains=1", "trainer.n_gpus_per_node=1"];
        given(&settings).and_then(|(config, _)| batch_plan(&config, None).map_err(|error| error.to_string()))
    };
    assert_eq!(of(32 * 257).unwrap().mini_batch_chains, 32);
    assert!(of(31 * 257).unwrap_err().contains("no divisor from 32 to 256"));
    let told = given(&[
        "data.train_batch_size=7",
        "agent.num_chains=1",
        "actor_rollout_ref.actor.ppo_mini_batch_size=3",
    ])
    .and_then(|(config, _)| batch_plan(&config, None).map_err(|error| error.to_string()));
    assert!(told.as_ref().is_err_and(|told| told.contains("to 1 or 7")), "{told:?}");
}
