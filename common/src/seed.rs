//! One job seed, and every random stream derived from it by name.
//!
//! A stream depends on its key alone, never on what else runs beside it, so a chain that is sampled again on
//! another worker, in another batch, draws the same numbers.

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::SeedableRng;

use crate::ids::{ChainKey, Purpose};

/// The seed a job was started with.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(transparent)]
pub struct JobSeed(pub u64);

impl JobSeed {
    /// A 64-bit seed for the stream named by `name` and `parts`: BLAKE3 of all of them.
    #[must_use]
    pub fn derive(self, name: &str, parts: &[u64]) -> u64 {
        let mut hasher = blake3::Hasher::new();
        hasher.update(&self.0.to_le_bytes());
        hasher.update(&(name.len() as u64).to_le_bytes());
        hasher.update(name.as_bytes());
        for part in parts {
            hasher.update(&part.to_le_bytes());
        }
        let mut bytes = [0; 8];
        bytes.copy_from_slice(&hasher.finalize().as_bytes()[..8]);
        u64::from_le_bytes(bytes)
    }

    /// The seed of one turn of a chain: sampling and, by name, its tools.
    #[must_use]
    pub fn turn(self, name: &str, key: &ChainKey, turn: u32) -> u64 {
        let purpose = match key.purpose {
            Purpose::Train => 0,
            Purpose::Validation => 1,
        };
        self.derive(name, &[purpose, key.step, u64::from(key.group), u64::from(key.chain), u64::from(turn)])
    }

    /// A generator for the stream named by `name` and `parts`.
    #[must_use]
    pub fn rng(self, name: &str, parts: &[u64]) -> ChaCha8Rng {
        ChaCha8Rng::seed_from_u64(self.derive(name, parts))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn streams_differ_by_every_part_of_their_key() {
        let seed = JobSeed(7);
        let key = ChainKey { purpose: Purpose::Train, step: 1, group: 2, chain: 3 };
        let mut seen = std::collections::BTreeSet::new();
        seen.insert(seed.turn("sample", &key, 0));
        seen.insert(seed.turn("sample", &key, 1));
        seen.insert(seed.turn("tool", &key, 0));
        seen.insert(seed.turn("sample", &ChainKey { purpose: Purpose::Validation, ..key }, 0));
        seen.insert(seed.turn("sample", &ChainKey { step: 2, ..key }, 0));
        seen.insert(seed.turn("sample", &ChainKey { group: 3, ..key }, 0));
        seen.insert(seed.turn("sample", &ChainKey { chain: 4, ..key }, 0));
        seen.insert(JobSeed(8).turn("sample", &key, 0));
        assert_eq!(seen.len(), 8);
        assert_eq!(seed.turn("sample", &key, 0), JobSeed(7).turn("sample", &key, 0));
    }
}
