//! `worker score`: log-probs of given token ids, so that anyone can check the model from outside.

use std::io::{BufRead as _, ErrorKind, Write as _};
use std::path::PathBuf;

use agentfly_hub::{Want, local_model};
use agentfly_policy::model::{Scores, score_rows};
use agentfly_policy::placement::{Place, open, set_up};
use anyhow::Context as _;
use serde::{Deserialize, Serialize};

use super::{DtypeArg, check_place};

/// Arguments of `worker score`.
#[derive(Debug, clap::Args)]
pub struct ScoreArgs {
    /// Hugging Face model directory, or a hub name: org/name[@revision]
    #[arg(long, value_name = "MODEL")]
    model: PathBuf,
    /// Numbers to compute in
    #[arg(long, value_enum, default_value = "f32")]
    dtype: DtypeArg,
    /// Device: cpu or cuda:N
    #[arg(long, default_value = "cpu")]
    device: Place,
    /// CPU threads
    #[arg(long, default_value_t = 1)]
    threads: u32,
    /// Also write the entropy (nats) of the distribution each token is drawn from, as "entropies"
    #[arg(long)]
    entropies: bool,
}

#[derive(Deserialize)]
struct Line {
    ids: Vec<u32>,
}

#[derive(Serialize)]
struct Scored {
    logprobs: Vec<Option<f32>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    entropies: Option<Vec<Option<f32>>>,
}

/// Reads `{"ids":[…]}` lines from stdin, writes `{"logprobs":[null,…]}` lines to stdout.
///
/// # Errors
/// A model that cannot be read, or the first line that cannot be scored, by number.
pub fn run(args: &ScoreArgs) -> anyhow::Result<()> {
    check_place(args.threads, args.device)?;
    set_up(args.threads, args.device)?;
    let decoder = open(&local_model(&args.model, Want::Everything)?, args.dtype.into(), args.device)?;
    let mut out = std::io::stdout().lock();
    for (index, line) in std::io::stdin().lock().lines().enumerate() {
        let (line, number) = (line?, index + 1);
        if line.trim().is_empty() {
            continue;
        }
        let Line { ids } =
            serde_json::from_str(&line).with_context(|| format!("line {number} is not {{\"ids\":[…]}}"))?;
        let scores = score_rows(&decoder, &[&ids]).with_context(|| format!("line {number}"))?;
        for Scores { log_probs, entropies } in scores {
            let entropies = args.entropies.then_some(entropies);
            serde_json::to_writer(&mut out, &Scored { logprobs: log_probs, entropies })?;
        }
        if let Err(error) = out.write_all(b"\n").and_then(|()| out.flush()) {
            // Whoever read the scores has enough of them (`… | head`).
            return if error.kind() == ErrorKind::BrokenPipe { Ok(()) } else { Err(error.into()) };
        }
    }
    Ok(())
}
