//! verl's settings as the learner's: the one place where the two meet.

use agentfly_common::config::{Config, KlLossType, LossAggMode, LrSchedule, MicroBatch};
use agentfly_common::planner::Plan;
use agentfly_policy::learner::{Aggregation, KlBase, KlEstimator, LearnerConfig, MicroBatchLimit, Schedule};

/// What a job's configuration says about learning; micro-batches are the plan's.
#[must_use]
pub(super) fn learner_config(config: &Config, total_steps: u64, plan: &Plan) -> LearnerConfig {
    let actor = &config.actor_rollout_ref.actor;
    let optim = &actor.optim;
    LearnerConfig {
        lr: optim.lr,
        lr_warmup_steps: optim.warmup_steps(total_steps),
        lr_scheduler: match optim.lr_scheduler_type {
            LrSchedule::Constant => Schedule::Constant,
            LrSchedule::Cosine => Schedule::Cosine,
        },
        min_lr_ratio: optim.min_lr_ratio,
        num_cycles: optim.num_cycles,
        total_training_steps: total_steps,
        weight_decay: optim.weight_decay,
        betas: (optim.betas[0], optim.betas[1]),
        grad_clip: actor.grad_clip,
        clip_ratio: actor.clip_ratio,
        clip_ratio_low: actor.clip_ratio_low,
        clip_ratio_high: actor.clip_ratio_high,
        clip_ratio_c: actor.clip_ratio_c,
        loss_agg_mode: match actor.loss_agg_mode {
            LossAggMode::TokenMean => Aggregation::TokenMean,
            LossAggMode::SeqMeanTokenSum => Aggregation::SeqMeanTokenSum,
            LossAggMode::SeqMeanTokenMean => Aggregation::SeqMeanTokenMean,
            LossAggMode::SeqMeanTokenSumNorm => Aggregation::SeqMeanTokenSumNorm,
        },
        loss_scale_factor: actor.loss_scale_factor,
        entropy_coeff: actor.entropy_coeff,
        use_kl_loss: actor.use_kl_loss,
        kl_loss_coef: actor.kl_loss_coef,
        kl_loss_type: kl_estimator(actor.kl_loss_type),
        ppo_epochs: actor.ppo_epochs,
        micro_batch: match plan.micro_batch {
            MicroBatch::Chains(rows) => MicroBatchLimit::Rows(rows as usize),
            MicroBatch::Tokens(_) | MicroBatch::Planned => {
                MicroBatchLimit::Tokens(plan.micro_batch_tokens as usize)
            }
        },
        recompute_above: plan.recompute_above_tokens.map_or(usize::MAX, |tokens| tokens as usize),
        temperature: config.actor_rollout_ref.rollout.temperature,
        shard_optimizer: actor.fsdp_config.shards_optimizer(),
        ..LearnerConfig::default()
    }
}

fn kl_estimator(name: KlLossType) -> KlEstimator {
    let (base, straight_through) = match name {
        KlLossType::Kl => (KlBase::K1, false),
        KlLossType::Abs => (KlBase::Abs, false),
        KlLossType::Mse => (KlBase::K2, false),
        KlLossType::LowVarKl => (KlBase::K3, false),
        KlLossType::KlStraightThrough => (KlBase::K1, true),
        KlLossType::AbsStraightThrough => (KlBase::Abs, true),
        KlLossType::MseStraightThrough => (KlBase::K2, true),
        KlLossType::LowVarKlStraightThrough => (KlBase::K3, true),
    };
    KlEstimator { base, straight_through }
}

#[cfg(test)]
mod tests {
    use agentfly_common::model_dir::ModelConfig;
    use agentfly_common::planner::{DeviceKind, Machine, Precision, Workload, plan};

    use super::*;

    #[test]
    fn every_kl_estimator_of_the_settings_is_the_learners_of_that_name() {
        for name in KlLossType::ALL {
            assert_eq!(Ok(kl_estimator(*name)), name.as_str().parse(), "{name}");
        }
        let config = resolved(&["actor_rollout_ref.actor.kl_loss_type=k3+"]);
        let expected = KlEstimator { base: KlBase::K3, straight_through: true };
        assert_eq!(learned(&config, 1).kl_loss_type, expected);
    }

    /// The learner's settings on a machine with room.
    fn learned(config: &Config, total_steps: u64) -> LearnerConfig {
        let dir = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy/models/tiny");
        let model = ModelConfig::from_dir(&dir).unwrap();
        let machine = Machine { kind: DeviceKind::Cpu, memory_bytes: Some(16 << 30), ranks: 2, threads: 1 };
        let plan = plan(&Workload::of(config, &model, Precision::F32), &machine).unwrap();
        learner_config(config, total_steps, &plan)
    }

    fn resolved(overrides: &[&str]) -> Config {
        let mut all = vec!["data.train_files=x.json".to_owned(), "actor_rollout_ref.model.path=m".to_owned()];
        all.extend(overrides.iter().map(|o| (*o).to_owned()));
        agentfly_common::config::resolve(&all, None, []).unwrap().config
    }

    #[test]
    fn every_setting_of_the_guide_reaches_the_learner() {
        let config = resolved(&[
            "actor_rollout_ref.actor.optim.lr=3e-4",
            "actor_rollout_ref.actor.use_kl_loss=True",
            "actor_rollout_ref.actor.kl_loss_type=mse",
            "actor_rollout_ref.actor.kl_loss_coef=0.01",
            "actor_rollout_ref.actor.entropy_coeff=0.002",
            "actor_rollout_ref.actor.clip_ratio_high=0.28",
            "actor_rollout_ref.actor.optim.lr_warmup_steps_ratio=0.1",
            "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=4",
            "actor_rollout_ref.rollout.temperature=0.8",
        ]);
        let learner = learned(&config, 40);
        assert_eq!(learner.lr, 3e-4);
        assert!(learner.use_kl_loss);
        assert_eq!(learner.kl_loss_type, KlEstimator { base: KlBase::K2, straight_through: false });
        assert_eq!((learner.kl_loss_coef, learner.entropy_coeff), (0.01, 0.002));
        assert_eq!(learner.clip_ratio_high, Some(0.28));
        assert_eq!((learner.lr_warmup_steps, learner.total_training_steps), (4, 40));
        assert_eq!(learner.micro_batch, MicroBatchLimit::Rows(4));
        assert_eq!(learner.temperature, 0.8);
        assert!(learner.shard_optimizer, "the default");
        let whole = resolved(&["actor_rollout_ref.actor.fsdp_config.fsdp_size=1"]);
        assert!(!learned(&whole, 1).shard_optimizer);
    }

    #[test]
    fn without_a_size_micro_batches_are_what_memory_has_room_for() {
        assert_eq!(learned(&resolved(&[]), 1).micro_batch, MicroBatchLimit::Tokens(2048));
        let set = resolved(&["actor_rollout_ref.actor.ppo_max_token_len_per_gpu=700"]);
        assert_eq!(learned(&set, 1).micro_batch, MicroBatchLimit::Tokens(700));
    }
}
