//! The rollout engine: continuous batching of many chains on one device.
//!
//! Lives on the device thread, which calls [`Engine::step`] while there is work. A chain submits one turn at a
//! time; while its tool runs its keys and values stay cached, so the next turn computes only what is new.
//!
//! One step computes, in one pass without padding, the next tokens of every chain that has a turn: all that a new
//! prompt or observation added, as far as the budget goes, and the last sampled token of the others.
//!
//! What must stay true:
//! - a turn's tokens depend on its chain's tokens, its seed and the weights, never on what else is batched (to the last bit
//!   where [`crate::placement::computes_batch_invariantly`]; elsewhere the products' rounding does);
//! - a chain's tokens are kept until [`Engine::release`], so losing its cache costs time, never the chain;
//! - running out of slots, cache or window is a wait or a [`StopReason::Length`], never an error.

mod batch;
mod cache;
mod chain;
mod graphs;
mod sampler;
mod schedule;

use std::collections::{BTreeMap, VecDeque};

use agentfly_c10d::ops::PAGE_TOKENS;
use agentfly_common::ids::PolicyVersion;
use agentfly_common::sampling::{Generation, SamplingParams, StopReason, is_divisor};

use crate::model::{Decoder, ModelConfig, ModelError};
use cache::{PagePool, pages_for};
use chain::{Chain, Turn};
use graphs::DecodeGraphs;

/// Tokens that attention gathers of the cache for a pass on a GPU, in caches at most. A page that chains share is gathered
/// for each of them.
pub const GATHERED_CACHES: usize = 2;

/// How much the engine may hold at a time, and how it computes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EngineConfig {
    /// Chains that generate at a time, and so the largest decode batch.
    pub max_slots: usize,
    /// Tokens whose keys and values are cached at a time, over all chains; at least one chain's window is.
    pub cache_tokens: usize,
    /// The window: tokens of a chain, prompt and observations included.
    pub max_tokens_per_chain: usize,
    /// Tokens that a step computes beside one for each decoding chain; longer prompts take several steps.
    pub max_prefill_tokens: usize,
    /// Launches every decode step kernel by kernel, where a GPU would otherwise record it as a CUDA graph. Without effect
    /// on CPUs.
    pub enforce_eager: bool,
}

/// One turn of one chain.
#[derive(Debug, Clone)]
pub struct TurnRequest {
    /// The chain.
    pub chain: u64,
    /// Chains of the same group begin with the same prompt, which is computed once for all of them; others share whole
    /// pages of what they have in common.
    pub group: Option<u64>,
    /// What was added since this chain's last turn: its prompt, or a tool's observation.
    pub new_tokens: Vec<u32>,
    /// How to sample.
    pub sampling: SamplingParams,
    /// The random stream of this turn.
    pub seed: u64,
}

/// What the engine has done since it was made, and what it holds.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct EngineStats {
    /// Chains not yet released.
    pub chains: usize,
    /// Turns that sample a token a step.
    pub decoding: usize,
    /// Turns that wait for a slot or are not yet prefilled.
    pub waiting: usize,
    /// Tokens that the cache could hold.
    pub cache_tokens: usize,
    /// Of these, those in pages that a chain uses.
    pub cache_tokens_used: usize,
    /// Calls of [`Engine::step`] that computed something.
    pub steps: u64,
    /// Tokens whose keys and values were computed by prefill.
    pub prefill_tokens: u64,
    /// Tokens whose keys and values were shared by another chain instead.
    pub shared_tokens: u64,
    /// Tokens sampled.
    pub decode_tokens: u64,
    /// Chains that were not running and lost their cache to another.
    pub evictions: u64,
    /// Running chains that were paused and lost theirs, to be prefilled again.
    pub preemptions: u64,
}

/// A turn that was refused or failed.
#[derive(Debug, thiserror::Error)]
pub enum EngineError {
    /// A chain's turns follow one another.
    #[error("chain {chain} already has a turn running; submit the next one when it has ended")]
    Busy {
        /// The chain.
        chain: u64,
    },
    /// There is nothing to predict from.
    #[error("chain {chain} has no tokens: its first turn needs a prompt")]
    EmptyPrompt {
        /// The chain.
        chain: u64,
    },
    /// A token the model does not have.
    #[error(
        "chain {chain}: token {token} is not in the model's vocabulary of {vocab}; is the tokenizer another model's?"
    )]
    UnknownToken {
        /// The chain.
        chain: u64,
        /// The token.
        token: u32,
        /// The vocabulary's size.
        vocab: i64,
    },
    /// A sampling parameter out of its range.
    #[error("chain {chain}: {name} = {value} cannot be sampled with; {needed}")]
    Sampling {
        /// The chain.
        chain: u64,
        /// The parameter.
        name: &'static str,
        /// Its value.
        value: f64,
        /// Its range.
        needed: &'static str,
    },
    /// The weights gave a token no probability that is a number.
    #[error(
        "chain {chain}: token {position} has log-prob {log_prob} under {version}: the weights hold NaN or infinities"
    )]
    NotFinite {
        /// The chain.
        chain: u64,
        /// Its position in the chain.
        position: usize,
        /// What came out.
        log_prob: f64,
        /// The weights, as `policy version N`.
        version: String,
    },
    /// The weights changed while a turn ran: its tokens would have two policies, and the loss can name one.
    #[error(
        "chain {chain}: token {position} comes from policy version {version}, but its turn began under {before}; let \
         turns end before the weights change"
    )]
    PolicyChanged {
        /// The chain.
        chain: u64,
        /// The first position of the new weights.
        position: usize,
        /// Whose weights the turn began with.
        before: PolicyVersion,
        /// Whose weights these are.
        version: PolicyVersion,
    },
    /// The forward pass failed; every running turn is lost.
    #[error(transparent)]
    Model(#[from] ModelError),
}

impl From<tch::TchError> for EngineError {
    fn from(error: tch::TchError) -> Self {
        Self::Model(error.into())
    }
}

/// What a finished turn came to.
pub type TurnResult = (u64, Result<Generation, EngineError>);

/// See the module.
#[derive(Debug)]
pub struct Engine {
    config: EngineConfig,
    vocab: i64,
    chains: BTreeMap<u64, Chain>,
    /// Chains with a turn and a slot, first come first.
    active: Vec<u64>,
    /// Chains with a turn that wait for a slot, first come first.
    queue: VecDeque<u64>,
    /// Chains with a turn that lost their slot, by age: they come before the queue.
    paused: BTreeMap<u64, u64>,
    /// Turns that ended outside a computation; the version is filled in when they are reported.
    ended: Vec<TurnResult>,
    cache: PagePool,
    graphs: DecodeGraphs,
    born: u64,
    stats: EngineStats,
}

impl Engine {
    /// An engine for models of this shape; each limit of `config` counts as at least 1.
    #[must_use]
    pub fn new(config: EngineConfig, model: &ModelConfig) -> Self {
        let window = config.max_tokens_per_chain.max(1);
        let pages = (config.cache_tokens / PAGE_TOKENS).max(pages_for(window));
        let config = EngineConfig {
            max_slots: config.max_slots.max(1),
            cache_tokens: pages * PAGE_TOKENS,
            max_tokens_per_chain: window,
            max_prefill_tokens: config.max_prefill_tokens.max(1),
            enforce_eager: config.enforce_eager,
        };
        Self {
            vocab: model.vocab,
            chains: BTreeMap::new(),
            active: Vec::new(),
            queue: VecDeque::new(),
            paused: BTreeMap::new(),
            ended: Vec::new(),
            cache: PagePool::new(model, pages),
            graphs: DecodeGraphs::new(config.enforce_eager),
            born: 0,
            stats: EngineStats::default(),
            config,
        }
    }

    /// Takes a turn; [`Self::step`] reports its end.
    ///
    /// # Errors
    /// When the chain has a turn running, the request cannot be sampled, or the prompt is empty; the chain is
    /// as before then.
    pub fn submit(&mut self, request: TurnRequest) -> Result<(), EngineError> {
        self.check(&request)?;
        let TurnRequest { chain: id, group, new_tokens, sampling, seed } = request;
        let born = self.born;
        let chain = self.chains.entry(id).or_insert_with(|| Chain::new(group, born));
        self.born += 1;
        chain.tokens.extend(new_tokens);
        if chain.tokens.len() >= self.config.max_tokens_per_chain || sampling.max_tokens == 0 {
            // No room for a single token.
            let generation = Generation {
                ids: Vec::new(),
                log_probs: Vec::new(),
                stop: StopReason::Length,
                policy_version: PolicyVersion::default(),
            };
            self.ended.push((id, Ok(generation)));
            return Ok(());
        }
        chain.turn = Some(Turn::new(sampling, seed));
        self.queue.push_back(id);
        Ok(())
    }

    /// Computes one round: lets waiting chains in, prefills some of them, and samples one token for every
    /// chain that is ready. Returns the turns that ended. `version` is that of `decoder`'s weights.
    ///
    /// # Errors
    /// When the forward pass fails; turns are still there, and [`Self::cancel`] ends them.
    pub fn step(
        &mut self,
        decoder: &Decoder,
        version: PolicyVersion,
    ) -> Result<Vec<TurnResult>, EngineError> {
        let _no_grad = tch::no_grad_guard();
        let mut ended = std::mem::take(&mut self.ended);
        for (_, result) in &mut ended {
            if let Ok(generation) = result {
                generation.policy_version = version;
            }
        }
        if !self.has_turns() {
            return Ok(ended);
        }
        let computed = self.round(decoder, version);
        match computed {
            Ok(more) => ended.extend(more),
            Err(error) => {
                self.ended = ended;
                return Err(error);
            }
        }
        self.stats.steps += 1;
        Ok(ended)
    }

    fn round(&mut self, decoder: &Decoder, version: PolicyVersion) -> Result<Vec<TurnResult>, EngineError> {
        self.cache.prepare(decoder.kind(), decoder.device())?;
        self.admit();
        let batch = self.plan()?;
        self.compute(decoder, &batch, version)
    }

    /// Ends a chain's turn, if it has one, without a result; its tokens so far stay.
    pub fn cancel(&mut self, chain: u64) {
        self.ended.retain(|(id, _)| *id != chain);
        if let Some(state) = self.chains.get_mut(&chain) {
            state.turn = None;
        }
        self.leave(chain);
    }

    /// Ends a chain's turn, if it has one, with what it has sampled so far, maybe nothing;
    /// [`Self::step`] reports it as [`StopReason::TimeLimit`].
    pub fn cut_short(&mut self, chain: u64) {
        let Some(turn) = self.chains.get_mut(&chain).and_then(|state| state.turn.take()) else {
            return;
        };
        self.leave(chain);
        self.ended.push((chain, Ok(turn.finish(StopReason::TimeLimit, PolicyVersion::default()))));
    }

    /// Whether the chain's turn has a slot, or it has none and its cache is there: it waits for no other chain's end.
    #[must_use]
    pub fn is_admitted(&self, chain: u64) -> bool {
        self.active.contains(&chain)
            || self.chains.get(&chain).is_some_and(|c| c.turn.is_none() && !c.pages.is_empty())
    }

    /// Forgets a chain and frees its cache.
    pub fn release(&mut self, chain: u64) {
        self.cancel(chain);
        self.drop_cache(chain);
        self.chains.remove(&chain);
    }

    /// Whether [`Self::step`] has anything to do.
    #[must_use]
    pub fn has_work(&self) -> bool {
        !self.ended.is_empty() || self.has_turns()
    }

    fn has_turns(&self) -> bool {
        !self.queue.is_empty() || !self.paused.is_empty() || !self.active.is_empty()
    }

    /// Drops every cached key and value, and their memory: call it when the weights have changed. Chains go on under
    /// the new weights, from their tokens; a turn that has sampled under the old ones ends with
    /// [`EngineError::PolicyChanged`].
    pub fn forget_weights(&mut self) {
        for chain in self.chains.values_mut() {
            chain.pages.clear();
            chain.cached = 0;
        }
        self.graphs.clear();
        self.cache.clear();
    }

    /// Counters and levels.
    #[must_use]
    pub fn stats(&self) -> EngineStats {
        let ready = |id: &&u64| self.chains.get(id).is_some_and(|c| c.to_compute() == 1);
        let decoding = self.active.iter().filter(ready).count();
        EngineStats {
            chains: self.chains.len(),
            decoding,
            waiting: self.queue.len() + self.paused.len() + self.active.len() - decoding,
            cache_tokens: self.config.cache_tokens,
            cache_tokens_used: self.cache.used() * PAGE_TOKENS,
            ..self.stats
        }
    }

    fn check(&self, request: &TurnRequest) -> Result<(), EngineError> {
        let chain = request.chain;
        let known = self.chains.get(&chain);
        if known.is_some_and(|c| c.turn.is_some()) || self.ended.iter().any(|(id, _)| *id == chain) {
            return Err(EngineError::Busy { chain });
        }
        if known.is_none_or(|c| c.tokens.is_empty()) && request.new_tokens.is_empty() {
            return Err(EngineError::EmptyPrompt { chain });
        }
        if let Some(&token) = request.new_tokens.iter().find(|&&token| i64::from(token) >= self.vocab) {
            return Err(EngineError::UnknownToken { chain, token, vocab: self.vocab });
        }
        let SamplingParams { temperature, top_p, top_k, .. } = request.sampling;
        let wrong = |name, value, needed| Err(EngineError::Sampling { chain, name, value, needed });
        if !(temperature == 0.0 || is_divisor(temperature)) {
            return wrong(
                "temperature",
                temperature,
                "it must be 0 (greedy), or more with an inverse that is an f32",
            );
        }
        if !(top_p > 0.0 && top_p <= 1.0) {
            return wrong("top_p", top_p, "it must be above 0 and at most 1");
        }
        if top_k == Some(0) {
            return wrong("top_k", 0.0, "it must be at least 1, or absent to keep every token");
        }
        Ok(())
    }
}
