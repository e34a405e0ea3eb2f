//! `worker doctor` says what a machine has and whether a job fits it, before anything is started or loaded.
#![allow(clippy::unwrap_used, reason = "a story that cannot go on fails here")]

use std::path::{Path, PathBuf};
use std::time::Duration;

use agentfly_tests::cluster::{Playground, Ran};
use agentfly_tests::tree::root;
use serde_json::{Value, json};

const SOON: Duration = Duration::from_secs(60);

async fn doctor(playground: &Playground, args: &[&str]) -> Ran {
    let all: Vec<&str> = ["doctor"].into_iter().chain(args.iter().copied()).collect();
    playground.run("worker", &all, SOON).await.unwrap()
}

#[track_caller]
fn assert_says(said: &str, parts: &[&str]) {
    for part in parts {
        assert!(said.contains(part), "{part:?} is not in:\n{said}");
    }
}

fn tiny() -> String {
    root().join("deploy/models/tiny").display().to_string()
}

/// A model of the size of Llama-3.1-405B: its configuration is all there is of it.
fn giant(folder: &Path) -> PathBuf {
    let dir = folder.join("giant");
    std::fs::create_dir(&dir).unwrap();
    let config = json!({
        "architectures": ["LlamaForCausalLM"], "hidden_size": 16_384, "num_hidden_layers": 126,
        "num_attention_heads": 128, "num_key_value_heads": 8, "intermediate_size": 53_248, "vocab_size": 128_256,
        "hidden_act": "silu", "rms_norm_eps": 1e-5, "rope_theta": 500_000.0, "max_position_embeddings": 131_072,
        "torch_dtype": "bfloat16",
    });
    std::fs::write(dir.join("config.json"), config.to_string()).unwrap();
    dir
}

#[tokio::test]
async fn the_machine_is_described_and_the_sandbox_is_tried() {
    let playground = Playground::new().unwrap();
    let Ran { code, stdout, stderr } = doctor(&playground, &[]).await;
    assert_eq!(code, Some(0), "{stdout}\n{stderr}");
    assert_says(&stdout, &["cores", "memory", "GPUs", "libtorch", "2.11.0", "sandbox for code", "yes, tier"]);
    assert_says(&stdout, &["worker doctor --model DIR"]);
    let command =
        playground.command("worker", &["doctor"]).env("AGENTFLY_SANDBOX_PYTHON", "/nowhere").output().await;
    let Ran { code, stderr, .. } = Ran::from(command.unwrap());
    assert_ne!(code, Some(0));
    assert_says(&stderr, &["tools and rewards cannot run", "/nowhere"]);
}

#[tokio::test]
async fn a_job_that_fits_gets_a_plan_with_its_parts() {
    let playground = Playground::new().unwrap();
    let Ran { code, stdout, stderr } = doctor(&playground, &["--model", &tiny(), "--num-ranks", "2"]).await;
    assert_eq!(code, Some(0), "{stdout}\n{stderr}");
    let parts = ["weights", "gradients", "optimizer", "KV cache", "activations", "peak", "for 2 ranks"];
    assert_says(&stdout, &parts);
    assert_says(&stdout, &["micro-batches of up to 2048 tokens", "a part in 2", "tools and rewards: "]);

    let args = ["--model", &tiny(), "--json", "--dtype", "bf16", "actor_rollout_ref.actor.use_kl_loss=True"];
    let report: Value = serde_json::from_str(&doctor(&playground, &args).await.stdout).unwrap();
    let plan = &report["job"]["plan"];
    assert_eq!(report["problems"], json!([]));
    assert_eq!(plan["precision"], "bf16");
    assert_eq!(plan["rank"]["reference"], plan["rank"]["weights"]);
    let parameters = report["job"]["parameters"].as_u64().unwrap();
    assert_eq!(plan["rank"]["optimizer"].as_u64(), Some(12 * parameters), "whole on the one rank");
    assert!(plan["rank"]["total_bytes"].as_u64() <= plan["budget_bytes"].as_u64(), "{plan}");

    let shared =
        doctor(&playground, &["--model", &tiny(), "--json", "--dtype", "bf16", "--num-ranks", "2"]).await;
    let report: Value = serde_json::from_str(&shared.stdout).unwrap();
    let plan = &report["job"]["plan"];
    assert_eq!(plan["optimizer_shards"], 2);
    assert_eq!(plan["rank"]["optimizer"].as_u64(), Some(6 * parameters), "each has its half");
    assert_eq!(plan["rank"]["gradients"].as_u64(), Some(4 * parameters), "and all gradients");
}

#[tokio::test]
async fn a_job_that_cannot_fit_is_refused_with_the_numbers_from_its_configuration_alone() {
    let playground = Playground::new().unwrap();
    let model = giant(playground.path());
    let Ran { code, stderr, .. } = doctor(&playground, &["--model", &model.display().to_string()]).await;
    assert_eq!(code, Some(64), "the operator must act: {stderr}");
    assert_says(
        &stderr,
        &["not enough memory: a rank needs at least", "of weights", "of optimizer", "a smaller model"],
    );
    let args = ["--json", "--model", &tiny(), "actor_rollout_ref.rollout.max_model_len=1025"];
    let Ran { code, stdout, .. } = doctor(&playground, &args).await;
    let report: Value = serde_json::from_str(&stdout).unwrap();
    assert_eq!((code, &report["job"]), (Some(64), &Value::Null));
    assert_says(report["problems"][0].as_str().unwrap(), &["max_model_len=1025", "trained for 1024 tokens"]);
}
