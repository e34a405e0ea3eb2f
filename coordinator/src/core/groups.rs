//! The chains of one phase, as they come in: groups of equally many chains, each chain counted once.
//!
//! A group is given out whole or not at all: nothing reads chains from here before all groups are complete.

use agentfly_common::ids::{ChainKey, Purpose};
use agentfly_common::trajectory::Trajectory;

/// The groups of one rollout phase.
#[derive(Debug)]
pub(crate) struct Groups {
    purpose: Purpose,
    step: u64,
    chains: u32,
    /// Row of the data set of each group.
    rows: Vec<usize>,
    members: Vec<Vec<Option<Trajectory>>>,
    arrived: u64,
}

/// What became of a chain.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Taken {
    /// It counts.
    New,
    /// It was there already and changes nothing.
    Duplicate,
}

impl Groups {
    /// One group of `chains` per entry of `rows`.
    pub(crate) fn new(purpose: Purpose, step: u64, chains: u32, rows: Vec<usize>) -> Self {
        let members = rows.iter().map(|_| (0..chains).map(|_| None).collect()).collect();
        Self { purpose, step, chains, rows, members, arrived: 0 }
    }

    /// Whether this key belongs to these groups.
    pub(crate) fn knows(&self, key: &ChainKey) -> bool {
        key.purpose == self.purpose
            && key.step == self.step
            && (key.group as usize) < self.rows.len()
            && key.chain < self.chains
    }

    /// Takes a chain whose key is known.
    pub(crate) fn take(&mut self, chain: Trajectory) -> Taken {
        let slot = self
            .members
            .get_mut(chain.key.group as usize)
            .and_then(|group| group.get_mut(chain.key.chain as usize));
        match slot {
            Some(slot @ None) => {
                *slot = Some(chain);
                self.arrived += 1;
                Taken::New
            }
            _ => Taken::Duplicate,
        }
    }

    /// The row of the data set a group answers.
    pub(crate) fn row(&self, group: u32) -> usize {
        self.rows[group as usize]
    }

    /// Whether a chain is in.
    pub(crate) fn has(&self, key: &ChainKey) -> bool {
        self.members[key.group as usize][key.chain as usize].is_some()
    }

    /// The first chain of a group that is not in.
    pub(crate) fn missing_of(&self, group: u32) -> Option<ChainKey> {
        let chain = self.members[group as usize].iter().position(Option::is_none)?;
        Some(ChainKey { purpose: self.purpose, step: self.step, group, chain: u32::try_from(chain).ok()? })
    }

    /// Chains that are in.
    pub(crate) fn arrived(&self) -> u64 {
        self.arrived
    }

    /// Chains that must come in.
    pub(crate) fn total(&self) -> u64 {
        self.rows.len() as u64 * u64::from(self.chains)
    }

    /// Whether every chain of every group is in.
    pub(crate) fn complete(&self) -> bool {
        self.arrived == self.total()
    }

    /// All chains in the order (group, chain), each with its row. `None` unless complete.
    pub(crate) fn into_chains(self) -> Option<Vec<(Trajectory, usize)>> {
        let rows = self.rows;
        let groups = self.members.into_iter().zip(rows);
        groups
            .flat_map(|(group, row)| group.into_iter().map(move |chain| chain.map(|chain| (chain, row))))
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::chain;
    use super::*;

    #[test]
    fn a_chain_counts_once_and_groups_come_out_only_when_complete() {
        let mut groups = Groups::new(Purpose::Train, 1, 2, vec![7, 9]);
        assert_eq!(groups.take(chain(1, 1, 0, 3, 0.5)), Taken::New);
        assert_eq!(groups.take(chain(1, 1, 0, 3, 0.9)), Taken::Duplicate);
        assert_eq!((groups.arrived(), groups.total(), groups.complete()), (1, 4, false));
        assert_eq!(groups.missing_of(1).map(|key| key.chain), Some(1));
        for (group, index) in [(1, 1), (0, 0), (0, 1)] {
            assert!(!groups.complete());
            assert_eq!(groups.take(chain(1, group, index, 3, 0.0)), Taken::New);
        }
        let chains = groups.into_chains().unwrap();
        assert_eq!(chains.iter().map(|(_, row)| *row).collect::<Vec<_>>(), [7, 7, 9, 9]);
        assert_eq!(chains[2].0.reward.value, 0.5, "the first to arrive is the one that counts");
    }

    #[test]
    fn incomplete_groups_are_never_given_out() {
        let mut groups = Groups::new(Purpose::Train, 1, 2, vec![0]);
        groups.take(chain(1, 0, 0, 3, 1.0));
        assert!(groups.into_chains().is_none());
    }

    #[test]
    fn a_key_of_another_step_group_or_chain_is_unknown() {
        let groups = Groups::new(Purpose::Train, 2, 2, vec![0]);
        for (step, group, index, known) in
            [(2, 0, 1, true), (1, 0, 1, false), (2, 1, 0, false), (2, 0, 2, false)]
        {
            assert_eq!(groups.knows(&chain(step, group, index, 1, 0.0).key), known, "{step} {group} {index}");
        }
    }
}
