//! What the policy reads for every kind of call.

use std::time::Duration;

use agentfly_common::ids::Purpose;
use serde_json::json;
use tokio::time::Instant;

use super::*;

#[derive(Clone)]
struct Scripted(Result<RunOutput, InfraError>);

#[async_trait]
impl PythonRunner for Scripted {
    async fn admit(&self) -> Result<Box<dyn PythonSlot>, InfraError> {
        Ok(Box::new(self.clone()))
    }
}

#[async_trait]
impl PythonSlot for Scripted {
    async fn run(self: Box<Self>, snippet: Snippet<'_>) -> Result<RunOutput, InfraError> {
        assert_eq!(snippet.limits, None, "the policy's code runs under the settings' limits");
        self.0
    }
}

async fn call(
    name: &str,
    arguments: Value,
    run: Result<RunOutput, InfraError>,
) -> Result<Observation, ToolFault> {
    call_with(CodeOptions::default(), name, arguments, run).await
}

async fn call_with(
    code: CodeOptions,
    name: &str,
    arguments: Value,
    run: Result<RunOutput, InfraError>,
) -> Result<Observation, ToolFault> {
    let python: Arc<dyn PythonRunner> = Arc::new(Scripted(run));
    let tools = ToolSet::by_names(&["code_interpreter"], &python, code).unwrap();
    let chain = ChainKey { purpose: Purpose::Train, step: 1, group: 0, chain: 0 };
    let hour = Duration::from_secs(3600);
    let clock = Clock::start(hour, Instant::now() + hour);
    let context = ToolContext { chain, turn: 0, seed: 0, clock: &clock };
    tools.call(&ToolCall { name: name.into(), arguments }, context).await
}

async fn ran(status: RunStatus, stdout: &str) -> String {
    let output = RunOutput { status, stdout: stdout.into(), stderr: "ignored".into(), restarted: false };
    call("code_interpreter", json!({"code": "…"}), Ok(output)).await.unwrap().text
}

#[tokio::test]
async fn a_run_shows_what_it_printed_and_then_what_went_wrong() {
    let error = || RunStatus::Error { message: "NameError: name 'x' is not defined".into() };
    assert_eq!(ran(RunStatus::Success, "4\n").await, "4\n");
    assert_eq!(ran(RunStatus::Success, "").await, "");
    assert_eq!(ran(error(), "").await, "NameError: name 'x' is not defined");
    assert_eq!(ran(error(), "half").await, "half\nNameError: name 'x' is not defined");
    assert_eq!(ran(RunStatus::TimedOut, "1\n").await, "1\nExecution timed out");
    assert_eq!(ran(RunStatus::MemoryExceeded, "").await, "Memory limit exceeded");
    assert_eq!(ran(RunStatus::Success, &"é".repeat(5000)).await.chars().count(), 2048);
    let long = ran(RunStatus::TimedOut, &"x".repeat(5000)).await;
    assert_eq!(long.chars().count(), 2048);
    assert!(long.ends_with("x\nExecution timed out"));
}

/// `sandbox.partial_output=false`: AgentFly's observations to the letter.
#[tokio::test]
async fn without_partial_output_a_run_that_failed_shows_its_problem_alone() {
    let show = async |status, stdout: &str| {
        let output = RunOutput { status, stdout: stdout.into(), stderr: String::new(), restarted: false };
        let code = CodeOptions { partial_output: false, ..CodeOptions::default() };
        call_with(code, "code_interpreter", json!({"code": "…"}), Ok(output)).await.unwrap().text
    };
    let error = RunStatus::Error { message: "NameError: name 'x' is not defined".into() };
    assert_eq!(show(RunStatus::Success, "4\n").await, "4\n");
    assert_eq!(show(error, "half").await, "NameError: name 'x' is not defined");
    assert_eq!(show(RunStatus::TimedOut, "1\n").await, "Execution timed out");
    assert_eq!(show(RunStatus::MemoryExceeded, "1\n").await, "Memory limit exceeded");
}

#[tokio::test]
async fn a_bad_call_is_answered_with_what_is_wrong() {
    let fine = || {
        Ok(RunOutput {
            status: RunStatus::Success,
            stdout: "ok".into(),
            stderr: String::new(),
            restarted: false,
        })
    };
    let answer = async |name, arguments| call(name, arguments, fine()).await.unwrap().text;
    assert_eq!(answer("python", json!({})).await, "Unknown tool: python. Available tools: code_interpreter.");
    let tool = "code_interpreter";
    assert_eq!(
        answer(tool, json!("print(")).await,
        "Invalid input: print(, input must be a valid JSON object."
    );
    assert_eq!(
        answer(tool, json!({"code": "1", "x": 2})).await,
        "Invalid argument \"x\" for tool code_interpreter."
    );
    assert_eq!(answer(tool, json!({})).await, "Missing argument \"code\" for tool code_interpreter.");
    assert_eq!(answer(tool, json!("{\"code\": \"1\"}")).await, "ok", "arguments may be a JSON string");
    assert!(answer(tool, json!({"code": 1})).await.contains("must be a string"));
}

#[tokio::test]
async fn a_sandbox_that_fails_is_a_fault_and_not_an_observation() {
    let fault =
        call("code_interpreter", json!({"code": "1"}), Err(InfraError { cause: "no slot".into() })).await;
    assert_eq!(fault.unwrap_err().to_string(), "tool code_interpreter: the Python sandbox failed: no slot");
}

#[test]
fn an_unknown_tool_name_in_the_configuration_lists_the_known_ones() {
    let run = Ok(RunOutput {
        status: RunStatus::Success,
        stdout: String::new(),
        stderr: String::new(),
        restarted: false,
    });
    let python: Arc<dyn PythonRunner> = Arc::new(Scripted(run));
    let error =
        ToolSet::by_names(&["google_search"], &python, CodeOptions::default()).err().unwrap().to_string();
    assert!(error.contains("google_search") && error.contains("code_interpreter"), "{error}");
}

/// Notes what it is asked, and has always just lost its state.
#[derive(Clone, Default)]
struct Notes(Arc<std::sync::Mutex<Vec<String>>>);

#[async_trait]
impl PythonRunner for Notes {
    async fn admit(&self) -> Result<Box<dyn PythonSlot>, InfraError> {
        Ok(Box::new(self.clone()))
    }

    fn end_session(&self, chain: &ChainKey) {
        self.0.lock().unwrap().push(format!("end {chain}"));
    }
}

#[async_trait]
impl PythonSlot for Notes {
    async fn run(self: Box<Self>, snippet: Snippet<'_>) -> Result<RunOutput, InfraError> {
        self.0.lock().unwrap().push(format!("run {:?}", snippet.session.map(|chain| chain.to_string())));
        let stdout = "x".repeat(3000);
        Ok(RunOutput { status: RunStatus::TimedOut, stdout, stderr: String::new(), restarted: true })
    }
}

#[tokio::test]
async fn a_stateful_interpreter_has_a_session_for_each_chain_and_says_when_its_variables_are_gone() {
    let chain = ChainKey { purpose: Purpose::Train, step: 1, group: 0, chain: 7 };
    let hour = Duration::from_secs(3600);
    let clock = Clock::start(hour, Instant::now() + hour);
    let context = ToolContext { chain, turn: 0, seed: 0, clock: &clock };
    let asked = async |stateful| {
        let notes = Notes::default();
        let python: Arc<dyn PythonRunner> = Arc::new(notes.clone());
        let tools = ToolSet::by_names(
            &["code_interpreter"],
            &python,
            CodeOptions { stateful, ..CodeOptions::default() },
        )
        .unwrap();
        let call = ToolCall { name: "code_interpreter".into(), arguments: json!({"code": "x"}) };
        let text = tools.call(&call, context).await.unwrap().text;
        tools.chain_ended(&chain);
        let described = tools.schemas()[0]["function"]["description"].to_string();
        let asked = notes.0.lock().unwrap().clone();
        (asked, text, described)
    };
    let (fresh, _, described) = asked(false).await;
    assert_eq!(fresh, ["run None"]);
    assert!(described.contains("a fresh interpreter"));
    let (kept, text, described) = asked(true).await;
    assert_eq!(kept, [format!("run Some(\"{chain}\")"), format!("end {chain}")]);
    assert!(described.contains("earlier calls are still there"));
    assert!(
        text.starts_with("The interpreter was restarted: variables of earlier calls are gone.\nxxx"),
        "{text}"
    );
    assert!(text.ends_with("x\nExecution timed out") && text.chars().count() == 2048, "{text}");
}
