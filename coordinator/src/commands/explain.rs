//! `coordinator explain`: the resolved settings and the batch arithmetic, in words. Starts nothing.

use std::process::ExitCode;

use agentfly_common::config::Config;
use agentfly_common::model_dir::ModelConfig;

use crate::cli::SettingsArgs;
use crate::commands::settings;
use crate::failure::Outcome;
use crate::memory_check::plan_here;
use crate::submission::Questions;

pub(super) fn run(args: &SettingsArgs) -> Outcome<ExitCode> {
    let resolved = settings(args)?;
    // Questions are counted when their files are there; explaining needs none.
    let questions = Questions::load(&resolved.config).ok().map(|questions| questions.train_rows() as u64);
    print!("{}", agentfly_common::config::explain(&resolved, questions));
    print_memory(&resolved.config);
    Ok(ExitCode::SUCCESS)
}

/// What a rank would need here, if its model is here to be looked at.
fn print_memory(config: &Config) {
    let model = ModelConfig::from_dir(&config.actor_rollout_ref.model.path);
    let Some(plan) = model.ok().and_then(|model| plan_here(config, &model, config.trainer.n_gpus_per_node))
    else {
        return;
    };
    println!("\nMemory of a rank on this machine");
    match plan {
        Ok(plan) => plan.in_words().iter().for_each(|words| println!("  {words}")),
        Err(refusal) => println!("  impossible: {refusal}"),
    }
}
