//! What every measurement shares: the work file, this process's share of it, and requests and answers.

use std::io::Write as _;
use std::ops::Range;
use std::path::Path;

use agentfly_common::sampling::SamplingParams;
use agentfly_policy::engine::TurnRequest;
use anyhow::Context as _;
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::Value;

/// Chains that share a prompt, as in a GRPO group.
pub(crate) const GROUP: usize = 8;

/// Prompts and observations as token ids: `bench_work` of crate agentfly-agent makes the file.
#[derive(Debug, Deserialize)]
pub(crate) struct Work {
    /// Chat prompts, generation prompt included.
    pub(crate) prompts: Vec<Vec<u32>>,
    /// What a tool answers, in the frame of the chat template.
    pub(crate) observations: Vec<Vec<u32>>,
    /// Tokens that are digits: what the toy reward counts.
    pub(crate) digits: Vec<u32>,
}

impl Work {
    pub(crate) fn read(path: &Path) -> anyhow::Result<Self> {
        let text = std::fs::read_to_string(path)
            .with_context(|| format!("reading {}: `bench_work` makes it", path.display()))?;
        let work: Self =
            serde_json::from_str(&text).with_context(|| format!("{} is no work file", path.display()))?;
        anyhow::ensure!(
            !work.prompts.is_empty() && !work.observations.is_empty(),
            "{} holds no prompts or no observations",
            path.display()
        );
        Ok(work)
    }

    /// The prompt of a group.
    pub(crate) fn prompt(&self, group: usize) -> &[u32] {
        &self.prompts[group % self.prompts.len()]
    }

    /// The first turn of a chain: exactly `new_tokens` tokens at temperature 1.
    pub(crate) fn first_turn(&self, chain: usize, first_group: usize, sampling: Sampling) -> TurnRequest {
        let group = chain / GROUP;
        TurnRequest {
            group: Some(group as u64),
            ..sampling.turn(chain as u64, self.prompt(first_group + group).to_vec())
        }
    }
}

/// How every turn of the benchmark is sampled.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Sampling {
    pub(crate) new_tokens: u32,
    pub(crate) seed: u64,
}

impl Sampling {
    /// A turn without a group.
    pub(crate) fn turn(self, chain: u64, new_tokens: Vec<u32>) -> TurnRequest {
        let sampling = SamplingParams {
            temperature: 1.0,
            top_p: 1.0,
            top_k: None,
            max_tokens: self.new_tokens,
            stop_ids: Vec::new(),
        };
        TurnRequest {
            chain,
            group: None,
            new_tokens,
            sampling,
            seed: self.seed.wrapping_mul(1 << 32) ^ chain,
        }
    }
}

/// This process's part of a batch that several share.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Share {
    pub(crate) rank: usize,
    pub(crate) ranks: usize,
}

impl Share {
    /// Its part of `count` things: neighbours, so that groups stay whole where they can.
    pub(crate) fn of(self, count: usize) -> Range<usize> {
        count * self.rank / self.ranks..count * (self.rank + 1) / self.ranks
    }
}

/// Answers each line of standard input until it ends.
pub(crate) fn serve<R: DeserializeOwned>(
    mut answer: impl FnMut(R) -> anyhow::Result<Value>,
) -> anyhow::Result<()> {
    for line in std::io::stdin().lines() {
        let line = line.context("reading a request")?;
        let request = serde_json::from_str(&line).with_context(|| format!("{line:?} is no request"))?;
        let answer = answer(request)?;
        let mut out = std::io::stdout().lock();
        writeln!(out, "{answer}")?;
        out.flush()?;
    }
    Ok(())
}
