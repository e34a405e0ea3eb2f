//! A run's files at their edges: what is cut back is cut to the byte, what is listed is what is there, and nothing
//! that holds results is overwritten.
#![allow(clippy::unwrap_used, reason = "helpers of tests fail by panicking")]

use std::fs;
use std::path::Path;

use agentfly_common::config::{Config, resolve};
use agentfly_common::ids::PolicyVersion;
use agentfly_coordinator::core::event::CheckpointPoint;
use agentfly_coordinator::data::Cursor;
use agentfly_coordinator::store::checkpoints::{CheckpointError, Checkpoints, CoordinatorPart, verify};
use agentfly_coordinator::store::metrics_file::{MetricsLine, cut_back};
use agentfly_coordinator::store::run_dir::RunDir;
use agentfly_coordinator::store::summary::Course;

fn part(step: u64) -> CoordinatorPart {
    let point = CheckpointPoint {
        step,
        policy_version: PolicyVersion(step),
        weights_hash: "abc".into(),
        cursor: Cursor::default(),
        seed: 7,
        total_steps: 40,
    };
    CoordinatorPart { point, metrics_bytes: 0, config: serde_json::json!({}) }
}

fn written(checkpoints: &Checkpoints, step: u64) -> std::path::PathBuf {
    fs::write(checkpoints.begin(step).unwrap().join("model.safetensors"), [7; 1234]).unwrap();
    checkpoints.commit(&part(step), &[]).unwrap()
}

#[test]
fn a_manifest_lists_sizes_and_a_wrong_size_alone_is_damage() {
    let root = tempfile::tempdir().unwrap();
    let dir = written(&Checkpoints::open(root.path(), None).unwrap(), 1);
    let manifest = dir.join("manifest.json");
    let mut listed: serde_json::Value = serde_json::from_slice(&fs::read(&manifest).unwrap()).unwrap();
    for file in listed["files"].as_array().unwrap() {
        let length = fs::metadata(dir.join(file["path"].as_str().unwrap())).unwrap().len();
        assert_eq!(file["bytes"], length, "{file}");
    }
    assert_eq!(listed["format"], 1);
    listed["files"][1]["bytes"] = 1233.into();
    fs::write(&manifest, listed.to_string()).unwrap();
    let error = verify(&dir).unwrap_err();
    assert!(matches!(error, CheckpointError::Damaged { .. }), "{error}");
    assert!(error.to_string().contains("model.safetensors is damaged (1234 bytes"), "{error}");
}

#[test]
fn a_checkpoint_begun_again_has_nothing_of_the_first_attempt() {
    let root = tempfile::tempdir().unwrap();
    let checkpoints = Checkpoints::open(root.path(), None).unwrap();
    fs::write(checkpoints.begin(1).unwrap().join("half"), "x").unwrap();
    let dir = written(&checkpoints, 1);
    assert!(!dir.join("half").exists());
}

#[test]
fn metrics_are_cut_back_to_the_byte_and_what_the_checkpoint_knew_stays_as_it_is() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("metrics.jsonl");
    let known = "{\"step\":9,\"time\":0.0}\nnot a line of ours\n{\"step\":2,\"time\":0.0}\n";
    for (more, kept) in [
        ("", ""),
        ("{\"step\":3,\"time\":0.0}\n", ""),
        ("{\"step\":2,\"time\":1.0}\n{\"step\":3,\"time\":0.0}\n", "{\"step\":2,\"time\":1.0}\n"),
        ("{\"step\":2,\"ti", ""),
    ] {
        fs::write(&path, format!("{known}{more}")).unwrap();
        let length = cut_back(&path, known.len() as u64, 2).unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), format!("{known}{kept}"));
        assert_eq!(length, (known.len() + kept.len()) as u64);
    }
    fs::write(&path, format!("{known}{}", "{\"step\":9,\"time\":0.0}\n")).unwrap();
    cut_back(&path, known.len() as u64, 2).unwrap();
    assert_eq!(
        fs::read_to_string(&path).unwrap(),
        known,
        "its last line ends exactly where the checkpoint says"
    );
    fs::write(&path, "{\"step\":9,\"time\":0.0}\n").unwrap();
    assert_eq!(cut_back(&path, 22, 2).unwrap(), 22, "the only line, known whole");
}

#[test]
fn the_accuracy_after_the_first_step_counts_as_after() {
    let line = |step, value: f64| MetricsLine {
        step,
        time: 0.0,
        metrics: [("val-core/data/acc/mean@1".to_owned(), value)].into(),
    };
    let course = Course::of(&[line(0, 0.25), line(1, 0.5)]);
    assert_eq!((course.val_before, course.val_after), (Some(0.25), Some(0.5)));
}

fn config(root: &Path) -> Config {
    let settings =
        [format!("trainer.run_dir={}/p/e", root.display()), "trainer.resume_mode=disable".to_owned()];
    resolve(&settings, None, []).unwrap().config
}

#[test]
fn any_one_kind_of_result_is_moved_aside_and_an_empty_file_is_none() {
    for (file, content, moved) in [
        ("metrics.jsonl", "{\"step\":1,\"time\":0.0}\n", true),
        ("summary.json", "{", true),
        ("checkpoints/global_step_3/manifest.json", "", true),
        ("global_step_3/manifest.json", "", true),
        ("metrics.jsonl", "", false),
        ("summary.json", "", false),
        ("notes.txt", "mine", false),
    ] {
        let root = tempfile::tempdir().unwrap();
        let path = root.path().join("p/e").join(file);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(&path, content).unwrap();
        let opened = RunDir::open(&config(root.path()), 4, "job").unwrap();
        assert_eq!(root.path().join("p/e.1").join(file).exists(), moved, "{file}: {:?}", opened.notes);
        assert_eq!(path.exists(), !moved, "{file}");
    }
}

#[test]
fn a_lock_names_only_its_present_holder() {
    let root = tempfile::tempdir().unwrap();
    let config = config(root.path());
    drop(RunDir::open(&config, 4, "a job with a very long name").unwrap());
    let _second = RunDir::open(&config, 4, "brief").unwrap();
    let told = RunDir::open(&config, 4, "third").unwrap_err().to_string();
    assert!(
        told.contains(&format!("is being written by brief (process {}); wait", std::process::id())),
        "{told}"
    );
}
