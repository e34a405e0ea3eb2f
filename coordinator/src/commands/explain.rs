//! `coordinator explain`: the resolved settings and the batch arithmetic, in words. Starts nothing.

use std::process::ExitCode;

use crate::cli::SettingsArgs;
use crate::commands::settings;
use crate::failure::Outcome;
use crate::submission::Questions;

pub(super) fn run(args: &SettingsArgs) -> Outcome<ExitCode> {
    let resolved = settings(args)?;
    // Questions are counted when their files are there; explaining needs none.
    let questions = Questions::load(&resolved.config).ok().map(|questions| questions.train_rows() as u64);
    print!("{}", agentfly_common::config::explain(&resolved, questions));
    Ok(ExitCode::SUCCESS)
}
