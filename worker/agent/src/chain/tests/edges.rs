//! Chains at the edges of their budgets, and what the loop must hand on to tools, prompt and record.

use serde_json::Value;

use super::*;
use crate::agents::{Agent, Parsed};
use crate::chain::record::Record;
use crate::chain::state::Limits;
use crate::tools::{Tool, ToolContext, ToolFault, ToolStatus};

/// A tool whose answer ends the chain.
struct Submit;

#[async_trait]
impl Tool for Submit {
    fn name(&self) -> &'static str {
        "code_interpreter"
    }

    fn schema(&self) -> Value {
        json!({"function": {"name": "code_interpreter", "parameters": {"properties": {"code": {}}}}})
    }

    fn status(&self) -> ToolStatus {
        ToolStatus::Finish
    }

    async fn call(
        &self,
        _arguments: &Map<String, Value>,
        _context: ToolContext<'_>,
    ) -> Result<String, ToolFault> {
        Ok("\\boxed{42}".to_owned())
    }
}

#[tokio::test]
async fn a_tool_that_finishes_ends_the_chain_and_its_observation_is_rewarded() {
    let mut stage = stage(&says(&[CODE]), prints_42());
    stage.deps.tools = ToolSet::new(vec![Arc::new(Submit)]);
    let t = stage.play().await;
    assert_eq!((reason(&t), t.timings.turns, t.reward.value), (FinishReason::Terminal, 1, 1.0));
    assert!(t.token_ids.ends_with(&ids("</tool_response><|im_end|>\n")), "without a generation prompt");
}

#[tokio::test]
async fn an_observation_that_leaves_no_room_for_a_token_ends_the_chain_and_one_token_more_lets_it_go_on() {
    let within = |more: usize| {
        let mut stage = stage(&says(&[CODE, ANSWER]), prints_42());
        let template = &stage.deps.template;
        let prompt = template.prompt_ids(Some("S"), &stage.spec.question, &[]).unwrap().len();
        let reply = [ToolReply { tool: String::new(), text: "42\n".into() }];
        let observation = template.observation_ids(&reply, true, Next::Generate).unwrap().len();
        stage.spec.max_model_len = Some((prompt + CODE.len() + 1 + observation + more) as u32);
        stage
    };
    let t = within(0).play().await;
    assert_eq!((reason(&t), t.timings.turns), (FinishReason::MaxModelLen, 1));
    assert!(
        t.token_ids.ends_with(&ids("42\n\n</tool_response><|im_end|>\n")),
        "no turn follows, so none is begun"
    );

    let t = within(1).play().await;
    assert_eq!((reason(&t), t.timings.turns), (FinishReason::MaxModelLen, 2));
    assert_eq!(t.loss_mask.last(), Some(&true), "its last token is sampled");
}

#[test]
fn the_last_free_token_is_still_sampled() {
    let limits = Limits { max_turns: 2, max_model_len: Some(10), max_tokens: 4 };
    assert_eq!(limits.before_turn(1, 9), Ok(1));
    assert_eq!(limits.before_turn(1, 11), Err(FinishReason::MaxModelLen), "a prompt longer than the budget");
}

/// The code agent, but its tools are listed in the prompt.
struct ListsTools;

impl Agent for ListsTools {
    fn name(&self) -> &'static str {
        "lists tools"
    }

    fn system_prompt(&self) -> Option<&str> {
        None
    }

    fn lists_tools(&self) -> bool {
        true
    }

    fn parse(&self, text: &str) -> Parsed {
        CodeAgent.parse(text)
    }
}

#[tokio::test]
async fn the_template_lists_tools_for_agents_that_call_them_by_json_and_only_for_them() {
    let prompt = async |agent: Arc<dyn Agent>| {
        let mut stage = stage(&says(&[ANSWER]), prints_42());
        stage.deps.template = Arc::new(ChatTemplate::new(Some("qwen2.5"), tokenizer()).unwrap());
        stage.deps.agent = agent;
        tokenizer().decode(&stage.play().await.token_ids).unwrap()
    };
    assert!(prompt(Arc::new(ListsTools)).await.contains("# Tools"));
    assert!(!prompt(Arc::new(CodeAgent)).await.contains("# Tools"), "it is asked for Python blocks");
}

#[tokio::test]
async fn a_system_prompt_of_the_configuration_gets_the_tools_schemas() {
    let mut stage = stage(&says(&[ANSWER]), prints_42());
    stage.deps.system_prompt = Some("Use:\n{tools}".into());
    let t = stage.play().await;
    let system = &t.messages[0].content;
    assert!(system.starts_with("Use:\n[\n    {\n        \"type\": \"function\",\n"), "{system}");
    let listed: Value = serde_json::from_str(system.strip_prefix("Use:\n").unwrap()).unwrap();
    assert_eq!(listed, Value::Array(stage.deps.tools.schemas()));
}

/// A sandbox that remembers the seeds it was run with.
#[derive(Clone, Default)]
struct Seeds(Arc<Mutex<Vec<u64>>>);

#[async_trait]
impl PythonRunner for Seeds {
    async fn admit(&self) -> Result<Box<dyn PythonSlot>, InfraError> {
        Ok(Box::new(self.clone()))
    }
}

#[async_trait]
impl PythonSlot for Seeds {
    async fn run(self: Box<Self>, snippet: Snippet<'_>) -> Result<RunOutput, InfraError> {
        self.0.lock().unwrap().push(snippet.seed);
        Ok(RunOutput {
            status: RunStatus::Success,
            stdout: "42\n".into(),
            stderr: String::new(),
            restarted: false,
        })
    }
}

#[tokio::test]
async fn every_tool_call_and_the_reward_have_seeds_of_their_own_that_a_rerun_has_again() {
    let mut both = Vec::new();
    for _ in 0..2 {
        let (seeds, mut stage) =
            (Arc::new(Seeds::default()), stage(&says(&[CODE, CODE, "\\boxed{x+y}"]), prints_42()));
        let python: Arc<dyn PythonRunner> = seeds.clone();
        stage.deps.tools = ToolSet::by_names(&["code_interpreter"], &python, CodeOptions::default()).unwrap();
        stage.deps.reward = Some(reward("math_reward", &python).unwrap());
        stage.play().await;
        both.push(seeds.0.lock().unwrap().clone());
    }
    let key = ChainKey { purpose: Purpose::Train, step: 1, group: 2, chain: 3 };
    let (tool, reward) = (|turn| JobSeed(7).turn("tool", &key, turn), JobSeed(7).turn("reward", &key, 3));
    assert_eq!(both[0], [tool(0), tool(1), reward]);
    assert_eq!(both[0], both[1]);
}

#[test]
fn a_generation_enters_the_record_whole_or_not_at_all() {
    let generation = |ids: &[u32], log_probs: &[f32]| Generation {
        ids: ids.to_vec(),
        log_probs: log_probs.to_vec(),
        stop: StopReason::Stop,
        policy_version: PolicyVersion(3),
    };
    let mut record = Record::default();
    record.observe(&[1, 2]);
    for (ids, log_probs, word) in [
        (&[][..], &[][..], "0 ids, not 1 to 2"),
        (&[7, 8, 9], &[-1.0, -1.0, -1.0], "3 ids, not 1 to 2"),
        (&[7, 8], &[-1.0], "1 log-probs for 2 ids"),
        (&[7, 8], &[-1.0, f32::NAN], "log-prob NaN for sampled token 1 (id 8)"),
        (&[7, 8], &[f32::NEG_INFINITY, -1.0], "log-prob -inf for sampled token 0 (id 7)"),
    ] {
        let told = record.sample(&generation(ids, log_probs), PolicyVersion(3), 2).unwrap_err();
        assert!(told.contains(word), "{told}");
        assert_eq!((&record.token_ids[..], record.unseen()), (&[1, 2][..], &[1, 2][..]), "{word}");
    }
    record
        .sample(&generation(&[7, 8], &[-1.0, 0.0]), PolicyVersion(3), 2)
        .expect("a certain token has log-prob 0");
    record.observe(&[5]);
    assert_eq!(record.loss_mask, [false, false, true, true, false]);
    assert_eq!(record.log_probs, [0.0, 0.0, -1.0, 0.0, 0.0]);
    assert_eq!(record.unseen(), [5]);
}
