//! A model by its hub name: fetched once, whole and verified, whatever the network does; and without one, a way out.
#![allow(clippy::unwrap_used, reason = "a story that cannot go on fails here")]

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use agentfly_hub::{Hub, HubError, HubSettings, ModelName, Patience, Want};
use agentfly_tests::cluster::{Playground, Ran};
use agentfly_tests::hub::{COMMIT, FakeHub, git_blob};
use agentfly_tests::job::settings;
use agentfly_tests::tree::root;
use rustix::thread::{CapabilitySet, CapabilitySets, set_capabilities};
use tempfile::TempDir;
use tokio::io::AsyncWriteExt as _;

fn tiny() -> PathBuf {
    root().join("deploy/models/tiny")
}

/// The same network, asked with little patience.
fn impatient(endpoint: &str, cache: &Path, tries: usize) -> HubSettings {
    let short = Duration::from_secs(5);
    let pause = Duration::from_millis(1);
    let patience = Patience {
        connect: short,
        answer: short,
        silence: short,
        tries,
        pause,
        lock: Duration::from_secs(30),
    };
    let (endpoint, cache) = (endpoint.to_owned(), cache.to_owned());
    HubSettings { endpoint, cache, token: None, offline: false, patience }
}

struct Scene {
    hub: FakeHub,
    cache: TempDir,
}

impl Scene {
    fn new() -> Self {
        Self { hub: FakeHub::serving(&tiny()).unwrap(), cache: tempfile::tempdir().unwrap() }
    }

    fn settings(&self, tries: usize) -> HubSettings {
        impatient(&self.hub.endpoint(), self.cache.path(), tries)
    }

    fn fetch(&self, tries: usize) -> Result<PathBuf, HubError> {
        fetch(self.settings(tries), "acme/tiny", Want::Everything)
    }

    fn blobs(&self) -> Vec<String> {
        let entries = std::fs::read_dir(self.cache.path().join("models--acme--tiny/blobs")).unwrap();
        entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
    }
}

fn fetch(settings: HubSettings, name: &str, want: Want) -> Result<PathBuf, HubError> {
    Hub::new(settings).model_dir(&ModelName::parse(name).unwrap(), want)
}

#[track_caller]
fn assert_says(said: &str, parts: &[&str]) {
    for part in parts {
        assert!(said.contains(part), "{part:?} is not in:\n{said}");
    }
}

/// The folder holds the tiny model, byte for byte.
#[track_caller]
fn assert_whole(folder: &Path) {
    for file in [
        "config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "generation_config.json",
        "model.safetensors",
    ] {
        let (there, here) =
            (std::fs::read(tiny().join(file)).unwrap(), std::fs::read(folder.join(file)).unwrap());
        assert!(there == here, "{file} differs");
    }
}

#[test]
fn a_model_is_fetched_once_and_lies_where_pythons_library_looks() {
    let scene = Scene::new();
    scene.hub.edit("README.md", |text| text.extend(b"not needed"));
    let folder = scene.fetch(0).unwrap();
    assert_whole(&folder);
    let model = scene.cache.path().join("models--acme--tiny");
    assert_eq!(folder, model.join("snapshots").join(COMMIT));
    assert_eq!(std::fs::read_to_string(model.join("refs/main")).unwrap(), COMMIT);
    let config = std::fs::read(tiny().join("config.json")).unwrap();
    let link = std::fs::read_link(folder.join("config.json")).unwrap();
    assert_eq!(link, Path::new("../../blobs").join(git_blob(&config)));
    assert!(!folder.join("README.md").exists(), "only what is needed");
    assert!(!scene.hub.asked().iter().any(|asked| asked.path.contains("README")));

    let before = scene.hub.asked().len();
    assert_eq!(scene.fetch(0).unwrap(), folder);
    let again = scene.hub.asked().split_off(before);
    assert_eq!(again.len(), 1, "the listing alone is asked for again: {again:?}");
    fetch(scene.settings(0), &format!("acme/tiny@{COMMIT}"), Want::Everything).unwrap();
    assert_eq!(scene.hub.asked().len(), before + 1, "a commit that is here is asked about nowhere");
}

#[test]
fn the_configuration_alone_costs_no_weights() {
    let scene = Scene::new();
    let folder = fetch(scene.settings(0), "acme/tiny@v1", Want::Configuration).unwrap();
    assert!(folder.join("config.json").exists() && !folder.join("model.safetensors").exists());
    assert!(scene.hub.transfers().is_empty());
    assert_whole(&fetch(scene.settings(0), "acme/tiny@v1", Want::Everything).unwrap());
}

#[test]
fn a_broken_transfer_goes_on_where_it_broke() {
    let scene = Scene::new();
    scene.hub.faults(|faults| faults.breaks.extend([1000, 50_000]));
    assert_whole(&scene.fetch(3).unwrap());
    let ranges: Vec<_> = scene.hub.transfers().into_iter().map(|asked| asked.range).collect();
    assert_eq!(ranges, [None, Some("bytes=1000-".to_owned()), Some("bytes=51000-".to_owned())]);
}

#[test]
fn an_interrupted_download_goes_on_in_the_next_run() {
    let scene = Scene::new();
    scene.hub.faults(|faults| faults.breaks.extend([7000]));
    let told = scene.fetch(0).unwrap_err().to_string();
    assert_says(
        &told,
        &["model.safetensors of acme/tiny broke off at 7000 of", "run the same command again"],
    );
    assert_whole(&scene.fetch(0).unwrap());
    assert_eq!(scene.hub.transfers().last().unwrap().range.as_deref(), Some("bytes=7000-"));
    assert!(scene.blobs().iter().all(|name| !name.contains("part")), "{:?}", scene.blobs());
}

#[test]
fn a_file_cut_short_in_a_copied_cache_is_replaced() {
    let scene = Scene::new();
    let folder = scene.fetch(0).unwrap();
    // As a copy without links leaves it that was broken off.
    let place = folder.join("model.safetensors");
    let whole = std::fs::read(&place).unwrap();
    std::fs::remove_file(&place).unwrap();
    std::fs::write(&place, &whole[..1000]).unwrap();
    assert_whole(&scene.fetch(0).unwrap());
    assert_eq!(std::fs::read(&place).unwrap().len(), whole.len());
}

#[test]
fn a_file_of_a_commit_that_is_cut_short_is_fetched_again_or_named_with_its_lengths() {
    let exact = format!("acme/tiny@{COMMIT}");
    // Within the header's length, the header, the data and a JSON; a copy without links, and a blob that links lead to.
    for (file, bytes) in [
        ("model.safetensors", 5),
        ("model.safetensors", 1000),
        ("model.safetensors", 200_000),
        ("tokenizer.json", 900),
    ] {
        for link in [false, true] {
            let scene = Scene::new();
            let folder = fetch(scene.settings(0), &exact, Want::Everything).unwrap();
            let place = folder.join(file);
            let whole = std::fs::read(&place).unwrap();
            if !link {
                std::fs::remove_file(&place).unwrap();
            }
            std::fs::write(&place, &whole[..bytes]).unwrap();

            let offline = HubSettings { offline: true, ..scene.settings(0) };
            let told = fetch(offline, &exact, Want::Everything).unwrap_err().to_string();
            let path = place.display().to_string();
            assert_says(
                &told,
                &[&path, &format!("{bytes} bytes"), "HF_HUB_OFFLINE is set", "hf download acme/tiny"],
            );
            if bytes == 200_000 {
                assert_says(&told, &[&format!("by its header {}", whole.len())]);
            }
            let before = scene.hub.transfers().len();
            assert_whole(&fetch(scene.settings(0), &exact, Want::Everything).unwrap());
            // The blob that a copy stands beside is linked again.
            let large = usize::from(link && file == "model.safetensors");
            assert_eq!(scene.hub.transfers().len() - before, large, "{file}, {bytes} bytes, link: {link}");
        }
    }
}

#[test]
fn a_server_that_does_not_resume_sends_the_whole_again() {
    let scene = Scene::new();
    scene.hub.faults(|faults| {
        faults.breaks.extend([7000]);
        faults.no_ranges = true;
    });
    assert_whole(&scene.fetch(1).unwrap());
}

#[test]
fn bytes_that_are_not_the_hubs_are_removed_and_named() {
    let scene = Scene::new();
    scene.hub.faults(|faults| faults.corrupt = true);
    let told = scene.fetch(0).unwrap_err().to_string();
    assert_says(&told, &["model.safetensors of acme/tiny arrived damaged", "SHA-256", "was removed"]);
    let weights = std::fs::metadata(tiny().join("model.safetensors")).unwrap().len();
    let kept =
        scene.blobs().into_iter().map(|name| scene.cache.path().join("models--acme--tiny/blobs").join(name));
    assert!(
        kept.map(|path| path.metadata().unwrap().len()).all(|bytes| bytes != weights),
        "{:?}",
        scene.blobs()
    );
    scene.hub.faults(|faults| faults.corrupt = false);
    assert_whole(&scene.fetch(0).unwrap());
}

#[test]
fn a_small_file_is_verified_too() {
    let scene = Scene::new();
    scene.fetch(0).unwrap();
    let config = git_blob(&std::fs::read(tiny().join("config.json")).unwrap());
    let blob = scene.cache.path().join("models--acme--tiny/blobs").join(&config);
    // As an interrupted write leaves it: the right length would be caught by the checksum, a wrong one by the length.
    let mut bytes = std::fs::read(&blob).unwrap();
    bytes[0] = b'[';
    std::fs::rename(&blob, blob.with_extension("part")).unwrap();
    std::fs::write(blob.with_extension("part"), &bytes).unwrap();
    let told = scene.fetch(0).unwrap_err().to_string();
    assert_says(&told, &["config.json of acme/tiny arrived damaged", "git blob id"]);
    assert_whole(&scene.fetch(0).unwrap());
}

#[test]
fn a_gated_model_needs_a_token_which_goes_to_the_hub_alone() {
    let scene = Scene::new();
    scene.hub.faults(|faults| faults.token = Some("hf_secret".to_owned()));
    let told = scene.fetch(0).unwrap_err().to_string();
    assert_says(&told, &["no token was given", "HF_TOKEN", "/acme/tiny"]);
    let with = |token: &str| HubSettings {
        token: Some(agentfly_common::secret::Secret::new(token)),
        ..scene.settings(0)
    };
    let told = fetch(with("hf_wrong"), "acme/tiny", Want::Everything).unwrap_err().to_string();
    assert_says(&told, &["the token given may not read it"]);
    assert!(!told.contains("hf_wrong"), "{told}");
    assert_whole(&fetch(with("hf_secret"), "acme/tiny", Want::Everything).unwrap());
    let transfers = scene.hub.transfers();
    assert!(
        !transfers.is_empty() && transfers.iter().all(|asked| asked.authorization.is_none()),
        "{transfers:?}"
    );
}

#[test]
fn without_a_network_the_copy_is_taken_or_a_way_to_get_one_is_told() {
    let scene = Scene::new();
    let away = || impatient("http://127.0.0.1:1", scene.cache.path(), 0);
    let told = fetch(away(), "acme/tiny", Want::Everything).unwrap_err().to_string();
    let cache = scene.cache.path().display().to_string();
    assert_says(
        &told,
        &[
            "no folder of that name here",
            "127.0.0.1:1 cannot be reached",
            "hf download acme/tiny --local-dir tiny",
            "models--acme--tiny",
            &cache,
        ],
    );
    let offline = || HubSettings { offline: true, ..scene.settings(0) };
    let told = fetch(offline(), "acme/tiny@v1", Want::Everything).unwrap_err().to_string();
    assert_says(&told, &["HF_HUB_OFFLINE is set", "hf download acme/tiny --revision v1"]);
    assert!(scene.hub.asked().is_empty(), "nobody was asked");

    let folder = scene.fetch(0).unwrap();
    assert_eq!(fetch(away(), "acme/tiny", Want::Everything).unwrap(), folder);
    assert_eq!(fetch(offline(), "acme/tiny", Want::Everything).unwrap(), folder);
    // Half a copy is none.
    std::fs::remove_file(folder.join("model.safetensors")).unwrap();
    assert!(fetch(offline(), "acme/tiny", Want::Everything).is_err());
}

#[test]
fn a_listing_that_broke_is_asked_for_again() {
    let scene = Scene::new();
    scene.hub.faults(|faults| faults.listings.extend([None, Some("503 Service Unavailable"), None]));
    assert_whole(&scene.fetch(5).unwrap());
    assert_eq!(scene.hub.listings(), 4);

    let scene = Scene::new();
    scene.hub.faults(|faults| faults.listings.extend([None; 9]));
    let told = scene.fetch(9).unwrap_err().to_string();
    assert_says(&told, &["cannot be reached", "hf download acme/tiny"]);
    assert_eq!(scene.hub.listings(), 4, "and not for ever");
}

#[test]
fn a_hub_without_an_answer_for_now_leaves_the_copy_in_use() {
    for fault in [Some("429 Too Many Requests"), Some("500 Oops"), Some("503 Service Unavailable"), None] {
        let scene = Scene::new();
        scene.hub.faults(|faults| faults.listings.extend([fault; 2]));
        let none = fetch(scene.settings(0), "acme/tiny", Want::Everything).unwrap_err().to_string();
        assert_says(&none, &[fault.map_or("cannot be reached", |_| "try again later")]);

        scene.hub.faults(|faults| faults.listings.clear());
        let folder = scene.fetch(0).unwrap();
        let before = scene.hub.listings();
        scene.hub.faults(|faults| faults.listings.extend([fault; 9]));
        assert_eq!(scene.fetch(5).unwrap(), folder, "{fault:?}");
        assert_eq!(scene.hub.listings(), before + 2, "one further try, for there is a copy");
        // Half a copy is none.
        std::fs::remove_file(folder.join("model.safetensors")).unwrap();
        scene.fetch(5).unwrap_err();
    }
}

#[test]
fn a_last_word_of_the_hub_is_not_hidden_by_a_copy() {
    let scene = Scene::new();
    scene.fetch(0).unwrap();
    for (status, said) in
        [("401 Unauthorized", "no token was given"), ("404 Not Found", "check the spelling")]
    {
        scene.hub.faults(|faults| faults.listings.extend([Some(status)]));
        assert_says(&scene.fetch(0).unwrap_err().to_string(), &[said]);
    }
}

#[test]
fn a_download_of_a_newer_commit_that_breaks_leaves_the_older_copy_in_use() {
    let scene = Scene::new();
    let new = scene.fetch(0).unwrap();
    // What main meant before.
    let (older, model) = ("a".repeat(40), scene.cache.path().join("models--acme--tiny"));
    let old = new.with_file_name(&older);
    std::fs::rename(&new, &old).unwrap();
    std::fs::write(model.join("refs/main"), &older).unwrap();
    scene.hub.edit("model.safetensors", |bytes| *bytes.last_mut().unwrap() ^= 1);
    scene.hub.faults(|faults| faults.breaks.extend([7000, 7000]));
    assert_eq!(scene.fetch(0).unwrap(), old);
    let exact = fetch(scene.settings(0), &format!("acme/tiny@{COMMIT}"), Want::Everything);
    assert_says(&exact.unwrap_err().to_string(), &["broke off at"]);
    assert_eq!(scene.fetch(0).unwrap(), new, "and goes on to the newer one as soon as it can");
}

/// Runs `story` where nobody can write to the cache; root may write anywhere unless it gives that up.
fn read_only<T: Send>(cache: &Path, story: impl FnOnce() -> T + Send) -> T {
    let allow = |mode: u32| {
        let mut all = vec![cache.to_owned()];
        while let Some(path) = all.pop() {
            std::fs::set_permissions(&path, PermissionsExt::from_mode(mode)).unwrap();
            if path.is_dir() {
                let entries = std::fs::read_dir(&path).unwrap().map(|entry| entry.unwrap().path());
                all.extend(entries.filter(|path| !path.is_symlink()));
            }
        }
    };
    allow(0o555);
    let told = std::thread::scope(|scope| {
        let without_rights = scope.spawn(|| {
            let none = CapabilitySet::empty();
            let sets = CapabilitySets { effective: none, permitted: none, inheritable: none };
            set_capabilities(None, sets).unwrap();
            assert!(std::fs::write(cache.join("probe"), "").is_err(), "it is not read-only");
            story()
        });
        without_rights.join().unwrap()
    });
    allow(0o755);
    told
}

#[test]
fn a_whole_copy_in_a_read_only_cache_is_used_as_it_is() {
    let scene = Scene::new();
    let folder = scene.fetch(0).unwrap();
    let model = scene.cache.path().join("models--acme--tiny");
    // As another program left it: no lock of ours, and the branch was somewhere else.
    std::fs::remove_file(model.join(".agentfly.lock")).unwrap();
    std::fs::write(model.join("refs/main"), "b".repeat(40)).unwrap();
    let transfers = scene.hub.transfers().len();
    for want in [Want::Configuration, Want::Everything] {
        let got = read_only(scene.cache.path(), || fetch(scene.settings(0), "acme/tiny", want));
        assert_eq!(got.unwrap(), folder, "{want:?}");
    }
    assert_eq!(scene.hub.transfers().len(), transfers);
    assert!(!model.join(".agentfly.lock").exists(), "nothing was written");
    assert_eq!(std::fs::read_to_string(model.join("refs/main")).unwrap(), "b".repeat(40));
    // Where it can, it keeps what the branch means now.
    scene.fetch(0).unwrap();
    assert_eq!(std::fs::read_to_string(model.join("refs/main")).unwrap(), COMMIT);
}

#[test]
fn a_read_only_cache_that_lacks_something_is_named_with_the_way_out() {
    let scene = Scene::new();
    let cache = scene.cache.path().display().to_string();
    let says = || {
        let told = read_only(scene.cache.path(), || scene.fetch(0)).unwrap_err();
        assert_says(
            &told.to_string(),
            &["not all of acme/tiny is in", &cache, "cannot write there", "HF_HOME"],
        );
    };
    says();
    let folder = scene.fetch(0).unwrap();
    std::fs::remove_file(folder.join("model.safetensors")).unwrap();
    let transfers = scene.hub.transfers().len();
    says();
    assert_eq!(scene.hub.transfers().len(), transfers, "and is not fetched");
}

#[test]
fn a_model_that_cannot_be_computed_is_refused_before_its_weights_are_fetched() {
    let scene = Scene::new();
    scene.hub.edit("config.json", |text| {
        let changed =
            String::from_utf8(text.clone()).unwrap().replace("Qwen2ForCausalLM", "MambaForCausalLM");
        *text = changed.replace("LlamaForCausalLM", "MambaForCausalLM").into_bytes();
    });
    let told = scene.fetch(0).unwrap_err();
    let source = std::error::Error::source(&told).unwrap().to_string();
    assert_says(&told.to_string(), &["acme/tiny", "weights were not fetched"]);
    assert_says(&source, &["MambaForCausalLM", "supported: LlamaForCausalLM"]);
    assert!(scene.hub.transfers().is_empty());
}

#[test]
fn a_name_the_hub_does_not_know_is_said_to_be_unknown() {
    let scene = Scene::new();
    for name in ["acme/tiny@v9", "acme/giant"] {
        let told = fetch(scene.settings(0), name, Want::Everything).unwrap_err().to_string();
        assert_says(&told, &[name, "check the spelling"]);
    }
}

#[test]
fn many_who_want_a_model_at_the_same_time_fetch_it_once() {
    let scene = Scene::new();
    let folders: Vec<PathBuf> = std::thread::scope(|scope| {
        let all: Vec<_> = (0..4).map(|_| scope.spawn(|| scene.fetch(0).unwrap())).collect();
        all.into_iter().map(|thread| thread.join().unwrap()).collect()
    });
    assert!(folders.iter().all(|folder| *folder == folders[0]));
    assert_whole(&folders[0]);
    assert_eq!(scene.hub.transfers().len(), 1);
}

#[tokio::test]
async fn a_worker_scores_with_a_model_it_has_just_fetched() {
    let scene = Scene::new();
    let playground = Playground::new().unwrap();
    let mut command = playground.command("worker", &["score", "--model", "acme/tiny"]);
    command.env("HF_ENDPOINT", scene.hub.endpoint()).env("HF_HOME", scene.cache.path()).stdin(Stdio::piped());
    let mut worker = command.spawn().unwrap();
    worker.stdin.take().unwrap().write_all(b"{\"ids\":[1,2,3]}\n").await.unwrap();
    let ended = tokio::time::timeout(Duration::from_secs(60), worker.wait_with_output()).await.unwrap();
    let Ran { code, stdout, stderr } = Ran::from(ended.unwrap());
    assert_eq!(code, Some(0), "{stderr}");
    assert_says(&stdout, &["{\"logprobs\":[null,-"]);
    assert_says(&stderr, &["fetching acme/tiny"]);
}

#[tokio::test]
async fn whoever_gets_the_copy_instead_is_told() {
    let scene = Scene::new();
    let folder = scene.fetch(0).unwrap();
    scene.hub.faults(|faults| faults.listings.extend([Some("429 Too Many Requests"); 9]));
    let playground = Playground::new().unwrap();
    let mut command = playground.command("worker", &["score", "--model", "acme/tiny"]);
    command
        .env("HF_ENDPOINT", scene.hub.endpoint())
        .env("HF_HUB_CACHE", scene.cache.path())
        .stdin(Stdio::piped());
    let mut worker = command.spawn().unwrap();
    worker.stdin.take().unwrap().write_all(b"{\"ids\":[1,2,3]}\n").await.unwrap();
    let ended = tokio::time::timeout(Duration::from_secs(60), worker.wait_with_output()).await.unwrap();
    let Ran { code, stdout: _, stderr } = Ran::from(ended.unwrap());
    assert_eq!(code, Some(0), "{stderr}");
    assert_says(&stderr, &["taking the copy in the cache", "status 429", &folder.display().to_string()]);
}

#[tokio::test]
async fn a_job_that_no_machine_could_hold_is_refused_before_its_weights_are_fetched() {
    let scene = Scene::new();
    // As large as Llama-3.1-405B, by its configuration.
    scene.hub.edit("config.json", |text| {
        let mut config: serde_json::Value = serde_json::from_slice(text).unwrap();
        for (key, value) in [
            ("hidden_size", 16_384),
            ("num_hidden_layers", 126),
            ("num_attention_heads", 128),
            ("num_key_value_heads", 8),
            ("intermediate_size", 53_248),
        ] {
            config[key] = value.into();
        }
        config.as_object_mut().unwrap().remove("head_dim");
        *text = config.to_string().into_bytes();
    });
    let playground = Playground::new().unwrap();
    let all = settings(&["actor_rollout_ref.model.path=acme/tiny", "agent.model_name_or_path=acme/tiny"]);
    let args: Vec<&str> = all.iter().map(String::as_str).collect();
    let mut command = playground.command("coordinator", &args);
    command.env("HF_ENDPOINT", scene.hub.endpoint()).env("HF_HOME", scene.cache.path());
    let ended = tokio::time::timeout(Duration::from_secs(60), command.output()).await.unwrap();
    let Ran { code, stdout, stderr } = Ran::from(ended.unwrap());
    assert_eq!(code, Some(64), "the operator must act: {stdout}\n{stderr}");
    assert_says(&stderr, &["not enough memory: a rank needs at least", "of weights"]);
    assert!(scene.hub.asked().iter().any(|asked| asked.path.ends_with("config.json")));
    assert!(scene.hub.transfers().is_empty(), "no weight was asked for: {:?}", scene.hub.transfers());
}

#[tokio::test]
async fn a_job_trains_a_model_given_by_name_and_fetches_it_once_for_all_ranks() {
    let scene = Scene::new();
    let playground = Playground::new().unwrap();
    let mut all = settings(&[
        "actor_rollout_ref.model.path=acme/tiny@v1",
        "agent.model_name_or_path=acme/tiny@v1",
        "data.train_batch_size=4",
        "agent.num_chains=2",
        "actor_rollout_ref.actor.ppo_mini_batch_size=8",
        "trainer.total_training_steps=1",
        "trainer.val_before_train=False",
    ]);
    all.retain(|setting| !setting.starts_with("data.val_files"));
    all.push("data.val_files=[]".to_owned());
    let args: Vec<&str> = all.iter().map(String::as_str).collect();
    let mut command = playground.command("coordinator", &args);
    command.env("HF_ENDPOINT", scene.hub.endpoint()).env("HF_HOME", scene.cache.path());
    let ended = tokio::time::timeout(Duration::from_secs(170), command.output()).await.unwrap();
    let Ran { code, stdout, stderr } = Ran::from(ended.unwrap());
    assert_eq!(code, Some(0), "{stdout}\n{stderr}");
    assert_eq!(scene.hub.transfers().len(), 1, "two ranks, one download");
    let run = playground.path().join("runs/test/run");
    let config = agentfly_tests::job::json(&run.join("config.json")).unwrap();
    let model = config["actor_rollout_ref"]["model"]["path"].as_str().unwrap();
    assert!(model.ends_with(COMMIT), "the settings say which model it was: {model}");
    let steps = agentfly_tests::job::json_lines(&run.join("metrics.jsonl")).unwrap();
    let memory = |name: &str| steps.iter().find_map(|step| step[name].as_f64()).unwrap();
    let (planned, peak) = (memory("perf/max_memory_planned_gb"), memory("perf/max_memory_allocated_gb"));
    assert!(planned > 0.1 && peak > 0.1, "planned {planned}, measured {peak}");
}
