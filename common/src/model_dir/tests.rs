//! Small model directories, whole and damaged in every way a download or an export can damage them.

mod layouts;

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};

use proptest::prelude::*;
use safetensors::Dtype;
use safetensors::tensor::TensorView;
use serde_json::{Value, json};
use tempfile::TempDir;

use super::*;

/// Tensors to be written: name → dtype, shape, bytes.
type Tensors = BTreeMap<String, (Dtype, Vec<usize>, Vec<u8>)>;

const GATE: &str = "model.layers.0.mlp.gate_proj.weight";

fn config_json() -> Value {
    json!({
        "architectures": ["LlamaForCausalLM"], "hidden_size": 4, "num_hidden_layers": 1,
        "num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 6, "vocab_size": 8,
        "hidden_act": "silu", "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "max_position_embeddings": 64,
        "eos_token_id": 1, "tie_word_embeddings": false,
        "rope_scaling": {
            "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        },
    })
}

fn config(change: impl FnOnce(&mut Value)) -> Result<ModelConfig, String> {
    let mut json = config_json();
    change(&mut json);
    ModelConfig::from_json(json.as_object().unwrap(), Path::new("/m/config.json")).map_err(|e| e.to_string())
}

/// Every tensor of the configuration in bf16, each with bytes of its own.
fn tensors() -> Tensors {
    let listed = config(|_| ()).unwrap().tensors().into_iter().enumerate();
    listed
        .map(|(i, (name, shape))| {
            let shape: Vec<usize> = shape.iter().map(|&dim| dim as usize).collect();
            let bytes =
                (0..shape.iter().product::<usize>() * 2).map(|byte| (byte * 7 + i * 31) as u8).collect();
            (name, (Dtype::BF16, shape, bytes))
        })
        .collect()
}

fn write_weights(path: &Path, tensors: &Tensors) {
    let views = tensors
        .iter()
        .map(|(name, (dtype, shape, bytes))| (name, TensorView::new(*dtype, shape.clone(), bytes).unwrap()));
    // As transformers writes it.
    let metadata = HashMap::from([("format".to_owned(), "pt".to_owned())]);
    safetensors::serialize_to_file(views, Some(metadata), path).unwrap();
}

/// A directory with this configuration and these weights in one file.
fn directory(tensors: &Tensors) -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("config.json"), config_json().to_string()).unwrap();
    write_weights(&weights(&dir), tensors);
    dir
}

fn weights(dir: &TempDir) -> PathBuf {
    dir.path().join("model.safetensors")
}

fn refusal(dir: &TempDir) -> String {
    ModelDir::inspect(dir.path()).expect_err("it is damaged").to_string()
}

/// What is said of a weights file with this header and so many bytes after it.
fn refusal_of_header(header: &str, data_bytes: usize) -> String {
    let dir = directory(&Tensors::new());
    let mut file = (header.len() as u64).to_le_bytes().to_vec();
    file.extend(header.as_bytes());
    file.resize(file.len() + data_bytes, 0);
    std::fs::write(weights(&dir), file).unwrap();
    refusal(&dir)
}

#[track_caller]
fn assert_says(said: &str, words: &[&str]) {
    for word in words {
        assert!(said.contains(word), "{word:?} is not in: {said}");
    }
}

#[test]
fn every_parameter_is_found_where_it_was_written() {
    let written = tensors();
    let dir = directory(&written);
    let model = ModelDir::inspect(dir.path()).unwrap();
    let names: Vec<_> = model.tensors.iter().map(|tensor| tensor.name.clone()).collect();
    let expected: Vec<_> = model.config.tensors().into_iter().map(|(name, _)| name).collect();
    assert_eq!(names, expected);
    let file = std::fs::read(weights(&dir)).unwrap();
    for tensor in &model.tensors {
        let bytes = &file[tensor.offset as usize..][..tensor.bytes];
        assert_eq!((tensor.dtype, bytes), (StoredDtype::Bf16, written[&tensor.name].2.as_slice()));
    }
    // 2·8·4 + 3·4 + 4·4 + 2·2·4 + 4·4 + 3·6·4 weights of two bytes.
    assert_eq!(model.weight_bytes(), 2 * (64 + 12 + 16 + 16 + 16 + 72));
}

#[test]
fn weights_and_configuration_that_do_not_belong_together_are_named_by_tensor_and_shapes() {
    let after = |change: fn(&mut Tensors)| {
        let mut tensors = tensors();
        change(&mut tensors);
        refusal(&directory(&tensors))
    };
    let said = after(|t| drop(t.remove(GATE)));
    assert_says(
        &said,
        &[
            "model.safetensors: tensor `model.layers.0.mlp.gate_proj.weight` [6, 4] is missing (11 tensors found)",
        ],
    );
    let said = after(|t| {
        let gate = t.remove(GATE).unwrap();
        t.insert(GATE.trim_start_matches("model.").into(), gate);
    });
    assert_says(&said, &["is missing", "`layers.0.mlp.gate_proj.weight` [6, 4] among them"]);
    // The embedding of another vocabulary: 7 rows where config.json says 8.
    let said = after(|t| {
        t.get_mut("model.embed_tokens.weight").unwrap().1 = vec![7, 4];
        t.get_mut("model.embed_tokens.weight").unwrap().2.truncate(56);
    });
    assert_says(
        &said,
        &[
            "model.safetensors: tensor `model.embed_tokens.weight` has shape [7, 4], config.json asks for [8, 4]",
            "its rows are the vocabulary, 7 here and 8 in vocab_size",
        ],
    );
    let said = after(|t| drop(t.insert("model.extra".into(), (Dtype::F32, vec![2], vec![0; 8]))));
    assert_says(&said, &["model.safetensors: tensor `model.extra` [2] has no place", "LlamaForCausalLM"]);
    let said = after(|t| t.get_mut(GATE).unwrap().1 = vec![4, 6]);
    assert_says(
        &said,
        &["`model.layers.0.mlp.gate_proj.weight` has shape [4, 6], config.json asks for [6, 4]"],
    );
    let said = after(|t| t.get_mut(GATE).unwrap().0 = Dtype::I16);
    assert_says(&said, &["`dtype of model.layers.0.mlp.gate_proj.weight` = I16", "F32, BF16, F16"]);
}

#[test]
fn buffers_and_the_copy_of_a_tied_head_are_not_weights() {
    let mut tensors = tensors();
    tensors.insert("model.layers.0.self_attn.rotary_emb.inv_freq".into(), (Dtype::F64, vec![1], vec![0; 8]));
    let dir = directory(&tensors);
    let whole = ModelDir::inspect(dir.path()).unwrap().weight_bytes();
    let mut tied = config_json();
    tied["tie_word_embeddings"] = true.into();
    std::fs::write(dir.path().join("config.json"), tied.to_string()).unwrap();
    assert_eq!(ModelDir::inspect(dir.path()).unwrap().weight_bytes(), whole - 2 * 8 * 4);
}

#[test]
fn a_file_cut_anywhere_is_refused() {
    let dir = directory(&tensors());
    let whole = std::fs::read(weights(&dir)).unwrap();
    let header = whole.len() as u64 - 392;
    for length in 0..whole.len() {
        std::fs::write(weights(&dir), &whole[..length]).unwrap();
        assert_says(&refusal(&dir), &["model.safetensors"]);
        let announced = announced_bytes(&weights(&dir)).unwrap();
        assert!(announced > length as u64, "{length} bytes seem whole");
        if length as u64 >= header {
            assert_eq!(announced, whole.len() as u64);
        }
    }
    std::fs::write(weights(&dir), &whole[..whole.len() - 1]).unwrap();
    assert_says(
        &refusal(&dir),
        &["is cut short: tensor `model.norm.weight` ends at byte 392 of the data, the file at 391"],
    );
    std::fs::write(weights(&dir), [whole.as_slice(), &[0]].concat()).unwrap();
    assert_says(&refusal(&dir), &["its tensors end at byte 392 of the data, the file at 393"]);
}

#[test]
fn what_is_no_safetensors_file_is_said_to_be_none() {
    let dir = directory(&tensors());
    for bytes in [&b"an HTML page, perhaps"[..], b"", &[0xff; 40]] {
        std::fs::write(weights(&dir), bytes).unwrap();
        assert_says(&refusal(&dir), &["is no safetensors file, or is cut short"]);
    }
    assert_says(&refusal_of_header("[1, 2]", 0), &["has no safetensors header: invalid type: sequence"]);
    assert_says(&refusal_of_header(&"[".repeat(5_000), 0), &["has no safetensors header"]);
    let pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n";
    std::fs::write(weights(&dir), pointer).unwrap();
    assert_says(&refusal(&dir), &["model.safetensors: is a Git-LFS pointer", "git lfs pull"]);
    std::fs::remove_file(weights(&dir)).unwrap();
    assert_says(&refusal(&dir), &["model.safetensors: is not there", "holds no weights"]);
    std::fs::write(dir.path().join("pytorch_model.bin"), "a pickle").unwrap();
    assert_says(&refusal(&dir), &["only pytorch_model.bin", "safe_serialization=True"]);
    std::fs::create_dir(weights(&dir)).unwrap();
    assert_says(&refusal(&dir), &["model.safetensors: is not a regular file"]);
}

#[test]
fn a_header_that_lies_is_refused_with_the_tensor_and_the_numbers() {
    let header = |tensors: &[(&str, &str, &str)]| {
        let parts: Vec<_> = tensors
            .iter()
            .map(|(name, shape, at)| {
                format!(r#""{name}":{{"dtype":"F32","shape":{shape},"data_offsets":{at}}}"#)
            })
            .collect();
        format!("{{{}}}", parts.join(","))
    };
    let huge = "[4294967296,4294967296]";
    for (tensors, words) in [
        (
            &[("a", "[2]", "[0,8]"), ("b", "[2]", "[4,12]")][..],
            "`b` lies at 4..12 of the data, and the one before ends at 8",
        ),
        (
            &[("a", "[2]", "[0,8]"), ("b", "[1]", "[12,16]")],
            "`b` lies at 12..16 of the data, and the one before ends at 8",
        ),
        (
            &[("a", "[2]", "[0,8]"), ("b", "[1]", "[8,4]")],
            "`b` lies at 8..4 of the data, and the one before ends at 8",
        ),
        (&[("a", "[3]", "[0,16]")], "`a` [3] in F32 takes 12 bytes, and has 16"),
        (
            &[("a", huge, "[0,16]")],
            "`a` [4294967296, 4294967296] in F32 takes no whole number of bytes, and has 16",
        ),
        (&[("a", "[2305843009213693952]", "[0,0]")], "takes no whole number of bytes"),
        (&[("a", "[5]", "[0,20]")], "is cut short: tensor `a` ends at byte 20 of the data, the file at 16"),
        (&[("a", "[2,2]", "[0,16]"), ("a", "[4]", "[0,16]")], "tensor `a` occurs twice"),
        (&[("a", "[-1]", "[0,16]")], "tensor `a`: invalid value: integer `-1`"),
        (&[("a", "[4]", "[0,18446744073709551616]")], "tensor `a`: invalid type: floating point"),
    ] {
        assert_says(&refusal_of_header(&header(tensors), 16), &["model.safetensors", words]);
    }
    let unknown = r#"{"a":{"dtype":"C64","shape":[2],"data_offsets":[0,16]}}"#;
    assert_says(&refusal_of_header(unknown, 16), &["tensor `a`: unknown variant `C64`"]);
}

/// Two files and the index that names them.
fn sharded() -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("config.json"), config_json().to_string()).unwrap();
    let (mut parts, mut map) = ([Tensors::new(), Tensors::new()], serde_json::Map::new());
    for (i, (name, tensor)) in tensors().into_iter().enumerate() {
        map.insert(name.clone(), format!("part-{}.safetensors", i % 2).into());
        parts[i % 2].insert(name, tensor);
    }
    for (i, part) in parts.iter().enumerate() {
        write_weights(&dir.path().join(format!("part-{i}.safetensors")), part);
    }
    let index = json!({ "weight_map": map }).to_string();
    std::fs::write(dir.path().join("model.safetensors.index.json"), index).unwrap();
    dir
}

#[test]
fn a_model_in_several_files_is_one_model_or_is_refused() {
    let dir = sharded();
    assert_eq!(ModelDir::inspect(dir.path()).unwrap().tensors.len(), 12);
    let part = |i: u32| dir.path().join(format!("part-{i}.safetensors"));

    let second = std::fs::read(part(1)).unwrap();
    std::fs::copy(part(0), part(1)).unwrap();
    assert_says(
        &refusal(&dir),
        &["part-1.safetensors: tensor `lm_head.weight` is in", "part-0.safetensors too"],
    );
    std::fs::remove_file(part(1)).unwrap();
    assert_says(&refusal(&dir), &["part-1.safetensors: is not there", "index.json names it as one of 2"]);
    write_weights(&part(1), &Tensors::new());
    assert_says(&refusal(&dir), &["model.safetensors.index.json: tensor `", "is missing"]);
    std::fs::write(part(1), second).unwrap();

    write_weights(&weights(&dir), &tensors());
    assert_says(
        &refusal(&dir),
        &["index.json: does not name model.safetensors", "two models in one directory"],
    );
    std::fs::remove_file(weights(&dir)).unwrap();

    let index = dir.path().join("model.safetensors.index.json");
    for (text, words) in [
        (
            r#"{"weight_map":{"a":"../other/model.safetensors"}}"#,
            "sends tensor `a` to \"../other/model.safetensors\"",
        ),
        (r#"{"weight_map":{"a":".."}}"#, "is not a regular file"),
        (r#"{"weight_map":{"a":7}}"#, "sends tensor `a` to 7"),
        (r#"{"weight_map":[]}"#, "has no object `weight_map`"),
        ("[]", "index.json: is not a JSON object"),
    ] {
        std::fs::write(&index, text).unwrap();
        assert_says(&refusal(&dir), &[words]);
    }
}

#[test]
fn faults_in_the_configuration_name_the_key_and_what_is_supported() {
    let set = |key: &str, value: Value| config(|c| c[key] = value).unwrap_err();
    assert_eq!(
        set("architectures", json!(["GemmaForCausalLM"])),
        "/m/config.json: `architectures` = [\"GemmaForCausalLM\"] is not supported; \
         supported: LlamaForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM"
    );
    assert_eq!(
        set("hidden_size", Value::Null),
        "/m/config.json: key `hidden_size` is missing; needed: a positive integer"
    );
    assert_says(&set("vocab_size", "many".into()), &["key `vocab_size` is \"many\""]);
    assert_says(&set("vocab_size", (1_i64 << 40).into()), &["`vocab_size` is 1099511627776", "below 2^31"]);
    assert_says(&set("num_hidden_layers", 10_001.into()), &["`num_hidden_layers` is 10001", "at most 10000"]);
    assert_says(&set("num_key_value_heads", 3.into()), &["a divisor of 2 heads"]);
    assert_says(&set("hidden_size", 5.into()), &["key `head_dim` is missing; needed: an even number"]);
    assert_says(&set("hidden_act", "gelu".into()), &["`hidden_act` = \"gelu\" is not supported"]);
    assert_says(&set("mlp_bias", true.into()), &["`mlp_bias` = true is not supported"]);
    assert_says(&set("attention_bias", true.into()), &["`attention_bias` = true is not supported"]);
    assert_says(&set("quantization_config", json!({"bits": 4})), &["`quantization_config` = {\"bits\":4}"]);
    let yarn = json!({ "rope_type": "yarn", "factor": 4.0 });
    assert_says(&set("rope_scaling", yarn), &["`rope_scaling.rope_type` = \"yarn\"", "default, llama3"]);
    assert_says(&set("rope_scaling", json!({ "factor": 4.0 })), &["key `rope_type` is missing"]);
    assert_says(&set("rope_scaling", "linear".into()), &["key `rope_scaling` is \"linear\""]);
}

#[test]
fn a_tokenizer_with_ids_the_embedding_has_no_rows_for_is_refused() {
    let dir = directory(&tensors());
    let check = |text: &str| {
        std::fs::write(dir.path().join("tokenizer.json"), text).unwrap();
        ModelDir::inspect(dir.path()).unwrap().config.check_tokenizer(dir.path()).map_err(|e| e.to_string())
    };
    let added = |id: u32| {
        format!(r#"{{"model":{{"vocab":{{"a":0,"b":6}}}},"added_tokens":[{{"id":{id},"content":"<end>"}}]}}"#)
    };
    assert_eq!(check(&added(7)), Ok(()));
    assert_says(
        &check(&added(8)).unwrap_err(),
        &["tokenizer.json: token \"<end>\" has id 8", "`model.embed_tokens.weight` has 8 rows", "vocab_size"],
    );
    let said = check(r#"{"model":{"vocab":{"a":0,"b":9}}}"#).unwrap_err();
    assert_says(&said, &["token \"b\" has id 9"]);
    let unigram = |pieces: usize| json!({"model": {"vocab": vec![json!(["x", -1.5]); pieces]}}).to_string();
    assert_eq!(check(&unigram(8)), Ok(()));
    assert_says(&check(&unigram(9)).unwrap_err(), &["has id 8"]);
    assert_says(&check("{}").unwrap_err(), &["is no tokenizer: it has no `model.vocab`"]);
    assert_says(&check(r#"{"model":{"vocab":{}}}"#).unwrap_err(), &["it has no tokens"]);
    assert_says(&check("<html>").unwrap_err(), &["tokenizer.json: is not JSON"]);
    std::fs::remove_file(dir.path().join("tokenizer.json")).unwrap();
    let missing =
        ModelDir::inspect(dir.path()).unwrap().config.check_tokenizer(dir.path()).unwrap_err().to_string();
    assert_says(&missing, &["cannot open", "tokenizer.json"]);
}

#[test]
fn special_tokens_are_the_added_ones_that_say_so() {
    let dir = tempfile::tempdir().unwrap();
    let text = r#"{"model":{"vocab":{"<|im_start|>":0}},"added_tokens":[
        {"id":1,"content":"<|eot_id|>","special":true}, {"id":2,"content":"<tool_call>","special":false}, 7]}"#;
    std::fs::write(dir.path().join("tokenizer.json"), text).unwrap();
    assert_eq!(special_tokens(dir.path()).unwrap().into_iter().collect::<Vec<_>>(), ["<|eot_id|>"]);
}

#[test]
fn the_chat_template_is_in_its_own_file_or_in_the_tokenizers_configuration() {
    let dir = tempfile::tempdir().unwrap();
    let found = || chat_template(dir.path()).map_err(|e| e.to_string());
    let configure = |text: &str| std::fs::write(dir.path().join("tokenizer_config.json"), text).unwrap();
    assert_eq!(found(), Ok(None));
    configure(r#"{"eos_token": "</s>"}"#);
    assert_eq!(found(), Ok(None));
    configure(r#"{"chat_template": "one"}"#);
    assert_eq!(found(), Ok(Some("one".to_owned())));
    configure(r#"{"chat_template": [{"name":"rag","template":"r"},{"name":"default","template":"two"}]}"#);
    assert_eq!(found(), Ok(Some("two".to_owned())));
    configure("{");
    assert_says(&found().unwrap_err(), &["tokenizer_config.json: is not JSON"]);
    std::fs::write(dir.path().join("chat_template.jinja"), "own").unwrap();
    assert_eq!(found(), Ok(Some("own".to_owned())));
}

#[test]
fn a_chain_gets_what_is_asked_for_or_the_models_window_and_never_more() {
    let model = config(|_| ()).unwrap();
    let window = |chain: Option<u32>, turn: u32| {
        let mut settings = crate::config::resolve(&[], None, []).unwrap().config.actor_rollout_ref.rollout;
        (settings.max_model_len, settings.max_tokens) = (chain, turn);
        model.window(&settings)
    };
    assert_eq!(window(None, 64), Ok(64));
    assert_eq!(window(Some(40), 8), Ok(40));
    assert_eq!(window(Some(65), 8), Err(WindowError { asked: 65, trained: 64 }));
    assert_eq!(window(None, 65), Ok(64), "a turn's cap beyond the window is no cap");
    assert_eq!(window(Some(40), 65), Ok(40));
    assert_says(&window(Some(65), 8).unwrap_err().to_string(), &["max_model_len=65", "64 tokens"]);
}

proptest! {
    #[test]
    fn a_changed_byte_of_a_header_is_refused_or_changes_nothing(at in 0.0..1.0_f64, byte: u8) {
        let dir = directory(&tensors());
        let whole = ModelDir::inspect(dir.path()).unwrap();
        let mut file = std::fs::read(weights(&dir)).unwrap();
        let data_start = whole.tensors.iter().map(|tensor| tensor.offset).min().unwrap() as usize;
        file[(at * data_start as f64) as usize] = byte;
        std::fs::write(weights(&dir), &file).unwrap();
        if let Ok(again) = ModelDir::inspect(dir.path()) {
            prop_assert_eq!(again, whole);
        }
    }

    #[test]
    fn a_header_length_that_is_off_by_its_padding_is_refused(off in 1_u64..16, longer: bool) {
        let dir = directory(&tensors());
        let mut file = std::fs::read(weights(&dir)).unwrap();
        let length = u64::from_le_bytes(file[..8].try_into().unwrap());
        // Room to be wrong in: JSON ends in spaces either way.
        let pad = vec![b' '; 16];
        file.splice(8 + length as usize..8 + length as usize, pad);
        let told = if longer { length + 16 + off } else { length + 16 - off };
        file[..8].copy_from_slice(&told.to_le_bytes());
        std::fs::write(weights(&dir), &file).unwrap();
        prop_assert!(ModelDir::inspect(dir.path()).is_err());
        file[..8].copy_from_slice(&(length + 16).to_le_bytes());
        std::fs::write(weights(&dir), &file).unwrap();
        prop_assert!(ModelDir::inspect(dir.path()).is_ok());
    }

    #[test]
    fn no_configuration_makes_reading_it_panic(at in 0.0..1.0_f64, bytes in proptest::collection::vec(any::<u8>(), 0..6)) {
        let dir = directory(&tensors());
        let mut text = config_json().to_string().into_bytes();
        let at = (at * text.len() as f64) as usize;
        text.splice(at..(at + bytes.len()).min(text.len()), bytes);
        std::fs::write(dir.path().join("config.json"), text).unwrap();
        if let Err(error) = ModelDir::inspect(dir.path()) {
            prop_assert!(error.to_string().contains(&dir.path().display().to_string()), "{}", error);
        }
    }
}
