//! `coordinator`: reads the command line, runs the command, prints an error with what to do, sets the exit code.
#![forbid(unsafe_code)]

use std::process::ExitCode;

use agentfly_common::telemetry::{self, LogTo};
use agentfly_coordinator::cli::{Cli, Command};
use agentfly_coordinator::commands;
use agentfly_coordinator::failure::{Failure, Outcome};
use agentfly_coordinator::process;
use clap::Parser;

fn main() -> ExitCode {
    let cli = Cli::parse();
    if let Some(Command::RunBound { parent, program, arguments }) = &cli.command {
        let error = process::exec_bound_to_parent(*parent, program, arguments);
        eprintln!("error: could not run {}: {error}", program.display());
        return ExitCode::from(agentfly_common::error::Whose::Operator.exit_code());
    }
    match run(cli) {
        Ok(code) => code,
        Err(failure) => {
            eprintln!("error: {failure}");
            ExitCode::from(failure.whose.exit_code())
        }
    }
}

#[tokio::main]
async fn run(cli: Cli) -> Outcome<ExitCode> {
    // A head in the foreground speaks on the terminal; other commands only when something is wrong.
    let filter = if cli.head.head { "info" } else { "error" };
    telemetry::init(LogTo::Stderr, filter).map_err(Failure::operator)?;
    commands::run(cli).await
}
