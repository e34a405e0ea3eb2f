//! Tests of the learner's arithmetic where a wrong factor would still train: clipping, AdamW over several steps,
//! the ends of a schedule, and what a step reports.

use std::thread;
use std::time::Duration;

use agentfly_c10d::{AdamWHyper, Group, Store};
use agentfly_common::batch::{MiniBatch, TrainRow, TrainShard};
use agentfly_common::ids::{ChainKey, PolicyVersion, Purpose};
use tch::{Device, Kind, Tensor};

use super::config::MicroBatchLimit;
use super::error::{LearnerError, NonFinite};
use super::offpolicy::OffPolicySums;
use super::optimizer::{Optimizer, Update};
use super::ranks::Ranks;
use super::stats::StepSums;
use super::{Learner, LearnerConfig, LrSchedule, Schedule};
use crate::model::plain::PlainModel;
use crate::model::{Architecture, Decoder, ModelConfig, ModelError};

/// The smallest decoder there is.
fn decoder() -> Decoder {
    fresh(smallest())
}

fn fresh(config: ModelConfig) -> Decoder {
    Decoder::random(config, 1, Kind::Float, Device::Cpu).unwrap()
}

/// The same weights once more: those drawn by two threads at a time differ in spite of their seed.
fn copy(decoder: &Decoder) -> Decoder {
    decoder.cast(decoder.kind(), decoder.device()).unwrap()
}

/// One that has what the smallest lacks: several layers and keys, norms on heads, a head of its own.
fn larger() -> ModelConfig {
    ModelConfig {
        architecture: Architecture::Qwen3,
        hidden: 20,
        layers: 3,
        heads: 6,
        kv_heads: 2,
        head_dim: 8,
        intermediate: 28,
        tie_word_embeddings: false,
        initializer_range: 0.2,
        ..smallest()
    }
}

fn smallest() -> ModelConfig {
    ModelConfig {
        architecture: Architecture::Qwen2,
        hidden: 4,
        layers: 1,
        heads: 2,
        kv_heads: 1,
        head_dim: 2,
        intermediate: 4,
        vocab: 7,
        rms_eps: 1e-6,
        rope_theta: 10_000.0,
        rope_scaling: None,
        tie_word_embeddings: true,
        max_position_embeddings: 16,
        initializer_range: 0.5,
        eos_ids: vec![0],
        bos_id: None,
        pad_id: None,
        torch_dtype: None,
    }
}

fn numbers(tensor: &Tensor) -> Vec<f64> {
    Vec::try_from(tensor.to_kind(Kind::Double).flatten(0, -1)).unwrap()
}

/// The numbers of a flat buffer without what lies between the parameters.
fn weights_of(optimizer: &Optimizer, flat: &Tensor) -> Vec<f64> {
    optimizer.shards.slots.iter().flat_map(|slot| numbers(&slot.of(flat).unwrap())).collect()
}

fn assert_close(got: &[f64], expected: &[f64], what: &str) {
    assert_eq!(got.len(), expected.len());
    for (at, (got, expected)) in got.iter().zip(expected).enumerate() {
        assert!(
            (got - expected).abs() < 3e-5 * expected.abs().max(1.0),
            "{what}, weight {at}: {got}, not {expected}"
        );
    }
}

/// AdamW with decoupled weight decay (Loshchilov & Hutter 2019), in 64 bits.
fn adamw(weights: &mut [f64], moments: &mut [(f64, f64)], grads: &[f64], step: i32, hyper: &AdamWHyper) {
    for ((weight, (m, v)), g) in weights.iter_mut().zip(moments).zip(grads) {
        *weight -= hyper.lr * hyper.weight_decay * *weight;
        *m = hyper.beta1 * *m + (1.0 - hyper.beta1) * g;
        *v = hyper.beta2 * *v + (1.0 - hyper.beta2) * g * g;
        let (m, v) = (*m / (1.0 - hyper.beta1.powi(step)), *v / (1.0 - hyper.beta2.powi(step)));
        *weight -= hyper.lr * m / (v.sqrt() + hyper.eps);
    }
}

#[test]
fn updates_are_adamw_over_clipped_gradients_step_after_step() {
    let decoder = decoder();
    let mut optimizer = Optimizer::new(&decoder, 0, 1).unwrap();
    let ranks = Ranks::new(None, Device::Cpu);
    // With a large ε the size of a gradient matters, not only its direction.
    let hyper = AdamWHyper { lr: 0.1, beta1: 0.8, beta2: 0.9, weight_decay: 0.2, eps: 0.5 };
    let mut weights = weights_of(&optimizer, &optimizer.master);
    let mut moments = vec![(0.0, 0.0); weights.len()];
    let direction: Vec<f64> = (0..weights.len()).map(|i| ((i * 7 + 3) % 11) as f64 - 4.5).collect();
    let length = direction.iter().map(|x| x * x).sum::<f64>().sqrt();
    for (step, (norm, clip)) in (1..).zip([(3.0, 2.0), (0.5, 2.0), (1.5, 2.0), (40.0, 2.0), (1.5, 1.0)]) {
        let sign = if step % 2 == 0 { -1.0 } else { 1.0 };
        let gradient: Vec<f64> = direction.iter().map(|x| sign * x / length * norm).collect();
        let mut rest = gradient.as_slice();
        for slot in &optimizer.shards.slots {
            let (own, others) = rest.split_at(slot.len as usize);
            slot.of(&optimizer.grad).unwrap().copy_(&Tensor::from_slice(own).view(slot.shape.as_slice()));
            rest = others;
        }
        let update = optimizer.step(&decoder, &ranks, clip, &hyper).unwrap();
        assert!(
            update.applied && (update.grad_norm - norm).abs() < 1e-5,
            "the norm before clipping: {update:?}"
        );
        let scale = (clip / norm).min(1.0);
        let clipped: Vec<f64> = gradient.iter().map(|x| x * scale).collect();
        adamw(&mut weights, &mut moments, &clipped, step, &hyper);
        assert_close(&weights_of(&optimizer, &optimizer.master), &weights, &format!("step {step}"));
    }
    let published: Vec<f64> = decoder.parameters().iter().flat_map(|(_, tensor)| numbers(tensor)).collect();
    assert_close(&published, &weights, "the model's own tensors");
}

#[test]
fn a_gradient_that_is_not_finite_changes_neither_weights_nor_the_count_of_steps() {
    let decoder = decoder();
    let mut optimizer = Optimizer::new(&decoder, 0, 1).unwrap();
    let before = weights_of(&optimizer, &optimizer.master);
    let _same = optimizer.grad.fill_(f64::INFINITY);
    let hyper = AdamWHyper { lr: 0.1, beta1: 0.9, beta2: 0.9, weight_decay: 0.1, eps: 0.1 };
    let update = optimizer.step(&decoder, &Ranks::new(None, Device::Cpu), 1.0, &hyper).unwrap();
    assert!(!update.applied, "{update:?}");
    assert_eq!((weights_of(&optimizer, &optimizer.master), optimizer.steps), (before, 0));
}

#[test]
fn a_kernel_that_fails_is_not_blamed_on_other_ranks() {
    let decoder = decoder();
    let mut optimizer = Optimizer::new(&decoder, 0, 1).unwrap();
    optimizer.exp_avg = Tensor::zeros([1], (Kind::Float, Device::Cpu));
    let hyper = AdamWHyper { lr: 0.1, beta1: 0.9, beta2: 0.9, weight_decay: 0.1, eps: 0.1 };
    let error = optimizer.step(&decoder, &Ranks::new(None, Device::Cpu), 1.0, &hyper).unwrap_err();
    assert!(matches!(error, LearnerError::Model(ModelError::Torch(_))), "{error:?}");
    assert!(error.to_string().contains("exp_avgs[0] differs from params[0]"), "{error}");
}

#[test]
fn a_parameter_that_the_optimizer_does_not_know_is_named() {
    let optimizer = Optimizer::new(&decoder(), 0, 1).unwrap();
    let told = LearnerError::from(optimizer.gradient_of("model.extra.weight").unwrap_err()).to_string();
    let known = optimizer.shards.slots.len();
    let expected = format!(
        "parameter to train: got `model.extra.weight`, needed one of the {known} that the optimizer was made for"
    );
    assert_eq!(told, expected);
}

#[test]
fn what_libtorch_refuses_is_told_in_its_own_words_alone() {
    let refused = || decoder().parameters().flat().f_view([7]).unwrap_err();
    let count = decoder().parameters().flat().numel();
    let expected = format!("libtorch: shape '[7]' is invalid for input of size {count}");
    assert_eq!(LearnerError::from(refused()).to_string(), expected);
    assert_eq!(ModelError::from(refused()).to_string(), expected);
}

/// A learner whose reference policy is broken: the KL loss is NaN, while the estimator's clamp leaves its gradient 0.
fn with_nan_in_the_kl_loss(decoder: &Decoder, max_grad_skips: u32) -> Learner {
    let config = LearnerConfig { use_kl_loss: true, max_grad_skips, ..LearnerConfig::default() };
    let learner = Learner::new(config, decoder, true, None).unwrap();
    break_reference(&learner);
    learner
}

fn break_reference(learner: &Learner) {
    let norm = learner.reference.as_ref().unwrap().parameters().get("model.norm.weight").unwrap();
    let _same = tch::no_grad(|| norm.shallow_clone().fill_(f64::NAN));
}

#[test]
fn a_loss_that_is_not_finite_is_skipped_like_a_gradient_and_ends_the_run_with_its_rows() {
    let mut decoder = decoder();
    let before = decoder.weights_hash().unwrap();
    let mut learner = with_nan_in_the_kl_loss(&decoder, 1);
    let stats = learner.train(&mut decoder, &shard()).unwrap();
    assert_eq!(stats.skipped_updates, 1);
    assert_eq!(stats.metrics.get("actor/pg_loss"), None, "an update that was not made has no loss");
    assert_eq!((decoder.weights_hash().unwrap(), learner.optimizer.steps), (before, 0));
    let next = TrainShard { policy_version: PolicyVersion(1), ..shard() };
    let error = learner.train(&mut decoder, &next).unwrap_err();
    let LearnerError::TooManySkips { skipped: 2, allowed: 1, last } = error else { panic!("{error}") };
    assert!(matches!(last, NonFinite::Loss { what: "KL loss", rows: 2, .. }), "{last}");
    let told = error.to_string();
    assert!(
        told.contains("the KL loss is NaN in a micro-batch of 2 rows that starts with train/step 1"),
        "{told}"
    );
}

#[test]
fn an_update_between_ends_the_count_of_those_skipped_in_a_row() {
    let mut decoder = decoder();
    let mut learner = with_nan_in_the_kl_loss(&decoder, 1);
    for (version, skips) in (0..).zip([true, false, true, false, true]) {
        learner.config.use_kl_loss = skips;
        let shard = TrainShard { policy_version: PolicyVersion(version), ..shard() };
        let stats = learner.train(&mut decoder, &shard).unwrap();
        assert_eq!(stats.skipped_updates, u32::from(skips));
    }
}

#[test]
fn a_loss_that_is_not_finite_on_one_rank_is_skipped_by_all_and_told_by_that_one() {
    let deadline = Duration::from_secs(20);
    for shard_optimizer in [true, false] {
        let (_server, port) = Store::serve("127.0.0.1", 0, deadline).unwrap();
        let rank = |rank| {
            thread::spawn(move || {
                let store = Store::connect("127.0.0.1", port, deadline).unwrap();
                let group = Group::gloo(&store, rank, 2, "127.0.0.1", deadline).unwrap();
                let mut decoder = decoder();
                let before = decoder.weights_hash().unwrap();
                let config = LearnerConfig {
                    shard_optimizer,
                    use_kl_loss: true,
                    max_grad_skips: 0,
                    ..LearnerConfig::default()
                };
                let mut learner = Learner::new(config, &decoder, true, Some(group)).unwrap();
                if rank == 1 {
                    break_reference(&learner);
                }
                let mut shard = shard();
                shard.mini_batches[0].rows.remove(rank);
                let error = learner.train(&mut decoder, &shard).unwrap_err();
                assert_eq!(decoder.weights_hash().unwrap(), before);
                error
            })
        };
        let told = [rank(0), rank(1)].map(|thread| match thread.join().unwrap() {
            LearnerError::TooManySkips { last, .. } => last,
            other => panic!("{other}"),
        });
        assert_eq!(told[0], NonFinite::Elsewhere);
        assert!(matches!(told[1], NonFinite::Loss { what: "KL loss", rows: 1, .. }), "{}", told[1]);
    }
}

#[test]
fn schedules_at_their_ends() {
    let schedule = LrSchedule {
        lr: 2.0,
        kind: Schedule::Cosine,
        warmup_steps: 3,
        total_steps: 4,
        min_lr_ratio: 0.25,
        num_cycles: 0.5,
    };
    let rates = |schedule: &LrSchedule| (0..6).map(|step| schedule.rate(step)).collect::<Vec<_>>();
    assert_close(&rates(&schedule)[..5], &[0.0, 2.0 / 3.0, 4.0 / 3.0, 2.0, 0.5], "one step after warm-up");
    let all_warmup = LrSchedule { warmup_steps: 4, ..schedule };
    assert_close(&rates(&all_warmup)[..5], &[0.0, 0.5, 1.0, 1.5, 2.0], "warm-up to the end");
    assert!(rates(&all_warmup).iter().all(|rate| rate.is_finite()));
    let one = LrSchedule { warmup_steps: 1, kind: Schedule::Constant, ..schedule };
    assert_eq!(rates(&one)[..2], [0.0, 2.0]);
    let none = LrSchedule { warmup_steps: 0, ..one };
    assert_eq!(rates(&none)[0], 2.0);
}

#[test]
fn what_updates_report_is_averaged_over_updates_and_where_it_counts_tokens_over_tokens() {
    let mut sums = StepSums { tokens: 50, ..StepSums::default() };
    let applied = |grad_norm| Update { grad_norm, applied: true };
    let skipped = Update { grad_norm: f64::NAN, applied: false };
    sums.add_update(applied(2.0), &[1.0, 2.0, 3.0, 10.0, 20.0, 40.0], 10);
    sums.add_update(skipped, &[f64::NAN; 6], 10);
    sums.add_update(applied(3.0), &[3.0, 4.0, 5.0, 0.0, 0.0, 0.0], 10);
    sums.add_update(applied(4.0), &[2.0, 3.0, 4.0, 5.0, 10.0, 20.0], 5);
    let stats = sums.finish(&Ranks::new(None, Device::Cpu), 0.5, Some(0.25), 25).unwrap();
    for (name, value) in [
        ("actor/pg_loss", 2.0),
        ("actor/kl_loss", 3.0),
        ("actor/entropy", 4.0),
        ("actor/pg_clipfrac", 2.0 / 3.0),
        ("actor/pg_clipfrac_lower", 4.0 / 3.0),
        ("actor/ppo_kl", 8.0 / 3.0),
        ("actor/lr", 0.5),
        ("actor/kl_coef", 0.25),
        ("actor/grad_norm", 3.0),
        ("actor/skipped_updates", 1.0),
    ] {
        assert!((stats.metrics[name] - value).abs() < 1e-12, "{name}: {}, not {value}", stats.metrics[name]);
    }
    assert_eq!((stats.skipped_updates, stats.tokens, stats.loss_tokens), (1, 50, 25));

    let mut none = StepSums::default();
    none.add_update(skipped, &[0.0; 6], 1);
    let stats = none.finish(&Ranks::new(None, Device::Cpu), 0.5, None, 1).unwrap();
    for name in ["actor/grad_norm", "actor/pg_loss", "actor/entropy"] {
        assert_eq!(stats.metrics.get(name), None, "nothing was applied that {name} could be of");
    }
    assert!(!stats.metrics.contains_key("actor/kl_loss") && !stats.metrics.contains_key("actor/kl_coef"));
}

#[test]
fn differences_of_probabilities_have_the_mean_and_standard_deviation_of_all_tokens() {
    let ln = |p: f64| p.ln() as f32;
    let mut sums = OffPolicySums::default();
    sums.add_row(&[ln(0.5), ln(0.9)], &[ln(0.4), ln(0.5)]);
    sums.add_row(&[ln(0.2)], &[ln(0.9)]);
    let metrics = sums.metrics();
    // |0.1|, |0.4|, |0.7|: mean 0.4, deviation with n − 1 is 0.3
    for (name, value) in [("max", 0.7), ("mean", 0.4), ("std", 0.3)] {
        let got = metrics[format!("training/rollout_probs_diff_{name}").as_str()];
        assert!((got - value).abs() < 1e-6, "{name}: {got}, not {value}");
    }
    let mut one = OffPolicySums::default();
    one.add_row(&[ln(0.5)], &[ln(0.4)]);
    assert!(one.metrics()["training/rollout_probs_diff_std"].abs() < 1e-6, "one token has no spread");
}

#[test]
fn the_largest_difference_of_log_probs_is_told_and_a_nan_is_no_small_one() {
    let largest = |trained: &[f32], rollout: &[f32]| {
        let mut sums = OffPolicySums::default();
        sums.add_row(trained, rollout);
        sums.metrics()["rollout_corr/log_prob_diff_max"]
    };
    // Two rare tokens: of probabilities alone nothing would show.
    assert_eq!(largest(&[-1.0, -14.0, -11.0], &[-1.0, -11.5, -11.25]), 2.5);
    assert_eq!(largest(&[-1.0, f32::NAN], &[-1.25, -2.0]), f64::INFINITY);
}

#[test]
fn a_panic_within_a_step_is_an_error_that_leaves_the_learner_broken() {
    let mut decoder = decoder();
    let mut learner = Learner::new(LearnerConfig::default(), &decoder, false, None).unwrap();
    let told = learner.guarded(&mut decoder, |_, _| -> Result<(), _> { panic!("out of memory") });
    assert!(told.unwrap_err().to_string().contains("out of memory"));
    assert!(matches!(learner.train(&mut decoder, &shard()), Err(LearnerError::Broken)));
}

/// A row of group 0.
fn row(chain: u32, token_ids: &[u32], mask: [bool; 5], advantage: f32) -> TrainRow {
    TrainRow {
        key: ChainKey { purpose: Purpose::Train, step: 1, group: 0, chain },
        token_ids: token_ids.to_vec(),
        loss_mask: mask.to_vec(),
        rollout_log_probs: mask.map(|sampled| if sampled { -2.0 } else { 0.0 }).to_vec(),
        advantages: mask.map(|sampled| if sampled { advantage } else { 0.0 }).to_vec(),
    }
}

/// Two rows with gaps in their masks and advantages of both signs.
fn shard() -> TrainShard {
    shard_of(vec![
        row(0, &[1, 2, 3, 4, 5], [false, true, true, false, true], 1.5),
        row(1, &[6, 5, 4, 1, 2], [false, false, true, true, true], -0.5),
    ])
}

/// Three that begin alike, as the model sees them once.
fn shard_of_a_prompt() -> TrainShard {
    shard_of(vec![
        row(0, &[1, 2, 3, 4, 5], [false, false, false, true, true], 1.5),
        row(1, &[1, 2, 3, 6, 1], [false, false, false, true, false], -1.25),
        row(2, &[1, 2, 3, 4, 2], [false, false, false, true, true], 0.5),
    ])
}

fn shard_of(rows: Vec<TrainRow>) -> TrainShard {
    let loss_tokens = rows.iter().flat_map(|row| &row.loss_mask).filter(|loss| **loss).count();
    let global_rows = rows.len() as u64;
    let mini_batch = MiniBatch { rows, global_loss_tokens: loss_tokens as u64, global_rows };
    TrainShard { step: 1, policy_version: PolicyVersion(0), mini_batches: vec![mini_batch] }
}

/// The loss written out by its definition over a plain model in f64, on the first update of a step, where the ratio
/// is 1: policy loss, KL loss and entropy, each the mean over all tokens with loss, and the gradient of their weighted
/// sum.
fn by_definition(
    decoder: &Decoder,
    reference: &Decoder,
    config: &LearnerConfig,
    shard: &TrainShard,
) -> ([f64; 3], Vec<f64>) {
    let kl_coef = if config.use_kl_loss { config.kl_loss_coef } else { 0.0 };
    let (model, reference) = (PlainModel::of(decoder), PlainModel::of(reference));
    let zero = || Tensor::zeros([], (Kind::Double, Device::Cpu));
    let (mut policy, mut divergence, mut entropy) = (zero(), zero(), zero());
    for row in &shard.mini_batches[0].rows {
        let all = model.log_probs(&row.token_ids, config.temperature);
        let of_reference = reference.log_probs(&row.token_ids, config.temperature).detach();
        for at in (0..row.token_ids.len()).filter(|&at| row.loss_mask[at]) {
            let (place, id) = (at as i64 - 1, i64::from(row.token_ids[at]));
            let (now, then) = (all.get(place).get(id), of_reference.get(place).get(id));
            policy -= (&now - now.detach()).exp() * f64::from(row.advantages[at]);
            divergence += (&then - &now).exp() + (&now - &then) - 1.0; // k3
            entropy -= (all.get(place).exp() * all.get(place)).sum(Kind::Double);
        }
    }
    let [policy, divergence, entropy] =
        [policy, divergence, entropy].map(|sum| sum / shard.mini_batches[0].global_loss_tokens as f64);
    (&policy + &divergence * kl_coef - &entropy * config.entropy_coeff).backward();
    let gradient = model.parameters.iter().flat_map(|(_, tensor)| numbers(&tensor.grad())).collect();
    ([policy, divergence, entropy].map(|value| value.double_value(&[])), gradient)
}

#[test]
fn the_gradient_is_that_of_the_loss_by_its_definition() {
    let base = LearnerConfig { grad_clip: 1e9, use_kl_loss: true, ..LearnerConfig::default() };
    for (config, shape, shard) in [
        LearnerConfig { temperature: 0.7, kl_loss_coef: 3.0, entropy_coeff: 0.2, ..base.clone() },
        LearnerConfig { temperature: 1.0, kl_loss_coef: 0.5, entropy_coeff: -0.2, ..base.clone() },
        LearnerConfig { temperature: 2.0, kl_loss_coef: 0.5, entropy_coeff: 0.0, ..base.clone() },
        LearnerConfig { use_kl_loss: false, entropy_coeff: 0.0, ..base.clone() },
        LearnerConfig { recompute_above: 0, entropy_coeff: 0.1, ..base.clone() },
        LearnerConfig { micro_batch: MicroBatchLimit::Rows(1), entropy_coeff: 0.1, ..base },
    ]
    .into_iter()
    .flat_map(|config| {
        [smallest(), larger()]
            .map(|shape| [shard(), shard_of_a_prompt()].map(|shard| (shape.clone(), shard)))
            .into_iter()
            .flatten()
            .map(move |(shape, shard)| (config.clone(), shape, shard))
    }) {
        let reference = fresh(shape);
        let mut trained = copy(&reference);
        let mut learner = Learner::new(config.clone(), &trained, true, None).unwrap();
        // Far enough for a divergence, not so far that its estimate is cut off.
        let size = 0.3 / (trained.config().hidden as f64 / 4.0);
        tch::no_grad(|| {
            for (index, (_, tensor)) in trained.parameters().iter().enumerate() {
                let noise = Tensor::arange(tensor.numel() as i64, (Kind::Float, Device::Cpu)) + index as f64;
                let _same =
                    tensor.shallow_clone().g_add_(&(noise.sin() * size).view(tensor.size().as_slice()));
            }
        });
        let ([policy, divergence, entropy], gradient) = by_definition(&trained, &reference, &config, &shard);
        let stats = learner.train(&mut trained, &shard).unwrap();
        assert_close(
            &weights_of(&learner.optimizer, &learner.optimizer.grad),
            &gradient,
            &format!("{config:?}"),
        );
        let metric = |name: &str| stats.metrics.get(name).copied().unwrap_or(f64::NAN);
        let norm = gradient.iter().map(|x| x * x).sum::<f64>().sqrt();
        let reported = [metric("actor/pg_loss"), metric("actor/entropy"), metric("actor/grad_norm")];
        assert_close(&reported, &[policy, entropy, norm], "what is reported");
        assert_eq!(stats.metrics.contains_key("actor/kl_loss"), config.use_kl_loss);
        if config.use_kl_loss {
            assert!(divergence > 1e-3, "the two must differ for this to say anything: {divergence}");
            assert_close(&[metric("actor/kl_loss")], &[divergence], "the divergence");
        }
    }
}

#[test]
fn an_update_does_not_depend_on_how_the_head_is_cut() {
    // So large a vocabulary that the head takes 64 tokens at a time: two rows of 40 are cut across, one alone is not.
    let shape = ModelConfig { vocab: 400_000, max_position_embeddings: 64, ..smallest() };
    let row = |chain: u32| TrainRow {
        key: ChainKey { purpose: Purpose::Train, step: 1, group: 0, chain },
        token_ids: (0..41).map(|i| (i * (chain + 3) * 8_191) % 400_000).collect(),
        loss_mask: (0..41).map(|i| i > 0).collect(),
        rollout_log_probs: vec![-12.0; 41],
        advantages: (0..41).map(|i| if i % 3 == 0 { -1.0 } else { 0.75 }).collect(),
    };
    let mini_batch = MiniBatch { rows: vec![row(0), row(1)], global_loss_tokens: 80, global_rows: 2 };
    let shard = TrainShard { step: 1, policy_version: PolicyVersion(0), mini_batches: vec![mini_batch] };
    let start = fresh(shape);
    let trained = |rows: usize| {
        let mut decoder = copy(&start);
        // Old log-probs and two updates; an ε that lets a gradient's size show.
        let config = LearnerConfig {
            lr: 0.1,
            eps: 0.1,
            ppo_epochs: 2,
            entropy_coeff: 0.1,
            micro_batch: MicroBatchLimit::Rows(rows),
            ..LearnerConfig::default()
        };
        let mut learner = Learner::new(config, &decoder, false, None).unwrap();
        let stats = learner.train(&mut decoder, &shard).unwrap();
        let names = ["actor/pg_loss", "actor/entropy", "actor/ppo_kl", "rollout_corr/training_ppl"];
        (numbers(decoder.parameters().flat()), names.map(|name| stats.metrics[name]))
    };
    let (whole, cut) = (trained(1), trained(2));
    assert_close(&cut.0, &whole.0, "cut across");
    assert_close(&cut.1, &whole.1, "what is reported");
    assert_ne!(whole.0, numbers(start.parameters().flat()));
}

#[test]
fn later_updates_of_a_step_are_measured_against_the_policy_before_the_first() {
    let halves = |mut whole: TrainShard| {
        let rows = std::mem::take(&mut whole.mini_batches[0].rows);
        whole.mini_batches = rows
            .into_iter()
            .map(|row| MiniBatch { rows: vec![row], global_loss_tokens: 3, global_rows: 1 })
            .collect();
        whole
    };
    for (shard, ppo_epochs, updates) in [(shard(), 1, 1), (shard(), 2, 2), (halves(shard()), 1, 2)] {
        let mut decoder = decoder();
        let config = LearnerConfig { lr: 0.05, ppo_epochs, ..LearnerConfig::default() };
        let stats = Learner::new(config, &decoder, false, None).unwrap().train(&mut decoder, &shard).unwrap();
        let moved = stats.metrics["actor/ppo_kl"] != 0.0;
        assert_eq!(moved, updates > 1, "{updates} updates: {:?}", stats.metrics);
        assert!(stats.metrics["rollout_corr/training_ppl"] > 1.0, "compared with the rollout in any case");
    }
}
