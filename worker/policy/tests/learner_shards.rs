//! The optimizer's state shared by ranks: the same training as on one rank, the same attestation, and checkpoints
//! that any number of ranks goes on from. Ranks are threads with real sockets.
#![allow(clippy::unwrap_used, reason = "helpers of tests fail by panicking, too")]

mod support;

use std::sync::Arc;
use std::thread;
use std::time::Duration;

use agentfly_c10d::{Group, Store};
use agentfly_common::batch::{MiniBatch, TrainRow, TrainShard};
use agentfly_common::ids::{ChainKey, PolicyVersion, Purpose};
use agentfly_policy::learner::{Learner, LearnerConfig, LearnerError};
use agentfly_policy::model::Decoder;
use rand::{Rng, SeedableRng};
use tch::{Device, Kind, Tensor};

const DEADLINE: Duration = Duration::from_secs(20);
const ROWS: usize = 6;

fn decoder(kind: Kind) -> Decoder {
    // Weights that no other test's draws can disturb: libtorch's generator is shared by threads.
    let decoder = Decoder::random(support::config("qwen2"), 1, kind, Device::Cpu).unwrap();
    let mut rng = rand_chacha::ChaCha8Rng::seed_from_u64(3);
    let _no_grad = tch::no_grad_guard();
    for (_, tensor) in decoder.parameters().iter() {
        let values: Vec<f32> = (0..tensor.numel()).map(|_| rng.random_range(-0.2..0.2)).collect();
        tensor.shallow_clone().copy_(&Tensor::from_slice(&values).view(tensor.size().as_slice()));
    }
    decoder
}

/// The rows of one step that rank `rank` of `ranks` trains on.
fn shard(version: u64, rank: usize, ranks: usize) -> TrainShard {
    let mut rng = rand_chacha::ChaCha8Rng::seed_from_u64(version);
    let row = |i: usize| {
        let length = 6 + i;
        let loss_mask: Vec<bool> = (0..length).map(|j| j > 1).collect();
        let number = |m: &bool, x: f32| if *m { x } else { 0.0 };
        let advantage: f32 = rng.random_range(-1.0..1.0);
        TrainRow {
            key: ChainKey { purpose: Purpose::Train, step: version + 1, group: 0, chain: i as u32 },
            token_ids: (0..length).map(|_| rng.random_range(0..100)).collect(),
            rollout_log_probs: loss_mask.iter().map(|m| number(m, -4.0)).collect(),
            advantages: loss_mask.iter().map(|m| number(m, advantage)).collect(),
            loss_mask,
        }
    };
    let rows: Vec<TrainRow> = (0..ROWS).map(row).collect();
    let global_loss_tokens = rows.iter().map(|row| row.token_ids.len() as u64 - 2).sum();
    let rows = rows.into_iter().skip(rank).step_by(ranks).collect();
    let mini_batch = MiniBatch { rows, global_loss_tokens, global_rows: ROWS as u64 };
    TrainShard { step: version + 1, policy_version: PolicyVersion(version), mini_batches: vec![mini_batch] }
}

fn config() -> LearnerConfig {
    // A norm that is clipped, and decay, so that every factor of an update takes part.
    LearnerConfig { lr: 1e-2, grad_clip: 0.05, weight_decay: 0.1, ..LearnerConfig::default() }
}

/// One rank's learner, its decoder, and which rank of how many it is.
struct Seat {
    learner: Learner,
    decoder: Decoder,
    rank: usize,
    ranks: usize,
}

impl Seat {
    fn train(&mut self, steps: usize) -> Vec<f64> {
        let norm = |_| {
            let version = self.learner.policy_version().0;
            let shard = shard(version, self.rank, self.ranks);
            self.learner.train(&mut self.decoder, &shard).unwrap().metrics["actor/grad_norm"]
        };
        (0..steps).map(norm).collect()
    }

    fn hash(&self) -> String {
        self.learner.weights_hash(&self.decoder).unwrap()
    }

    fn weights(&self) -> Vec<f64> {
        let parameters = self.decoder.parameters();
        let flat: Vec<Tensor> =
            parameters.iter().map(|(_, t)| t.to_kind(Kind::Double).flatten(0, -1)).collect();
        Vec::try_from(Tensor::cat(&flat, 0)).unwrap()
    }
}

/// Runs `story` on each of `ranks` ranks.
fn on_ranks<T: Send + 'static>(
    ranks: usize,
    kind: Kind,
    config: &LearnerConfig,
    story: impl Fn(Seat) -> T + Send + Sync + 'static,
) -> Vec<T> {
    let (_server, port) = Store::serve("127.0.0.1", 0, DEADLINE).unwrap();
    let (story, config) = (Arc::new(story), Arc::new(config.clone()));
    let seat = |rank| {
        let (story, config) = (Arc::clone(&story), Arc::clone(&config));
        thread::spawn(move || {
            let group = (ranks > 1).then(|| {
                let store = Store::connect("127.0.0.1", port, DEADLINE).unwrap();
                Group::gloo(&store, rank, ranks, "127.0.0.1", DEADLINE).unwrap()
            });
            let decoder = decoder(kind);
            let learner = Learner::new((*config).clone(), &decoder, false, group).unwrap();
            story(Seat { learner, decoder, rank, ranks })
        })
    };
    let threads: Vec<_> = (0..ranks).map(seat).collect();
    threads.into_iter().map(|thread| thread.join().unwrap()).collect()
}

fn distance(a: &[f64], b: &[f64]) -> f64 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(x, y)| (x - y).powi(2)).sum::<f64>().sqrt()
}

/// How far two trainings may end from one another, as a part of how far either went. bf16 gradients are rounded, by
/// which rows a rank adds up, and the first steps of AdamW go by a gradient's sign alone.
fn tolerance(kind: Kind) -> f64 {
    if kind == Kind::Float { 1e-3 } else { 0.2 }
}

#[test]
fn ranks_that_share_the_state_train_as_one_rank_does() {
    let whole = LearnerConfig { shard_optimizer: false, ..config() };
    for kind in [Kind::Float, Kind::BFloat16] {
        let tolerance = tolerance(kind);
        let story = |mut seat: Seat| (seat.train(4), seat.weights(), seat.hash());
        let alone = on_ranks(1, kind, &config(), story).remove(0);
        let moved = distance(&alone.1, &on_ranks(1, kind, &config(), |seat| seat.weights())[0]);
        assert!(moved > 1.0, "{kind:?}: the weights moved by {moved}");
        for (ranks, config) in [(2, config()), (3, config()), (2, whole.clone())] {
            let all = on_ranks(ranks, kind, &config, story);
            for (norms, weights, hash) in &all {
                assert_eq!((norms, hash), (&all[0].0, &all[0].2), "{kind:?}: ranks differ");
                assert!(weights.iter().zip(&all[0].1).all(|(a, b)| a.to_bits() == b.to_bits()));
                let off = distance(&alone.1, weights) / moved;
                assert!(off < tolerance, "{kind:?} on {ranks} ranks: {off}");
                let norms_off = distance(&alone.0, norms) / alone.0[0];
                assert!(norms_off < tolerance, "{kind:?}: {norms:?} and {:?}", alone.0);
            }
        }
    }
}

#[test]
fn what_two_ranks_saved_any_number_goes_on_from() {
    for kind in [Kind::Float, Kind::BFloat16] {
        let dir = tempfile::tempdir().unwrap();
        let folder = dir.path().to_owned();
        let undisturbed = on_ranks(2, kind, &config(), move |mut seat| {
            seat.train(2);
            let files = seat.learner.save(&folder).unwrap();
            let (saved, then) = (seat.hash(), seat.weights());
            seat.train(2);
            let weights = seat.weights();
            (files, saved, weights.clone(), seat.hash(), distance(&then, &weights))
        });
        let file = |rank| format!("optimizer-0000{rank}-of-00002.safetensors");
        assert_eq!(undisturbed[0].0, [file(1), "learner.json".to_owned()]);
        assert_eq!(undisturbed[1].0, [file(2)]);
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 3, "and nothing half-written");
        let size = |name: String| std::fs::metadata(dir.path().join(name)).unwrap().len();
        assert!(size(file(1)).abs_diff(size(file(2))) < size(file(1)) / 3, "each holds its half");

        for ranks in [1, 2, 3] {
            let folder = dir.path().to_owned();
            let resumed = on_ranks(ranks, kind, &config(), move |mut seat| {
                seat.learner.load(&folder, &mut seat.decoder).unwrap();
                assert_eq!(seat.learner.policy_version(), PolicyVersion(2));
                let loaded = seat.hash();
                seat.train(2);
                (loaded, seat.weights(), seat.hash())
            });
            for (loaded, weights, hash) in &resumed {
                assert_eq!(loaded, &undisturbed[0].1, "{ranks} ranks attest what two have saved");
                let off = distance(&undisturbed[0].2, weights) / undisturbed[0].4;
                assert!(off < tolerance(kind), "{kind:?}, {ranks} ranks: {off}");
                assert!(ranks != 2 || *hash == undisturbed[0].3, "as many ranks go on bit for bit");
            }
        }
    }
}

#[test]
fn a_rank_that_cannot_read_its_part_stops_all_before_anything_changes() {
    let dir = tempfile::tempdir().unwrap();
    let folder = dir.path().to_owned();
    on_ranks(3, Kind::Float, &config(), move |mut seat| {
        seat.train(1);
        seat.learner.save(&folder).unwrap();
    });
    let gone = dir.path().join("optimizer-00003-of-00003.safetensors");
    let kept = dir.path().join("kept");
    std::fs::rename(&gone, &kept).unwrap();
    let folder = dir.path().to_owned();
    let again = gone.clone();
    let barrier = Arc::new(std::sync::Barrier::new(2));
    on_ranks(2, Kind::Float, &config(), move |mut seat| {
        let before = seat.hash();
        let error = seat.learner.load(&folder, &mut seat.decoder).unwrap_err().to_string();
        assert!(error.contains("optimizer-00003-of-00003.safetensors") && error.contains("no such file"));
        barrier.wait();
        // Now only rank 1 looks at a folder that lacks it.
        if seat.rank == 0 {
            std::fs::rename(&kept, &again).unwrap();
        }
        barrier.wait();
        let elsewhere = folder.join("elsewhere");
        let looked_at = if seat.rank == 0 { &folder } else { &elsewhere };
        let error = seat.learner.load(looked_at, &mut seat.decoder).unwrap_err();
        let peer = matches!(error, LearnerError::PeerCannotRead { .. });
        assert_eq!(peer, seat.rank == 0, "{error}");
        assert_eq!(seat.hash(), before);
        seat.learner.load(&folder, &mut seat.decoder).unwrap();
        assert_ne!(seat.hash(), before);
    });
}

#[test]
fn the_single_file_of_older_checkpoints_is_read() {
    let dir = tempfile::tempdir().unwrap();
    let folder = dir.path().to_owned();
    let saved = on_ranks(1, Kind::Float, &config(), move |mut seat| {
        seat.train(2);
        seat.learner.save(&folder).unwrap();
        seat.hash()
    });
    let rename = |from: &str, to: &str| std::fs::rename(dir.path().join(from), dir.path().join(to)).unwrap();
    rename("optimizer-00001-of-00001.safetensors", "optimizer.safetensors");
    let counters = dir.path().join("learner.json");
    let old = r#"{"format":1,"policy_version":2,"training_steps":2,"optimizer_steps":2,"skips_in_a_row":0}"#;
    std::fs::write(&counters, old).unwrap();
    let folder = dir.path().to_owned();
    let loaded = on_ranks(2, Kind::Float, &config(), move |mut seat| {
        seat.learner.load(&folder, &mut seat.decoder).unwrap();
        seat.hash()
    });
    assert_eq!(loaded, [saved[0].clone(), saved[0].clone()]);
    for (text, problem) in [
        (old.replace("\"format\":1", "\"format\":9"), "format 9, but this program reads 1 to 2"),
        (old.replace("\"format\":1", "\"format\":2"), "optimizer_files is 0, not 1 to 99999"),
    ] {
        std::fs::write(&counters, text).unwrap();
        let folder = dir.path().to_owned();
        let errors = on_ranks(1, Kind::Float, &config(), move |mut seat| {
            seat.learner.load(&folder, &mut seat.decoder).unwrap_err().to_string()
        });
        assert!(errors[0].contains(problem), "{errors:?}");
    }
}

#[test]
fn an_update_too_small_for_bf16_shows_in_the_hash_whoever_made_it() {
    let tiny = LearnerConfig { lr: 1e-9, weight_decay: 0.0, ..config() };
    for ranks in [1, 2] {
        let told = on_ranks(ranks, Kind::BFloat16, &tiny, |mut seat| {
            let (before, weights) = (seat.hash(), seat.weights());
            seat.train(1);
            assert_eq!(seat.weights(), weights, "no bf16 weight has moved");
            (before, seat.hash())
        });
        assert!(told.iter().all(|(before, after)| before != after));
        assert!(told.iter().all(|of_rank| of_rank == &told[0]), "{told:?}");
    }
}

#[test]
fn the_last_gradient_is_summed_over_ranks_and_clipped_or_not_told_at_all() {
    let story = |mut seat: Seat| {
        let norm = seat.train(1)[0];
        let gradients = seat.learner.last_gradients()?;
        let flat: Vec<Tensor> =
            gradients.iter().map(|(_, g)| g.to_kind(Kind::Double).flatten(0, -1)).collect();
        Ok::<_, LearnerError>((norm, Vec::<f64>::try_from(Tensor::cat(&flat, 0)).unwrap()))
    };
    let free = LearnerConfig { grad_clip: 1e9, ..config() };
    let whole = LearnerConfig { shard_optimizer: false, ..config() };
    let (norm, unclipped) = on_ranks(1, Kind::Float, &free, story).remove(0).unwrap();
    let length = distance(&unclipped, &vec![0.0; unclipped.len()]);
    assert!((length - norm).abs() < 1e-4 * norm && norm > 2.0 * config().grad_clip, "{length}, {norm}");
    let clipped: Vec<f64> = unclipped.iter().map(|x| x * config().grad_clip / norm).collect();
    for (ranks, config) in [(1, config()), (2, whole)] {
        for told in on_ranks(ranks, Kind::Float, &config, story) {
            let off = distance(&told.unwrap().1, &clipped) / config.grad_clip;
            assert!(off < 1e-4, "{ranks} ranks: {off}");
        }
    }
    for (rank, told) in on_ranks(2, Kind::Float, &config(), story).into_iter().enumerate() {
        let error = told.unwrap_err();
        let shared = matches!(error, LearnerError::SharedGradients { index, count: 2 } if index == rank);
        assert!(shared, "{error}");
    }
}
