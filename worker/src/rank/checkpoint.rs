//! A checkpoint's files from this rank: the model in Hugging Face layout, the learner's state beside it.
//!
//! The coordinator made the folder, adds its own part and commits by renaming; nothing here is final.

use agentfly_policy::placement::save;
use agentfly_proto::v1::{CheckpointWritten, WriteCheckpoint, rank_message::Kind as Say};
use anyhow::Context as _;

use super::setup::MODEL_DIR;
use super::{Job, RankError, Reporter};

/// Writes model and learner into the folder the coordinator named.
pub(super) async fn write(job: &Job, reporter: &Reporter, write: WriteCheckpoint) -> Result<(), RankError> {
    reporter.activity.set(format!("writing the checkpoint of step {}", write.step));
    let (dir, source) = (std::path::PathBuf::from(&write.dir), job.model_dir.clone());
    let work = move |device: &mut agentfly_policy::device::Device<super::job::LearnerSeat>| {
        let learner = device.extra.as_ref().context("there is no learner to save").map_err(RankError::us)?;
        save(&dir.join(MODEL_DIR), &device.decoder, &source).map_err(RankError::operator)?;
        learner.save(&dir).map_err(RankError::operator)
    };
    job.device.call("writing a checkpoint", work).await.map_err(RankError::us)??;
    reporter
        .say(Say::CheckpointWritten(CheckpointWritten { step: write.step }))
        .await
        .map_err(RankError::outside)
}
