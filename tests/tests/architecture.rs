//! The rules that keep the house in order, held by a test and not by good will.
#![allow(clippy::unwrap_used, reason = "a story that cannot go on fails here")]

use agentfly_tests::tree::{Source, dependencies, root, rust_sources};

/// This file, which must name what it forbids.
const OWN: &str = "tests/tests/architecture.rs";

/// The offenders, one a line; empty when the rule holds.
fn offenders(rule: impl Fn(&Source) -> Option<String>) -> String {
    let sources = rust_sources();
    let found: Vec<String> = sources
        .iter()
        .filter(|s| s.path != OWN)
        .filter_map(|s| rule(s).map(|why| format!("{}: {why}", s.path)))
        .collect();
    found.join("\n")
}

#[test]
fn dependencies_follow_the_arrows() {
    let allowed: &[(&str, &[&str])] = &[
        ("proto", &[]),
        ("common", &["agentfly-proto"]),
        ("common/hub", &["agentfly-common"]),
        ("coordinator", &["agentfly-proto", "agentfly-common", "agentfly-hub"]),
        (
            "worker",
            &[
                "agentfly-proto",
                "agentfly-common",
                "agentfly-hub",
                "agentfly-agent",
                "agentfly-policy",
                "agentfly-sandbox",
                "agentfly-c10d",
            ],
        ),
        ("worker/agent", &["agentfly-common"]),
        ("worker/policy", &["agentfly-common", "agentfly-c10d"]),
        ("worker/c10d", &[]),
        ("worker/sandbox", &[]),
    ];
    for (folder, may) in allowed {
        for dependency in dependencies(folder) {
            let ours = dependency.starts_with("agentfly-");
            assert!(!ours || may.contains(&dependency.as_str()), "{folder} must not depend on {dependency}");
        }
    }
}

#[test]
fn libtorch_stays_in_the_policy_and_its_collectives() {
    for folder in ["proto", "common", "common/hub", "coordinator", "worker", "worker/agent", "worker/sandbox"]
    {
        let named = dependencies(folder);
        assert!(
            !named.iter().any(|d| d == "tch" || d == "torch-sys"),
            "{folder} must not link libtorch itself"
        );
    }
    let wire_free = ["worker/agent", "worker/policy", "worker/sandbox", "worker/c10d"];
    for folder in wire_free {
        let named = dependencies(folder);
        assert!(!named.iter().any(|d| d == "tonic" || d == "prost"), "{folder} must not know the wire");
    }
}

#[test]
fn the_core_is_pure() {
    let banned = [
        "tokio",
        "tonic",
        "axum",
        "std::fs",
        "std::time::Instant",
        "SystemTime",
        "rand::",
        "std::env",
        "std::net",
    ];
    let found = offenders(|s| {
        let core = s.path.starts_with("coordinator/src/core/");
        let code: String = s.production().lines().filter(|l| !l.trim_start().starts_with("//")).collect();
        banned.iter().find(|b| core && code.contains(*b)).map(|b| format!("names {b}"))
    });
    assert_eq!(found, "");
}

#[test]
fn unsafe_stays_in_the_fenced_crates() {
    let found = offenders(|s| {
        let fenced = s.path.starts_with("worker/c10d/") || s.path.starts_with("worker/sandbox/");
        let code = s.text.lines().filter(|l| !l.trim_start().starts_with("//"));
        let used = code
            .clone()
            .any(|l| l.contains("unsafe {") || l.contains("unsafe fn") || l.contains("unsafe impl"));
        (!fenced && used).then(|| "uses unsafe".to_owned())
    });
    assert_eq!(found, "");
}

#[test]
fn every_module_says_what_it_is() {
    assert_eq!(offenders(|s| (!s.text.starts_with("//!")).then(|| "does not open with //!".to_owned())), "");
}

#[test]
fn files_are_small() {
    let found = offenders(|s| {
        let lines = s.production().lines().count();
        (!s.is_test() && lines > 600).then(|| format!("{lines} lines"))
    });
    assert_eq!(found, "");
}

#[test]
fn nothing_is_left_unfinished() {
    let words = [
        "TODO",
        "FIXME",
        "XXX",
        "todo!(",
        "unimplemented!(",
        "dbg!(",
        "for now,",
        "placeholder",
        "#[ignore]",
    ];
    let found = offenders(|s| words.iter().find(|w| s.text.contains(*w)).map(|w| format!("says {w}")));
    assert_eq!(found, "");
}

#[test]
fn tests_wait_for_values_and_never_sleep() {
    let sleeps = ["thread::sleep", "time::sleep("];
    let found = offenders(|s| {
        let tests = if s.is_test() {
            s.text.as_str()
        } else {
            s.text.get(s.production().len()..).unwrap_or_default()
        };
        sleeps.iter().any(|sleep| tests.contains(sleep)).then(|| "sleeps".to_owned())
    });
    assert_eq!(found, "");
}

#[test]
fn metric_names_live_in_one_file() {
    let found = offenders(|s| {
        let names = s.path == "common/src/telemetry/names.rs";
        let literal =
            ["counter!(\"", "gauge!(\"", "histogram!(\""].iter().any(|m| s.production().contains(m));
        (!names && literal).then(|| "names a metric".to_owned())
    });
    assert_eq!(found, "");
}

#[test]
fn every_dependency_has_its_reason() {
    let manifest = std::fs::read_to_string(root().join("Cargo.toml")).unwrap();
    let section = manifest.split("[workspace.dependencies]").nth(1).unwrap().split("\n[").next().unwrap();
    for line in section.lines().filter(|l| l.contains(" = ") && !l.starts_with("agentfly-")) {
        assert!(line.contains('#'), "without a reason: {line}");
    }
}
