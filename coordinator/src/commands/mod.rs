//! The commands, a file each: they ask a head (or start one) and print what it says.

mod explain;
mod head;
mod progress;
mod show;
mod signals;
mod stop;
mod tables;
mod train;

use std::process::ExitCode;

use agentfly_common::config::{Resolved, resolve};

use crate::cli::{Cli, Command, SettingsArgs};
use crate::failure::{Failure, Outcome};

/// Exit code of a command that its user cancelled, as shells give for Ctrl-C.
pub const CANCELLED: u8 = 130;

/// Runs what was asked.
///
/// # Errors
/// What went wrong, whose it is, and what to do.
pub async fn run(cli: Cli) -> Outcome<ExitCode> {
    match cli.command {
        None => head::run(cli.head).await,
        Some(Command::Train(args)) => train::run(args).await,
        Some(Command::Explain(args)) => explain::run(&args),
        Some(Command::Status(args)) => show::status(args).await,
        Some(Command::Nodes(args)) => show::nodes(args).await,
        Some(Command::Jobs(args)) => show::jobs(args).await,
        Some(Command::Job(command)) => show::job(command).await,
        Some(Command::Stop(args)) => stop::run(args).await,
        // `main` turned into that program before the runtime was started.
        Some(Command::RunBound { .. }) => Ok(ExitCode::SUCCESS),
    }
}

/// The settings of a command line, with every error at once.
fn settings(args: &SettingsArgs) -> Outcome<Resolved> {
    let environment = std::env::vars_os()
        .filter_map(|(name, value)| Some((name.into_string().ok()?, value.into_string().ok()?)));
    Ok(resolve(&args.overrides, args.config.as_deref(), environment)?)
}

/// Prints `value` as JSON.
fn print_json(value: &impl serde::Serialize) -> Outcome {
    println!("{}", serde_json::to_string_pretty(value).map_err(Failure::us)?);
    Ok(())
}
