//! `Trajectories`: finished chains in, train shards out, in chunks.

use agentfly_common::trajectory::Trajectory;
use agentfly_common::wire::chunks;
use agentfly_proto::v1::{self as pb, trajectories_server::Trajectories, upload_part};
use prost::Message;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};

use super::{HELLO_DEADLINE, Services};
use crate::scheduler::wire;

/// Largest encoded trajectory, bytes: some four million tokens.
const TRAJECTORY_BYTES: usize = 64 << 20;
/// Chunks of a shard on their way to a rank.
const CHUNKS_AHEAD: usize = 4;

#[tonic::async_trait]
impl Trajectories for Services {
    type FetchTrainShardStream = ReceiverStream<Result<pb::Chunk, Status>>;

    async fn upload(
        &self,
        request: Request<Streaming<pb::UploadPart>>,
    ) -> Result<Response<pb::UploadAck>, Status> {
        let mut parts = request.into_inner();
        let Some(upload_part::Kind::Header(pb::UploadHeader { rank: Some(rank), shard_id })) =
            next(&mut parts).await?
        else {
            return Err(Status::invalid_argument(
                "the first part of an upload must be its header, with a rank",
            ));
        };
        let encoded = assemble(&mut parts).await?;
        let broken = |e: &dyn std::fmt::Display| {
            Status::invalid_argument(format!(
                "a chain of rank {} cannot be used: {e}; please report this",
                rank.rank
            ))
        };
        let message = pb::Trajectory::decode(encoded.as_slice()).map_err(|e| broken(&e))?;
        let trajectory = Trajectory::try_from(message).map_err(|e| broken(&e))?;
        let duplicate = self.scheduler.uploaded(wire::rank_from(rank), shard_id, trajectory).await?;
        Ok(Response::new(pb::UploadAck { duplicate }))
    }

    async fn fetch_train_shard(
        &self,
        request: Request<pb::FetchTrainShardRequest>,
    ) -> Result<Response<Self::FetchTrainShardStream>, Status> {
        let pb::FetchTrainShardRequest { rank, step } = request.into_inner();
        let rank =
            wire::rank_from(rank.ok_or_else(|| Status::invalid_argument("a fetch must name its rank"))?);
        let shard = self.shelf.get(&rank, step).ok_or_else(|| {
            Status::not_found(format!(
                "there is no shard of step {step} for rank {} of {}",
                rank.rank, rank.job
            ))
        })?;
        let (out, stream) = tokio::sync::mpsc::channel(CHUNKS_AHEAD);
        let stop = self.stop.clone();
        self.tasks.spawn(async move {
            let send = async {
                for chunk in chunks(pb::TrainShard::from(shard.as_ref()).encode_to_vec()) {
                    if out.send(Ok(chunk)).await.is_err() {
                        return;
                    }
                }
            };
            stop.run_until_cancelled(send).await;
        });
        Ok(Response::new(ReceiverStream::new(stream)))
    }
}

/// The next part's content, within [`HELLO_DEADLINE`]: a worker sends a finished chain without pausing.
async fn next(parts: &mut Streaming<pb::UploadPart>) -> Result<Option<upload_part::Kind>, Status> {
    let late = || Status::deadline_exceeded(format!("the upload paused for more than {HELLO_DEADLINE:?}"));
    let part = tokio::time::timeout(HELLO_DEADLINE, parts.message()).await.map_err(|_| late())??;
    Ok(part.and_then(|part| part.kind))
}

async fn assemble(parts: &mut Streaming<pb::UploadPart>) -> Result<Vec<u8>, Status> {
    let mut encoded = Vec::new();
    loop {
        let Some(upload_part::Kind::Chunk(chunk)) = next(parts).await? else {
            return Err(Status::invalid_argument(format!("the upload ended after {} bytes", encoded.len())));
        };
        if encoded.len() + chunk.data.len() > TRAJECTORY_BYTES {
            return Err(Status::resource_exhausted(format!(
                "a chain of more than {} MiB; lower actor_rollout_ref.rollout.max_model_len",
                TRAJECTORY_BYTES >> 20
            )));
        }
        encoded.extend_from_slice(&chunk.data);
        if chunk.last {
            return Ok(encoded);
        }
    }
}
