//! The shape of a model, read from Hugging Face's `config.json`.
//!
//! What must stay true: a key that would change what is computed is either honoured or refused by name; a key
//! that is absent has the value `transformers` gives it; no number in it is so large that listing the tensors
//! overflows or never ends.

use std::path::Path;

use serde_json::{Map, Value, json};

use super::error::ModelDirError;
use super::json::{Reader, read_object};
use super::rope::{self, RopeScaling};
use super::tokenizer;

/// More blocks than any model has: bounds the list of tensors that a damaged file can ask for.
const MAX_LAYERS: i64 = 10_000;

/// Families that can be computed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Architecture {
    /// Llama 2/3, SmolLM2: no biases.
    Llama,
    /// Qwen2, Qwen2.5: biases on queries, keys and values.
    Qwen2,
    /// Qwen3: queries and keys are normalised per head.
    Qwen3,
}

impl Architecture {
    /// The class name in `architectures`.
    #[must_use]
    pub fn class_name(self) -> &'static str {
        match self {
            Self::Llama => "LlamaForCausalLM",
            Self::Qwen2 => "Qwen2ForCausalLM",
            Self::Qwen3 => "Qwen3ForCausalLM",
        }
    }

    fn model_type(self) -> &'static str {
        match self {
            Self::Llama => "llama",
            Self::Qwen2 => "qwen2",
            Self::Qwen3 => "qwen3",
        }
    }

    /// What `transformers` takes `num_key_value_heads` for where the key is absent; `None`: every head has its own.
    fn default_kv_heads(self) -> Option<i64> {
        match self {
            Self::Llama => None,
            Self::Qwen2 | Self::Qwen3 => Some(32),
        }
    }

    /// What `transformers` takes `head_dim` for where the key is absent; `None`: `hidden` / `heads`.
    fn default_head_dim(self) -> Option<i64> {
        match self {
            Self::Llama | Self::Qwen2 => None,
            Self::Qwen3 => Some(128),
        }
    }

    /// What `transformers` takes `max_position_embeddings` for where the key is absent.
    fn default_positions(self) -> i64 {
        match self {
            Self::Llama => 2048,
            Self::Qwen2 | Self::Qwen3 => 32_768,
        }
    }

    /// Whether queries, keys and values have biases.
    #[must_use]
    pub fn qkv_bias(self) -> bool {
        self == Self::Qwen2
    }

    /// Whether queries and keys are normalised.
    #[must_use]
    pub fn qk_norm(self) -> bool {
        self == Self::Qwen3
    }
}

/// Everything the forward pass depends on.
#[derive(Debug, Clone, PartialEq)]
pub struct ModelConfig {
    /// The family.
    pub architecture: Architecture,
    /// Width of the residual stream.
    pub hidden: i64,
    /// Number of blocks.
    pub layers: i64,
    /// Query heads.
    pub heads: i64,
    /// Key and value heads; divides `heads`.
    pub kv_heads: i64,
    /// Channels of a head; even.
    pub head_dim: i64,
    /// Width of the MLP.
    pub intermediate: i64,
    /// Rows of the embedding.
    pub vocab: i64,
    /// Added to the mean square in RMSNorm.
    pub rms_eps: f64,
    /// Base of the rotary frequencies.
    pub rope_theta: f64,
    /// Llama 3's stretching, if any.
    pub rope_scaling: Option<RopeScaling>,
    /// Whether the head is the embedding.
    pub tie_word_embeddings: bool,
    /// The longest context the model knows, in tokens.
    pub max_position_embeddings: i64,
    /// Standard deviation of fresh weights.
    pub initializer_range: f64,
    /// Tokens that end a text, from `config.json` and `generation_config.json`.
    pub eos_ids: Vec<u32>,
    /// The token texts start with.
    pub bos_id: Option<u32>,
    /// The token rows are padded with.
    pub pad_id: Option<u32>,
    /// The kind the weights are stored in, as the file says: `bfloat16`, ….
    pub torch_dtype: Option<String>,
}

impl ModelConfig {
    /// Reads `config.json`, and `generation_config.json` if there is one, in `dir`.
    ///
    /// # Errors
    /// Names the file, the key, its value and what is supported.
    pub fn from_dir(dir: &Path) -> Result<Self, ModelDirError> {
        if !dir.is_dir() {
            let reason = "is no folder; a model is a Hugging Face directory, or a hub name as org/name";
            return Err(ModelDirError::malformed(dir, reason));
        }
        let path = dir.join("config.json");
        let below = dir.join("huggingface");
        if !path.exists() && below.join("config.json").exists() {
            let reason =
                format!("is not there, but in {}, where a checkpoint has its model", below.display());
            return Err(ModelDirError::malformed(&path, reason));
        }
        let mut config = Self::from_json(&read_object(&path)?, &path)?;
        let path = dir.join("generation_config.json");
        if path.exists() {
            let generation = Reader { path: &path, map: &read_object(&path)? };
            for id in generation.ids("eos_token_id")? {
                if !config.eos_ids.contains(&id) {
                    config.eos_ids.push(id);
                }
            }
        }
        Ok(config)
    }

    /// Reads the object of a `config.json`; `path` is for the errors.
    ///
    /// # Errors
    /// As [`Self::from_dir`].
    pub fn from_json(map: &Map<String, Value>, path: &Path) -> Result<Self, ModelDirError> {
        let read = Reader { path, map };
        let architecture = read.architecture()?;
        read.only("hidden_act", &json!("silu"), "\"silu\"")?;
        for key in ["mlp_bias", "use_sliding_window"] {
            read.only(key, &json!(false), "false")?;
        }
        read.only("quantization_config", &Value::Null, "none (weights in F32, BF16 or F16)")?;
        // Qwen2 has its biases whatever this key says.
        if !architecture.qkv_bias() {
            read.only("attention_bias", &json!(false), "false")?;
        }
        read.full_attention()?;
        let (hidden, heads) = (read.positive("hidden_size")?, read.positive("num_attention_heads")?);
        let max_position_embeddings =
            read.optional_positive("max_position_embeddings")?.unwrap_or(architecture.default_positions());
        let (rope_theta, rope_scaling) = read.rope(max_position_embeddings)?;
        // Null means "derived from the others"; an absent key has the family's default.
        let absent = |key: &str, default: Option<i64>| default.filter(|_| !map.contains_key(key));
        let config = Self {
            architecture,
            hidden,
            layers: read.positive("num_hidden_layers")?,
            heads,
            kv_heads: read
                .optional_positive("num_key_value_heads")?
                .or(absent("num_key_value_heads", architecture.default_kv_heads()))
                .unwrap_or(heads),
            head_dim: read
                .optional_positive("head_dim")?
                .or(absent("head_dim", architecture.default_head_dim()))
                .unwrap_or(hidden / heads),
            intermediate: read.positive("intermediate_size")?,
            vocab: read.positive("vocab_size")?,
            rms_eps: read.optional_number("rms_norm_eps")?.unwrap_or(1e-6),
            rope_theta,
            rope_scaling,
            tie_word_embeddings: read.flag("tie_word_embeddings", false)?,
            max_position_embeddings,
            initializer_range: read.optional_number("initializer_range")?.unwrap_or(0.02),
            eos_ids: read.ids("eos_token_id")?,
            bos_id: read.ids("bos_token_id")?.first().copied(),
            pad_id: read.ids("pad_token_id")?.first().copied(),
            torch_dtype: ["dtype", "torch_dtype"]
                .iter()
                .find_map(|key| map.get(*key).and_then(Value::as_str))
                .map(str::to_owned),
        };
        if config.heads % config.kv_heads != 0 {
            let needed = match read.get("num_key_value_heads") {
                Some(_) => format!("a divisor of {heads} heads"),
                None => format!("a divisor of {heads} heads; absent it counts as {}", config.kv_heads),
            };
            return Err(read.wrong("num_key_value_heads", &needed));
        }
        // Qwen2 without the key rounds down, as transformers does.
        let uneven = architecture == Architecture::Llama && hidden % heads != 0;
        if config.head_dim == 0 || config.head_dim % 2 != 0 || (read.get("head_dim").is_none() && uneven) {
            return Err(read.wrong("head_dim", "an even number of channels"));
        }
        if config.layers > MAX_LAYERS {
            return Err(read.wrong("num_hidden_layers", &format!("at most {MAX_LAYERS}")));
        }
        Ok(config)
    }

    /// Checks that `tokenizer.json` in `dir` is a tokenizer whose ids all are in this model's vocabulary.
    ///
    /// # Errors
    /// What is wrong with the file, or the token with the largest id.
    pub fn check_tokenizer(&self, dir: &Path) -> Result<(), ModelDirError> {
        tokenizer::check(dir, self.vocab)
    }

    /// The `config.json` that `transformers` reads back as this model.
    #[must_use]
    pub fn to_json(&self) -> Map<String, Value> {
        let eos = match self.eos_ids.as_slice() {
            [] => Value::Null,
            [one] => json!(one),
            many => json!(many),
        };
        let value = json!({
            "architectures": [self.architecture.class_name()],
            "model_type": self.architecture.model_type(),
            "hidden_size": self.hidden,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "intermediate_size": self.intermediate,
            "vocab_size": self.vocab,
            "hidden_act": "silu",
            "rms_norm_eps": self.rms_eps,
            "rope_theta": self.rope_theta,
            "rope_scaling": rope::scaling_json(self.rope_scaling.as_ref()),
            "tie_word_embeddings": self.tie_word_embeddings,
            "max_position_embeddings": self.max_position_embeddings,
            "initializer_range": self.initializer_range,
            "eos_token_id": eos,
            "bos_token_id": self.bos_id,
            "pad_token_id": self.pad_id,
            "torch_dtype": self.torch_dtype,
        });
        match value {
            Value::Object(map) => map,
            _ => Map::new(),
        }
    }

    /// Names and shapes of every parameter, in the order the model uses them; a tied head is not listed.
    #[must_use]
    pub fn tensors(&self) -> Vec<(String, Vec<i64>)> {
        let (queries, keys) = (self.heads * self.head_dim, self.kv_heads * self.head_dim);
        let mut all = vec![("model.embed_tokens.weight".to_owned(), vec![self.vocab, self.hidden])];
        for layer in 0..self.layers {
            let mut push = |name: &str, shape: &[i64]| {
                all.push((format!("model.layers.{layer}.{name}"), shape.to_vec()));
            };
            push("input_layernorm.weight", &[self.hidden]);
            for (name, width) in [("q", queries), ("k", keys), ("v", keys)] {
                push(&format!("self_attn.{name}_proj.weight"), &[width, self.hidden]);
                if self.architecture.qkv_bias() {
                    push(&format!("self_attn.{name}_proj.bias"), &[width]);
                }
            }
            if self.architecture.qk_norm() {
                push("self_attn.q_norm.weight", &[self.head_dim]);
                push("self_attn.k_norm.weight", &[self.head_dim]);
            }
            push("self_attn.o_proj.weight", &[self.hidden, queries]);
            push("post_attention_layernorm.weight", &[self.hidden]);
            push("mlp.gate_proj.weight", &[self.intermediate, self.hidden]);
            push("mlp.up_proj.weight", &[self.intermediate, self.hidden]);
            push("mlp.down_proj.weight", &[self.hidden, self.intermediate]);
        }
        all.push(("model.norm.weight".to_owned(), vec![self.hidden]));
        if !self.tie_word_embeddings {
            all.push(("lm_head.weight".to_owned(), vec![self.vocab, self.hidden]));
        }
        all
    }
}

impl Reader<'_> {
    /// The class in `architectures`, or where there is none the family in `model_type`, by which
    /// `transformers` goes; where both are there they must agree.
    fn architecture(&self) -> Result<Architecture, ModelDirError> {
        const CLASSES: &str = "LlamaForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM";
        const TYPES: &str = "llama, qwen2, qwen3";
        let all = [Architecture::Llama, Architecture::Qwen2, Architecture::Qwen3];
        let (class, family) = (self.get("architectures"), self.get("model_type"));
        let Some(class) = class else {
            let Some(family) = family else {
                return Err(self.wrong("architectures", CLASSES));
            };
            return all
                .into_iter()
                .find(|a| *family == json!(a.model_type()))
                .ok_or_else(|| self.unsupported("model_type", family, TYPES));
        };
        let found = all
            .into_iter()
            .find(|a| *class == json!([a.class_name()]))
            .ok_or_else(|| self.unsupported("architectures", class, CLASSES))?;
        match family {
            Some(family) if *family != json!(found.model_type()) => {
                let needed = format!("\"{}\", as `architectures` says", found.model_type());
                Err(self.wrong("model_type", &needed))
            }
            _ => Ok(found),
        }
    }

    /// Refuses layers with a sliding window.
    fn full_attention(&self) -> Result<(), ModelDirError> {
        let Some(types) = self.get("layer_types") else { return Ok(()) };
        match types.as_array() {
            Some(types) if types.iter().all(|kind| *kind == json!("full_attention")) => Ok(()),
            _ => Err(self.unsupported("layer_types", types, "\"full_attention\" for every layer")),
        }
    }
}
