//! `worker sandbox run`: files through the sandbox, their output as a script's or as JSON.

use std::io::{ErrorKind, Read as _, Write};
use std::path::{Path, PathBuf};

use agentfly_sandbox::{Outcome, Sandbox, Snippet, Status, Tier};
use anyhow::Context as _;
use serde::Serialize;

use super::PoolArgs;

pub(super) const EXAMPLES: &str = "\
Examples:
  worker sandbox run script.py
  echo 'print(6 * 7)' | worker sandbox run - --json
  worker sandbox run define.py use.py --stateful        # use.py finds what define.py defined

Ends with the exit code of the first file that fails: its own, 128 and the signal's number,
124 where a time limit ended it, 137 where memory, output or an operator did.";

/// The code a shell knows for a time limit: timeout(1)'s.
const TIMED_OUT: u8 = 124;
/// 128 + SIGKILL.
const KILLED: u8 = 137;
const SESSION: &str = "command line";

/// Arguments of `worker sandbox run`.
#[derive(Debug, clap::Args)]
pub(super) struct RunArgs {
    /// Python files; - reads standard input
    #[arg(required = true, value_name = "FILE")]
    files: Vec<PathBuf>,
    /// The files are turns of one session: each finds the variables and the /tmp of those before it; one that fails leaves
    /// the variables as they were, and the next ones run all the same
    #[arg(long)]
    stateful: bool,
    /// One line of JSON a file: status (ok, error, timeout, memory, killed, output_limit), stdout, stderr, exit_code,
    /// seconds, peak_bytes, tier
    #[arg(long)]
    json: bool,
    /// Seeds random, numpy and sympy
    #[arg(long, default_value_t = 0)]
    seed: u64,
    #[command(flatten)]
    pool: PoolArgs,
}

/// A file's end as JSON.
#[derive(Serialize)]
struct Report<'a> {
    file: &'a Path,
    #[serde(flatten)]
    outcome: &'a Outcome,
    tier: Tier,
    /// With --stateful: the variables are what this file made of them.
    #[serde(skip_serializing_if = "Option::is_none")]
    kept: Option<bool>,
    /// With --stateful: what the files before it did to the variables was lost before this one.
    #[serde(skip_serializing_if = "Option::is_none")]
    restarted: Option<bool>,
}

pub(super) fn run(args: &RunArgs) -> anyhow::Result<u8> {
    let codes = args.files.iter().map(|file| read(file)).collect::<anyhow::Result<Vec<_>>>()?;
    // Nothing is preloaded: loading a library costs more than the one snippet that may not need it.
    let sandbox = Sandbox::start(args.pool.config(1, &[])?)?;
    let mut exit_code = 0;
    for (file, code) in args.files.iter().zip(&codes) {
        let snippet = Snippet { code, seed: args.seed, limits: None };
        let (outcome, kept, restarted) = if args.stateful {
            let turn = sandbox.turn(SESSION, &snippet)?;
            (turn.outcome, Some(turn.kept), Some(turn.restarted))
        } else {
            (sandbox.run(&snippet)?, None, None)
        };
        let shown = if args.json {
            let report = Report { file, outcome: &outcome, tier: sandbox.tier(), kept, restarted };
            writeln!(std::io::stdout(), "{}", serde_json::to_string(&report)?)
        } else {
            if restarted == Some(true) {
                eprintln!(
                    "{}: the session had ended, and begins again: variables of earlier files are gone",
                    file.display()
                );
            }
            show(file, &outcome)
        };
        if let Err(error) = shown {
            anyhow::ensure!(error.kind() == ErrorKind::BrokenPipe, error);
            break; // whoever read the output has enough of it
        }
        if exit_code == 0 {
            exit_code = code_of(&outcome);
        }
    }
    sandbox.end_session(SESSION);
    Ok(exit_code)
}

fn read(file: &Path) -> anyhow::Result<String> {
    let bytes = if file == Path::new("-") {
        let mut bytes = Vec::new();
        std::io::stdin().lock().read_to_end(&mut bytes).map(|_| bytes)
    } else {
        std::fs::read(file)
    };
    let bytes = bytes.with_context(|| format!("cannot read {}", file.display()))?;
    String::from_utf8(bytes).with_context(|| format!("{} is not UTF-8", file.display()))
}

/// The output where a script's would be, and on standard error why it was ended, if it was.
fn show(file: &Path, outcome: &Outcome) -> std::io::Result<()> {
    let mut out = std::io::stdout().lock();
    out.write_all(outcome.stdout.as_bytes())?;
    out.flush()?;
    let mut error = std::io::stderr().lock();
    error.write_all(outcome.stderr.as_bytes())?;
    let why = match outcome.status {
        Status::Ok | Status::Error => return Ok(()),
        Status::Timeout => "it reached its time limit (--wall, --cpu)",
        Status::Memory => "it reached its memory limit (--memory-mb)",
        Status::OutputLimit => "it wrote more than is kept (--output-kb)",
        Status::Killed => "it was killed: by itself, by an operator, or as the machine ran out of memory",
    };
    writeln!(error, "{}: ended after {:.1} s: {why}", file.display(), outcome.seconds)
}

fn code_of(outcome: &Outcome) -> u8 {
    match (outcome.status, outcome.exit_code) {
        (Status::Timeout, _) => TIMED_OUT,
        (Status::Memory | Status::OutputLimit | Status::Killed, _) | (_, None) => KILLED,
        (_, Some(code)) if code < 0 => u8::try_from(128 - code).unwrap_or(KILLED),
        (_, Some(code)) => u8::try_from(code).unwrap_or(1),
    }
}
