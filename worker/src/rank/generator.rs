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

#[cfg(test)]
mod tests {
    use std::path::Path;
    use std::sync::mpsc;
    use std::time::Duration;

    use agentfly_common::ids::PolicyVersion;
    use agentfly_common::sampling::{SamplingParams, StopReason};
    use agentfly_policy::device::Device;
    use agentfly_policy::engine::{Engine, EngineConfig, EngineStats};
    use agentfly_policy::placement::{Place, random, set_up};
    use tokio::sync::oneshot;
    use tokio::task::{JoinHandle, spawn_blocking, yield_now};
    use tokio::time::{Instant, advance};

    use super::*;

    const SECOND: Duration = Duration::from_secs(1);
    /// Tokens that the cache holds.
    const CACHE: usize = 1024;

    /// An engine, and a clock that goes on only where a test says so.
    struct Scene {
        generator: EngineGenerator,
        /// Keeps a blocking task: meanwhile tokio's clock does not run ahead of a test that waits for the device.
        _time_stands: mpsc::Sender<()>,
    }

    impl Scene {
        async fn new() -> Self {
            let (time_stands, until_dropped) = mpsc::channel();
            spawn_blocking(move || until_dropped.recv());
            let device = DeviceHandle::start(|| {
                set_up(1, Place::Cpu)?;
                let tiny = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../deploy/models/tiny"));
                let decoder = random(tiny, 1)?;
                let config = EngineConfig {
                    max_slots: 2,
                    cache_tokens: CACHE,
                    max_tokens_per_chain: CACHE,
                    max_prefill_tokens: CACHE,
                    enforce_eager: false,
                };
                let engine = Engine::new(config, decoder.config());
                Ok(Device { decoder, engine, policy_version: PolicyVersion(0), extra: None })
            });
            Self { generator: EngineGenerator(device.await.unwrap()), _time_stands: time_stands }
        }

        /// Begins the first turn of a new chain.
        async fn begin(
            &self,
            group: u32,
            prompt: usize,
            max_tokens: u32,
            limit: Duration,
        ) -> JoinHandle<Generation> {
            let chain = &ChainKey { purpose: Purpose::Train, step: 1, group, chain: 0 };
            let prompt = &vec![group + 1; prompt];
            let sampling =
                SamplingParams { temperature: 1.0, top_p: 1.0, top_k: None, max_tokens, stop_ids: vec![] };
            let turn = TurnInput { chain, turn: 0, context: prompt, new_tokens: prompt, sampling, seed: 1 };
            let admitted = self.generator.admit(turn).await.unwrap();
            let clock = Clock::start(limit, Instant::now() + 1000 * SECOND);
            tokio::spawn(async move { admitted.until_over(&clock).await.unwrap() })
        }

        /// Lets time pass while the device rests, as soon as the engine is as wanted between two decode steps.
        async fn pass(&self, time: Duration, wanted: fn(&EngineStats) -> bool) {
            loop {
                let (looked, found) = oneshot::channel();
                let (go_on, until_dropped) = mpsc::channel::<()>();
                let device = self.generator.0.clone();
                let rest = tokio::spawn(async move {
                    let look = move |device: &mut Device<LearnerSeat>| {
                        let stats = device.engine.stats();
                        looked.send(stats).unwrap();
                        wanted(&stats).then(|| until_dropped.recv())
                    };
                    device.call("resting", look).await.map(drop)
                });
                let stats = found.await.unwrap();
                assert!(stats.decoding + stats.waiting > 0, "over, and never as wanted: {stats:?}");
                let rests = wanted(&stats);
                if rests {
                    // First whoever the device woke hears why.
                    yield_now().await;
                    advance(time).await;
                }
                drop(go_on);
                rest.await.unwrap().unwrap();
                if rests {
                    return;
                }
            }
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_chains_time_stands_still_while_the_engine_has_paused_it() {
        let scene = Scene::new().await;
        let older = scene.begin(0, 5, 1000, 1000 * SECOND);
        let younger = scene.begin(1, 600, 300, 10 * SECOND);
        let (older, younger) = tokio::join!(older, younger);
        scene.pass(9 * SECOND, |engine| engine.decoding == 2).await;
        scene.pass(100 * SECOND, |engine| (engine.decoding, engine.preemptions) == (1, 1)).await;
        older.abort();
        let whole = younger.await.unwrap();
        assert_eq!((whole.ids.len(), whole.stop), (300, StopReason::Length), "9 of its 10 s have passed");
    }

    #[tokio::test(start_paused = true)]
    async fn a_chains_time_passes_while_it_is_sampled() {
        let scene = Scene::new().await;
        let alone = scene.begin(0, 5, 1000, 10 * SECOND).await;
        scene.pass(11 * SECOND, |engine| engine.decode_tokens > 2).await;
        let cut = alone.await.unwrap();
        assert!((3..1000).contains(&cut.ids.len()), "{} tokens", cut.ids.len());
        assert_eq!(cut.stop, StopReason::TimeLimit);
    }
}
