//! The fake rank: follows the protocol of a rank, with invented chains and a weights' hash that is a number.

use agentfly_common::batch::TrainShard;
use agentfly_common::ids::{ChainKey, PolicyVersion, Purpose};
use agentfly_common::trajectory::{FinishReason, Outcome, Reward, Timings, Trajectory};
use agentfly_common::wire::chunks;
use agentfly_proto::v1::{self as pb, rank_command, rank_message, upload_part};
use pb::cluster_client::ClusterClient;
use pb::trajectories_client::TrajectoriesClient;
use prost::Message;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;

use super::worker::Connection;

pub(crate) struct FakeRank {
    id: pb::RankId,
    connection: Connection,
    generates: bool,
}

impl FakeRank {
    pub(crate) fn new(id: pb::RankId, connection: Connection, generates: bool) -> Self {
        Self { id, connection, generates }
    }

    pub(crate) async fn live(self) {
        let (said, outbound) = mpsc::channel(64);
        let say = async |kind| said.send(pb::RankMessage { kind: Some(kind) }).await.unwrap();
        say(rank_message::Kind::Hello(pb::RankHello { rank: Some(self.id.clone()), pid: 1 })).await;
        let mut cluster = ClusterClient::new(self.connection.clone());
        let mut commands = cluster.rank_session(ReceiverStream::new(outbound)).await.unwrap().into_inner();
        let mut version = 0;
        while let Ok(Some(command)) = commands.message().await {
            match command.kind.unwrap() {
                rank_command::Kind::Prepare(prepare) => {
                    assert!(prepare.config_json.contains("\"train_files\""));
                    assert_eq!(prepare.world_size, 2);
                    version = prepare.policy_version;
                    if self.id.rank == 0 {
                        say(rank_message::Kind::StoreOpened(pb::StoreOpened {
                            host: "127.0.0.1".into(),
                            port: 9,
                        }))
                        .await;
                    }
                }
                rank_command::Kind::FormGroup(group) => {
                    assert_eq!(group.port, 9);
                    say(rank_message::Kind::Ready(pb::Ready {
                        policy_version: version,
                        weights_hash: hash(version),
                        sandbox_tier: "root".into(),
                    }))
                    .await;
                }
                rank_command::Kind::RunRollout(run) if self.generates => {
                    assert_eq!(run.policy_version, version);
                    let shard_id = run.shard_id;
                    self.generate(run).await;
                    say(rank_message::Kind::Spans(spans("rollout"))).await;
                    let metrics = [("engine/tokens".to_owned(), 3.0)].into();
                    say(rank_message::Kind::RolloutDone(pb::RolloutDone { shard_id, metrics })).await;
                }
                rank_command::Kind::RunRollout(_) => {}
                rank_command::Kind::RunTrain(run) => {
                    let shard = self.fetch(run.step).await;
                    assert_eq!((shard.step, shard.policy_version), (run.step, PolicyVersion(version)));
                    version += 1;
                    say(rank_message::Kind::Spans(spans("train"))).await;
                    let metrics = [("actor/grad_norm".to_owned(), 1.5)].into();
                    let done = pb::TrainDone {
                        step: run.step,
                        policy_version: version,
                        weights_hash: hash(version),
                        metrics,
                    };
                    say(rank_message::Kind::TrainDone(done)).await;
                }
                rank_command::Kind::WriteCheckpoint(write) => {
                    let file = format!("optimizer-{}.safetensors", self.id.rank);
                    std::fs::write(std::path::Path::new(&write.dir).join(&file), hash(version)).unwrap();
                    let written = pb::CheckpointWritten { step: write.step, files: vec![file] };
                    say(rank_message::Kind::CheckpointWritten(written)).await;
                }
                rank_command::Kind::Stop(_) => return,
            }
        }
    }

    /// Every second chain is right; each is sent twice, which must do no harm.
    async fn generate(&self, run: pb::RunRollout) {
        let purpose = Purpose::try_from(run.purpose()).unwrap();
        for group in run.groups {
            let row: serde_json::Value = serde_json::from_str(&group.row_json).unwrap();
            assert_eq!(row["id"], group.prompt_id.as_str());
            for chain in 0..run.chains {
                let right = (group.index + chain) % 2 == 0;
                let key = ChainKey { purpose, step: run.step, group: group.index, chain };
                let acc = if right { 1.0 } else { 0.0 };
                let trajectory = Trajectory {
                    key,
                    prompt_id: group.prompt_id.clone(),
                    policy_version: PolicyVersion(run.policy_version),
                    token_ids: vec![1, 2, 3],
                    loss_mask: vec![false, true, true],
                    log_probs: vec![0.0, -0.5, -0.25],
                    messages: Vec::new(),
                    outcome: Outcome::Finished { reason: FinishReason::NoToolCalls },
                    reward: Reward { value: acc, parts: [("acc".to_owned(), acc)].into() },
                    timings: Timings { turns: 1, total_seconds: 0.01, ..Timings::default() },
                };
                assert!(!self.upload(run.shard_id, &trajectory).await);
                assert!(self.upload(run.shard_id, &trajectory).await, "the second time it is a duplicate");
            }
        }
    }

    async fn upload(&self, shard_id: u64, trajectory: &Trajectory) -> bool {
        let header = pb::UploadHeader { rank: Some(self.id.clone()), shard_id };
        let mut parts = vec![upload_part::Kind::Header(header)];
        parts.extend(chunks(pb::Trajectory::from(trajectory).encode_to_vec()).map(upload_part::Kind::Chunk));
        let parts: Vec<_> = parts.into_iter().map(|kind| pb::UploadPart { kind: Some(kind) }).collect();
        let mut client = TrajectoriesClient::new(self.connection.clone());
        client.upload(tokio_stream::iter(parts)).await.unwrap().into_inner().duplicate
    }

    async fn fetch(&self, step: u64) -> TrainShard {
        let request = pb::FetchTrainShardRequest { rank: Some(self.id.clone()), step };
        let mut client = TrajectoriesClient::new(self.connection.clone());
        let mut parts = client.fetch_train_shard(request).await.unwrap().into_inner();
        let mut encoded = Vec::new();
        while let Some(chunk) = parts.message().await.unwrap() {
            encoded.extend(chunk.data);
        }
        pb::TrainShard::decode(encoded.as_slice()).unwrap().try_into().unwrap()
    }
}

/// One millisecond of work that ends now, told by a clock that is an hour behind.
fn spans(name: &str) -> pb::Spans {
    let sent_micros = agentfly_common::wire::unix_micros() - 3_600_000_000;
    let span = pb::Span {
        name: name.to_owned(),
        lane: "rank".to_owned(),
        start_micros: sent_micros - 1000,
        micros: 1000,
        ..pb::Span::default()
    };
    pb::Spans { spans: vec![span], dropped: 0, sent_micros }
}

fn hash(version: u64) -> String {
    format!("weights {version}")
}
