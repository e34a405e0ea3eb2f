//! A byte-level tokenizer small enough to read, for this crate's tests.
//!
//! Ids 0–255 are bytes, 256 and up the special tokens of a Qwen-style chat.

use std::sync::{Arc, LazyLock};

use serde_json::{Value, json};

use crate::tokenizer::ChatTokenizer;

/// `<|endoftext|>`.
pub(crate) const EOS: u32 = 256;
/// `<|im_start|>`.
pub(crate) const IM_START: u32 = 257;
/// `<|im_end|>`.
pub(crate) const IM_END: u32 = 258;

/// GPT-2's printable stand-in of each byte.
fn byte_characters() -> Vec<char> {
    let printable = |b: u32| (33..=126).contains(&b) || (161..=172).contains(&b) || (174..=255).contains(&b);
    let mut next = 256;
    (0..256)
        .map(|b| {
            let code = if printable(b) { b } else { next };
            next += u32::from(!printable(b));
            char::from_u32(code).unwrap()
        })
        .collect()
}

fn tokenizer_json() -> Value {
    let vocab: serde_json::Map<String, Value> =
        byte_characters().into_iter().enumerate().map(|(id, c)| (c.to_string(), json!(id))).collect();
    let special = |id: u32, content: &str| {
        json!({"id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false,
            "normalized": false, "special": true})
    };
    json!({
        "version": "1.0", "truncation": null, "padding": null,
        "added_tokens": [special(EOS, "<|endoftext|>"), special(IM_START, "<|im_start|>"), special(IM_END, "<|im_end|>")],
        "normalizer": null,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": false, "use_regex": true},
        "post_processor": null,
        "decoder": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": false, "use_regex": true},
        "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "vocab": vocab, "merges": []}
    })
}

/// A tokenizer with the given chat template of its own.
pub(crate) fn tokenizer_with_template(chat_template: &str) -> Arc<ChatTokenizer> {
    tokenizer_with_config(&json!({"eos_token": {"content": "<|endoftext|>"}, "chat_template": chat_template}))
}

/// A tokenizer with the given `tokenizer_config.json`.
pub(crate) fn tokenizer_with_config(config: &Value) -> Arc<ChatTokenizer> {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("tokenizer.json"), tokenizer_json().to_string()).unwrap();
    std::fs::write(dir.path().join("tokenizer_config.json"), config.to_string()).unwrap();
    Arc::new(ChatTokenizer::from_dir(dir.path()).unwrap())
}

/// The shared tokenizer.
pub(crate) fn tokenizer() -> Arc<ChatTokenizer> {
    static TOKENIZER: LazyLock<Arc<ChatTokenizer>> =
        LazyLock::new(|| tokenizer_with_template("{{ messages }}"));
    TOKENIZER.clone()
}

/// A named file of `tests/golden`.
pub(crate) fn golden(name: &str) -> Value {
    let path = format!("{}/tests/golden/{name}", env!("CARGO_MANIFEST_DIR"));
    serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap()
}
