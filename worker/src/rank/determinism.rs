//! Whether a chain's tokens are the same bits whatever else is in its batch.
//!
//! What must stay true: a job that asks for it (`rollout.full_determinism`) runs nowhere else.

use std::path::Path;

use agentfly_common::config::Config;
use agentfly_common::model_dir::ModelConfig;
use agentfly_common::planner::Precision;
use agentfly_policy::placement::{Place, computes_batch_invariantly};
use anyhow::ensure;

/// Logs what this place does; refuses where the job asks for more.
///
/// # Errors
/// A model that cannot be read, or a place, precision or width of which the job cannot have what it asks for.
pub(super) fn check(
    place: Place,
    config: &Config,
    model_dir: &Path,
    precision: Precision,
) -> anyhow::Result<()> {
    let model = ModelConfig::from_dir(model_dir)?;
    let invariant = computes_batch_invariantly(&model, place, precision);
    let (verb, device) = (
        if invariant { "do not depend" } else { "depend" },
        match place {
            Place::Cpu => "this CPU",
            Place::Cuda(_) => "a GPU",
        },
    );
    tracing::info!("a chain's tokens {verb} on what else is in its batch ({precision}, {device})");
    ensure!(
        invariant || !config.actor_rollout_ref.rollout.full_determinism,
        "actor_rollout_ref.rollout.full_determinism=True, but with {precision} on {device} a chain's tokens depend on \
         what else is in its batch. They do not on CPUs with AVX2 in float32, and with AVX-512 in bfloat16, of models with \
         even widths; `worker doctor` shows what a machine does. Set actor_rollout_ref.rollout.dtype=float32, use such \
         nodes, or leave full_determinism out"
    );
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settings(more: &[&str]) -> Config {
        let all = [&["data.train_files=x.json", "actor_rollout_ref.model.path=m"], more].concat();
        let all: Vec<String> = all.iter().map(|s| (*s).to_owned()).collect();
        agentfly_common::config::resolve(&all, None, []).unwrap().config
    }

    #[test]
    fn a_gpu_is_refused_to_who_asks_for_it_and_to_nobody_else() {
        let tiny = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../deploy/models/tiny"));
        let asked = settings(&["actor_rollout_ref.rollout.full_determinism=True"]);
        let error = check(Place::Cuda(0), &asked, tiny, Precision::Bf16).unwrap_err().to_string();
        assert!(error.contains("with bfloat16 on a GPU a chain's tokens depend"), "{error}");
        check(Place::Cuda(0), &settings(&[]), tiny, Precision::Bf16).unwrap();
        // Every CPU that tests run on has AVX2.
        check(Place::Cpu, &asked, tiny, Precision::F32).unwrap();
    }
}
