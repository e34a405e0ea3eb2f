//! Whole training steps on a tiny decoder: the update does not depend on how the batch is cut, ranks stay
//! bit-equal, checkpoints continue, faults are loud.
#![allow(clippy::unwrap_used, reason = "helpers of tests fail by panicking, too")]

use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use agentfly_c10d::{ErrorKind, Group, Store};
use agentfly_common::batch::{MiniBatch, TrainRow, TrainShard};
use agentfly_common::ids::{ChainKey, PolicyVersion, Purpose};
use agentfly_policy::learner::{
    Aggregation, Learner, LearnerConfig, LearnerError, MicroBatchLimit, StepStats, SupervisedRow,
};
use agentfly_policy::model::{Architecture, Decoder, ModelConfig, score};
use rand::{Rng, SeedableRng};
use tch::{Device, Kind, Tensor};

const VOCAB: u32 = 97;

fn decoder(kind: Kind) -> Decoder {
    drawn(shape(), kind)
}

fn shape() -> ModelConfig {
    ModelConfig {
        architecture: Architecture::Qwen2,
        hidden: 32,
        layers: 2,
        heads: 4,
        kv_heads: 2,
        head_dim: 8,
        intermediate: 64,
        vocab: i64::from(VOCAB),
        rms_eps: 1e-6,
        rope_theta: 10_000.0,
        rope_scaling: None,
        tie_word_embeddings: true,
        max_position_embeddings: 256,
        initializer_range: 0.1,
        eos_ids: vec![0],
        bos_id: None,
        pad_id: None,
        torch_dtype: None,
    }
}

/// Weights from a generator of their own: libtorch's is shared by the threads of a test program.
fn drawn(config: ModelConfig, kind: Kind) -> Decoder {
    let decoder = Decoder::random(config, 1, kind, Device::Cpu).unwrap();
    let mut rng = rand_chacha::ChaCha8Rng::seed_from_u64(11);
    let _no_grad = tch::no_grad_guard();
    for (name, tensor) in decoder.parameters().iter() {
        if !name.contains("norm") {
            let values: Vec<f32> = (0..tensor.numel()).map(|_| rng.random_range(-0.15..0.15)).collect();
            tensor.shallow_clone().copy_(&Tensor::from_slice(&values).view(tensor.size().as_slice()));
        }
    }
    decoder
}

fn config() -> LearnerConfig {
    LearnerConfig {
        lr: 1e-3,
        use_kl_loss: true,
        kl_loss_coef: 0.05,
        entropy_coeff: 0.01,
        temperature: 0.7,
        ..LearnerConfig::default()
    }
}

/// Rows of several lengths with gaps in their masks, one of them without any loss.
fn rows(count: usize) -> Vec<TrainRow> {
    let mut rng = rand_chacha::ChaCha8Rng::seed_from_u64(5);
    (0..count)
        .map(|i| {
            let length = 4 + rng.random_range(0..28);
            let loss_mask: Vec<bool> = (0..length).map(|j| j > 1 && i != 3 && rng.random_bool(0.6)).collect();
            let value = |m: &bool, x: f32| if *m { x } else { 0.0 };
            let advantage = rng.random_range(-1.5_f32..1.5);
            TrainRow {
                key: ChainKey { purpose: Purpose::Train, step: 1, group: i as u32 / 4, chain: i as u32 % 4 },
                token_ids: (0..length).map(|_| rng.random_range(0..VOCAB)).collect(),
                rollout_log_probs: loss_mask
                    .iter()
                    .map(|m| value(m, -rng.random_range(3.0_f32..6.0)))
                    .collect(),
                advantages: loss_mask.iter().map(|m| value(m, advantage)).collect(),
                loss_mask,
            }
        })
        .collect()
}

/// `rows` as `mini_batches` equal parts, of which this rank holds every `ranks`-th row.
fn shard(rows: &[TrainRow], mini_batches: usize, rank: usize, ranks: usize) -> TrainShard {
    let tokens = |row: &TrainRow| row.loss_mask.iter().filter(|m| **m).count() as u64;
    let mini_batches = rows
        .chunks(rows.len().div_ceil(mini_batches))
        .map(|part| MiniBatch {
            rows: part.iter().skip(rank).step_by(ranks).cloned().collect(),
            global_loss_tokens: part.iter().map(tokens).sum(),
            global_rows: part.iter().filter(|row| tokens(row) > 0).count() as u64,
        })
        .collect();
    TrainShard { step: 1, policy_version: PolicyVersion(0), mini_batches }
}

/// One step from the same start; the weights after it, as f64, and what was reported.
fn train(
    config: LearnerConfig,
    shard: &TrainShard,
    group: Option<Group>,
    kind: Kind,
) -> (Vec<f64>, StepStats) {
    let mut decoder = decoder(kind);
    let mut learner = Learner::new(config, &decoder, true, group).unwrap();
    let stats = learner.train(&mut decoder, shard).unwrap();
    assert_eq!(learner.policy_version(), PolicyVersion(1));
    assert!(decoder.parameters().iter().all(|(_, tensor)| !tensor.requires_grad()));
    (weights(&decoder), stats)
}

fn weights(decoder: &Decoder) -> Vec<f64> {
    let flat: Vec<Tensor> =
        decoder.parameters().iter().map(|(_, t)| t.to_kind(Kind::Double).flatten(0, -1)).collect();
    Vec::<f64>::try_from(Tensor::cat(&flat, 0)).unwrap()
}

/// Distance of two updates over their size: what rounding may make of it.
fn relative_distance(a: &[f64], b: &[f64]) -> f64 {
    let norm = |x: &mut dyn Iterator<Item = f64>| x.map(|v| v * v).sum::<f64>().sqrt();
    norm(&mut a.iter().zip(b).map(|(x, y)| x - y)) / norm(&mut a.iter().copied())
}

fn close_metrics(a: &StepStats, b: &StepStats) {
    assert_eq!(a.metrics.keys().collect::<Vec<_>>(), b.metrics.keys().collect::<Vec<_>>());
    for (name, value) in &a.metrics {
        let other = b.metrics[name];
        assert!((value - other).abs() <= 1e-4 * value.abs().max(0.1), "{name}: {value} and {other}");
    }
}

#[test]
fn micro_batches_do_not_change_the_update() {
    let rows = rows(12);
    let start = weights(&decoder(Kind::Float));
    for mode in [Aggregation::TokenMean, Aggregation::SeqMeanTokenMean, Aggregation::SeqMeanTokenSum] {
        let with = |micro_batch| LearnerConfig { micro_batch, loss_agg_mode: mode, ..config() };
        let whole = with(MicroBatchLimit::Tokens(100_000));
        let (expected, stats) = train(whole, &shard(&rows, 1, 0, 1), None, Kind::Float);
        assert!(relative_distance(&start, &expected) > 1e-4, "the step did not move the weights");
        for limit in [MicroBatchLimit::Rows(6), MicroBatchLimit::Rows(4), MicroBatchLimit::Tokens(50)] {
            let (got, other) = train(with(limit), &shard(&rows, 1, 0, 1), None, Kind::Float);
            let distance = relative_distance(&expected, &got);
            assert!(distance < 1e-5, "{mode:?}, {limit:?}: {distance}");
            close_metrics(&stats, &other);
        }
    }
}

/// Trains on `ranks` ranks, each in its thread.
fn train_on_ranks(config: &LearnerConfig, shards: Vec<TrainShard>) -> Vec<(Vec<f64>, StepStats)> {
    let (_server, port) = Store::serve("127.0.0.1", 0, Duration::from_secs(10)).unwrap();
    let size = shards.len();
    let config = Arc::new(config.clone());
    let threads: Vec<_> = shards
        .into_iter()
        .enumerate()
        .map(|(rank, shard)| {
            let config = Arc::clone(&config);
            thread::spawn(move || {
                let store = Store::connect("127.0.0.1", port, Duration::from_secs(10)).unwrap();
                let group = Group::gloo(&store, rank, size, "127.0.0.1", Duration::from_secs(10)).unwrap();
                train((*config).clone(), &shard, Some(group), Kind::Float)
            })
        })
        .collect();
    threads.into_iter().map(|t| t.join().unwrap()).collect()
}

#[test]
fn two_ranks_make_the_update_of_one_and_are_bit_equal() {
    let rows = rows(12);
    for (mini_batches, ppo_epochs) in [(1, 1), (3, 2)] {
        let config = LearnerConfig { ppo_epochs, ..config() };
        let (expected, stats) = train(config.clone(), &shard(&rows, mini_batches, 0, 1), None, Kind::Float);
        let both = train_on_ranks(&config, (0..2).map(|rank| shard(&rows, mini_batches, rank, 2)).collect());
        let distance = relative_distance(&expected, &both[0].0);
        assert!(distance < 1e-5, "{mini_batches} mini-batches: {distance}");
        assert!(both[0].0.iter().zip(&both[1].0).all(|(a, b)| a.to_bits() == b.to_bits()), "ranks differ");
        assert_eq!(both[0].1.metrics, both[1].1.metrics);
        close_metrics(&stats, &both[0].1);
    }
}

#[test]
fn a_rank_without_rows_takes_part() {
    let rows = rows(4);
    let (expected, _) = train(config(), &shard(&rows, 1, 0, 1), None, Kind::Float);
    let mut empty = shard(&rows, 1, 0, 1);
    empty.mini_batches[0].rows.clear();
    let both = train_on_ranks(&config(), vec![shard(&rows, 1, 0, 1), empty]);
    assert_eq!(both[0].0, both[1].0);
    assert!(relative_distance(&expected, &both[1].0) < 1e-5);
}

#[test]
fn a_token_with_positive_advantage_becomes_likelier_and_the_metrics_say_what_happened() {
    let mut row = rows(1).remove(0);
    row.advantages = row.loss_mask.iter().map(|m| f32::from(u8::from(*m))).collect();
    let mut decoder = decoder(Kind::Float);
    let at = |scores: Vec<Option<f32>>| -> Vec<f32> {
        scores.into_iter().zip(&row.loss_mask).filter(|(_, m)| **m).map(|(s, _)| s.unwrap()).collect()
    };
    let before = at(score(&decoder, &row.token_ids).unwrap());
    // The rollout reports exactly what the weights say: nothing may differ.
    let mut values = before.iter();
    row.rollout_log_probs =
        row.loss_mask.iter().map(|m| if *m { *values.next().unwrap() } else { 0.0 }).collect();
    let config = LearnerConfig { lr: 1e-3, weight_decay: 0.0, ..LearnerConfig::default() };
    let mut learner = Learner::new(config, &decoder, false, None).unwrap();
    let stats = learner.train(&mut decoder, &shard(std::slice::from_ref(&row), 1, 0, 1)).unwrap();
    let after = at(score(&decoder, &row.token_ids).unwrap());
    assert!(after.iter().sum::<f32>() > before.iter().sum::<f32>() + 0.1, "{before:?} -> {after:?}");
    let metric = |name: &str| stats.metrics[name];
    assert!((metric("actor/pg_loss") + 1.0).abs() < 1e-6, "on-policy the loss is −mean A");
    assert_eq!((metric("actor/ppo_kl"), metric("actor/pg_clipfrac"), metric("actor/lr")), (0.0, 0.0, 1e-3));
    assert!(metric("actor/entropy") > 3.0 && metric("actor/entropy") < f64::from(VOCAB).ln() + 1e-6);
    assert!(metric("actor/grad_norm") > 0.0);
    assert!(metric("training/rollout_probs_diff_max") < 1e-6);
    assert!(metric("rollout_corr/kl").abs() < 1e-5);
    assert!(!stats.metrics.contains_key("actor/kl_loss"));
    assert_eq!((stats.tokens, stats.loss_tokens), (row.token_ids.len() as u64, before.len() as u64));
}

#[test]
fn bf16_models_keep_f32_master_weights_so_small_steps_add_up() {
    let rows = rows(4);
    let small = LearnerConfig { lr: 2e-5, ..config() };
    let mut decoder = decoder(Kind::BFloat16);
    let start = weights(&decoder);
    let mut learner = Learner::new(small, &decoder, true, None).unwrap();
    for step in 0..20 {
        let mut shard = shard(&rows, 1, 0, 1);
        shard.policy_version = PolicyVersion(step);
        learner.train(&mut decoder, &shard).unwrap();
    }
    // One step moves a weight of 0.1 by 2e-5, a twentieth of bf16's spacing there: without f32 copies most
    // weights would never move.
    let moved = start.iter().zip(weights(&decoder)).filter(|(a, b)| (*a - b).abs() > 0.0).count();
    assert!(moved * 2 > start.len(), "{moved} of {} weights moved", start.len());
}

#[test]
fn a_loaded_checkpoint_continues_bit_for_bit_and_says_what_does_not_fit() {
    let rows = rows(6);
    let next = |version| TrainShard { policy_version: PolicyVersion(version), ..shard(&rows, 1, 0, 1) };
    let with_warmup = LearnerConfig { lr_warmup_steps: 4, ..config() };
    let (mut one, mut two) = (decoder(Kind::Float), decoder(Kind::Float));
    let mut first = Learner::new(with_warmup.clone(), &one, true, None).unwrap();
    first.train(&mut one, &next(0)).unwrap();
    first.train(&mut one, &next(1)).unwrap();
    let dir = tempfile::tempdir().unwrap();
    first.save(dir.path()).unwrap();

    let mut second = Learner::new(with_warmup, &two, true, None).unwrap();
    second.load(dir.path(), &mut two).unwrap();
    assert_eq!(second.policy_version(), PolicyVersion(2));
    let a = first.train(&mut one, &next(2)).unwrap();
    let b = second.train(&mut two, &next(2)).unwrap();
    assert_eq!(one.weights_hash().unwrap(), two.weights_hash().unwrap());
    assert_eq!(a.metrics, b.metrics);
    assert_eq!(a.metrics["actor/lr"], 5e-4, "the schedule went on from step 2 of 4");

    let mut names: Vec<_> = std::fs::read_dir(dir.path())
        .unwrap()
        .map(|f| f.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    assert_eq!(names, ["learner.json", "optimizer-00001-of-00001.safetensors"]);
    let path = dir.path().join("optimizer-00001-of-00001.safetensors");
    let mut tensors = Tensor::read_safetensors(&path).unwrap();
    let at = tensors.iter().position(|(n, _)| n == "exp_avg.model.norm.weight").unwrap();
    tensors[at].1 = Tensor::zeros([7], (Kind::Float, Device::Cpu));
    Tensor::write_safetensors(&tensors, &path).unwrap();
    let text = second.load(dir.path(), &mut two).unwrap_err().to_string();
    assert!(text.contains("`exp_avg.model.norm.weight` is [7], but this model's is [32]"), "{text}");
    let _removed = tensors.remove(at);
    Tensor::write_safetensors(&tensors, &path).unwrap();
    let text = second.load(dir.path(), &mut two).unwrap_err().to_string();
    assert!(text.contains("`exp_avg.model.norm.weight` [32] is missing"), "{text}");
}

#[test]
fn faults_are_found_before_the_weights_change() {
    let rows = rows(6);
    let mut decoder = decoder(Kind::Float);
    let start = weights(&decoder);
    let mut learner = Learner::new(config(), &decoder, true, None).unwrap();
    let mut refuse = |change: &dyn Fn(&mut TrainShard), part: &str| {
        let mut bad = shard(&rows, 1, 0, 1);
        change(&mut bad);
        let text = learner.train(&mut decoder, &bad).unwrap_err().to_string();
        assert!(text.contains(part), "{part:?} is not in {text:?}");
    };
    refuse(&|s| s.policy_version = PolicyVersion(4), "policy version 4, but the learner holds 0");
    refuse(&|s| s.mini_batches.clear(), "no token has loss");
    refuse(&|s| s.mini_batches[0].rows.clear(), "no token has loss");
    refuse(&|s| s.mini_batches[0].global_loss_tokens += 1, "tokens with loss in 5 rows");
    refuse(&|s| s.mini_batches[0].rows[1].loss_mask.truncate(1), "train/step 1/group 0/chain 1");
    refuse(&|s| s.mini_batches[0].rows[0].advantages.truncate(1), "advantages");
    refuse(&|s| s.mini_batches[0].rows[2].token_ids[0] = VOCAB, "the vocabulary has 97");
    refuse(&|s| s.mini_batches[0].rows[0].loss_mask[0] = true, "the first token has loss");
    refuse(
        &|s| {
            let row = &mut s.mini_batches[0].rows[0];
            let at = row.loss_mask.iter().position(|m| *m).unwrap();
            row.advantages[at] = f32::NAN;
        },
        "advantage NaN",
    );
    assert_eq!(weights(&decoder), start);
    assert_eq!(learner.policy_version(), PolicyVersion(0));
    for (temperature, told) in
        [(0.0, "temperature = 0.0"), (1e-39, "temperature = 1e-39"), (1e39, "temperature = 1e39")]
    {
        let wrong = LearnerConfig { temperature, ..config() };
        let text = Learner::new(wrong, &decoder, true, None).unwrap_err().to_string();
        assert!(text.contains(told), "{text}");
    }
}

#[test]
fn a_peer_with_a_bad_shard_stops_every_rank_at_once() {
    // Before anything is summed, and where only the sum shows it.
    let stale = |shard: &mut TrainShard| shard.policy_version = PolicyVersion(9);
    let miscounted = |shard: &mut TrainShard| shard.mini_batches[0].global_rows += 1;
    for (spoil, named) in [(stale as fn(&mut TrainShard), "policy version"), (miscounted, "rows")] {
        let [here, there] = refusals_of_two(spoil);
        assert!(matches!(here, LearnerError::PeerRefused { step: 1 }), "{here}");
        assert!(there.to_string().contains(named), "{there}");
    }
}

/// What each of two ranks says of a step whose shard is spoiled on the second; neither waits for its deadline.
fn refusals_of_two(spoil: fn(&mut TrainShard)) -> [LearnerError; 2] {
    let rows = rows(4);
    let (_server, port) = Store::serve("127.0.0.1", 0, Duration::from_secs(10)).unwrap();
    let threads: Vec<_> = (0..2)
        .map(|rank| {
            let mut shard = shard(&rows, 1, rank, 2);
            if rank == 1 {
                spoil(&mut shard);
            }
            thread::spawn(move || {
                let store = Store::connect("127.0.0.1", port, Duration::from_secs(10)).unwrap();
                let group = Group::gloo(&store, rank, 2, "127.0.0.1", Duration::from_secs(10)).unwrap();
                let mut decoder = decoder(Kind::Float);
                let mut learner = Learner::new(config(), &decoder, true, Some(group)).unwrap();
                learner.train(&mut decoder, &shard).unwrap_err()
            })
        })
        .collect();
    let errors: Vec<LearnerError> = threads.into_iter().map(|t| t.join().unwrap()).collect();
    errors.try_into().unwrap()
}

/// A rank's decoder, its learner in a group of two, and what it is to train on.
struct Seat {
    rank: usize,
    decoder: Decoder,
    learner: Learner,
    shard: TrainShard,
}

/// Runs `story` on each of two ranks with a deadline of half a minute; what it gives, by rank, and how long that took.
fn on_two<T: Send + 'static>(
    config: &LearnerConfig,
    story: impl Fn(Seat) -> T + Send + Sync + 'static,
) -> (Vec<T>, Duration) {
    let deadline = Duration::from_secs(30);
    let (rows, story) = (rows(4), Arc::new(story));
    let (_server, port) = Store::serve("127.0.0.1", 0, deadline).unwrap();
    let started = Instant::now();
    let threads: Vec<_> = (0..2)
        .map(|rank| {
            let (shard, config, story) = (shard(&rows, 1, rank, 2), config.clone(), Arc::clone(&story));
            thread::spawn(move || {
                let store = Store::connect("127.0.0.1", port, deadline).unwrap();
                let group = Group::gloo(&store, rank, 2, "127.0.0.1", deadline).unwrap();
                let decoder = decoder(Kind::Float);
                let learner = Learner::new(config, &decoder, true, Some(group)).unwrap();
                story(Seat { rank, decoder, learner, shard })
            })
        })
        .collect();
    (threads.into_iter().map(|t| t.join().unwrap()).collect(), started.elapsed())
}

fn lost(error: &LearnerError) -> bool {
    matches!(error, LearnerError::Collective(e) if e.kind == ErrorKind::Network)
}

/// As a fault of memory would: the model's own map no longer fits its gradient.
fn damage(decoder: &Decoder) {
    let weight = decoder.parameters().get("model.layers.1.mlp.down_proj.weight").unwrap();
    let _same = weight.shallow_clone().resize_([1, 2]);
}

#[test]
fn a_rank_that_fails_half_way_frees_its_peers_and_neither_saves_nor_goes_on_alone() {
    for shard_optimizer in [true, false] {
        let dir = tempfile::tempdir().unwrap();
        let folder = dir.path().to_owned();
        let story = move |mut seat: Seat| {
            if seat.rank == 1 {
                damage(&seat.decoder);
            }
            let error = seat.learner.train(&mut seat.decoder, &seat.shard).unwrap_err();
            let saved = seat.learner.save(&folder).unwrap_err();
            let loaded = seat.learner.load(&folder, &mut seat.decoder).unwrap_err();
            let trained = seat.learner.train(&mut seat.decoder, &seat.shard).unwrap_err();
            // It lives on: it is not its end that frees the others.
            (error, saved, [loaded, trained], seat)
        };
        let (told, took) = on_two(&LearnerConfig { shard_optimizer, ..config() }, story);
        assert!(lost(&told[0].0), "{}", told[0].0);
        assert!(!matches!(told[1].0, LearnerError::Collective(_)), "{}", told[1].0);
        assert!(took < Duration::from_secs(15), "{took:?}");
        for (rank, (_, saved, refused, _)) in told.iter().enumerate() {
            assert!(matches!(saved, LearnerError::Broken), "{saved}");
            for error in refused {
                let left = matches!(error, LearnerError::LeftGroup { index, count: 2 } if *index == rank);
                assert!(left, "shard_optimizer: {shard_optimizer}, rank {rank}: {error}");
            }
        }
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0, "nothing was saved");
    }
}

#[test]
fn a_rank_whose_collective_failed_before_an_update_is_out_of_its_group_but_can_save() {
    type Call = fn(&mut Seat) -> Result<(), LearnerError>;
    let calls: [Call; 2] = [
        |seat| seat.learner.train(&mut seat.decoder, &seat.shard).map(drop),
        |seat| {
            let row = SupervisedRow { token_ids: vec![1, 2, 3], loss_mask: vec![false, true, true] };
            seat.learner.supervised_step(&mut seat.decoder, &[row], 1e-3).map(drop)
        },
    ];
    for call in calls {
        let dir = tempfile::tempdir().unwrap();
        let folder = dir.path().to_owned();
        let story = move |mut seat: Seat| {
            if seat.rank == 1 {
                return None; // gone before its first collective
            }
            let first = call(&mut seat).unwrap_err();
            let again =
                [call(&mut seat).unwrap_err(), seat.learner.load(&folder, &mut seat.decoder).unwrap_err()];
            Some((first, again, seat.learner.save(&folder).unwrap()))
        };
        let (mut told, took) = on_two(&config(), story);
        assert!(took < Duration::from_secs(15), "{took:?}");
        let (first, again, saved) = told.remove(0).unwrap();
        assert!(lost(&first), "{first}");
        for error in again {
            assert!(matches!(error, LearnerError::LeftGroup { index: 0, count: 2 }), "{error}");
        }
        assert_eq!(saved, ["optimizer-00001-of-00002.safetensors", "learner.json"], "its share is sound");
    }
}

#[test]
fn another_decoder_than_the_learners_own_is_refused_and_peers_need_not_wait() {
    let rows = rows(4);
    let row = SupervisedRow { token_ids: vec![1, 2, 3], loss_mask: vec![false, true, true] };
    let dir = tempfile::tempdir().unwrap();
    for kind in [Kind::Float, Kind::BFloat16] {
        // Of the same shape, with the same numbers.
        let (mut own, mut other) = (decoder(kind), decoder(kind));
        let mut learner = Learner::new(config(), &own, true, None).unwrap();
        learner.save(dir.path()).unwrap();
        let before = (weights(&own), weights(&other));
        for result in [
            learner.train(&mut other, &shard(&rows, 1, 0, 1)).map(drop),
            learner.supervised_step(&mut other, std::slice::from_ref(&row), 1e-3).map(drop),
            learner.load(dir.path(), &mut other),
            learner.weights_hash(&other).map(drop),
        ] {
            assert!(matches!(result, Err(LearnerError::OtherDecoder)), "{kind:?}: {result:?}");
        }
        assert_eq!((weights(&own), weights(&other)), before);
        learner.load(dir.path(), &mut own).unwrap();
        learner.train(&mut own, &shard(&rows, 1, 0, 1)).unwrap();
        assert_ne!(weights(&own), before.0);
    }
    let (told, took) = on_two(&config(), |mut seat| {
        if seat.rank == 1 {
            seat.decoder = decoder(Kind::Float);
        }
        (seat.learner.train(&mut seat.decoder, &seat.shard).unwrap_err(), seat)
    });
    assert!(lost(&told[0].0), "{}", told[0].0);
    assert!(matches!(told[1].0, LearnerError::OtherDecoder), "{}", told[1].0);
    assert!(took < Duration::from_secs(15), "{took:?}");
}

fn poison(decoder: &Decoder) {
    let _same = decoder.parameters().get("model.norm.weight").unwrap().shallow_clone().fill_(f64::NAN);
}

#[test]
fn nan_weights_are_named_and_leave_the_learner_refusing_until_a_checkpoint_is_loaded() {
    let rows = rows(4);
    let mut decoder = decoder(Kind::Float);
    let stubborn = LearnerConfig { max_grad_skips: 0, ..config() };
    let mut learner = Learner::new(stubborn, &decoder, true, None).unwrap();
    let (good, bad) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    learner.save(good.path()).unwrap();
    poison(&decoder);
    let error = learner.train(&mut decoder, &shard(&rows, 1, 0, 1)).unwrap_err();
    assert!(error.to_string().contains("the policy loss is NaN in a micro-batch"), "{error}");
    let error = learner.train(&mut decoder, &shard(&rows, 1, 0, 1)).unwrap_err();
    assert!(matches!(error, LearnerError::Broken), "{error}");
    let error = learner.save(bad.path()).unwrap_err();
    assert!(matches!(error, LearnerError::Broken), "{error}");
    assert_eq!(std::fs::read_dir(bad.path()).unwrap().count(), 0, "nothing was saved");
    learner.load(good.path(), &mut decoder).unwrap();
    learner.train(&mut decoder, &shard(&rows, 1, 0, 1)).unwrap();
    learner.save(bad.path()).unwrap();
}

#[test]
fn supervised_warm_up_learns_a_sequence_by_heart() {
    let row = SupervisedRow {
        token_ids: vec![3, 14, 15, 92, 65, 35, 8],
        loss_mask: vec![false, false, true, true, true, true, true],
    };
    let mut decoder = decoder(Kind::Float);
    let mut learner = Learner::new(LearnerConfig::default(), &decoder, false, None).unwrap();
    let first = learner.supervised_step(&mut decoder, std::slice::from_ref(&row), 3e-3).unwrap();
    assert!((first.loss - f64::from(VOCAB).ln()).abs() < 1.0, "{first:?}");
    assert_eq!(first.loss_tokens, 5);
    let mut last = first;
    for _ in 0..40 {
        last = learner.supervised_step(&mut decoder, std::slice::from_ref(&row), 3e-3).unwrap();
    }
    assert!(last.loss < 0.3, "{last:?}");
    assert_eq!(learner.policy_version(), PolicyVersion(0));

    let before = weights(&decoder);
    for (rate, told) in [(f64::NAN, "NaN"), (-1e-9, "-1e-9"), (f64::INFINITY, "inf")] {
        let error = learner.supervised_step(&mut decoder, std::slice::from_ref(&row), rate).unwrap_err();
        assert_eq!(error.to_string(), format!("learner setting lr = {told}: must be at least 0"));
    }
    assert_eq!(weights(&decoder), before, "a rate that is none changes nothing");
    learner.supervised_step(&mut decoder, std::slice::from_ref(&row), 0.0).unwrap();

    let patient = LearnerConfig { max_grad_skips: 1, ..LearnerConfig::default() };
    let mut learner = Learner::new(patient, &decoder, false, None).unwrap();
    poison(&decoder);
    assert!(!learner.supervised_step(&mut decoder, std::slice::from_ref(&row), 3e-3).unwrap().applied);
    let error = learner.supervised_step(&mut decoder, &[row], 3e-3).unwrap_err().to_string();
    assert!(error.contains("the cross-entropy is NaN in a micro-batch of 1 rows"), "{error}");
}
