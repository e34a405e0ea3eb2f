//! Models are read and written as Hugging Face directories, and faults name file, tensor and shapes.

mod support;

use std::path::Path;

use agentfly_c10d::ops::Packed;
use agentfly_policy::model::{Attention, Decoder, ModelConfig, export, score, tensor_bytes};
use support::{FAMILIES, config_json, full_logits, model, text};
use tch::{Device, Kind, Tensor};

fn named(decoder: &Decoder) -> Vec<(String, Tensor)> {
    decoder.parameters().iter().map(|(name, tensor)| (name.to_owned(), tensor.shallow_clone())).collect()
}

fn load(dir: &Path) -> Result<Decoder, String> {
    Decoder::load(dir, Kind::Float, Device::Cpu).map_err(|error| error.to_string())
}

#[test]
fn what_is_exported_is_loaded_bit_for_bit() {
    for family in FAMILIES {
        let decoder = model(family, 1);
        let dir = tempfile::tempdir().unwrap();
        export(dir.path(), decoder.config(), &named(&decoder), None).unwrap();
        let again = load(dir.path()).unwrap();
        assert_eq!(again.config(), decoder.config());
        assert_eq!(again.weights_hash().unwrap(), decoder.weights_hash().unwrap());
        assert_ne!(again.weights_hash().unwrap(), model(family, 2).weights_hash().unwrap());
        let ids = text(20, 1);
        assert!(full_logits(&decoder, &ids).equal(&full_logits(&again, &ids)), "{family}");
    }
}

#[test]
fn half_precision_weights_round_trip_and_load_in_any_kind() {
    let decoder = model("llama", 3);
    for (kind, name) in [(Kind::BFloat16, "bfloat16"), (Kind::Half, "float16")] {
        let small = decoder.cast(kind, Device::Cpu).unwrap();
        let dir = tempfile::tempdir().unwrap();
        export(dir.path(), small.config(), &named(&small), None).unwrap();
        let config = ModelConfig::from_dir(dir.path()).unwrap();
        assert_eq!(config.torch_dtype.as_deref(), Some(name));
        let again = Decoder::load(dir.path(), kind, Device::Cpu).unwrap();
        assert_eq!(again.weights_hash().unwrap(), small.weights_hash().unwrap());
        let widened = load(dir.path()).unwrap();
        for (name, tensor) in widened.parameters().iter() {
            let expected = small.parameters().get(name).unwrap().to_kind(Kind::Float);
            assert_eq!(tensor_bytes(tensor).unwrap(), tensor_bytes(&expected).unwrap(), "{name}");
        }
    }
}

#[test]
fn weights_in_several_files_load_as_one_model() {
    let decoder = model("qwen2", 4);
    let dir = tempfile::tempdir().unwrap();
    export(dir.path(), decoder.config(), &named(&decoder), None).unwrap();
    // The same tensors, dealt into two files as an index says.
    let whole = std::fs::read(dir.path().join("model.safetensors")).unwrap();
    let tensors = safetensors::SafeTensors::deserialize(&whole).unwrap();
    let mut weight_map = serde_json::Map::new();
    for part in 0..2 {
        let file = format!("part-{part}.safetensors");
        let mine: Vec<_> =
            tensors.iter().enumerate().filter(|(i, _)| i % 2 == part).map(|(_, t)| t).collect();
        for (name, _) in &mine {
            weight_map.insert((*name).to_owned(), file.clone().into());
        }
        safetensors::serialize_to_file(mine, None, &dir.path().join(file)).unwrap();
    }
    std::fs::remove_file(dir.path().join("model.safetensors")).unwrap();
    let index = serde_json::json!({ "weight_map": weight_map });
    std::fs::write(dir.path().join("model.safetensors.index.json"), index.to_string()).unwrap();
    let again = load(dir.path()).unwrap();
    assert_eq!(again.weights_hash().unwrap(), decoder.weights_hash().unwrap());
}

#[test]
fn tokenizer_and_configuration_come_from_the_source() {
    let decoder = model("qwen2", 5);
    let (source, dir) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let mut config = config_json("qwen2");
    config["a_key_for_others"] = 5.into();
    std::fs::write(source.path().join("config.json"), config.to_string()).unwrap();
    std::fs::write(source.path().join("tokenizer.json"), "{\"it\": \"is\"}").unwrap();
    std::fs::write(source.path().join("generation_config.json"), "{\"eos_token_id\": [1, 9]}").unwrap();
    export(dir.path(), decoder.config(), &named(&decoder), Some(source.path())).unwrap();
    assert_eq!(std::fs::read_to_string(dir.path().join("tokenizer.json")).unwrap(), "{\"it\": \"is\"}");
    assert!(std::fs::read_to_string(dir.path().join("config.json")).unwrap().contains("a_key_for_others"));
    assert_eq!(load(dir.path()).unwrap().config().eos_ids, [1, 9]);
}

#[test]
fn faults_in_the_weights_name_the_file_the_tensor_and_the_shapes() {
    let decoder = model("llama", 6);
    let dir = tempfile::tempdir().unwrap();
    let config_path = dir.path().join("config.json");
    export(dir.path(), decoder.config(), &named(&decoder), None).unwrap();
    let rewrite = |key: &str, value: serde_json::Value| {
        let mut config = config_json("llama");
        config[key] = value;
        std::fs::write(&config_path, config.to_string()).unwrap();
        load(dir.path()).unwrap_err()
    };
    let said = rewrite("num_hidden_layers", 3.into());
    assert!(
        said.contains("`model.layers.2.input_layernorm.weight` [48] is missing (21 tensors found)"),
        "{said}"
    );
    let said = rewrite("num_hidden_layers", 1.into());
    assert!(said.contains("model.safetensors: tensor `model.layers.1."), "{said}");
    let said = rewrite("intermediate_size", 64.into());
    assert!(
        said.contains(
            "`model.layers.0.mlp.gate_proj.weight` has shape [96, 48], config.json asks for [64, 48]"
        ),
        "{said}"
    );
    let weights = dir.path().join("model.safetensors");
    std::fs::write(&config_path, config_json("llama").to_string()).unwrap();
    let bytes = std::fs::read(&weights).unwrap();
    std::fs::write(&weights, &bytes[..bytes.len() - 10]).unwrap();
    let said = load(dir.path()).unwrap_err();
    assert!(said.contains("is cut short"), "{said}");
    std::fs::write(&weights, "an HTML page, perhaps").unwrap();
    let said = load(dir.path()).unwrap_err();
    assert!(said.contains("is no safetensors file"), "{said}");
    std::fs::remove_file(&weights).unwrap();
    let said = load(dir.path()).unwrap_err();
    assert!(said.contains("model.safetensors: is not there"), "{said}");
}

#[test]
fn misshapen_input_is_an_error_and_not_a_panic() {
    let decoder = model("qwen2", 7);
    let flat = Tensor::from_slice(&[1_i64, 2, 3]);
    let floats = Tensor::from_slice(&[1_f32, 2.0, 3.0]);
    let outside = Tensor::from_slice(&[1_i64, 500, 2]);
    let packed = |ends: &[i64]| Packed::new(ends, Device::Cpu).unwrap();
    for (ids, positions, packed, needle) in [
        (flat.unsqueeze(0), flat.unsqueeze(0), packed(&[0, 3]), "got [1, 3] Int64"),
        (floats.shallow_clone(), floats, packed(&[0, 3]), "Float on Cpu"),
        (flat.shallow_clone(), flat.narrow(0, 0, 2), packed(&[0, 3]), "positions: got [2]"),
        (outside, flat.shallow_clone(), packed(&[0, 3]), "index out of range"),
        (flat.shallow_clone(), flat.shallow_clone(), packed(&[0, 2]), "of 2 rows"),
    ] {
        let said = decoder.hidden(&ids, &positions, Attention::Packed(&packed)).unwrap_err().to_string();
        assert!(said.contains(needle) && !said.contains('\n'), "{said}");
    }
    assert!(decoder.logits(&Tensor::zeros([2, 7], (Kind::Float, Device::Cpu))).is_err());
    assert!(score(&decoder, &[500]).unwrap_err().to_string().contains("id 500"));
    assert!(score(&decoder, &[]).is_err());
    let said = score(&decoder, &text(513, 1)).unwrap_err().to_string();
    assert!(said.contains("513 ids") && said.contains("at most the 512"), "{said}");
    assert_eq!(score(&decoder, &text(512, 1)).unwrap().len(), 512);
}

#[test]
fn scores_are_log_softmax_of_the_logits_and_later_tokens_are_not_seen() {
    let decoder = model("qwen3", 8);
    let ids = text(300, 2);
    let scores = score(&decoder, &ids).unwrap();
    assert_eq!((scores.len(), scores[0]), (300, None));
    let log_probs = full_logits(&decoder, &ids).log_softmax(-1, Kind::Float);
    for at in [1_usize, 2, 150, 257, 299] {
        let expected = log_probs.double_value(&[at as i64 - 1, i64::from(ids[at])]);
        assert!((f64::from(scores[at].unwrap()) - expected).abs() < 1e-5);
    }
    let short = full_logits(&decoder, &ids[..40]);
    let longer = full_logits(&decoder, &ids[..65]).narrow(0, 0, 40);
    assert_eq!(short, longer, "later tokens are not seen, to the bit");
}

#[test]
fn a_sequence_is_computed_alike_whatever_is_packed_beside_it() {
    for family in FAMILIES {
        let decoder = model(family, 9);
        let texts = [text(30, 1), text(1, 2), text(70, 3)];
        let ids: Vec<i64> = texts.concat().into_iter().map(i64::from).collect();
        let positions: Vec<i64> = texts.iter().flat_map(|t| 0..t.len() as i64).collect();
        let sequences = Packed::new(&[0, 30, 31, 101], Device::Cpu).unwrap();
        let (ids, positions) = (Tensor::from_slice(&ids), Tensor::from_slice(&positions));
        let hidden = decoder.hidden(&ids, &positions, Attention::Packed(&sequences)).unwrap();
        let packed = decoder.logits(&hidden).unwrap();
        for (text, start) in texts.iter().zip([0, 30, 31]) {
            let own = packed.narrow(0, start, text.len() as i64);
            assert_eq!(own, full_logits(&decoder, text), "{family}, to the bit");
        }
    }
}

#[test]
fn an_update_in_place_is_seen() {
    for family in FAMILIES {
        let decoder = model(family, 9);
        let before = full_logits(&decoder, &text(12, 1));
        let other = model(family, 10);
        tch::no_grad(|| {
            for ((_, to), (_, from)) in decoder.parameters().iter().zip(other.parameters().iter()) {
                to.shallow_clone().copy_(from);
            }
        });
        let after = full_logits(&decoder, &text(12, 1));
        assert_eq!(after, full_logits(&other, &text(12, 1)), "{family}");
        assert!((before - after).abs().max().double_value(&[]) > 0.1, "{family}");
    }
}

#[test]
fn weights_that_are_no_numbers_are_refused_by_tensor_and_file() {
    let decoder = model("qwen2", 1);
    let mut broken = named(&decoder);
    let (name, tensor) = &mut broken[3];
    *tensor = tensor.copy();
    let _same_tensor = tensor.view([-1]).get(0).fill_(f64::NAN);
    let name = name.clone();
    let dir = tempfile::tempdir().unwrap();
    export(dir.path(), decoder.config(), &broken, None).unwrap();
    let told = load(dir.path()).unwrap_err();
    assert!(
        told.contains(&format!("NaN or infinities in `{name}`")) && told.contains("model.safetensors"),
        "{told}"
    );
}
