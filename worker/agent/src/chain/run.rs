//! The chain loop itself: asks [`super::state`] what is next, and does it.

use agentfly_common::ids::ChainKey;
use agentfly_common::sampling::{Generation, StopReason};
use agentfly_common::telemetry::TRACE;
use agentfly_common::trajectory::{FinishReason, Message, Outcome, Reward, Role, Timings, Trajectory};
use tokio::time::Instant;
use tracing::{Instrument as _, info_span};

use super::record::Record;
use super::state::{AfterTurn, Limits};
use super::{ChainDeps, ChainError, ChainSpec, TurnInput};
use crate::agents::ToolCall;
use crate::clock::{Clock, Overdue};
use crate::rewards::{RewardFault, RewardInput};
use crate::template::{FittedObservations, Next, TemplateError, ToolReply, to_python_json_indented};
use crate::tools::{ToolContext, ToolStatus};

/// What a chain waits for while it samples.
const ENGINE: &str = "the rollout engine";

/// Why a chain stops before its own end.
enum Stop {
    /// The machinery failed: run it again.
    Fault(String),
    /// Its own time is over, while it waited for this.
    OutOfTime(&'static str),
    /// It would fail again.
    Error(ChainError),
}

/// Runs one chain to its end: AgentFly's loop of generation, parsing and tools, then the reward.
///
/// Faults of the engine, a tool's machinery or the reward's come back as a trajectory with
/// [`Outcome::InfrastructureFault`]. A chain whose own time is over finishes as [`FinishReason::Timeout`]: with the
/// turn that was being sampled as far as it got, and without the tool call that was running.
///
/// # Errors
/// What would fail the same way again: the template, the row, a broken invariant, a chain that sampled nothing
/// in its time, or a step whose time is over.
pub async fn run_chain(spec: &ChainSpec, deps: &ChainDeps) -> Result<Trajectory, ChainError> {
    let _release = Release { deps, chain: spec.key };
    let started = Instant::now();
    let mut run = Run::new(spec, deps)?;
    let (outcome, reward) = match run.play_out().await {
        Ok((reason, reward)) => (Outcome::Finished { reason }, reward),
        Err(Stop::Fault(cause)) => (Outcome::InfrastructureFault { cause }, Reward::default()),
        Err(Stop::OutOfTime(waited_for)) => return Err(run.nothing_sampled(waited_for)),
        Err(Stop::Error(error)) => return Err(error),
    };
    run.timings.total_seconds = started.elapsed().as_secs_f64();
    let trajectory = Trajectory {
        key: spec.key,
        prompt_id: spec.prompt_id.clone(),
        policy_version: spec.policy_version,
        token_ids: run.record.token_ids,
        loss_mask: run.record.loss_mask,
        log_probs: run.record.log_probs,
        messages: run.messages,
        outcome,
        reward,
        timings: run.timings,
    };
    trajectory.check()?;
    tracing::debug!(chain = %spec.key, outcome = ?trajectory.outcome, reward = trajectory.reward.value,
        turns = trajectory.timings.turns, tokens = trajectory.token_ids.len(), "chain done");
    Ok(trajectory)
}

/// Releases what the engine and the tools keep for a chain however the chain ends, cancellation included.
struct Release<'a> {
    deps: &'a ChainDeps,
    chain: ChainKey,
}

impl Drop for Release<'_> {
    fn drop(&mut self) {
        self.deps.generator.release(&self.chain);
        self.deps.tools.chain_ended(&self.chain);
    }
}

struct Run<'a> {
    spec: &'a ChainSpec,
    deps: &'a ChainDeps,
    limits: Limits,
    record: Record,
    messages: Vec<Message>,
    timings: Timings,
    clock: Clock,
}

impl<'a> Run<'a> {
    fn new(spec: &'a ChainSpec, deps: &'a ChainDeps) -> Result<Self, ChainError> {
        let clock = Clock::start(spec.time_limit, spec.step_deadline);
        let schemas = deps.tools.schemas();
        let system = match &deps.system_prompt {
            Some(text) => {
                let listed = to_python_json_indented(&schemas.clone().into(), 4);
                Some(text.replace("{tools}", &listed))
            }
            None => deps.agent.system_prompt().map(str::to_owned),
        };
        let prompt = deps.template.prompt_ids(
            system.as_deref(),
            &spec.question,
            if deps.agent.lists_tools() { &schemas } else { &[] },
        );
        let mut record = Record::default();
        record.observe(&prompt.map_err(|source| template_error(spec, source))?);
        let message = |role, content: String| Message { role, content, tool: None };
        let mut messages: Vec<Message> = system.map(|s| message(Role::System, s)).into_iter().collect();
        messages.push(message(Role::User, spec.question.clone()));
        let limits = Limits {
            max_turns: spec.max_turns,
            max_model_len: spec.max_model_len,
            max_tokens: spec.sampling.max_tokens,
        };
        Ok(Self { spec, deps, limits, record, messages, timings: Timings::default(), clock })
    }

    /// Turns, then the reward. Running out of time ends the turns and not the chain, if it sampled anything.
    async fn play_out(&mut self) -> Result<(FinishReason, Reward), Stop> {
        let reason = match self.turns().await {
            Err(Stop::OutOfTime(_)) if self.timings.turns > 0 => FinishReason::Timeout,
            ended => ended?,
        };
        Ok((reason, self.score().await?))
    }

    async fn turns(&mut self) -> Result<FinishReason, Stop> {
        loop {
            let max_tokens = match self.limits.before_turn(self.timings.turns, self.record.len()) {
                Ok(max_tokens) => max_tokens,
                Err(reason) => return Ok(reason),
            };
            if self.clock.is_over() {
                return Err(Stop::OutOfTime("its next turn"));
            }
            let text = self.generate(max_tokens).await?;
            let parsed = self.deps.agent.parse(&text);
            match self.limits.after_turn(parsed, self.record.len()) {
                AfterTurn::Finish(reason) => return Ok(reason),
                AfterTurn::Call(calls) => {
                    if let Some(reason) = self.tools(&calls).await? {
                        return Ok(reason);
                    }
                }
            }
        }
    }

    /// Samples one turn and records it; returns its text.
    async fn generate(&mut self, max_tokens: u32) -> Result<String, Stop> {
        let (spec, turn) = (self.spec, self.timings.turns);
        let asked = Instant::now();
        let sampled = self.sample(max_tokens).await;
        self.timings.generate_seconds += asked.elapsed().as_secs_f64();
        let generation = sampled?;
        let cut_short = generation.stop == StopReason::TimeLimit;
        if cut_short && generation.ids.is_empty() {
            return Err(Stop::OutOfTime(ENGINE));
        }
        let recorded = self.record.sample(&generation, spec.policy_version, max_tokens);
        recorded.map_err(|broken| Stop::Fault(format!("turn {turn}: {broken}")))?;
        self.timings.turns += 1;
        let text = self.deps.template.tokenizer().decode(&generation.ids).map_err(|source| {
            let prompt_id = spec.prompt_id.clone();
            Stop::Error(ChainError::Tokenizer { key: spec.key, prompt_id, source })
        })?;
        self.messages.push(Message { role: Role::Assistant, content: text.clone(), tool: None });
        if cut_short { Err(Stop::OutOfTime(ENGINE)) } else { Ok(text) }
    }

    /// Waits for room in the engine, on nobody's clock, then for the turn, on the chain's.
    async fn sample(&mut self, max_tokens: u32) -> Result<Generation, Stop> {
        let (spec, turn) = (self.spec, self.timings.turns);
        let mut sampling = spec.sampling.clone();
        sampling.max_tokens = max_tokens;
        let input = TurnInput {
            chain: &spec.key,
            turn,
            context: &self.record.token_ids,
            new_tokens: self.record.unseen(),
            sampling,
            seed: spec.seed.turn("sample", &spec.key, turn),
        };
        let fault = |fault| Stop::Fault(format!("turn {turn}: {fault}"));
        let admit = self.deps.generator.admit(input);
        let admit = admit.instrument(info_span!(target: TRACE, "wait for the engine", turn));
        let admitted = self.clock.stand_still(admit);
        let admitted = self.clock.within_step(admitted).await;
        let sampling = admitted.map_err(|_| self.step_over("room in the rollout engine"))?.map_err(fault)?;
        let sampled = sampling.until_over(&self.clock);
        let sampled = sampled.instrument(info_span!(target: TRACE, "generate", turn));
        let sampled = self.clock.within_step(sampled).await;
        sampled.map_err(|_| self.step_over(ENGINE))?.map_err(fault)
    }

    /// Makes the calls of a turn, in order, and appends what they answered. `Some`: the chain ends with it.
    async fn tools(&mut self, calls: &[ToolCall]) -> Result<Option<FinishReason>, Stop> {
        let (spec, turn) = (self.spec, self.timings.turns - 1);
        let seed = spec.seed.turn("tool", &spec.key, turn);
        let mut replies = Vec::with_capacity(calls.len());
        let mut last = ToolStatus::Success;
        for (index, call) in calls.iter().enumerate() {
            let seed = seed.wrapping_add(index as u64);
            let context = ToolContext { chain: spec.key, turn, seed, clock: &self.clock };
            let asked = Instant::now();
            let called = self.deps.tools.call(call, context);
            let called = called.instrument(info_span!(target: TRACE, "tool", title = call.name, turn));
            let answered = self.clock.within(called).await;
            self.timings.tool_seconds += asked.elapsed().as_secs_f64();
            let answered = answered.map_err(|overdue| match overdue {
                Overdue::Own => Stop::OutOfTime("a tool"),
                Overdue::Step => self.step_over("a tool"),
            });
            let observation = answered?.map_err(|fault| Stop::Fault(format!("turn {turn}: {fault}")))?;
            self.timings.tool_calls += 1;
            last = observation.status;
            replies.push(ToolReply { tool: call.name.clone(), text: observation.text });
        }
        let finish = self.limits.after_tools(last, self.timings.turns);
        self.observe(&replies, finish).map_err(|source| Stop::Error(template_error(spec, source)))
    }

    /// Appends observations. Where they leave no room for another token, they are cut to the tokens there are
    /// and the chain ends; where not even their frame fits, they are left out.
    fn observe(
        &mut self,
        replies: &[ToolReply],
        finish: Option<FinishReason>,
    ) -> Result<Option<FinishReason>, TemplateError> {
        let end_of_turn = self.deps.template.tokenizer().end_of_turn_id();
        let after_stop = self.record.token_ids.last() == Some(&end_of_turn);
        let room = self.limits.room(self.record.len());
        let template = &self.deps.template;
        if finish.is_none() {
            let whole = template.observation_ids(replies, after_stop, Next::Generate)?;
            if whole.len() < room {
                self.append(replies, &whole);
                return Ok(None);
            }
        }
        let fitted = template.observation_ids_within(replies, after_stop, Next::End, room)?;
        let Some(FittedObservations { shown, ids }) = fitted else {
            return Ok(Some(FinishReason::MaxModelLen));
        };
        self.append(&shown, &ids);
        Ok(finish.filter(|_| shown == replies).or(Some(FinishReason::MaxModelLen)))
    }

    fn append(&mut self, replies: &[ToolReply], ids: &[u32]) {
        self.record.observe(ids);
        self.messages.extend(replies.iter().map(|r| Message {
            role: Role::Tool,
            content: r.text.clone(),
            tool: Some(r.tool.clone()),
        }));
    }

    /// The reward of the finished chain.
    async fn score(&mut self) -> Result<Reward, Stop> {
        let Some(function) = &self.deps.reward else {
            return Ok(Reward::default());
        };
        let spoken = |m: &&Message| matches!(m.role, Role::Assistant | Role::Tool);
        let turns = self.timings.turns;
        let input = RewardInput {
            final_response: self.messages.iter().rev().find(spoken).map_or("", |m| &m.content),
            row_id: &self.spec.prompt_id,
            row: &self.spec.row,
            messages: &self.messages,
            seed: self.spec.seed.turn("reward", &self.spec.key, turns),
            clock: &self.clock,
        };
        let asked = Instant::now();
        let scored = function.score(input).instrument(info_span!(target: TRACE, "reward"));
        let scored = self.clock.within_reward(scored).await;
        let seconds = asked.elapsed().as_secs_f64();
        self.timings.reward_seconds = seconds;
        let scored = scored.map_err(|overdue| match overdue {
            Overdue::Own => Stop::Fault(format!("reward {}: no answer in {seconds:.0} s", function.name())),
            Overdue::Step => self.step_over("the reward"),
        });
        scored?.map_err(|fault| match fault {
            RewardFault::Infrastructure { .. } => Stop::Fault(fault.to_string()),
            source => Stop::Error(ChainError::Reward { key: self.spec.key, source }),
        })
    }

    fn step_over(&self, waited_for: &'static str) -> Stop {
        let (key, prompt_id) = (self.spec.key, self.spec.prompt_id.clone());
        Stop::Error(ChainError::StepOver { key, prompt_id, waited_for })
    }

    fn nothing_sampled(&self, waited_for: &'static str) -> ChainError {
        ChainError::NothingSampled {
            key: self.spec.key,
            prompt_id: self.spec.prompt_id.clone(),
            limit_seconds: self.spec.time_limit.as_secs_f64(),
            waited_for,
        }
    }
}

fn template_error(spec: &ChainSpec, source: TemplateError) -> ChainError {
    ChainError::Template { key: spec.key, prompt_id: spec.prompt_id.clone(), source }
}
