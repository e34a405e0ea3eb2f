//! Templates at their edges: several observations under one budget, schemas that are not ASCII, and what a
//! model's own template may rely on.

use serde_json::json;

use super::*;
use crate::test_support::{EOS, tokenizer_with_config};

#[test]
fn every_budget_shows_as_many_characters_as_fit_the_first_observation_first() {
    let template = ChatTemplate::new(Some("qwen2.5"), tokenizer()).unwrap();
    let reply = |text: &str| ToolReply { tool: "t".into(), text: text.into() };
    let replies = [reply("abcde"), reply("fghij")];
    let whole = template.observation_ids(&replies, true, Next::End).unwrap().len();
    for shown in 0..10 {
        let fitted =
            template.observation_ids_within(&replies, true, Next::End, whole - 10 + shown).unwrap().unwrap();
        let texts = format!("{}{}", fitted.shown[0].text, fitted.shown[1].text);
        assert_eq!((texts.as_str(), fitted.ids.len()), (&"abcdefghij"[..shown], whole - 10 + shown));
        assert_eq!(fitted.ids, template.observation_ids(&fitted.shown, true, Next::End).unwrap());
    }
}

#[test]
fn qwens_tool_schemas_are_ascii_as_in_its_training() {
    let template = ChatTemplate::new(Some("qwen2.5"), tokenizer()).unwrap();
    let ids = template.prompt_ids(Some("s"), "q", &[json!({"description": "é"})]).unwrap();
    let text = tokenizer().decode(&ids).unwrap();
    assert!(text.contains("<tools>\n{\"description\": \"\\u00e9\"}\n</tools>"), "{text}");
}

#[test]
fn blocks_of_a_models_own_template_leave_no_blank_lines() {
    // Hugging Face renders with trim_blocks and lstrip_blocks.
    let source = "{% for m in messages %}\n  {% if m.role == 'user' %}\n{{ m.content }}\n  {% endif %}\n{% endfor %}\nend";
    let tokenizer = tokenizer_with_template(source);
    let template = ChatTemplate::new(None, tokenizer.clone()).unwrap();
    assert_eq!(tokenizer.decode(&template.prompt_ids(None, "q", &[]).unwrap()).unwrap(), "q\nend");
}

#[test]
fn a_models_own_template_may_write_its_begin_and_end_of_text() {
    let config = json!({"bos_token": "<|im_start|>", "eos_token": "<|endoftext|>",
        "chat_template": "{{ bos_token }}{{ messages[0].content }}{{ eos_token }}"});
    let template = ChatTemplate::new(None, tokenizer_with_config(&config)).unwrap();
    assert_eq!(
        template.prompt_ids(None, "q", &[]).unwrap(),
        [crate::test_support::IM_START, u32::from(b'q'), EOS]
    );
}

#[test]
fn a_turn_stops_at_its_end_and_at_the_end_of_text() {
    let of = |config| tokenizer_with_config(&config).stop_ids();
    assert_eq!(of(json!({"eos_token": "<|endoftext|>"})), [IM_END, EOS]);
    assert_eq!(of(json!({"eos_token": "<|im_end|>"})), [IM_END], "one token, named once");
    assert_eq!(of(json!({})), [IM_END]);
}
