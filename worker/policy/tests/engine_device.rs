//! The device thread answers everyone, whatever happens on it.

mod support;

use agentfly_common::ids::PolicyVersion;
use agentfly_common::sampling::{Generation, SamplingParams, StopReason};
use agentfly_policy::device::{AdmittedTurn, Device, DeviceError, DeviceHandle, Progress};
use agentfly_policy::engine::{Engine, EngineConfig, TurnRequest};
use support::{model, text};
use tokio::time::Instant;

async fn start() -> DeviceHandle<Vec<u32>> {
    start_with(8192, 2000).await
}

async fn start_with(cache_tokens: usize, window: usize) -> DeviceHandle<Vec<u32>> {
    DeviceHandle::start(move || {
        let decoder = model("qwen2", 1);
        let config = EngineConfig {
            max_slots: 4,
            cache_tokens,
            max_tokens_per_chain: window,
            max_prefill_tokens: 64,
            enforce_eager: false,
        };
        let engine = Engine::new(config, decoder.config());
        Ok(Device { decoder, engine, policy_version: PolicyVersion(2), extra: Vec::new() })
    })
    .await
    .expect("a tiny model starts")
}

/// Waits for a place, then for the turn's end.
async fn generate(device: &DeviceHandle<Vec<u32>>, request: TurnRequest) -> Result<Generation, DeviceError> {
    device.admit(request).await?.finish().await
}

/// The turn's end, cut short where it has not ended yet.
async fn cut(turn: &mut AdmittedTurn) -> Generation {
    match turn.until(Instant::now()).await.expect("the turn ends well") {
        Progress::Ended(generation) => generation,
        Progress::Paused => panic!("paused where the cache has room"),
    }
}

fn turn(chain: u64, max_tokens: u32) -> TurnRequest {
    let sampling = SamplingParams { temperature: 1.0, top_p: 1.0, top_k: None, max_tokens, stop_ids: vec![] };
    TurnRequest { chain, group: None, new_tokens: text(5, chain as u32), sampling, seed: chain }
}

#[tokio::test]
async fn chains_generate_side_by_side_and_calls_run_between_their_steps() {
    let device = start().await;
    let many = futures_of((0..10).map(|chain| {
        let device = device.clone();
        async move {
            let generation = generate(&device, turn(chain, 20)).await;
            device.release(chain);
            generation
        }
    }));
    let version = device.call("reading the version", |device| {
        device.extra.push(1);
        device.policy_version
    });
    let (generations, version) = tokio::join!(many, version);
    assert_eq!(version.unwrap(), PolicyVersion(2));
    for generation in generations {
        let generation = generation.unwrap();
        assert_eq!((generation.ids.len(), generation.policy_version), (20, PolicyVersion(2)));
    }
    let (extra, stats) = device.call("looking", |d| (d.extra.clone(), d.engine.stats())).await.unwrap();
    assert_eq!((extra, stats.chains, stats.decode_tokens), (vec![1], 0, 200));
    device.stop().await;
}

#[tokio::test]
async fn what_is_released_is_gone_for_the_call_that_follows() {
    let device = start().await;
    for chain in 0..50 {
        generate(&device, turn(chain, 1)).await.unwrap();
        let held = |device: &mut Device<Vec<u32>>| device.engine.stats().chains;
        assert_eq!(device.call("looking", held).await.unwrap(), 1);
        device.release(chain); // the thread waits for its next message by now, most times
        assert_eq!(device.call("looking", held).await.unwrap(), 0, "chain {chain}");
    }
    device.stop().await;
}

#[tokio::test]
async fn a_dropped_turn_is_cancelled_and_its_chain_released() {
    let device = start().await;
    {
        let endless = generate(&device, turn(1, 1900));
        let other = generate(&device, turn(2, 3));
        tokio::select! {
            biased;
            _ = endless => panic!("1900 tokens were sampled before 3"),
            done = other => assert_eq!(done.unwrap().ids.len(), 3),
        }
    }
    device.release(1);
    device.release(2);
    generate(&device, turn(3, 2)).await.unwrap();
    let stats = device.call("looking", |device| device.engine.stats()).await.unwrap();
    assert_eq!((stats.chains, stats.decoding, stats.cache_tokens_used), (1, 0, 64));
    assert!(stats.decode_tokens < 1900);
}

#[tokio::test]
async fn a_turn_is_admitted_when_a_chain_lets_go_of_its_slot() {
    let device = start().await;
    let mut admitted = Vec::new();
    for chain in 0..4 {
        admitted.push(device.admit(turn(chain, 1900)).await.unwrap());
    }
    let mut fifth = Box::pin(device.admit(turn(4, 3)));
    let mut steps = Vec::new();
    while steps.first().is_none_or(|first| steps[steps.len() - 1] < first + 3) {
        tokio::select! {
            biased;
            _ = &mut fifth => panic!("five turns were admitted to four slots"),
            stats = device.call("looking", |device| device.engine.stats()) => {
                let stats = stats.unwrap();
                assert_eq!((stats.decoding, stats.waiting), (4, 1));
                steps.push(stats.steps);
            }
        }
    }
    let cut = cut(&mut admitted[0]).await;
    assert_eq!(cut.stop, StopReason::TimeLimit);
    assert_eq!(fifth.await.unwrap().finish().await.unwrap().ids.len(), 3);
    let stats = device.call("looking", |device| device.engine.stats()).await.unwrap();
    assert_eq!((stats.decoding, stats.evictions), (3, 0), "the first chain is idle and keeps its cache");
}

#[tokio::test]
async fn a_turn_past_its_deadline_ends_with_what_it_has() {
    let device = start().await;
    let mut long = device.admit(turn(1, 1900)).await.unwrap();
    let whole = generate(&device, turn(2, 5)).await.unwrap();
    let cut = cut(&mut long).await;
    assert!(cut.ids.len() >= 4 && cut.ids.len() < 1900, "{} tokens", cut.ids.len());
    assert_eq!((cut.stop, cut.policy_version), (StopReason::TimeLimit, PolicyVersion(2)));
    assert_eq!(cut.log_probs.len(), cut.ids.len());
    assert_eq!(whole.stop, StopReason::Length);
    let later = Instant::now() + std::time::Duration::from_secs(60);
    let next = device.admit(turn(1, 2)).await.unwrap().until(later).await.unwrap();
    let Progress::Ended(next) = next else { panic!("a chain alone was paused") };
    assert_eq!((next.ids.len(), next.stop), (2, StopReason::Length), "the chain goes on");
}

#[tokio::test]
async fn a_paused_turn_says_so_and_is_not_cut_until_it_has_its_slot_again() {
    let device = start_with(256, 256).await;
    let older = device.admit(turn(1, 200)).await.unwrap();
    let mut younger = device.admit(turn(2, 200)).await.unwrap();
    let long_ago = Instant::now();
    let later = long_ago + std::time::Duration::from_secs(60);
    let older = tokio::spawn(older.finish());
    assert!(matches!(younger.until(later).await.unwrap(), Progress::Paused), "the cache holds one of them");
    // Its owner's clock stands still meanwhile: nobody asks for its end.
    younger.resumed().await;
    assert_eq!(older.await.unwrap().unwrap().ids.len(), 200, "the older one had the cache until its end");
    let Progress::Ended(whole) = younger.until(later).await.unwrap() else { panic!("paused by nobody") };
    assert_eq!((whole.ids.len(), whole.stop), (200, StopReason::Length));
}

#[tokio::test]
async fn a_dropped_turn_takes_nothing_from_the_next_one_of_its_chain() {
    let device = start().await;
    let _busy = device.admit(turn(9, 1900)).await.unwrap();
    for round in 0..50 {
        // Dropped while a step runs; the messages that follow are read before the next one.
        drop(device.admit(turn(1, 1000)).await.unwrap());
        device.release(1);
        let again = generate(&device, turn(1, 2)).await.unwrap();
        assert_eq!(again.ids.len(), 2, "round {round}");
        drop(device.admit(turn(1, 1000)).await.unwrap());
        let next = generate(&device, TurnRequest { new_tokens: text(1, 1), ..turn(1, 2) }).await.unwrap();
        assert_eq!(next.ids.len(), 2, "a chain goes on after a turn that nobody waited for; round {round}");
        device.release(1);
    }
}

#[tokio::test]
async fn a_panic_is_the_callers_error_and_the_thread_lives_on() {
    let device = start().await;
    let error = device.call("dividing", |_| -> u32 { panic!("no {}", 7) }).await.unwrap_err();
    assert_eq!(error.to_string(), "dividing failed on the device thread: no 7");
    let refused = generate(&device, TurnRequest { new_tokens: vec![], ..turn(1, 3) }).await.unwrap_err();
    assert!(matches!(refused, DeviceError::Engine(_)), "{refused}");
    assert_eq!(generate(&device, turn(2, 3)).await.unwrap().ids.len(), 3);
}

#[tokio::test]
async fn a_stopped_device_says_so() {
    let device = start().await;
    let (ended, ()) = tokio::join!(generate(&device, turn(1, 1900)), async { device.stop().await });
    assert!(matches!(ended, Err(DeviceError::Stopped { .. })), "{ended:?}");
    let error = generate(&device, turn(2, 1)).await.unwrap_err();
    assert_eq!(error.to_string(), "generating a turn: the device thread has stopped");
    assert!(device.call("looking", |_| ()).await.is_err());
    device.stop().await;
}

#[tokio::test]
async fn a_device_that_cannot_be_set_up_says_why() {
    let failed = DeviceHandle::<()>::start(|| anyhow::bail!("no model here")).await;
    assert_eq!(failed.unwrap_err().to_string(), "cannot set up the device: no model here");
    let failed = DeviceHandle::<()>::start(|| panic!("no room")).await;
    assert!(failed.unwrap_err().to_string().ends_with("no room"));
}

/// Runs all of them at once and keeps their order.
async fn futures_of<F>(all: impl Iterator<Item = F>) -> Vec<F::Output>
where
    F: Future + Send + 'static,
    F::Output: Send + 'static,
{
    let tasks: Vec<_> = all.map(tokio::spawn).collect();
    let mut outputs = Vec::new();
    for task in tasks {
        outputs.push(task.await.expect("no test task panics"));
    }
    outputs
}
