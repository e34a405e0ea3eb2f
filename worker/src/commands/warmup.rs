//! `worker warmup`: a model of a given shape, taught by demonstrations, as a start for reinforcement learning.
//!
//! Weights are drawn from the seed, or read when `--from` names a model; the same inputs give the same
//! weights on the same machine.

use std::io::BufRead as _;
use std::path::PathBuf;
use std::sync::Arc;

use super::check_place;
use agentfly_agent::template::{ChatTemplate, Next, ToolReply};
use agentfly_agent::tokenizer::ChatTokenizer;
use agentfly_common::model_dir::ModelConfig;
use agentfly_common::seed::JobSeed;
use agentfly_common::trajectory::{Message, Role};
use agentfly_hub::{Want, local_model};
use agentfly_policy::learner::{Learner, LearnerConfig, MicroBatchLimit, Schedule, SupervisedRow};
use agentfly_policy::placement::{Dtype, Place, open, random, save, set_up};
use anyhow::{Context as _, ensure};
use indicatif::{ProgressBar, ProgressStyle};
use rand::seq::SliceRandom as _;
use serde::Deserialize;

/// Arguments of `worker warmup`.
#[derive(Debug, clap::Args)]
pub struct WarmupArgs {
    /// Directory (or hub name) with config.json and the tokenizer; weights, if any, are not read
    #[arg(long, value_name = "MODEL", required_unless_present = "from")]
    shape: Option<PathBuf>,
    /// Start from this model (a directory, or a hub name: org/name[@revision]) instead of random weights
    #[arg(long, value_name = "MODEL", conflicts_with = "shape")]
    from: Option<PathBuf>,
    /// Demonstrations: JSONL {"messages":[{"role","content"},…]}
    #[arg(long, value_name = "FILE")]
    demos: PathBuf,
    /// Where to write the model
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// Chat template
    #[arg(long, default_value = "qwen-chat")]
    template: String,
    /// Updates
    #[arg(long, default_value_t = 1000)]
    steps: u64,
    /// Demonstrations per update
    #[arg(long, default_value_t = 64)]
    batch: usize,
    /// Peak learning rate; linear warm-up over a twentieth of the steps, then cosine to a fiftieth
    #[arg(long, default_value_t = 2e-3)]
    lr: f64,
    /// Seed of weights and order
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// CPU threads
    #[arg(long, default_value_t = 2)]
    threads: u32,
}

#[derive(Deserialize)]
struct Demo {
    messages: Vec<Message>,
}

/// Trains and writes the model.
///
/// # Errors
/// What is wrong with the settings (found before anything is read or written), the demonstrations (by line, before the
/// first update), the shape or the disk; a loss that is no number.
pub fn run(args: &WarmupArgs) -> anyhow::Result<()> {
    let config = settings(args);
    config.check()?;
    check_place(args.threads, Place::Cpu)?;
    ensure!(args.batch > 0, "--batch 0: an update learns from at least 1 demonstration");
    let given = args.from.as_ref().or(args.shape.as_ref()).context("either --shape or --from is given")?;
    let want = if args.from.is_some() { Want::Everything } else { Want::Configuration };
    let source = &local_model(given, want)?;
    let tokenizer = Arc::new(ChatTokenizer::from_dir(source)?);
    let template = ChatTemplate::new(Some(&args.template), tokenizer)?;
    let shape = ModelConfig::from_dir(source)?;
    shape.check_tokenizer(source)?;
    let window = shape.max_position_embeddings;
    let rows = read_demos(args, &template, usize::try_from(window).unwrap_or(usize::MAX))?;
    set_up(args.threads, Place::Cpu)?;
    let mut decoder = match want {
        Want::Everything => open(source, Dtype::F32, Place::Cpu)?,
        Want::Configuration => random(source, args.seed)?,
    };
    let schedule = config.schedule();
    let mut learner = Learner::new(config, &decoder, false, None)?;
    let bar = progress(args.steps)?;
    let mut order = Order { seed: JobSeed(args.seed), epoch: 0, left: Vec::new(), rows: rows.len() };
    for step in 0..args.steps {
        let batch: Vec<SupervisedRow> = order.next(args.batch).into_iter().map(|i| rows[i].clone()).collect();
        // The schedule's first rate with warm-up is 0: start one in.
        let stats = learner.supervised_step(&mut decoder, &batch, schedule.rate(step + 1))?;
        bar.set_message(format!("loss {:.4}", stats.loss));
        bar.inc(1);
        if (step + 1) % 100 == 0 && bar.is_hidden() {
            println!("warm-up step {} of {}: loss {:.4}", step + 1, args.steps, stats.loss);
        }
    }
    bar.finish();
    save(&args.out, &decoder, source)?;
    println!("wrote {}", args.out.display());
    Ok(())
}

fn settings(args: &WarmupArgs) -> LearnerConfig {
    LearnerConfig {
        lr: args.lr,
        lr_warmup_steps: args.steps / 20,
        lr_scheduler: Schedule::Cosine,
        min_lr_ratio: 0.02,
        num_cycles: 0.5,
        total_training_steps: args.steps,
        betas: (0.9, 0.98), // as short a memory as a thousand updates want
        micro_batch: MicroBatchLimit::Tokens(8192),
        ..LearnerConfig::default()
    }
}

fn progress(steps: u64) -> anyhow::Result<ProgressBar> {
    let style = ProgressStyle::with_template("{wide_bar} {pos}/{len} updates, {msg}, {eta} left")?;
    Ok(ProgressBar::new(steps).with_style(style))
}

/// Every demonstration once per epoch, in a new order each.
struct Order {
    seed: JobSeed,
    epoch: u64,
    left: Vec<usize>,
    rows: usize,
}

impl Order {
    fn next(&mut self, count: usize) -> Vec<usize> {
        let mut taken = Vec::with_capacity(count);
        while taken.len() < count {
            if self.left.is_empty() {
                self.left = (0..self.rows).collect();
                self.left.shuffle(&mut self.seed.rng("warmup-order", &[self.epoch]));
                self.epoch += 1;
            }
            taken.extend(self.left.pop());
        }
        taken
    }
}

/// The demonstrations of a file; each has something to learn and fits `window`, tokens.
fn read_demos(
    args: &WarmupArgs,
    template: &ChatTemplate,
    window: usize,
) -> anyhow::Result<Vec<SupervisedRow>> {
    let name = args.demos.display();
    let file = std::fs::File::open(&args.demos).with_context(|| format!("cannot read {name}"))?;
    let mut rows = Vec::new();
    for (index, line) in std::io::BufReader::new(file).lines().enumerate() {
        let number = index + 1;
        let demo: Demo = serde_json::from_str(&line?)
            .with_context(|| format!("{name}, line {number}: not {{\"messages\":[…]}}"))?;
        let row = row(&demo.messages, template).and_then(|row| {
            check_row(&row, demo.messages.len(), window)?;
            Ok(row)
        });
        rows.push(row.with_context(|| format!("{name}, line {number}"))?);
    }
    ensure!(!rows.is_empty(), "{name} holds no demonstration");
    Ok(rows)
}

/// Refuses here what would end the training between two updates, or teach positions that the model does not have.
fn check_row(row: &SupervisedRow, messages: usize, window: usize) -> anyhow::Result<()> {
    ensure!(
        row.loss_mask.contains(&true),
        "nothing to learn: of its {messages} messages none is the assistant's; add what it should say, or leave the line \
         out"
    );
    let tokens = row.token_ids.len();
    ensure!(
        tokens <= window,
        "{tokens} tokens with the template, and the model was trained for {window} (max_position_embeddings); shorten it, \
         or leave the line out"
    );
    Ok(())
}

/// A demonstration as the chain loop would have recorded it: the same prompt, deltas and mask.
fn row(messages: &[Message], template: &ChatTemplate) -> anyhow::Result<SupervisedRow> {
    let (system, rest) = match messages {
        [first, rest @ ..] if first.role == Role::System => (Some(first.content.as_str()), rest),
        all => (None, all),
    };
    let Some((user, turns)) = rest.split_first().filter(|(first, _)| first.role == Role::User) else {
        anyhow::bail!("the first message after the system prompt must be the user's");
    };
    let mut token_ids = template.prompt_ids(system, &user.content, &[])?;
    let mut loss_mask = vec![false; token_ids.len()];
    let tokenizer = template.tokenizer();
    for (index, message) in turns.iter().enumerate() {
        let (ids, learned) = match message.role {
            Role::Assistant => {
                let mut ids = tokenizer.encode_text(&message.content)?;
                ids.push(tokenizer.end_of_turn_id());
                (ids, true)
            }
            Role::Tool => {
                let next = if index + 1 == turns.len() { Next::End } else { Next::Generate };
                let reply = ToolReply { tool: String::new(), text: message.content.clone() };
                (template.observation_ids(&[reply], true, next)?, false)
            }
            other => {
                anyhow::bail!("message {} is the {other:?}'s; only assistant and tool may follow", index + 2)
            }
        };
        loss_mask.extend(std::iter::repeat_n(learned, ids.len()));
        token_ids.extend(ids);
    }
    Ok(SupervisedRow { token_ids, loss_mask })
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    /// A place that is no other test's.
    fn place(name: &str) -> PathBuf {
        std::env::temp_dir().join(format!("agentfly-warmup-{}-{name}", std::process::id()))
    }

    fn args(shape: PathBuf, demos: PathBuf, out: PathBuf) -> WarmupArgs {
        WarmupArgs {
            shape: Some(shape),
            from: None,
            demos,
            out,
            template: "qwen-chat".to_owned(),
            steps: 0, // not even the first update could find what is wrong
            batch: 1,
            lr: 1e-3,
            seed: 1,
            threads: 1,
        }
    }

    #[test]
    fn settings_that_nothing_can_be_taught_with_are_refused_before_anything_is_read_or_written() {
        let nowhere = place("nowhere");
        let given = |lr, batch| WarmupArgs {
            lr,
            batch,
            ..args(nowhere.join("no-such-model"), nowhere.join("no-such-file"), nowhere.join("out"))
        };
        for (lr, told) in [(f64::NAN, "NaN"), (-1e-3, "-0.001"), (f64::INFINITY, "inf")] {
            let error = run(&given(lr, 1)).unwrap_err().to_string();
            assert_eq!(error, format!("learner setting lr = {told}: must be at least 0"));
        }
        let error = run(&given(1e-3, 0)).unwrap_err().to_string();
        assert_eq!(error, "--batch 0: an update learns from at least 1 demonstration");
        assert!(!nowhere.exists());
        let error = run(&given(1e-3, 1)).unwrap_err().to_string();
        assert!(error.contains("no-such-model"), "good settings are not what stops it: {error}");
    }

    #[test]
    fn a_demonstration_that_cannot_be_taught_is_refused_by_line_before_the_first_update() {
        let tiny = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../deploy/models/tiny"));
        let (demos, out) = (place("demos.jsonl"), place("out"));
        let user = |text: &str| serde_json::json!({"role": "user", "content": text});
        let answer = serde_json::json!({"role": "assistant", "content": "2"});
        let line = |messages: &[&serde_json::Value]| serde_json::json!({"messages": messages}).to_string();
        let good = line(&[&user("1 + 1?"), &answer]);
        let tool = serde_json::json!({"role": "tool", "content": "2"});
        let unanswered = line(&[&user("1 + 1?"), &tool]);
        let long = line(&[&user(&"1 + ".repeat(1024)), &answer]);
        for (bad, told) in [
            (&unanswered, "line 2: nothing to learn: of its 2 messages none is the assistant's"),
            (&long, "the model was trained for 1024 (max_position_embeddings)"),
        ] {
            std::fs::write(&demos, format!("{good}\n{bad}\n")).unwrap();
            let error = run(&args(tiny.to_owned(), demos.clone(), out.clone())).unwrap_err();
            let error = format!("{error:#}");
            assert!(error.contains(told) && error.contains("demos.jsonl, line 2: "), "{error}");
            assert!(!out.exists());
        }
        std::fs::remove_file(&demos).unwrap();
    }

    #[test]
    fn a_tokenizer_with_more_ids_than_the_model_has_rows_is_refused_before_the_demonstrations_are_read() {
        let tiny = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../deploy/models/tiny"));
        let shape = place("narrow");
        std::fs::create_dir_all(&shape).unwrap();
        for file in ["tokenizer.json", "tokenizer_config.json"] {
            std::fs::copy(tiny.join(file), shape.join(file)).unwrap();
        }
        let text = std::fs::read_to_string(tiny.join("config.json")).unwrap();
        let mut config: serde_json::Value = serde_json::from_str(&text).unwrap();
        config["vocab_size"] = 8.into();
        std::fs::write(shape.join("config.json"), config.to_string()).unwrap();
        let error =
            run(&args(shape.clone(), place("no-demos"), place("narrow-out"))).unwrap_err().to_string();
        assert!(error.contains("has 8 rows (vocab_size in config.json)"), "{error}");
        std::fs::remove_dir_all(&shape).unwrap();
    }

    #[test]
    fn a_demonstration_may_fill_the_window() {
        let row = SupervisedRow { token_ids: vec![1; 8], loss_mask: [vec![false; 7], vec![true]].concat() };
        check_row(&row, 2, 8).unwrap();
        assert!(check_row(&row, 2, 7).unwrap_err().to_string().starts_with("8 tokens with the template"));
    }
}
