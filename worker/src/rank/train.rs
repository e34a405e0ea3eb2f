//! A training step: fetch this rank's shard, update the policy, attest the new weights.

use std::time::Duration;

use agentfly_common::batch::TrainShard;
use agentfly_common::ids::PolicyVersion;
use agentfly_policy::learner::LearnerError;
use agentfly_proto::v1::{
    self as pb, FetchTrainShardRequest, RunTrain, TrainDone, rank_message::Kind as Say,
};
use anyhow::{Context as _, anyhow};
use prost::Message as _;

use super::{Job, RankError, Reporter};

/// How long a batch may take to arrive.
const FETCH_DEADLINE: Duration = Duration::from_secs(300);

/// Trains on one step's shard and reports figures, new version and hash.
pub(super) async fn run(job: &Job, reporter: &Reporter, train: RunTrain) -> Result<(), RankError> {
    job.check_version(PolicyVersion(train.policy_version)).await?;
    reporter.activity.set(format!("fetching the batch of step {}", train.step));
    let shard = fetch(reporter, train.step).await?;
    reporter.activity.set(format!("training step {}", train.step));
    let (metrics, version, hash) = job.train(shard).await?;
    let done = TrainDone {
        step: train.step,
        policy_version: version.0,
        weights_hash: hash,
        metrics: metrics.into_iter().collect(),
    };
    reporter.say(Say::TrainDone(done)).await.map_err(RankError::outside)
}

async fn fetch(reporter: &Reporter, step: u64) -> Result<TrainShard, RankError> {
    let request = FetchTrainShardRequest { rank: Some(reporter.id.clone()), step };
    let broke = |status: tonic::Status| {
        RankError::outside(anyhow!("fetching the batch of step {step} failed: {}", status.message()))
    };
    let mut client = reporter.connection.trajectories();
    let (mut encoded, mut whole) = (Vec::new(), false);
    let transfer = async {
        let mut stream = client.fetch_train_shard(request).await.map_err(broke)?.into_inner();
        while let Some(chunk) = stream.message().await.map_err(broke)? {
            encoded.extend_from_slice(&chunk.data);
            whole = chunk.last;
        }
        Ok(())
    };
    tokio::time::timeout(FETCH_DEADLINE, transfer).await.map_err(|_| {
        RankError::outside(anyhow!(
            "the coordinator did not send the batch of step {step} within {FETCH_DEADLINE:?}"
        ))
    })??;
    if !whole {
        return Err(RankError::outside(anyhow!(
            "the batch of step {step} broke off after {} bytes",
            encoded.len()
        )));
    }
    let message = pb::TrainShard::decode(encoded.as_slice())
        .context("the batch does not decode")
        .map_err(RankError::us)?;
    TrainShard::try_from(message).map_err(RankError::us)
}

/// Who must act on a learner's error.
pub(super) fn learner_error(error: LearnerError) -> RankError {
    match error {
        LearnerError::Config { .. } => RankError::operator(error),
        // Another rank is gone or refused: its own report says why.
        LearnerError::Collective(_) | LearnerError::PeerRefused { .. } => RankError::outside(error),
        other => RankError::us(other),
    }
}
