//! The decoder: embedding, pre-norm blocks of attention and SwiGLU, final norm, head.
//!
//! What must stay true: blocks hold the very tensors of [`Parameters`], so an optimizer's in-place update is
//! seen by the next forward pass.

use std::path::Path;

use agentfly_common::model_dir::{ModelConfig, ModelDir};
use tch::{Device, Kind, Tensor};

use super::attention::{Attention, Linear, RmsNorm, SelfAttention};
use super::error::ModelError;
use super::load;
use super::parameters::Parameters;
use super::rope::Rope;

/// A model on one device.
#[derive(Debug)]
pub struct Decoder {
    config: ModelConfig,
    parameters: Parameters,
    embedding: Tensor,
    blocks: Vec<Block>,
    norm: RmsNorm,
    head: Tensor,
    rope: Rope,
    kind: Kind,
    device: Device,
}

#[derive(Debug)]
struct Block {
    attention_norm: RmsNorm,
    attention: SelfAttention,
    mlp_norm: RmsNorm,
    gate: Linear,
    up: Linear,
    down: Linear,
}

impl Block {
    fn mlp(&self, x: &Tensor) -> Result<Tensor, ModelError> {
        let gated = self.gate.apply(x)?.f_silu()?.f_mul(&self.up.apply(x)?)?;
        self.down.apply(&gated)
    }
}

impl Decoder {
    /// Reads a Hugging Face directory: `config.json` and one or several safetensors files in f32, bf16 or
    /// f16, cast to `kind` on `device`.
    ///
    /// # Errors
    /// Names the file and the key or tensor that is missing, extra or misshapen.
    pub fn load(dir: &Path, kind: Kind, device: Device) -> Result<Self, ModelError> {
        let model = ModelDir::inspect(dir)?;
        let named = load::read_weights(&model, kind, device)?;
        Self::from_named(model.config, named, kind, device)
    }

    /// Fresh weights as Hugging Face initialises them: matrices N(0, `initializer_range`²), norms 1, biases
    /// 0. The same seed gives the same weights; libtorch's global generator is reseeded.
    ///
    /// # Errors
    /// When the device has no room.
    pub fn random(config: ModelConfig, seed: u64, kind: Kind, device: Device) -> Result<Self, ModelError> {
        tch::manual_seed(seed as i64);
        let _no_grad = tch::no_grad_guard();
        let mut named = Vec::new();
        for (name, shape) in config.tensors() {
            // Drawn in f32 on the CPU, so that the weights do not depend on kind or device.
            let options = (Kind::Float, Device::Cpu);
            let fresh = match shape.len() {
                2 => Tensor::f_randn(&shape, options)?.f_mul_scalar(config.initializer_range)?,
                _ if name.ends_with(".bias") => Tensor::f_zeros(&shape, options)?,
                _ => Tensor::f_ones(&shape, options)?,
            };
            named.push((name, fresh.f_to_kind(kind)?.f_to_device(device)?));
        }
        Self::from_named(config, named, kind, device)
    }

    /// A copy with its own storage, in another kind or on another device.
    ///
    /// # Errors
    /// When the device has no room.
    pub fn cast(&self, kind: Kind, device: Device) -> Result<Self, ModelError> {
        let _no_grad = tch::no_grad_guard();
        let mut named = Vec::with_capacity(self.parameters.len());
        for (name, tensor) in self.parameters.iter() {
            let options = (kind, device);
            let mut copy = Tensor::f_empty(tensor.size(), options)?;
            copy.f_copy_(tensor)?;
            named.push((name.to_owned(), copy));
        }
        Self::from_named(self.config.clone(), named, kind, device)
    }

    /// Assembles the blocks from tensors named and shaped as [`ModelConfig::tensors`] says, in that order.
    fn from_named(
        config: ModelConfig,
        named: Vec<(String, Tensor)>,
        kind: Kind,
        device: Device,
    ) -> Result<Self, ModelError> {
        let parameters = Parameters::new(named);
        let take = |name: &str| {
            parameters.get(name).map(Tensor::shallow_clone).ok_or_else(|| ModelError::Input {
                what: "weights",
                got: format!("{} tensors without `{name}`", parameters.len()),
                needed: format!("`{name}`"),
            })
        };
        let norm = |name: &str| Ok::<_, ModelError>(RmsNorm { weight: take(name)?, eps: config.rms_eps });
        let linear = |name: &str| {
            let bias = format!("{name}.bias");
            let bias = parameters.get(&bias).map(Tensor::shallow_clone);
            Ok::<_, ModelError>(Linear { weight: take(&format!("{name}.weight"))?, bias })
        };
        let mut blocks = Vec::new();
        for layer in 0..config.layers {
            let name = |part: &str| format!("model.layers.{layer}.{part}");
            let head_norm = |part: &str| -> Result<Option<RmsNorm>, ModelError> {
                if config.architecture.qk_norm() { norm(&name(part)).map(Some) } else { Ok(None) }
            };
            blocks.push(Block {
                attention_norm: norm(&name("input_layernorm.weight"))?,
                attention: SelfAttention {
                    query: linear(&name("self_attn.q_proj"))?,
                    key: linear(&name("self_attn.k_proj"))?,
                    value: linear(&name("self_attn.v_proj"))?,
                    output: linear(&name("self_attn.o_proj"))?,
                    query_norm: head_norm("self_attn.q_norm.weight")?,
                    key_norm: head_norm("self_attn.k_norm.weight")?,
                },
                mlp_norm: norm(&name("post_attention_layernorm.weight"))?,
                gate: linear(&name("mlp.gate_proj"))?,
                up: linear(&name("mlp.up_proj"))?,
                down: linear(&name("mlp.down_proj"))?,
            });
        }
        let embedding = take("model.embed_tokens.weight")?;
        let head =
            if config.tie_word_embeddings { embedding.shallow_clone() } else { take("lm_head.weight")? };
        let final_norm = norm("model.norm.weight")?;
        let rope = Rope::new(&config, device);
        Ok(Self { config, embedding, blocks, norm: final_norm, head, rope, kind, device, parameters })
    }

    /// The model's shape.
    #[must_use]
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// The weights, by name.
    #[must_use]
    pub fn parameters(&self) -> &Parameters {
        &self.parameters
    }

    /// The kind of the weights and of the activations.
    #[must_use]
    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// Where the weights are.
    #[must_use]
    pub fn device(&self) -> Device {
        self.device
    }

    /// Runs the blocks: ids and positions `[B, L]` i64 on the model's device → `[B, L, hidden]` after the
    /// final norm. Differentiable in the parameters.
    ///
    /// # Errors
    /// When an argument's shape, kind or device is wrong, an id is not in the vocabulary, or memory is out.
    pub fn hidden(
        &self,
        ids: &Tensor,
        positions: &Tensor,
        attention: Attention<'_>,
    ) -> Result<Tensor, ModelError> {
        self.check_tokens("token ids", ids)?;
        self.check_tokens("positions", positions)?;
        if ids.size() != positions.size() {
            return Err(ModelError::Input {
                what: "positions",
                got: format!("{:?}", positions.size()),
                needed: format!("the shape of the ids, {:?}", ids.size()),
            });
        }
        let rotation = self.rope.rotation(positions, self.kind)?;
        let mut x = Tensor::f_embedding(&self.embedding, ids, -1, false, false)?;
        for (layer, block) in self.blocks.iter().enumerate() {
            let normed = block.attention_norm.apply(&x)?;
            x = x.f_add(&block.attention.apply(&self.config, layer, &normed, &rotation, &attention)?)?;
            x = x.f_add(&block.mlp(&block.mlp_norm.apply(&x)?)?)?;
        }
        self.norm.apply(&x)
    }

    /// The head: `[…, hidden]` → `[…, vocab]`, in f32 whatever the model's kind.
    ///
    /// # Errors
    /// When the last dimension is not `hidden`, the kind is another, or memory is out.
    pub fn logits(&self, hidden: &Tensor) -> Result<Tensor, ModelError> {
        if hidden.size().last() != Some(&self.config.hidden) || hidden.kind() != self.kind {
            return Err(ModelError::Input {
                what: "hidden states",
                got: format!("{:?} {:?}", hidden.size(), hidden.kind()),
                needed: format!("[…, {}] {:?}", self.config.hidden, self.kind),
            });
        }
        Ok(hidden.f_linear(&self.head, None::<&Tensor>)?.f_to_kind(Kind::Float)?)
    }

    /// [`Parameters::hash`].
    ///
    /// # Errors
    /// When a tensor cannot be copied to the host.
    pub fn weights_hash(&self) -> Result<String, ModelError> {
        self.parameters.hash()
    }

    fn check_tokens(&self, what: &'static str, tensor: &Tensor) -> Result<(), ModelError> {
        let size = tensor.size();
        if size.len() != 2
            || size.contains(&0)
            || tensor.kind() != Kind::Int64
            || tensor.device() != self.device
        {
            return Err(ModelError::Input {
                what,
                got: format!("{size:?} {:?} on {:?}", tensor.kind(), tensor.device()),
                needed: format!("[rows, tokens] Int64 on {:?}", self.device),
            });
        }
        Ok(())
    }
}
