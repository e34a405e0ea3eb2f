//! The rewards against golden data, with the sandbox's Python where native steps do not decide.

use std::path::PathBuf;
use std::process::Stdio;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use serde_json::json;
use tokio::io::{AsyncBufReadExt, AsyncWriteExt};

use super::*;
use crate::test_support::golden;
use crate::tools::{InfraError, PythonSlot, RunLimits, RunOutput, RunStatus, Snippet};

mod edges;

/// Runs code with third_party/sandbox-venv, outside any sandbox, in one process that imports sympy once; counts
/// the runs.
#[derive(Clone, Default)]
struct PlainPython {
    runs: Arc<AtomicUsize>,
    process: Arc<tokio::sync::Mutex<Option<(tokio::process::Child, Lines)>>>,
}

type Lines = tokio::io::Lines<tokio::io::BufReader<tokio::process::ChildStdout>>;

/// Reads code as one JSON string a line, runs each in a namespace of its own, answers with one JSON list a line.
const DRIVER: &str = r#"
import contextlib, io, json, sys
for line in sys.stdin:
    out, error = io.StringIO(), None
    try:
        with contextlib.redirect_stdout(out):
            exec(json.loads(line), {"__name__": "__main__"})
    except Exception as e:
        error = f"{type(e).__name__}: {e}"
    print(json.dumps([out.getvalue(), error]), flush=True)
"#;

fn start_python() -> (tokio::process::Child, Lines) {
    let root = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../..").canonicalize().unwrap();
    let python = root.join("third_party/sandbox-venv/bin/python"); // not canonical: the link is the venv
    assert!(python.exists(), "{} is missing: run `make setup`", python.display());
    let mut command = tokio::process::Command::new(python);
    command.args(["-I", "-c", DRIVER]).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null());
    let mut child = command.kill_on_drop(true).spawn().unwrap();
    let lines = tokio::io::BufReader::new(child.stdout.take().unwrap()).lines();
    (child, lines)
}

#[async_trait]
impl PythonRunner for PlainPython {
    async fn admit(&self) -> Result<Box<dyn PythonSlot>, InfraError> {
        Ok(Box::new(self.clone()))
    }
}

#[async_trait]
impl PythonSlot for PlainPython {
    async fn run(self: Box<Self>, snippet: Snippet<'_>) -> Result<RunOutput, InfraError> {
        self.runs.fetch_add(1, Ordering::Relaxed);
        let mut process = self.process.lock().await;
        let (child, lines) = process.get_or_insert_with(start_python);
        let line = json!(snippet.code).to_string() + "\n";
        child.stdin.as_mut().unwrap().write_all(line.as_bytes()).await.unwrap();
        let answer = lines.next_line().await.unwrap().expect("the driver answers every line");
        let (stdout, error): (String, Option<String>) = serde_json::from_str(&answer).unwrap();
        let status = error.map_or(RunStatus::Success, |message| RunStatus::Error { message });
        Ok(RunOutput { status, stdout, stderr: String::new(), restarted: false })
    }
}

/// What a sandbox may do instead of answering.
#[derive(Clone)]
struct Broken(Result<RunStatus, InfraError>);

#[async_trait]
impl PythonRunner for Broken {
    async fn admit(&self) -> Result<Box<dyn PythonSlot>, InfraError> {
        Ok(Box::new(self.clone()))
    }
}

#[async_trait]
impl PythonSlot for Broken {
    async fn run(self: Box<Self>, _snippet: Snippet<'_>) -> Result<RunOutput, InfraError> {
        let output =
            |status| RunOutput { status, stdout: "EQUAL\n".into(), stderr: String::new(), restarted: false };
        self.0.map(output)
    }
}

/// A sandbox whose first runs take too long; remembers the limits it was asked to keep.
#[derive(Clone, Default)]
struct Slow {
    runs: usize,
    limits: Arc<Mutex<Vec<Option<RunLimits>>>>,
}

#[async_trait]
impl PythonRunner for Slow {
    async fn admit(&self) -> Result<Box<dyn PythonSlot>, InfraError> {
        Ok(Box::new(self.clone()))
    }
}

#[async_trait]
impl PythonSlot for Slow {
    async fn run(self: Box<Self>, snippet: Snippet<'_>) -> Result<RunOutput, InfraError> {
        let mut limits = self.limits.lock().unwrap();
        limits.push(snippet.limits);
        let status = if limits.len() <= self.runs { RunStatus::TimedOut } else { RunStatus::Success };
        Ok(RunOutput { status, stdout: "EQUAL\n".into(), stderr: String::new(), restarted: false })
    }
}

fn clock() -> Clock {
    let hour = Duration::from_secs(3600);
    Clock::start(hour, tokio::time::Instant::now() + hour)
}

async fn parity(python: &PlainPython, response: &str, answer: &str) -> bool {
    let judge = Judge { python, clock: &clock(), seed: 0, reward: "test", row_id: "gsm-7" };
    symbolic_math_equal(&judge, response, answer).await.unwrap() == Verdict::Equal
}

async fn strict(python: &PlainPython, response: &str, answer: &str) -> bool {
    let judge = Judge { python, clock: &clock(), seed: 0, reward: "test", row_id: "gsm-7" };
    strict_math_equal(&judge, response, answer).await.unwrap() == Verdict::Equal
}

fn text<'a>(case: &'a Value, field: &str) -> &'a str {
    case[field].as_str().unwrap()
}

#[tokio::test]
async fn the_math_cascade_agrees_with_every_golden_case() {
    let (golden, python) = (golden("golden_rewards.json"), PlainPython::default());
    let cases = golden["math"].as_array().unwrap();
    for case in cases {
        let (response, answer) = (text(case, "response"), text(case, "answer"));
        let extracted = extract_answer(response);
        assert_eq!(extracted, text(case, "extracted"), "{case}");
        assert_eq!(normalise(extracted).unwrap(), text(case, "stripped"), "{case}");
        assert_eq!(is_equiv(extracted, extract_answer(answer)), case["is_equiv"], "{case}");
        let equal = parity(&python, response, answer).await;
        assert_eq!(equal, case["symbolic_math_equal"], "{case}");
    }
    let runs = python.runs.load(Ordering::Relaxed);
    assert!(runs > 0 && runs <= 12, "{runs} of {} cases needed Python", cases.len());
}

#[test]
fn the_qa_scores_agree_with_every_golden_case() {
    let golden = golden("golden_rewards.json");
    for case in golden["qa"].as_array().unwrap() {
        let (prediction, answer) = (text(case, "prediction"), text(case, "answer"));
        assert_eq!(qa::normalise_answer(prediction), text(case, "normalized_prediction"), "{case}");
        assert_eq!(qa::normalise_answer(answer), text(case, "normalized_answer"), "{case}");
        let scores = qa_scores(prediction, answer);
        for (name, value) in
            [("f1", scores.f1), ("precision", scores.precision), ("recall", scores.recall), ("em", scores.em)]
        {
            assert!((value - case[name].as_f64().unwrap()).abs() < 1e-12, "{name} is {value}: {case}");
        }
    }
}

fn messages(with_tool: bool) -> Vec<Message> {
    let message = |role| Message { role, content: "x".into(), tool: None };
    let mut all = vec![message(Role::User), message(Role::Assistant)];
    all.extend(with_tool.then(|| message(Role::Tool)));
    all
}

async fn score(
    name: &str,
    response: &str,
    row: Value,
    with_tool: bool,
    python: Arc<dyn PythonRunner>,
) -> Result<Reward, RewardFault> {
    let messages = messages(with_tool);
    let row = row.as_object().unwrap();
    let clock = clock();
    let input = RewardInput {
        final_response: response,
        row_id: "gsm-7",
        row,
        messages: &messages,
        seed: 0,
        clock: &clock,
    };
    reward(name, &python).unwrap().score(input).await
}

#[tokio::test]
async fn the_math_rewards_agree_with_every_golden_call() {
    let golden = golden("golden_rewards.json");
    let mut compared = 0;
    for case in golden["reward_cases"].as_array().unwrap() {
        let name = text(case, "fn");
        if !REWARD_NAMES.contains(&name) {
            continue; // of rewards that this crate does not offer
        }
        let row = json!({"answer": case["answer"]});
        let with_tool = case["trajectory"] == "tool";
        let python: Arc<dyn PythonRunner> = Arc::new(PlainPython::default());
        let got = score(name, text(case, "final_response"), row, with_tool, python).await.unwrap();
        assert_eq!(json!(got.value), case["result"]["reward"], "{case}");
        assert_eq!(got.parts.get("acc").copied(), case["result"]["acc"].as_f64(), "{case}");
        compared += 1;
    }
    assert_eq!(compared, 12);
}

#[tokio::test]
async fn the_strict_rule_is_mathematics() {
    let python = PlainPython::default();
    for (response, answer, equal) in [
        ("\\boxed{x^2+2x+1}", "(x+1)^2", true),
        ("\\boxed{0.5}", "\\frac{1}{2}", true),
        ("\\boxed{0.75}", "3/4", true),
        ("\\boxed{1,000}", "1000", true),
        ("\\boxed{(1,2)}", "(12)", false),
        ("\\boxed{(1,2)}", "12", false),
        ("\\boxed{(1, 2)}", "(1,2)", true),
        ("\\boxed{(2,1)}", "(1,2)", false),
        ("\\boxed{0.333}", "\\frac{1}{3}", false),
        ("72", "72", true),
        ("so it is 72 or 73", "72", false),
        ("", "72", false),
        ("\\boxed{__import__('os')._exit(0)}", "1", false),
    ] {
        let got = strict(&python, response, answer).await;
        assert_eq!(got, equal, "{response} against {answer}");
    }
}

#[tokio::test]
async fn a_tool_call_alone_earns_nothing_under_the_strict_rule() {
    let python = || -> Arc<dyn PythonRunner> { Arc::new(PlainPython::default()) };
    let name = "Math_Equal_Reward_Tool_Strict";
    let of =
        async |response, tool| score(name, response, json!({"answer": 72}), tool, python()).await.unwrap();
    assert_eq!(of("\\boxed{71}", true).await.value, 0.0);
    assert_eq!(of("\\boxed{72}", true).await.value, 1.0);
    let without = of("\\boxed{72}", false).await;
    assert_eq!((without.value, without.parts["acc"]), (0.0, 1.0));
}

#[tokio::test]
async fn python_that_fails_means_not_equal_and_a_sandbox_that_fails_is_a_fault() {
    let of = async |broken| {
        let python: Arc<dyn PythonRunner> = Arc::new(Broken(broken));
        score("math_reward", "\\boxed{x+y}", json!({"answer": "y+x"}), true, python).await
    };
    assert_eq!(of(Ok(RunStatus::Success)).await.unwrap().value, 1.0);
    assert_eq!(of(Ok(RunStatus::TimedOut)).await.unwrap().value, 0.0);
    assert_eq!(of(Ok(RunStatus::Error { message: "ValueError: x".into() })).await.unwrap().value, 0.0);
    let missing = of(Ok(RunStatus::Error { message: "ModuleNotFoundError: sympy".into() })).await;
    assert!(missing.unwrap_err().to_string().contains("make setup"));
    let fault = of(Err(InfraError { cause: "no slot".into() })).await.unwrap_err();
    assert!(matches!(fault, RewardFault::Infrastructure { .. }), "{fault}");
}

#[tokio::test]
async fn the_judge_has_limits_of_its_own_and_reaching_them_twice_is_counted() {
    let asked: Arc<Mutex<Vec<_>>> = Arc::default();
    let python: Arc<dyn PythonRunner> = Arc::new(Slow { runs: 4, limits: asked.clone() });
    for name in ["math_equal_reward", "math_equal_reward_strict"] {
        let got = score(name, "\\boxed{x+y}", json!({"answer": "y+x"}), true, python.clone()).await.unwrap();
        assert_eq!((got.value, got.parts["judge_timeout"]), (0.0, 1.0), "{name}");
    }
    assert_eq!(*asked.lock().unwrap(), [Some(JUDGE_LIMITS); 4], "two tries each");
    let decided = score("math_equal_reward", "\\boxed{7}", json!({"answer": 7}), true, python).await.unwrap();
    assert_eq!((decided.value, decided.parts["judge_timeout"]), (1.0, 0.0));
    assert_eq!(asked.lock().unwrap().len(), 4, "and none where numbers decide");
}

#[tokio::test]
async fn the_plain_strict_reward_names_its_accuracy() {
    for (response, acc) in [("\\boxed{72}", 1.0), ("\\boxed{71}", 0.0)] {
        for tool in [false, true] {
            let python: Arc<dyn PythonRunner> = Arc::new(PlainPython::default());
            let got = score("math_equal_reward_strict", response, json!({"answer": 72}), tool, python)
                .await
                .unwrap();
            assert_eq!((got.value, got.parts["acc"]), (acc, acc), "{response}");
        }
    }
}

#[tokio::test]
async fn long_answers_are_parsed_unless_they_repeat_themselves() {
    let python = PlainPython::default();
    let terms = |order: &[u32]| order.iter().map(|n| format!("{n}x^{{{n}}}")).collect::<Vec<_>>().join("+");
    let (up, down): (Vec<u32>, Vec<u32>) = ((1..50).collect(), (1..50).rev().collect());
    let long = format!("\\boxed{{{}}}", terms(&up));
    assert!(long.len() > 256);
    assert!(parity(&python, &long, &terms(&down)).await);
    assert!(!strict(&python, &long, &terms(&down)).await, "the strict rule never parses that much");
    let runs = python.runs.load(Ordering::Relaxed);
    let repeated = "1+".repeat(70) + "1";
    assert!(!parity(&python, &format!("\\boxed{{{repeated}}}"), "71").await);
    assert_eq!(python.runs.load(Ordering::Relaxed), runs, "a text that repeats itself is not parsed at all");
}

#[tokio::test]
async fn a_row_without_its_answer_is_named() {
    for (name, field) in [("math_equal_reward", "answer"), ("qa_em_reward", "golden_answers")] {
        let python: Arc<dyn PythonRunner> = Arc::new(PlainPython::default());
        let error = score(name, "72", json!({"question": "q"}), true, python).await.unwrap_err().to_string();
        for part in [name, "gsm-7", field, "question"] {
            assert!(error.contains(part), "{part} is not in: {error}");
        }
    }
}

#[tokio::test]
async fn exact_match_takes_the_best_of_the_references_and_reads_the_answer_tag() {
    let python: Arc<dyn PythonRunner> = Arc::new(PlainPython::default());
    let row = json!({"golden_answers": ["Rome", "the City of Rome"]});
    let got = score("qa_em_reward", "I think <answer> Rome. </answer>", row, true, python).await.unwrap();
    assert_eq!((got.value, got.parts["em"], got.parts["f1"]), (1.0, 1.0, 1.0));
}

#[test]
fn every_listed_name_is_known_and_others_are_refused_with_the_list() {
    let python: Arc<dyn PythonRunner> = Arc::new(PlainPython::default());
    for name in REWARD_NAMES {
        assert!(reward(&name.to_uppercase(), &python).is_ok(), "{name}");
    }
    let error = reward("llm_judge", &python).err().unwrap().to_string();
    assert!(error.contains("llm_judge") && error.contains("math_reward_format"), "{error}");
}
