//! `coordinator`: reads the command line, runs the command, prints an error with what to do, sets the exit code.
#![forbid(unsafe_code)]

use std::process::ExitCode;

use agentfly_common::telemetry::{self, LogTo};
use agentfly_coordinator::cli::{Cli, Command};
use agentfly_coordinator::commands;
use agentfly_coordinator::failure::{Failure, Outcome};
use agentfly_coordinator::process;
use clap::Parser;

/// Threads that still read a file when the command is over get so long to end.
const LAST_WAIT: std::time::Duration = std::time::Duration::from_millis(500);

fn main() -> ExitCode {
    agentfly_common::shutdown::end_quietly_on_closed_pipe();
    let cli = Cli::parse();
    if let Some(Command::RunBound { parent, program, arguments }) = &cli.command {
        let error = process::exec_bound_to_parent(*parent, program, arguments);
        eprintln!("error: could not run {}: {error}", program.display());
        return ExitCode::from(agentfly_common::error::Whose::Operator.exit_code());
    }
    let ended =
        tokio::runtime::Builder::new_multi_thread().enable_all().build().map_err(Failure::operator).and_then(
            |runtime| {
                let ended = runtime.block_on(run(cli));
                // A file that is still being read when everything is over is nobody's concern.
                runtime.shutdown_timeout(LAST_WAIT);
                ended
            },
        );
    match ended {
        Ok(code) => code,
        Err(failure) => {
            eprintln!("error: {failure}");
            ExitCode::from(failure.whose.exit_code())
        }
    }
}

async fn run(cli: Cli) -> Outcome<ExitCode> {
    // A head in the foreground speaks on the terminal; other commands only when something is wrong.
    let filter = if cli.head.head { "info" } else { "error" };
    telemetry::init(LogTo::Stderr, filter).map_err(Failure::operator)?;
    commands::run(cli).await
}
