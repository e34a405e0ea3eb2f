//! A rollout shard: every chain of its groups as a task, each trajectory uploaded as its chain ends.
//!
//! Generation, tools and rewards of different chains overlap; the engine batches whatever generates at the
//! same time. A chain that would fail the same way again fails the shard; a fault of the machinery travels
//! to the coordinator as such, which asks again; a chain that ran into a limit of its own is finished like any
//! other, and counted where the limit is one of time.

use std::sync::Arc;
use std::time::Duration;

use agentfly_agent::chain::{ChainError, ChainSpec, question_of, run_chain};
use agentfly_common::ids::{ChainKey, PolicyVersion, Purpose};
use agentfly_common::sampling::SamplingParams;
use agentfly_common::telemetry::TRACE;
use agentfly_common::trajectory::{FinishReason, Outcome, Trajectory};
use agentfly_common::wire::chunks;
use agentfly_proto::v1::{
    self as pb, RolloutDone, RunRollout, UploadHeader, UploadPart, rank_message::Kind as Say, upload_part,
};
use anyhow::{Context as _, anyhow};
use backon::{ExponentialBuilder, Retryable as _};
use prost::Message as _;
use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tokio::time::Instant;
use tracing::{Instrument as _, info_span};

use super::{Job, RankError, Reporter};

/// Tries of one upload; the coordinator takes the same chain twice without harm.
const UPLOAD_TRIES: usize = 4;
/// How long the coordinator may take to accept one trajectory.
const UPLOAD_DEADLINE: Duration = Duration::from_secs(60);

/// No deadline is further away: sums of instants must not overflow.
const LONGEST: Duration = Duration::from_secs(365 * 24 * 3600);

/// Runs a shard to its end; what to report of it.
pub(super) async fn run(job: Arc<Job>, reporter: Reporter, shard: RunRollout) -> Result<Say, RankError> {
    let started = Instant::now();
    let purpose = Purpose::try_from(shard.purpose()).map_err(RankError::us)?;
    let version = PolicyVersion(shard.policy_version);
    job.check_version(version).await?;
    let chains = chain_specs(&job, &shard, purpose, version, started)?;
    let total = chains.len();
    reporter.activity.set(format!("rollout of step {}: 0 of {total} chains", shard.step));
    let limit = job.config.agent.max_concurrent_chains.map_or(Semaphore::MAX_PERMITS, |n| n as usize);
    let permits = Arc::new(Semaphore::new(limit));
    let mut running = JoinSet::new();
    for spec in chains {
        let (job, reporter, permits) = (job.clone(), reporter.clone(), permits.clone());
        let shard_id = shard.shard_id;
        running.spawn(async move {
            let _permit =
                permits.acquire().await.context("the semaphore is never closed").map_err(RankError::us)?;
            let title = format!("chain {}.{}", spec.key.group, spec.key.chain);
            let chain = async {
                let trajectory = run_chain(&spec, &job.chain_deps).await.map_err(chain_error)?;
                let upload = upload(&reporter, shard_id, &trajectory);
                upload.instrument(info_span!(target: TRACE, "upload")).await?;
                Ok::<_, RankError>(trajectory)
            };
            let trajectory =
                chain.instrument(info_span!(target: TRACE, "chain", lane = "chain", title)).await?;
            let timed_out = trajectory.outcome == Outcome::Finished { reason: FinishReason::Timeout };
            Ok::<_, RankError>((trajectory.sampled_tokens(), timed_out))
        });
    }
    let (mut done, mut sampled_tokens, mut timeouts) = (0, 0, 0_u32);
    while let Some(finished) = running.join_next().await {
        let (tokens, timed_out) =
            finished.map_err(|e| RankError::us(anyhow!("a chain's task broke: {e}")))??;
        done += 1;
        sampled_tokens += tokens;
        timeouts += u32::from(timed_out);
        reporter.activity.set(format!("rollout of step {}: {done} of {total} chains", shard.step));
    }
    let seconds = started.elapsed().as_secs_f64();
    let metrics = [
        ("rollout/seconds_max".to_owned(), seconds),
        ("rollout/sampled_tokens_total".to_owned(), sampled_tokens as f64),
        ("rollout/chains_total".to_owned(), total as f64),
        ("rollout/timeout_chains_total".to_owned(), f64::from(timeouts)),
    ];
    Ok(Say::RolloutDone(RolloutDone { shard_id: shard.shard_id, metrics: metrics.into_iter().collect() }))
}

/// One spec per chain of the shard.
fn chain_specs(
    job: &Job,
    shard: &RunRollout,
    purpose: Purpose,
    policy_version: PolicyVersion,
    started: Instant,
) -> Result<Vec<ChainSpec>, RankError> {
    let sampling = job.sampling(purpose);
    let time_limit = Duration::from_secs(job.config.trainer.chain_timeout_seconds).min(LONGEST);
    let step_seconds = shard.deadline_seconds.clamp(1.0, LONGEST.as_secs_f64());
    let step_deadline = started + Duration::from_secs_f64(step_seconds);
    let mut specs = Vec::new();
    for group in &shard.groups {
        let row: Arc<serde_json::Map<String, serde_json::Value>> = Arc::new(
            serde_json::from_str(&group.row_json)
                .with_context(|| format!("row {} is not a JSON object", group.prompt_id))
                .map_err(RankError::us)?,
        );
        let question = question_of(&group.prompt_id, &row).map_err(RankError::operator)?.to_owned();
        specs.extend((0..shard.chains).map(|chain| ChainSpec {
            key: ChainKey { purpose, step: shard.step, group: group.index, chain },
            prompt_id: group.prompt_id.clone(),
            question: question.clone(),
            row: row.clone(),
            policy_version,
            seed: job.seed,
            max_turns: job.config.agent.max_turns,
            max_model_len: Some(job.plan.window),
            sampling: SamplingParams::clone(&sampling),
            time_limit,
            step_deadline,
        }));
    }
    Ok(specs)
}

fn chain_error(error: ChainError) -> RankError {
    match error {
        ChainError::Reward { .. }
        | ChainError::Template { .. }
        | ChainError::NothingSampled { .. }
        | ChainError::StepOver { .. } => RankError::operator(error),
        ChainError::Tokenizer { .. } | ChainError::Broken(_) => RankError::us(error),
    }
}

/// Sends one trajectory, again if the way breaks, and waits until it is taken.
async fn upload(reporter: &Reporter, shard_id: u64, trajectory: &Trajectory) -> Result<(), RankError> {
    let encoded = pb::Trajectory::from(trajectory).encode_to_vec();
    let send = || async {
        let header = UploadHeader { rank: Some(reporter.id.clone()), shard_id };
        let parts = std::iter::once(upload_part::Kind::Header(header))
            .chain(chunks(encoded.clone()).map(upload_part::Kind::Chunk))
            .map(|kind| UploadPart { kind: Some(kind) });
        let call = reporter.connection.trajectories();
        let stream = futures::stream::iter(parts.collect::<Vec<_>>());
        let mut client = call;
        match tokio::time::timeout(UPLOAD_DEADLINE, client.upload(stream)).await {
            Ok(answer) => answer.map(|_| ()),
            Err(_) => {
                Err(tonic::Status::deadline_exceeded("the coordinator did not take the trajectory in time"))
            }
        }
    };
    let worth_another_try = |status: &tonic::Status| {
        matches!(
            status.code(),
            tonic::Code::Unavailable | tonic::Code::DeadlineExceeded | tonic::Code::Unknown
        )
    };
    send.retry(ExponentialBuilder::default().with_max_times(UPLOAD_TRIES))
        .when(worth_another_try)
        .await
        .map_err(|status| {
            RankError::outside(anyhow!("uploading {} failed: {}", trajectory.key, status.message()))
        })
}
