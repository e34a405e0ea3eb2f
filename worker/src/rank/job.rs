//! What a prepared rank holds for its job: the device thread and everything its chains share.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Mutex;

use agentfly_agent::chain::ChainDeps;
use agentfly_c10d::Store;
use agentfly_common::batch::TrainShard;
use agentfly_common::config::Config;
use agentfly_common::ids::{PolicyVersion, Purpose};
use agentfly_common::machine::{memory, peak_bytes};
use agentfly_common::planner::Plan;
use agentfly_common::sampling::SamplingParams;
use agentfly_common::seed::JobSeed;
use agentfly_common::telemetry::TRACE;
use agentfly_policy::device::DeviceHandle;
use agentfly_policy::learner::Learner;
use agentfly_policy::placement::Place;
use agentfly_sandbox::Tier;
use anyhow::{Context as _, anyhow};
use tracing::info_span;

use super::RankError;
use super::train::learner_error;

/// The device thread's own state: the learner, once the group stands.
pub(super) type LearnerSeat = Option<Learner>;

/// verl counts memory in GiB and calls them GB.
const GB: f64 = (1_u64 << 30) as f64;

/// A prepared job.
pub struct Job {
    /// Its settings.
    pub config: Config,
    /// Its seed.
    pub seed: JobSeed,
    /// What was planned for this rank's memory: micro-batch, KV cache, window.
    pub plan: Plan,
    /// What its chains share.
    pub chain_deps: ChainDeps,
    /// How their code is isolated.
    pub sandbox_tier: Tier,
    /// This rank, 0-based.
    pub rank: u32,
    /// How many ranks there are.
    pub world_size: u32,
    /// Training steps of the whole job, for the learning rate's schedule.
    pub total_steps: u64,
    /// The directory the weights came from; tokenizer and template files are copied from here.
    pub model_dir: PathBuf,
    /// A checkpoint to take the optimizer's state from.
    pub resume_dir: Option<PathBuf>,
    /// Ids that end a turn.
    pub stop_ids: Vec<u32>,
    /// The address ranks reach each other at.
    pub address: String,
    /// The device it owns: CPUs exchange gradients over Gloo, GPUs over NCCL.
    pub place: Place,
    pub(super) device: DeviceHandle<LearnerSeat>,
    /// Rank 0 keeps the rendezvous store open for as long as the job lives.
    pub(super) store: Mutex<Option<Store>>,
}

impl Job {
    /// How chains of this purpose are sampled.
    #[must_use]
    pub fn sampling(&self, purpose: Purpose) -> SamplingParams {
        let rollout = &self.config.actor_rollout_ref.rollout;
        match purpose {
            Purpose::Train => rollout.training_sampling(self.stop_ids.clone()),
            Purpose::Validation => rollout.validation_sampling(self.stop_ids.clone()),
        }
    }

    /// Fails unless the device holds this version: nothing is sampled or trained from other weights.
    ///
    /// # Errors
    /// Both versions.
    pub async fn check_version(&self, told: PolicyVersion) -> Result<(), RankError> {
        let held = self
            .device
            .call("reading the policy version", |device| device.policy_version)
            .await
            .map_err(RankError::us)?;
        if held == told {
            return Ok(());
        }
        Err(RankError::us(anyhow!(
            "told to work with policy version {told}, but rank {} holds {held}",
            self.rank
        )))
    }

    /// One training step: figures, new version, hash of the new weights.
    ///
    /// # Errors
    /// The learner's, with its owner.
    pub async fn train(
        &self,
        shard: TrainShard,
    ) -> Result<(BTreeMap<String, f64>, PolicyVersion, String), RankError> {
        let (planned, on_cpu) = (self.plan.peak_bytes(), self.place == Place::Cpu);
        let work = move |device: &mut agentfly_policy::device::Device<LearnerSeat>| {
            let learner = device
                .extra
                .as_mut()
                .context("the collective group was never formed")
                .map_err(RankError::us)?;
            // Its memory is the activations' now; no chain runs, and what it held is of no use to the next weights.
            device.engine.forget_weights();
            let update = info_span!(target: TRACE, "update the policy", lane = "device");
            let stats =
                update.in_scope(|| learner.train(&mut device.decoder, &shard)).map_err(learner_error)?;
            let attest = info_span!(target: TRACE, "hash the weights", lane = "device");
            let hash = attest.in_scope(|| learner.weights_hash(&device.decoder)).map_err(learner_error)?;
            device.policy_version = device.policy_version.next();
            let mut metrics = stats.metrics;
            let phases = stats.phases;
            metrics.insert("timing_s/ref".to_owned(), phases.reference);
            metrics.insert("timing_s/old_log_prob".to_owned(), phases.old_log_prob);
            metrics.insert("timing_s/forward_backward".to_owned(), phases.forward_backward);
            metrics.insert("timing_s/all_reduce".to_owned(), phases.all_reduce);
            metrics.insert("timing_s/optimizer".to_owned(), phases.optimizer);
            metrics.insert("timing_s/all_gather".to_owned(), phases.all_gather);
            metrics.extend(memory_metrics(planned, on_cpu));
            Ok((metrics, device.policy_version, hash))
        };
        self.device.call("a training step", work).await.map_err(RankError::us)?
    }
}

/// The plan beside what was measured. On CPUs a rank's peak is its process's; how much of a GPU was taken is not known
/// here.
fn memory_metrics(planned: u64, on_cpu: bool) -> Vec<(String, f64)> {
    let node = memory();
    let mut metrics = vec![
        ("perf/max_memory_planned_gb".to_owned(), planned as f64 / GB),
        (
            "perf/cpu_memory_used_gb".to_owned(),
            node.total_bytes.saturating_sub(node.available_bytes) as f64 / GB,
        ),
    ];
    if let Some(peak) = peak_bytes().filter(|_| on_cpu) {
        tracing::debug!(planned, peak, "memory of this rank in bytes");
        metrics.push(("perf/max_memory_allocated_gb".to_owned(), peak as f64 / GB));
    }
    metrics
}
