//! A world for the core: nodes and ranks that answer its decisions after a while, and break in ways a seed
//! chooses. Time is a number; nothing here waits.
//!
//! Every decision is checked against the invariants C1–C9 of `core` by [`checker::Checker`].

pub(crate) mod checker;
pub(crate) mod lines;

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use agentfly_common::config::{Config, resolve};
use agentfly_common::ids::{ChainKey, PolicyVersion};
use agentfly_common::trajectory::{FinishReason, Outcome, Reward, Timings, Trajectory};
use agentfly_coordinator::core::event::{
    CoreFault, Decision, Device, Event, JobEnd, JobId, JobSpec, Moment, NodeFacts, RankCommand, RankId,
};
use agentfly_coordinator::core::{CoreSettings, State};
use rand::Rng;
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::SeedableRng;

use checker::Checker;

/// How often things go wrong: the chance of each mishap at each of its opportunities.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Temper {
    /// An answer is given twice.
    pub(crate) duplicate: f64,
    /// A rank dies instead of answering.
    pub(crate) die: f64,
    /// A rank never answers, but lives; half of these are not heard any more either.
    pub(crate) hang: f64,
    /// A rank attests another hash or version than it should.
    pub(crate) lie: f64,
    /// A chain ends by a fault of the machinery.
    pub(crate) faulty_chain: f64,
    /// A chain is sampled by the wrong weights, or is of a group nobody asked for.
    pub(crate) foreign_chain: f64,
    /// An update leaves the weights as they were.
    pub(crate) idle_update: f64,
    /// A checkpoint cannot be committed.
    pub(crate) lost_checkpoint: f64,
    /// A node leaves, per minute.
    pub(crate) node_leaves: f64,
    /// A person cancels a job, per minute.
    pub(crate) cancel: f64,
    /// Longest time to an answer, seconds; 0 answers at once.
    pub(crate) slowness: f64,
}

/// The core and everything around it.
pub(crate) struct World {
    pub(crate) state: State,
    pub(crate) now: Moment,
    pub(crate) checker: Checker,
    /// Decisions as text, one a line.
    pub(crate) lines: Vec<String>,
    pub(crate) ended: BTreeMap<JobId, JobEnd>,
    temper: Temper,
    rng: ChaCha8Rng,
    queue: BTreeMap<(Moment, u64), Event>,
    sequence: u64,
    nodes: BTreeMap<String, bool>,
    running: BTreeMap<RankId, String>,
    jobs: BTreeSet<JobId>,
    joined: BTreeSet<RankId>,
    /// Ranks whose heartbeats have stopped.
    pub(crate) silent: BTreeSet<RankId>,
}

pub(crate) fn settings() -> CoreSettings {
    CoreSettings {
        node_lease: Duration::from_secs(15),
        stop_grace: Duration::from_secs(10),
        stop_margin: Duration::from_secs(5),
        rank_silence: Duration::from_secs(30),
        cause_margin: Duration::from_secs(2),
        answer_margin: Duration::from_secs(10),
    }
}

/// A job of 2 prompts × 2 chains a step, and `key=value` on top.
pub(crate) fn config(overrides: &[&str]) -> Config {
    let small = [
        "data.train_batch_size=2",
        "data.shuffle=False",
        "agent.num_chains=2",
        "actor_rollout_ref.actor.ppo_mini_batch_size=4",
        "trainer.nnodes=1",
        "trainer.total_training_steps=3",
        "trainer.val_before_train=False",
        "trainer.startup_timeout_seconds=60",
        "trainer.rollout_timeout_seconds=60",
        "trainer.train_timeout_seconds=60",
        "trainer.checkpoint_timeout_seconds=60",
    ];
    let all: Vec<String> = small.iter().chain(overrides).map(|text| (*text).to_owned()).collect();
    resolve(&all, None, []).unwrap().config
}

pub(crate) fn job(config: Config, validation_rows: usize) -> JobSpec {
    let validation_sources = vec!["exam".to_owned(); validation_rows];
    JobSpec { config, train_rows: 5, validation_rows, validation_sources, resume: None }
}

pub(crate) fn facts(seats: u32) -> NodeFacts {
    let devices = (0..seats).map(Device::Cpu).collect();
    NodeFacts { hostname: "host".to_owned(), devices, cpus: 4, memory_bytes: 1 << 30 }
}

/// The hash that honest ranks attest for a policy version.
pub(crate) fn hash(version: PolicyVersion) -> String {
    format!("hash-{version}")
}

pub(crate) fn chain(key: ChainKey, policy_version: PolicyVersion) -> Trajectory {
    let tokens = 3 + ((key.group * 5 + key.chain * 3) % 7) as usize;
    let sampled: Vec<bool> = (0..tokens).map(|token| token > 1).collect();
    Trajectory {
        key,
        prompt_id: format!("row {}", key.group),
        policy_version,
        token_ids: vec![7; tokens],
        log_probs: sampled.iter().map(|&sampled| if sampled { -0.25 } else { 0.0 }).collect(),
        loss_mask: sampled,
        messages: Vec::new(),
        outcome: Outcome::Finished { reason: FinishReason::Terminal },
        reward: Reward { value: f64::from(key.chain), parts: BTreeMap::from([("acc".to_owned(), 1.0)]) },
        timings: Timings { turns: 1, total_seconds: 1.0, ..Timings::default() },
    }
}

impl World {
    pub(crate) fn new(seed: u64, temper: Temper) -> Self {
        Self {
            state: State::new(settings()),
            now: Moment::ZERO,
            checker: Checker::default(),
            lines: Vec::new(),
            ended: BTreeMap::new(),
            temper,
            rng: ChaCha8Rng::seed_from_u64(seed),
            queue: BTreeMap::new(),
            sequence: 0,
            nodes: BTreeMap::new(),
            running: BTreeMap::new(),
            jobs: BTreeSet::new(),
            joined: BTreeSet::new(),
            silent: BTreeSet::new(),
        }
    }

    pub(crate) fn chance(&mut self, of: f64) -> bool {
        of > 0.0 && self.rng.random_bool(of)
    }

    pub(crate) fn below(&mut self, bound: u32) -> u32 {
        self.rng.random_range(0..bound)
    }

    pub(crate) fn add_node(&mut self, node: &str, seats: u32) {
        self.nodes.insert(node.to_owned(), true);
        self.apply(Event::NodeJoined { node: node.to_owned(), facts: facts(seats) });
    }

    pub(crate) fn submit(&mut self, job: &str, spec: JobSpec) {
        self.jobs.insert(job.to_owned());
        self.checker.submitted(job, &spec);
        self.apply(Event::JobSubmitted { job: job.to_owned(), spec: Box::new(spec) });
    }

    /// Tells the core something now, and does what it decides.
    pub(crate) fn apply(&mut self, event: Event) {
        self.checker.before(&event);
        if let Event::RankJoined { rank } = &event {
            self.joined.insert(rank.clone());
        }
        let decisions = self.state.apply(self.now, event);
        for decision in decisions {
            self.lines.push(lines::line(&decision));
            self.checker.decided(&decision);
            self.carry_out(decision);
        }
        self.checker.after(&self.state.view());
    }

    /// Events until all jobs have ended, and then what is still under way. Jobs that wait for nodes that never
    /// come are cancelled after `patience`.
    pub(crate) fn run(&mut self, patience: Duration) {
        let tick = Duration::from_secs(5);
        let mut next_tick = self.now + tick;
        while self.ended.len() < self.jobs.len() || !self.queue.is_empty() {
            assert!(self.now < patience * 3, "C5: {:?} never ended", self.state.view().jobs);
            match self.queue.first_key_value().map(|(key, _)| *key).filter(|(at, _)| *at <= next_tick) {
                Some(key) => {
                    self.now = self.now.max(key.0);
                    if let Some(event) = self.queue.remove(&key) {
                        self.deliver(event);
                    }
                }
                None => {
                    self.now = next_tick;
                    next_tick += tick;
                    self.tick(patience);
                }
            }
        }
    }

    fn deliver(&mut self, event: Event) {
        if let Event::RankExited { rank, .. } = &event {
            self.running.remove(rank);
        }
        self.apply(event);
    }

    fn tick(&mut self, patience: Duration) {
        let alive: Vec<String> =
            self.nodes.iter().filter(|(_, alive)| **alive).map(|(id, _)| id.clone()).collect();
        for node in alive {
            let leaves = self.chance(self.temper.node_leaves / 12.0);
            if leaves {
                self.running.retain(|_, at| *at != node);
                self.apply(Event::NodeLeft { node: node.clone(), cause: "its session ended".to_owned() });
                self.later(Event::NodeJoined { node, facts: facts(2) });
            } else {
                self.apply(Event::NodeHeard { node });
            }
        }
        for job in self.jobs.clone() {
            let waited_enough = self.now > patience && !self.ended.contains_key(&job);
            if waited_enough || self.chance(self.temper.cancel / 12.0) {
                self.apply(Event::JobCancelled { job, why: "a person asked".to_owned() });
            }
        }
        let heard =
            self.running.keys().filter(|rank| self.joined.contains(rank) && !self.silent.contains(rank));
        for rank in heard.cloned().collect::<Vec<_>>() {
            let activity = "all_reduce".to_owned();
            self.apply(Event::RankHeard { rank, activity, activity_seconds: 0.0 });
        }
        self.apply(Event::Tick);
    }

    /// Lets an event happen after a random delay, perhaps twice. Later events of the same call come later.
    fn later(&mut self, event: Event) -> Moment {
        let delay = Duration::from_secs_f64(self.rng.random::<f64>() * self.temper.slowness);
        let at = self.now + delay;
        if self.chance(self.temper.duplicate) {
            let mut again = at + Duration::from_secs_f64(self.rng.random::<f64>() * 20.0);
            let mut event = event.clone();
            if let (true, Some(rank)) = (self.chance(0.2), rank_of(&mut event)) {
                rank.incarnation = 0; // an earlier life of the rank still speaks
                again = self.now;
            }
            self.at(again, event);
        }
        self.at(at, event);
        at
    }

    fn at(&mut self, at: Moment, event: Event) {
        self.sequence += 1;
        self.queue.insert((at, self.sequence), event);
    }

    fn carry_out(&mut self, decision: Decision) {
        match decision {
            Decision::StartRank { node, rank, .. } => {
                self.running.insert(rank.clone(), node);
                self.answer(&rank.clone(), Event::RankJoined { rank });
            }
            Decision::StopRanks { node, job, .. } => {
                let there =
                    |(rank, at): (&RankId, &String)| (rank.job == job && *at == node).then(|| rank.clone());
                for rank in self.running.iter().filter_map(there).collect::<Vec<_>>() {
                    self.later(Event::RankExited { rank, cause: "ended with exit code 0".to_owned() });
                }
            }
            Decision::Command { rank, command } => self.obey(rank, command),
            Decision::CommitCheckpoint { job, point, .. } => {
                let fault = CoreFault {
                    whose: agentfly_common::error::Whose::Operator,
                    message: "no space left on the disk".to_owned(),
                };
                let lost = self.chance(self.temper.lost_checkpoint);
                let result = if lost { Err(fault) } else { Ok(format!("global_step_{}", point.step).into()) };
                self.later(Event::CheckpointCommitted { job, step: point.step, result });
            }
            Decision::Ended { job, end } => {
                self.ended.insert(job, end);
            }
            _ => {}
        }
    }

    fn obey(&mut self, rank: RankId, command: RankCommand) {
        match command {
            RankCommand::Prepare { world_size, policy_version, .. } => {
                if world_size == 1 {
                    self.attest_ready(rank, policy_version);
                } else if rank.rank == 0 {
                    self.answer(
                        &rank.clone(),
                        Event::StoreOpened { rank, host: "127.0.0.1".to_owned(), port: 4000 },
                    );
                }
            }
            RankCommand::FormGroup { .. } => self.attest_ready(rank, PolicyVersion(0)),
            RankCommand::RunRollout { shard, purpose, step, policy_version, chains, groups, .. } => {
                let keys = groups.iter().flat_map(|(group, _)| (0..chains).map(|chain| (*group, chain)));
                let keys = keys.map(|(group, chain)| ChainKey { purpose, step, group, chain });
                self.run_rollout(rank, shard, policy_version, &keys.collect::<Vec<_>>());
            }
            RankCommand::RunTrain { step, policy_version } => self.run_train(rank, step, policy_version),
            RankCommand::WriteCheckpoint { step } => {
                let files = vec![format!("optimizer-{}", rank.rank)];
                self.answer(&rank.clone(), Event::CheckpointWritten { rank, step, files });
            }
            RankCommand::Stop { .. } => {
                self.later(Event::RankExited { rank, cause: "ended with exit code 0".to_owned() });
            }
        }
    }

    fn run_rollout(&mut self, rank: RankId, shard: u64, version: PolicyVersion, keys: &[ChainKey]) {
        let mut last = self.now;
        for key in keys {
            let trajectory = Box::new(self.sample(*key, version));
            last = last.max(self.later(Event::TrajectoryArrived { rank: rank.clone(), shard, trajectory }));
        }
        if !self.breaks(&rank) {
            self.at(last, Event::RolloutDone { rank, shard, metrics: BTreeMap::new() });
        }
    }

    fn run_train(&mut self, rank: RankId, step: u64, version: PolicyVersion) {
        let idle = self.chance(self.temper.idle_update);
        let (policy_version, mut weights_hash) =
            (self.lie(version.next()), hash(if idle { version } else { version.next() }));
        if self.chance(self.temper.lie) {
            weights_hash.push_str("-of-a-liar");
        }
        let metrics = BTreeMap::from([("actor/lr".to_owned(), 1e-3)]);
        let done = Event::TrainDone { rank: rank.clone(), step, policy_version, weights_hash, metrics };
        self.answer(&rank, done);
    }

    fn attest_ready(&mut self, rank: RankId, version: PolicyVersion) {
        let policy_version = self.lie(version);
        self.answer(&rank.clone(), Event::RankReady { rank, policy_version, weights_hash: hash(version) });
    }

    fn lie(&mut self, version: PolicyVersion) -> PolicyVersion {
        if self.chance(self.temper.lie) { version.next() } else { version }
    }

    /// The answer of a rank, unless it hangs or dies first.
    fn answer(&mut self, rank: &RankId, event: Event) {
        let activity =
            Event::RankHeard { rank: rank.clone(), activity: "all_reduce".to_owned(), activity_seconds: 0.0 };
        self.later(activity);
        if !self.breaks(rank) {
            self.later(event);
        }
    }

    fn breaks(&mut self, rank: &RankId) -> bool {
        if self.chance(self.temper.hang) {
            if self.chance(0.5) {
                self.silent.insert(rank.clone());
            }
            return true;
        }
        if self.chance(self.temper.die) {
            let rank = rank.clone();
            if self.chance(0.3) {
                self.collective_fails_beside(&rank);
            } else if self.chance(0.5) {
                let message = "CUDA is out of memory".to_owned();
                let fault = CoreFault { whose: agentfly_common::error::Whose::Operator, message };
                self.later(Event::RankFailed { rank: rank.clone(), fault });
            }
            self.later(Event::RankExited { rank, cause: "was killed (signal 9)".to_owned() });
            return true;
        }
        false
    }

    /// The other ranks of its job hear of its death first, as a broken collective, and end.
    fn collective_fails_beside(&mut self, dying: &RankId) {
        let others = self.running.keys().filter(|rank| rank.job == dying.job && *rank != dying);
        for rank in others.cloned().collect::<Vec<_>>() {
            let message = "all_reduce: connection closed by peer".to_owned();
            let fault = CoreFault { whose: agentfly_common::error::Whose::Outside, message };
            let said = self.later(Event::RankFailed { rank: rank.clone(), fault });
            self.at(said, Event::RankExited { rank, cause: "ended with exit code 75".to_owned() });
        }
    }

    fn sample(&mut self, key: ChainKey, version: PolicyVersion) -> Trajectory {
        let mut trajectory = chain(key, version);
        if self.chance(self.temper.faulty_chain) {
            trajectory.outcome = Outcome::InfrastructureFault { cause: "the tool pool died".to_owned() };
        }
        if self.chance(self.temper.foreign_chain) {
            match self.below(3) {
                0 => trajectory.policy_version = version.next(),
                1 => trajectory.key.group += 1000,
                _ => trajectory.reward.value = f64::NAN,
            }
        }
        trajectory
    }
}

/// The rank an answer is from.
pub(crate) fn rank_of(event: &mut Event) -> Option<&mut RankId> {
    match event {
        Event::RankJoined { rank }
        | Event::RankHeard { rank, .. }
        | Event::StoreOpened { rank, .. }
        | Event::RankReady { rank, .. }
        | Event::TrajectoryArrived { rank, .. }
        | Event::RolloutDone { rank, .. }
        | Event::TrainDone { rank, .. }
        | Event::CheckpointWritten { rank, .. }
        | Event::RankFailed { rank, .. }
        | Event::RankExited { rank, .. } => Some(rank),
        _ => None,
    }
}
