//! A training job of the tiny model, with settings as a user gives them.

use std::path::Path;

use crate::tree::root;

/// The settings of the guide's `train.sh`, on the tiny model and two CPU ranks; `more` wins.
#[must_use]
pub fn settings(more: &[&str]) -> Vec<String> {
    let model = root().join("deploy/models/tiny").display().to_string();
    let data = |name: &str| root().join("deploy/data").join(name).display().to_string();
    let mut all = vec![
        "train".to_owned(),
        "algorithm.adv_estimator=grpo".to_owned(),
        format!("data.train_files={}", data("train.json")),
        format!("data.val_files={}", data("val.json")),
        "data.train_batch_size=16".to_owned(),
        "agent.agent_type=code".to_owned(),
        "agent.tools=[code_interpreter]".to_owned(),
        "agent.template=qwen-chat".to_owned(),
        format!("agent.model_name_or_path={model}"),
        "agent.max_steps=4".to_owned(),
        "agent.backend=async_verl".to_owned(),
        "agent.reward_name=math_reward_format".to_owned(),
        "agent.num_chains=8".to_owned(),
        "agent.use_agent=True".to_owned(),
        "actor_rollout_ref.actor.optim.lr=3e-4".to_owned(),
        "actor_rollout_ref.actor.ppo_mini_batch_size=64".to_owned(),
        format!("actor_rollout_ref.model.path={model}"),
        "actor_rollout_ref.actor.use_kl_loss=True".to_owned(),
        "actor_rollout_ref.actor.kl_loss_type=mse".to_owned(),
        "actor_rollout_ref.actor.kl_loss_coef=0.001".to_owned(),
        "actor_rollout_ref.actor.entropy_coeff=0.001".to_owned(),
        "trainer.n_gpus_per_node=2".to_owned(),
        "trainer.nnodes=1".to_owned(),
        "trainer.project_name=test".to_owned(),
        "trainer.experiment_name=run".to_owned(),
    ];
    all.extend(more.iter().map(|&setting| setting.to_owned()));
    all.retain({
        let keys: Vec<String> =
            more.iter().filter_map(|m| m.split_once('=')).map(|(k, _)| k.to_owned()).collect();
        let more: Vec<String> = more.iter().map(|&m| m.to_owned()).collect();
        move |setting| {
            let key = setting.split_once('=').map_or("", |(key, _)| key);
            more.contains(setting) || !keys.iter().any(|given| given == key)
        }
    });
    all
}

/// A JSON file.
///
/// # Errors
/// When it cannot be read or is no JSON.
pub fn json(path: &Path) -> anyhow::Result<serde_json::Value> {
    let text = std::fs::read_to_string(path).map_err(|e| anyhow::anyhow!("{}: {e}", path.display()))?;
    Ok(serde_json::from_str(&text)?)
}

/// The lines of a JSONL file.
///
/// # Errors
/// When it cannot be read or a line is no JSON.
pub fn json_lines(path: &Path) -> anyhow::Result<Vec<serde_json::Value>> {
    let text = std::fs::read_to_string(path).map_err(|e| anyhow::anyhow!("{}: {e}", path.display()))?;
    text.lines().map(|line| Ok(serde_json::from_str(line)?)).collect()
}

/// The lines of a zstd JSONL file.
///
/// # Errors
/// When it cannot be read or a line is no JSON.
pub fn zstd_json_lines(path: &Path) -> anyhow::Result<Vec<serde_json::Value>> {
    let file = std::fs::File::open(path).map_err(|e| anyhow::anyhow!("{}: {e}", path.display()))?;
    let text = std::io::read_to_string(zstd::Decoder::new(file)?)?;
    text.lines().map(|line| Ok(serde_json::from_str(line)?)).collect()
}
