//! The rollout engine as the chain loop's generator.

use agentfly_agent::chain::{GenerateFault, Generator, Sampling, TurnInput};
use agentfly_agent::clock::Clock;
use agentfly_common::ids::{ChainKey, Purpose};
use agentfly_common::sampling::Generation;
use agentfly_policy::device::{AdmittedTurn, DeviceError, DeviceHandle, Progress};
use agentfly_policy::engine::TurnRequest;

use super::job::LearnerSeat;

/// [`Generator`] over the device thread.
pub(super) struct EngineGenerator(pub(super) DeviceHandle<LearnerSeat>);

/// A number for a chain (or, with `chain` 0, its group) that no other chain on this device has now: chains
/// of different steps never run at the same time, training and validation are told apart by a bit.
fn number(key: &ChainKey, chain: u32) -> u64 {
    let purpose = match key.purpose {
        Purpose::Train => 0,
        Purpose::Validation => 1,
    };
    (purpose << 63) | (u64::from(key.group) << 32) | u64::from(chain)
}

/// [`Sampling`] over a turn on the device.
struct EngineTurn(AdmittedTurn);

#[async_trait::async_trait]
impl Sampling for EngineTurn {
    async fn until_over(self: Box<Self>, clock: &Clock) -> Result<Generation, GenerateFault> {
        let mut turn = self.0;
        loop {
            match turn.until(clock.own_deadline()).await.map_err(fault)? {
                Progress::Ended(generation) => return Ok(generation),
                Progress::Paused => clock.stand_still(turn.resumed()).await,
            }
        }
    }
}

fn fault(error: DeviceError) -> GenerateFault {
    GenerateFault { cause: format!("{error:#}") }
}

#[async_trait::async_trait]
impl Generator for EngineGenerator {
    async fn admit(&self, turn: TurnInput<'_>) -> Result<Box<dyn Sampling>, GenerateFault> {
        let request = TurnRequest {
            chain: number(turn.chain, turn.chain.chain),
            group: (turn.turn == 0).then(|| number(turn.chain, 0)),
            new_tokens: turn.new_tokens.to_vec(),
            sampling: turn.sampling,
            seed: turn.seed,
        };
        let admitted = self.0.admit(request).await.map_err(fault)?;
        Ok(Box::new(EngineTurn(admitted)))
    }

    fn release(&self, chain: &ChainKey) {
        self.0.release(number(chain, chain.chain));
    }
}
