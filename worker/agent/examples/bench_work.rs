//! The work of `make bench-engine` as token ids, so that ours and every peer compute the same.
//!
//! `bench_work MODEL_DIR [TEMPLATE]` reads `{"questions": [text], "observations": [text]}` on standard input and
//! writes `{"prompts": [ids], "observations": [ids], "digits": [ids]}`. Without a template's name the model's own
//! chat template is used.

use std::io::{Error, Read as _};
use std::path::PathBuf;
use std::sync::Arc;

use agentfly_agent::template::{ChatTemplate, Next, ToolReply};
use agentfly_agent::tokenizer::ChatTokenizer;
use serde_json::{Value, json};

fn texts<'a>(work: &'a Value, field: &str) -> Result<Vec<&'a str>, Error> {
    let list = work[field].as_array().ok_or_else(|| Error::other(format!("no list called {field:?}")))?;
    let text = |entry: &'a Value| entry.as_str().ok_or_else(|| Error::other(format!("{field}: {entry}")));
    list.iter().map(text).collect()
}

fn main() -> Result<(), Error> {
    let mut arguments = std::env::args().skip(1);
    let usage = "usage: bench_work MODEL_DIR [TEMPLATE] < questions.json";
    let model = arguments.next().map(PathBuf::from).ok_or_else(|| Error::other(usage))?;
    let tokenizer = Arc::new(ChatTokenizer::from_dir(&model).map_err(Error::other)?);
    let name = arguments.next();
    let template = ChatTemplate::new(name.as_deref(), tokenizer.clone()).map_err(Error::other)?;

    let mut input = String::new();
    std::io::stdin().read_to_string(&mut input)?;
    let work: Value = serde_json::from_str(&input)?;
    let prompt = |question: &str| template.prompt_ids(None, question, &[]).map_err(Error::other);
    let prompts: Vec<Vec<u32>> =
        texts(&work, "questions")?.into_iter().map(prompt).collect::<Result<_, _>>()?;
    let observation = |text: &str| {
        let reply = ToolReply { tool: "code_interpreter".to_owned(), text: text.to_owned() };
        template.observation_ids(&[reply], false, Next::Generate).map_err(Error::other)
    };
    let observations: Vec<Vec<u32>> =
        texts(&work, "observations")?.into_iter().map(observation).collect::<Result<_, _>>()?;
    let is_digits = |id: &u32| {
        let text = tokenizer.decode(&[*id]).unwrap_or_default();
        let text = text.trim();
        !text.is_empty() && text.chars().all(|c| c.is_ascii_digit())
    };
    let vocab = u32::try_from(tokenizer.vocab_size()).map_err(Error::other)?;
    let digits: Vec<u32> = (0..vocab).filter(is_digits).collect();
    println!("{}", json!({"prompts": prompts, "observations": observations, "digits": digits}));
    Ok(())
}
