//! The nodes, their seats, and who sits on them.
//!
//! A seat is a device one rank can own. A node lives as long as it is heard: silent for a lease, or its
//! session ended, it is lost, and so are all ranks on it. A lost node that is heard again was only cut off:
//! it is told to end what it still runs before its seats are given away again.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use super::event::{Device, JobId, Moment, NodeFacts, NodeId, RankId};
use super::settings::JobPlan;

/// One node.
#[derive(Debug, Clone)]
pub(crate) struct Node {
    pub(crate) facts: NodeFacts,
    pub(crate) heard: Moment,
    /// Why it was lost; `None` while it lives.
    pub(crate) lost: Option<String>,
    pub(crate) seats: BTreeMap<Device, RankId>,
    /// Jobs that had ranks here when it was lost, and that it has not been told to end.
    orphans: BTreeSet<JobId>,
}

/// A seat chosen for a rank.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Placement {
    pub(crate) node: NodeId,
    pub(crate) device: Device,
    /// CPU threads for the rank.
    pub(crate) threads: u32,
    /// Ranks on its node, those of other jobs and itself included.
    pub(crate) ranks_on_node: u32,
}

/// Whether a job gets its seats.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Seating {
    /// These, in rank order.
    Now(Vec<Placement>),
    /// The cluster is large enough, but others sit there.
    Later(String),
    /// The cluster as it is can never hold it.
    TooSmall(String),
}

/// All nodes, by name.
#[derive(Debug, Default)]
pub(crate) struct Fleet {
    pub(crate) nodes: BTreeMap<NodeId, Node>,
}

impl Fleet {
    /// A node opened its session. Ranks of an earlier session are gone: the caller must take the node for
    /// lost first.
    pub(crate) fn join(&mut self, node: NodeId, facts: NodeFacts, now: Moment) {
        let fresh = Node { facts, heard: now, lost: None, seats: BTreeMap::new(), orphans: BTreeSet::new() };
        self.nodes.insert(node, fresh);
    }

    /// A node was heard. Returns the jobs it must end, if it had been taken for lost.
    pub(crate) fn heard(&mut self, node: &NodeId, now: Moment) -> BTreeSet<JobId> {
        let Some(node) = self.nodes.get_mut(node) else {
            return BTreeSet::new();
        };
        node.heard = now;
        node.lost = None;
        std::mem::take(&mut node.orphans)
    }

    /// A node is lost; its seats are empty. Returns the jobs that had ranks there.
    pub(crate) fn lose(&mut self, node: &NodeId, cause: String) -> BTreeSet<JobId> {
        let Some(node) = self.nodes.get_mut(node).filter(|node| node.lost.is_none()) else {
            return BTreeSet::new();
        };
        node.lost = Some(cause);
        let jobs: BTreeSet<JobId> =
            std::mem::take(&mut node.seats).into_values().map(|rank| rank.job).collect();
        node.orphans.extend(jobs.iter().cloned());
        jobs
    }

    /// Living nodes that were silent for longer than the lease, with the cause in words.
    pub(crate) fn expired(&self, lease: Duration, now: Moment) -> Vec<(NodeId, String)> {
        let silent = |node: &Node| now.saturating_sub(node.heard);
        self.nodes
            .iter()
            .filter(|(_, node)| node.lost.is_none() && silent(node) > lease)
            .map(|(id, node)| {
                let (silent, lease) = (silent(node).as_secs_f64(), lease.as_secs_f64());
                (id.clone(), format!("it has been silent for {silent:.0} s (its lease is {lease:.0} s)"))
            })
            .collect()
    }

    /// Empties all seats of a job.
    pub(crate) fn free(&mut self, job: &JobId) {
        for node in self.nodes.values_mut() {
            node.seats.retain(|_, rank| rank.job != *job);
        }
    }

    /// Puts a rank on a seat.
    pub(crate) fn seat(&mut self, placement: &Placement, rank: RankId) {
        if let Some(node) = self.nodes.get_mut(&placement.node) {
            node.seats.insert(placement.device, rank);
        }
    }

    /// Seats for all ranks of a job: `ranks_per_node` on each node in the order of names, and whatever is left
    /// over wherever there is room.
    pub(crate) fn seats_for(&self, plan: &JobPlan) -> Seating {
        let cuda = self.uses_cuda();
        let total: usize = self.living().map(|(_, node)| seats_of(node, cuda).count()).sum();
        let wanted = plan.world_size as usize;
        if total < wanted {
            return Seating::TooSmall(self.missing(total, wanted, cuda));
        }
        let mut free: Vec<(&NodeId, Vec<Device>)> =
            self.living().map(|(id, node)| (id, free_of(node, cuda))).collect();
        let open: usize = free.iter().map(|(_, devices)| devices.len()).sum();
        if open < wanted {
            let kind = if cuda { "GPUs" } else { "CPU seats" };
            return Seating::Later(format!(
                "waiting for devices: {open} of {total} {kind} are free, {wanted} are needed"
            ));
        }
        let mut counts: Vec<usize> = Vec::new();
        let mut left = wanted;
        for (_, devices) in &free {
            counts.push(devices.len().min(plan.ranks_per_node as usize).min(left));
            left -= counts[counts.len() - 1];
        }
        for (count, (_, devices)) in counts.iter_mut().zip(&free) {
            let more = left.min(devices.len() - *count);
            *count += more;
            left -= more;
        }
        let mut placements = Vec::with_capacity(wanted);
        for (count, (id, devices)) in counts.iter().zip(&mut free) {
            let node = &self.nodes[*id];
            let sharing = u32::try_from(node.seats.len() + count).unwrap_or(u32::MAX).max(1);
            let threads = (node.facts.cpus / sharing).max(1);
            let seats = devices.drain(..*count);
            placements.extend(seats.map(|device| Placement {
                node: (*id).clone(),
                device,
                threads,
                ranks_on_node: sharing,
            }));
        }
        Seating::Now(placements)
    }

    fn living(&self) -> impl Iterator<Item = (&NodeId, &Node)> {
        self.nodes.iter().filter(|(_, node)| node.lost.is_none())
    }

    /// Ranks run on GPUs if the cluster has any, else on CPU seats.
    fn uses_cuda(&self) -> bool {
        self.living().any(|(_, node)| node.facts.devices.iter().any(|d| matches!(d, Device::Cuda(_))))
    }

    fn missing(&self, total: usize, wanted: usize, cuda: bool) -> String {
        let kind = if cuda { "GPU" } else { "CPU seat" };
        let nodes: Vec<String> =
            self.living().map(|(id, node)| format!("{id} has {}", seats_of(node, cuda).count())).collect();
        let there = if nodes.is_empty() { "no node has joined".to_owned() } else { nodes.join(", ") };
        format!(
            "waiting for nodes: {wanted} ranks need {wanted} {kind}s and the cluster has {total} ({there}); start \
             workers with {} more, or lower trainer.n_gpus_per_node × trainer.nnodes",
            wanted - total
        )
    }
}

fn seats_of(node: &Node, cuda: bool) -> impl Iterator<Item = Device> + '_ {
    node.facts.devices.iter().copied().filter(move |device| matches!(device, Device::Cuda(_)) == cuda)
}

fn free_of(node: &Node, cuda: bool) -> Vec<Device> {
    seats_of(node, cuda).filter(|device| !node.seats.contains_key(device)).collect()
}

#[cfg(test)]
mod tests {
    use super::super::testing::{facts, plan};
    use super::*;

    fn fleet(nodes: &[(&str, u32)]) -> Fleet {
        let mut fleet = Fleet::default();
        for (name, seats) in nodes {
            fleet.join((*name).to_owned(), facts(*seats), Duration::ZERO);
        }
        fleet
    }

    fn nodes_of(seating: Seating) -> Vec<String> {
        match seating {
            Seating::Now(placements) => placements.into_iter().map(|placement| placement.node).collect(),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn ranks_spread_as_configured_and_fall_back_to_where_there_is_room() {
        let mut plan = plan(2);
        plan.ranks_per_node = 1;
        assert_eq!(nodes_of(fleet(&[("a", 4), ("b", 4)]).seats_for(&plan)), ["a", "b"]);
        assert_eq!(nodes_of(fleet(&[("a", 4)]).seats_for(&plan)), ["a", "a"]);
    }

    #[test]
    fn a_cluster_that_is_too_small_says_what_is_missing() {
        let Seating::TooSmall(text) = fleet(&[("a", 1)]).seats_for(&plan(3)) else { panic!("it cannot fit") };
        assert!(text.contains("3 ranks need 3 CPU seats and the cluster has 1 (a has 1)"), "{text}");
    }

    #[test]
    fn a_lost_node_that_was_only_silent_must_end_what_it_runs() {
        let mut fleet = fleet(&[("a", 1)]);
        let Seating::Now(seats) = fleet.seats_for(&plan(1)) else { panic!("it fits") };
        fleet.seat(&seats[0], RankId { job: "j".to_owned(), rank: 0, incarnation: 1 });
        assert!(matches!(fleet.seats_for(&plan(1)), Seating::Later(_)));
        assert_eq!(fleet.expired(Duration::from_secs(5), Duration::from_secs(6)).len(), 1);
        let node = "a".to_owned();
        assert_eq!(fleet.lose(&node, "silent".to_owned()).len(), 1);
        assert!(matches!(fleet.seats_for(&plan(1)), Seating::TooSmall(_)));
        assert_eq!(fleet.heard(&node, Duration::from_secs(7)).into_iter().collect::<Vec<_>>(), ["j"]);
        assert!(matches!(fleet.seats_for(&plan(1)), Seating::Now(_)));
    }
}
