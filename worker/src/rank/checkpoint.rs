//! A checkpoint's files from this rank: its share of the learner's state; of rank 0 also the model in Hugging Face
//! layout, which is the same on every rank.
//!
//! The coordinator made the folder, waits for every rank, adds its own part and commits by renaming; nothing here is
//! final.

use agentfly_common::telemetry::TRACE;
use agentfly_policy::placement::save;
use agentfly_proto::v1::{CheckpointWritten, WriteCheckpoint, rank_message::Kind as Say};
use anyhow::Context as _;
use tracing::info_span;

use super::setup::MODEL_DIR;
use super::{Job, RankError, Reporter};

/// Writes this rank's files into the folder the coordinator named; what to report.
pub(super) async fn write(job: &Job, reporter: &Reporter, write: WriteCheckpoint) -> Result<Say, RankError> {
    reporter.activity.set(format!("writing the checkpoint of step {}", write.step));
    let (dir, source, rank) = (std::path::PathBuf::from(&write.dir), job.model_dir.clone(), job.rank);
    let work = move |device: &mut agentfly_policy::device::Device<super::job::LearnerSeat>| {
        let learner = device.extra.as_ref().context("there is no learner to save").map_err(RankError::us)?;
        if rank == 0 {
            let _span = info_span!(target: TRACE, "write the model", lane = "device").entered();
            save(&dir.join(MODEL_DIR), &device.decoder, &source).map_err(RankError::operator)?;
        }
        let _span = info_span!(target: TRACE, "write the optimizer's state", lane = "device").entered();
        learner.save(&dir).map_err(RankError::operator)
    };
    let files = job.device.call("writing a checkpoint", work).await.map_err(RankError::us)??;
    Ok(Say::CheckpointWritten(CheckpointWritten { step: write.step, files }))
}
