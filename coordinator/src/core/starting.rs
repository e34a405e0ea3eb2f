//! From started processes to a group that holds the same weights.
//!
//! A rank that joins is told to prepare. Ranks of a larger world then form the collective group, once all have
//! joined and rank 0 has opened the store; a rank alone needs no group. No step starts before every rank has
//! attested the same policy version and the same hash of its weights; after a resume, the checkpoint's hash.

use std::collections::BTreeMap;

use agentfly_common::error::Whose;
use agentfly_common::ids::PolicyVersion;

use super::event::{CoreFault, Moment, RankCommand};
use super::job::{Desk, Job, Life, Standing};

/// The ranks start and load.
#[derive(Debug)]
pub(crate) struct Starting {
    since: Moment,
    /// Where rank 0's store listens.
    store: Option<(String, u16)>,
    grouped: bool,
    /// What each rank attested.
    ready: BTreeMap<usize, (PolicyVersion, String)>,
}

impl Starting {
    pub(crate) fn new(since: Moment) -> Self {
        Self { since, store: None, grouped: false, ready: BTreeMap::new() }
    }
}

impl Job {
    pub(crate) fn rank_joined(&mut self, rank: usize, desk: &mut Desk<'_>) {
        let id = self.ranks[rank].id.clone();
        match self.life {
            Life::Starting(_) if self.ranks[rank].standing == Standing::Started => {
                self.ranks[rank].standing = Standing::Joined;
                self.ranks[rank].heard = desk.now;
                let prepare = RankCommand::Prepare {
                    world_size: self.plan.world_size,
                    seed: self.plan.seed,
                    resume: self.resume_dir(),
                    policy_version: self.policy_version,
                    total_steps: self.plan.total_steps,
                };
                self.command(rank, prepare, desk);
                self.form_group(desk);
            }
            // It joins a job that is being stopped: it must hear that too.
            Life::Stopping(_) if self.ranks[rank].standing == Standing::Started => {
                self.ranks[rank].standing = Standing::Joined;
                self.command(rank, RankCommand::Stop { why: self.detail() }, desk);
            }
            _ => self.ignore("a second joining", &id, desk),
        }
    }

    pub(crate) fn store_opened(&mut self, rank: usize, host: String, port: u16, desk: &mut Desk<'_>) {
        let id = self.ranks[rank].id.clone();
        match &mut self.life {
            Life::Starting(starting) if rank == 0 && starting.store.is_none() => {
                starting.store = Some((host, port));
                self.form_group(desk);
            }
            Life::Stopping(_) => {}
            _ => self.ignore("an opened store", &id, desk),
        }
    }

    /// Tells all ranks to form their group, as soon as all are there.
    fn form_group(&mut self, desk: &mut Desk<'_>) {
        let all_joined = self.ranks.iter().all(|rank| rank.standing == Standing::Joined);
        let Life::Starting(starting) = &mut self.life else {
            return;
        };
        if let (true, false, true, Some((host, port))) =
            (all_joined, starting.grouped, self.plan.world_size > 1, starting.store.clone())
        {
            starting.grouped = true;
            self.command_all(&RankCommand::FormGroup { generation: 1, host, port }, desk);
        }
    }

    pub(crate) fn rank_ready(
        &mut self,
        rank: usize,
        version: PolicyVersion,
        hash: String,
        desk: &mut Desk<'_>,
    ) {
        let id = self.ranks[rank].id.clone();
        let may_be_ready = self.ranks[rank].standing == Standing::Joined;
        let alone = self.plan.world_size == 1;
        match &mut self.life {
            Life::Starting(starting)
                if may_be_ready && (alone || starting.grouped) && !starting.ready.contains_key(&rank) =>
            {
                starting.ready.insert(rank, (version, hash));
                self.begin_if_all_ready(desk);
            }
            Life::Stopping(_) => {}
            _ => self.ignore("its readiness", &id, desk),
        }
    }

    fn begin_if_all_ready(&mut self, desk: &mut Desk<'_>) {
        let Life::Starting(starting) = &self.life else {
            return;
        };
        if starting.ready.len() < self.ranks.len() {
            return;
        }
        match same_weights(self.policy_version, &starting.ready) {
            Err(problem) => {
                let message = format!("wrong weights after loading: {problem}");
                self.fail(CoreFault { whose: Whose::Us, message }, desk);
            }
            Ok(hash) => match self.plan.resume.as_ref().filter(|point| point.weights_hash != hash) {
                Some(point) => {
                    let message = format!(
                        "the weights that the ranks loaded from {} are not those that were saved: the ranks attest \
                         {hash}, the checkpoint says {}; was it written with another \
                         actor_rollout_ref.rollout.dtype, or on another kind of device?",
                        point.dir.display(),
                        point.weights_hash
                    );
                    self.fail(CoreFault { whose: Whose::Operator, message }, desk);
                }
                None => {
                    self.weights_hash = hash;
                    self.begin(desk);
                }
            },
        }
    }

    /// Which ranks are late to be ready, in words.
    pub(super) fn late_start(&self, starting: &Starting, now: Moment) -> Option<String> {
        let limit = self.plan.start_deadline;
        if now.saturating_sub(starting.since) <= limit {
            return None;
        }
        let of = |standing: Standing| {
            let ranks = 0..self.ranks.len();
            ranks.filter(|rank| self.ranks[*rank].standing == standing).collect::<Vec<_>>()
        };
        let (unjoined, joined) = (of(Standing::Started), of(Standing::Joined));
        let not_ready = joined.into_iter().filter(|rank| !starting.ready.contains_key(rank));
        let waiting = match (&unjoined[..], &starting.store) {
            ([], None) if self.plan.world_size > 1 => self.waiting(0..1, "open the rendezvous store", now),
            ([], _) => self.waiting(not_ready, "load and attest its weights", now),
            (unjoined, _) => self.waiting(unjoined.iter().copied(), "join", now),
        };
        let seconds = limit.as_secs();
        Some(format!("starting took longer than trainer.startup_timeout_seconds={seconds}: {waiting}"))
    }
}

/// The hash that all ranks attested for `expected`.
///
/// # Errors
/// Names the rank and both hashes, or both versions, where they differ.
pub(super) fn same_weights(
    expected: PolicyVersion,
    attested: &BTreeMap<usize, (PolicyVersion, String)>,
) -> Result<String, String> {
    let mut first: Option<(usize, &String)> = None;
    for (&rank, (version, hash)) in attested {
        if *version != expected {
            return Err(format!("rank {rank} holds policy version {version}, expected {expected}"));
        }
        match first {
            Some((other, known)) if known != hash => {
                return Err(format!(
                    "rank {other} holds {known} and rank {rank} holds {hash} as policy version {expected}"
                ));
            }
            Some(_) => {}
            None => first = Some((rank, hash)),
        }
    }
    Ok(first.map(|(_, hash)| hash.clone()).unwrap_or_default())
}
