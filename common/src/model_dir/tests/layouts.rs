//! One model can be written down in several ways, and keys may be absent: what is read is what `transformers`
//! 5.23 reads (`make parity` holds it to that).

use super::*;

/// The configuration of another family without its rotary keys, then changed.
fn with(family: &str, change: Value) -> Result<ModelConfig, String> {
    config(|c| {
        let map = c.as_object_mut().unwrap();
        for key in ["architectures", "rope_scaling", "rope_theta"] {
            map.remove(key);
        }
        map.insert("model_type".to_owned(), family.into());
        map.extend(change.as_object().unwrap().clone());
    })
}

#[test]
fn the_newer_layout_of_rope_is_the_same_model() {
    let newer = config(|c| {
        let map = c.as_object_mut().unwrap();
        let mut rope = map.remove("rope_scaling").unwrap();
        rope["rope_theta"] = map.remove("rope_theta").unwrap();
        map.insert("rope_parameters".to_owned(), rope);
    });
    assert_eq!(newer, config(|_| ()));
    let written = config(|_| ()).unwrap().to_json();
    assert_eq!(ModelConfig::from_json(&written, Path::new("x")).map_err(|e| e.to_string()), config(|_| ()));
}

#[test]
fn of_two_places_for_the_rotary_base_the_inner_one_counts() {
    let theta = |change: Value| with("llama", change).unwrap().rope_theta;
    assert_eq!(theta(json!({})), 10_000.0);
    assert_eq!(theta(json!({"rope_theta": 5.0e5})), 5.0e5);
    for key in ["rope_scaling", "rope_parameters"] {
        let inside = json!({"rope_type": "default", "rope_theta": 999.0});
        assert_eq!(theta(json!({"rope_theta": 5.0e5, key: inside})), 999.0, "{key}");
        assert_eq!(theta(json!({"rope_theta": 5.0e5, key: {"rope_type": "default"}})), 5.0e5, "{key}");
        assert_eq!(theta(json!({"rope_theta": 5.0e5, key: {}})), 5.0e5, "{key}");
    }
    let both = json!({
        "rope_scaling": {"type": "default", "rope_theta": 7.0}, "rope_parameters": {"rope_theta": 8.0},
    });
    assert_eq!(theta(both), 7.0);
}

#[test]
fn llama3s_first_context_is_outside_or_inside_or_the_models_own() {
    let context = |outside: Value, inside: Value| {
        let mut rope =
            json!({"rope_type": "llama3", "factor": 8, "low_freq_factor": 1, "high_freq_factor": 4});
        rope["original_max_position_embeddings"] = inside;
        let change = json!({"rope_parameters": rope, "original_max_position_embeddings": outside});
        with("llama", change).unwrap().rope_scaling.unwrap().original_max_position_embeddings
    };
    assert_eq!(context(Value::Null, Value::Null), 64);
    assert_eq!(context(Value::Null, 16.into()), 16);
    assert_eq!(context(32.into(), 16.into()), 32);
}

#[test]
fn an_absent_key_has_its_familys_default_and_null_is_derived() {
    let shape = |family: &str| {
        let wide = json!({"num_attention_heads": 64, "hidden_size": 1024});
        let mut json = config_json();
        let map = json.as_object_mut().unwrap();
        map.extend(wide.as_object().unwrap().clone());
        map.insert("model_type".to_owned(), family.into());
        for key in
            ["architectures", "num_key_value_heads", "head_dim", "rms_norm_eps", "max_position_embeddings"]
        {
            map.remove(key);
        }
        let read = ModelConfig::from_json(map, Path::new("config.json")).unwrap();
        assert_eq!(read.rms_eps, 1e-6);
        (read.kv_heads, read.head_dim, read.max_position_embeddings)
    };
    assert_eq!(shape("llama"), (64, 16, 2048));
    assert_eq!(shape("qwen2"), (32, 16, 32_768));
    assert_eq!(shape("qwen3"), (32, 128, 32_768));
    for family in ["llama", "qwen2", "qwen3"] {
        let null = with(family, json!({"num_key_value_heads": null, "head_dim": null})).unwrap();
        assert_eq!((null.kv_heads, null.head_dim), (2, 2), "{family}");
        assert!(!with(family, json!({"tie_word_embeddings": null})).unwrap().tie_word_embeddings);
    }
    let uneven = |family| with(family, json!({"hidden_size": 5, "head_dim": null})).map(|c| c.head_dim);
    assert_eq!(uneven("qwen2"), Ok(2));
    assert_says(&uneven("llama").unwrap_err(), &["key `head_dim` is missing"]);
    let said = config(|c| {
        c["architectures"] = json!(["Qwen2ForCausalLM"]);
        c.as_object_mut().unwrap().remove("num_key_value_heads");
    });
    assert_says(&said.unwrap_err(), &["a divisor of 2 heads; absent it counts as 32"]);
}

#[test]
fn the_family_is_in_either_of_two_keys_and_they_agree() {
    assert_eq!(with("qwen3", json!({})).unwrap().architecture, Architecture::Qwen3);
    assert_says(&with("gemma", json!({})).unwrap_err(), &["`model_type` = \"gemma\"", "llama, qwen2, qwen3"]);
    let two = with("llama", json!({"architectures": ["Qwen2ForCausalLM"]})).unwrap_err();
    assert_says(&two, &["key `model_type` is \"llama\"", "\"qwen2\", as `architectures` says"]);
    let none = config(|c| drop(c.as_object_mut().unwrap().remove("architectures"))).unwrap_err();
    assert_says(&none, &["key `architectures` is missing", "Qwen3ForCausalLM"]);
}

#[test]
fn layers_and_channels_that_are_treated_apart_are_refused() {
    let said = |change: Value| with("qwen3", change).unwrap_err();
    let layers = json!({"layer_types": ["full_attention", "sliding_attention"]});
    assert_says(&said(layers), &["`layer_types` = ", "\"full_attention\" for every layer"]);
    assert!(with("qwen3", json!({"layer_types": ["full_attention"]})).is_ok());
    assert_says(&said(json!({"partial_rotary_factor": 0.5})), &["`partial_rotary_factor` = 0.5"]);
    let inside = json!({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.25}});
    assert_says(&said(inside), &["`partial_rotary_factor` = 0.25"]);
    let nested = json!({"rope_parameters": {"full_attention": {"rope_type": "default"}}});
    assert_says(&said(nested), &["`rope_parameters.full_attention`", "one set of numbers"]);
}
