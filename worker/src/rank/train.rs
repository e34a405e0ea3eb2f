//! A training step: fetch this rank's shard, update the policy, attest the new weights.

use std::time::Duration;

use agentfly_common::batch::TrainShard;
use agentfly_common::ids::PolicyVersion;
use agentfly_common::telemetry::TRACE;
use agentfly_policy::learner::{LearnerError, NonFinite};
use agentfly_proto::v1::{
    self as pb, FetchTrainShardRequest, RunTrain, TrainDone, rank_message::Kind as Say,
};
use anyhow::{Context as _, anyhow};
use backon::{ExponentialBuilder, Retryable as _};
use prost::Message as _;
use tracing::{Instrument as _, info_span};

use super::{Job, RankError, Reporter};

/// Further tries of a fetch that broke; the coordinator keeps the batch until the step is over.
const FETCH_TRIES: usize = 4;
/// How long a batch may take to arrive, all tries together.
const FETCH_DEADLINE: Duration = Duration::from_secs(300);

/// Trains on one step's shard; what to report: figures, new version and hash.
pub(super) async fn run(job: &Job, reporter: &Reporter, train: RunTrain) -> Result<Say, RankError> {
    job.check_version(PolicyVersion(train.policy_version)).await?;
    reporter.activity.set(format!("fetching the batch of step {}", train.step));
    let span = info_span!(target: TRACE, "fetch the batch");
    let shard = fetch(reporter, train.step).instrument(span).await?;
    reporter.activity.set(format!("training step {}", train.step));
    let (metrics, version, hash) = job.train(shard).await?;
    Ok(Say::TrainDone(TrainDone {
        step: train.step,
        policy_version: version.0,
        weights_hash: hash,
        metrics: metrics.into_iter().collect(),
    }))
}

/// Fetches this rank's part of a step's batch, from the start again where the way breaks.
async fn fetch(reporter: &Reporter, step: u64) -> Result<TrainShard, RankError> {
    let tries = again(|| receive(reporter, step), ExponentialBuilder::default());
    let encoded = tokio::time::timeout(FETCH_DEADLINE, tries)
        .await
        .map_err(|_| tonic::Status::deadline_exceeded(format!("it did not arrive within {FETCH_DEADLINE:?}")))
        .and_then(|received| received)
        .map_err(|status| {
            RankError::outside(anyhow!("fetching the batch of step {step} failed: {}", status.message()))
        })?;
    let message = pb::TrainShard::decode(encoded.as_slice())
        .context("the batch does not decode")
        .map_err(RankError::us)?;
    TrainShard::try_from(message).map_err(RankError::us)
}

/// Repeats what another moment may mend: faults of the way, as for uploads. A stream that is reset half-way is
/// [`tonic::Code::Internal`]; the coordinator itself answers a fetch with no such code.
async fn again<F: Future<Output = Result<Vec<u8>, tonic::Status>>>(
    attempt: impl FnMut() -> F,
    delays: ExponentialBuilder,
) -> Result<Vec<u8>, tonic::Status> {
    use tonic::Code::{DeadlineExceeded, Internal, Unavailable, Unknown};
    attempt
        .retry(delays.with_max_times(FETCH_TRIES))
        .when(|status| matches!(status.code(), Unavailable | DeadlineExceeded | Unknown | Internal))
        .notify(|status, delay| {
            tracing::warn!(error = status.message(), ?delay, "fetching the batch broke; trying again");
        })
        .await
}

/// One try: the whole encoded shard.
async fn receive(reporter: &Reporter, step: u64) -> Result<Vec<u8>, tonic::Status> {
    let request = FetchTrainShardRequest { rank: Some(reporter.id.clone()), step };
    let mut client = reporter.connection.trajectories();
    let mut stream = client.fetch_train_shard(request).await?.into_inner();
    let (mut encoded, mut whole) = (Vec::new(), false);
    while let Some(chunk) = stream.message().await? {
        encoded.extend_from_slice(&chunk.data);
        whole = chunk.last;
    }
    if whole {
        return Ok(encoded);
    }
    Err(tonic::Status::unavailable(format!("the stream broke off after {} bytes", encoded.len())))
}

/// Who must act on a learner's error.
pub(super) fn learner_error(error: LearnerError) -> RankError {
    match error {
        LearnerError::Config { .. } => RankError::operator(error),
        // Another rank is gone or refused: its own report says why.
        LearnerError::Collective(_)
        | LearnerError::PeerRefused { .. }
        | LearnerError::TooManySkips { last: NonFinite::Elsewhere, .. } => RankError::outside(error),
        other => RankError::us(other),
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;
    use std::time::Duration;

    use agentfly_common::error::Whose;

    use super::*;

    /// Fails with this code until the last try that is allowed; the tries it took, and whether it came through.
    async fn fetched_after(code: tonic::Code, failures: usize) -> (usize, bool) {
        let tries = Cell::new(0);
        let attempt = || async {
            tries.set(tries.get() + 1);
            if tries.get() > failures { Ok(vec![7]) } else { Err(tonic::Status::new(code, "broke")) }
        };
        let at_once =
            ExponentialBuilder::default().with_min_delay(Duration::ZERO).with_max_delay(Duration::ZERO);
        let ended = again(attempt, at_once).await;
        (tries.get(), ended.is_ok())
    }

    #[test]
    fn whose_loss_was_not_finite_is_the_jobs_cause_and_not_who_heard_of_it() {
        let skipped =
            |last| learner_error(LearnerError::TooManySkips { skipped: 11, allowed: 10, last }).whose;
        assert_eq!(skipped(NonFinite::Elsewhere), Whose::Outside);
        assert_eq!(skipped(NonFinite::GradNorm(f64::NAN)), Whose::Us);
    }

    #[tokio::test]
    async fn a_broken_stream_is_fetched_again_and_a_refusal_is_not() {
        assert_eq!(fetched_after(tonic::Code::Unavailable, 1).await, (2, true));
        assert_eq!(fetched_after(tonic::Code::Unknown, FETCH_TRIES).await, (5, true));
        assert_eq!(fetched_after(tonic::Code::Unavailable, 9).await, (5, false));
        assert_eq!(fetched_after(tonic::Code::NotFound, 1).await, (1, false));
    }
}
