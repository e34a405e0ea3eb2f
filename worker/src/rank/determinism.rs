//! Whether a chain's tokens are the same bits whatever else is in its batch.
//!
//! What must stay true: a job that asks for it (`rollout.full_determinism`) runs nowhere else.

use std::path::Path;

use agentfly_common::config::Config;
use agentfly_common::model_dir::ModelConfig;
use agentfly_common::planner::Precision;
use agentfly_policy::placement::{
    Place, computes_batch_invariantly, odd_widths, products_are_batch_invariant,
};
use anyhow::ensure;

/// Logs what this place does; refuses where the job asks for more.
///
/// # Errors
/// A model that cannot be read, or a place, precision or width of which the job cannot have what it asks for.
pub(crate) fn check(
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
    let obstacle = Obstacle {
        gpu: place != Place::Cpu,
        kernels: products_are_batch_invariant(place, precision),
        odd: odd_widths(&model, precision),
        float32_helps: computes_batch_invariantly(&model, place, Precision::F32),
    };
    ensure!(
        invariant || !config.actor_rollout_ref.rollout.full_determinism,
        "actor_rollout_ref.rollout.full_determinism=True, but with {precision} on {device} a chain's tokens depend on \
         what else is in its batch: {}. Ways out: {}; full_determinism=False",
        obstacle.cause(precision),
        obstacle.ways_out(precision)
    );
    Ok(())
}

/// What keeps a place from computing the same bits for a chain in any batch.
struct Obstacle {
    /// It is a GPU.
    gpu: bool,
    /// Whether there are kernels for the precision on it.
    kernels: bool,
    /// Widths of the model that no kernel takes in the precision.
    odd: Vec<(&'static str, i64)>,
    /// Whether the same place would do it in float32.
    float32_helps: bool,
}

impl Obstacle {
    fn cause(&self, precision: Precision) -> String {
        if self.gpu {
            return "a GPU's libraries choose by the size of the batch how they sum".to_owned();
        }
        let mut causes = Vec::new();
        if !self.kernels {
            causes.push(format!("this CPU has no kernels for {precision} (they need {})", needed(precision)));
        }
        let odd = |&(key, width): &(&str, i64)| {
            format!("no kernel for {precision} takes an odd width, and {key}={width}")
        };
        causes.extend(self.odd.iter().map(odd));
        causes.join("; ")
    }

    /// Each of them helps alone.
    fn ways_out(&self, precision: Precision) -> String {
        if self.gpu {
            return "CPU ranks".to_owned();
        }
        let float32 = "actor_rollout_ref.rollout.dtype=float32";
        let nodes = |needed| format!("nodes with {needed} (`worker doctor` shows what a machine does)");
        let mut ways = Vec::new();
        if self.float32_helps {
            ways.push(float32.to_owned());
        }
        match (self.kernels, self.odd.is_empty()) {
            (false, true) => ways.push(nodes(needed(precision))),
            (false, false) if !self.float32_helps => {
                ways.push(format!("{float32} on {}", nodes(needed(Precision::F32))));
            }
            (false, false) => {}
            (true, _) => ways.push("a model with even widths".to_owned()),
        }
        ways.join("; ")
    }
}

/// What the kernels for a precision are written in.
fn needed(precision: Precision) -> &'static str {
    match precision {
        Precision::F32 => "AVX2",
        Precision::Bf16 => "AVX-512",
    }
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
        for precision in [Precision::Bf16, Precision::F32] {
            let error = check(Place::Cuda(0), &asked, tiny, precision).unwrap_err().to_string();
            for told in [
                format!("with {precision} on a GPU a chain's tokens depend"),
                "a GPU's libraries".to_owned(),
                "Ways out: CPU ranks; full_determinism=False".to_owned(),
            ] {
                assert!(error.contains(&told), "{told:?} is not in {error}");
            }
        }
        check(Place::Cuda(0), &settings(&[]), tiny, Precision::Bf16).unwrap();
        // Every CPU that tests run on has AVX2.
        check(Place::Cpu, &asked, tiny, Precision::F32).unwrap();
    }

    #[test]
    fn a_refusal_names_the_cause_and_no_way_out_that_leads_nowhere() {
        let hidden = ("hidden_size", 33);
        let float32 = "actor_rollout_ref.rollout.dtype=float32";
        let doctor = "(`worker doctor` shows what a machine does)";
        let no_bf16 = "this CPU has no kernels for bfloat16 (they need AVX-512)";
        let odd_width = "no kernel for bfloat16 takes an odd width, and hidden_size=33";
        for (kernels, odd, float32_helps, precision, cause, ways) in [
            (
                false,
                vec![],
                false,
                Precision::F32,
                "this CPU has no kernels for float32 (they need AVX2)".to_owned(),
                format!("nodes with AVX2 {doctor}"),
            ),
            (
                false,
                vec![],
                true,
                Precision::Bf16,
                no_bf16.to_owned(),
                format!("{float32}; nodes with AVX-512 {doctor}"),
            ),
            (
                true,
                vec![hidden],
                true,
                Precision::Bf16,
                odd_width.to_owned(),
                format!("{float32}; a model with even widths"),
            ),
            (
                false,
                vec![hidden],
                true,
                Precision::Bf16,
                format!("{no_bf16}; {odd_width}"),
                float32.to_owned(),
            ),
            (
                false,
                vec![hidden],
                false,
                Precision::Bf16,
                format!("{no_bf16}; {odd_width}"),
                format!("{float32} on nodes with AVX2 {doctor}"),
            ),
        ] {
            let obstacle = Obstacle { gpu: false, kernels, odd, float32_helps };
            assert_eq!(obstacle.cause(precision), cause);
            assert_eq!(obstacle.ways_out(precision), ways, "{cause}");
        }
    }

    #[test]
    fn an_odd_width_is_refused_in_bfloat16_and_named() {
        let tiny = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../deploy/models/tiny/config.json"));
        let dir = std::env::temp_dir().join(format!("agentfly-odd-width-{}", std::process::id()));
        std::fs::create_dir_all(&dir).unwrap();
        let config = std::fs::read_to_string(tiny).unwrap();
        let odd = config.replace("\"intermediate_size\": 384", "\"intermediate_size\": 385");
        std::fs::write(dir.join("config.json"), odd).unwrap();
        let asked = settings(&["actor_rollout_ref.rollout.full_determinism=True"]);
        let error = check(Place::Cpu, &asked, &dir, Precision::Bf16).unwrap_err().to_string();
        assert!(error.contains("takes an odd width, and intermediate_size=385. Ways out: actor_"), "{error}");
        check(Place::Cpu, &asked, &dir, Precision::F32).unwrap();
        std::fs::remove_dir_all(&dir).unwrap();
    }
}
