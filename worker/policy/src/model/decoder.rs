//! The decoder: embedding, pre-norm blocks of attention and SwiGLU, final norm, head.
//!
//! What must stay true: blocks hold the very tensors of [`Parameters`], so an optimizer's in-place update is
//! seen by the next forward pass.

use std::path::Path;

use agentfly_c10d::ops::Packed;
use agentfly_common::model_dir::{ModelConfig, ModelDir};
use tch::{Device, Kind, Tensor};

use super::attention::{Attention, SelfAttention};
use super::error::ModelError;
use super::invariance;
use super::layers::{FindSum, Map, Norm};
use super::load;
use super::parameters::Parameters;
use super::rope::{Rope, Rotation};

/// The embedding's name, and a tied head's.
pub(crate) const EMBEDDING: &str = "model.embed_tokens.weight";

/// A model on one device.
#[derive(Debug)]
pub struct Decoder {
    config: ModelConfig,
    parameters: Parameters,
    embedding: Tensor,
    blocks: Vec<Block>,
    norm: Norm,
    head: Map,
    rope: Rope,
    kind: Kind,
    device: Device,
}

#[derive(Debug)]
struct Block {
    attention: SelfAttention,
    mlp: Mlp,
}

/// SwiGLU after its norm.
#[derive(Debug)]
struct Mlp {
    norm: Norm,
    gate_up: Map,
    down: Map,
}

impl Mlp {
    /// `[N, hidden]` → `[N, hidden]`.
    fn apply(&self, x: &Tensor) -> Result<Tensor, ModelError> {
        let gate_up = self.gate_up.apply_norm(&self.norm, x)?;
        self.down.apply_swiglu(&gate_up)
    }

    fn gather(&mut self, find: Option<FindSum<'_>>) -> Result<(), ModelError> {
        self.norm.gather(find)?;
        self.gate_up.gather(find)?;
        self.down.gather(find)
    }
}

impl Block {
    fn apply(
        &self,
        config: &ModelConfig,
        layer: usize,
        x: &Tensor,
        rotation: &Rotation,
        reach: Attention<'_>,
    ) -> Result<Tensor, ModelError> {
        let x = x.f_add(&self.attention.apply(config, layer, x, rotation, reach)?)?;
        Ok(x.f_add(&self.mlp.apply(&x)?)?)
    }

    fn gather(&mut self, find: Option<FindSum<'_>>) -> Result<(), ModelError> {
        self.attention.gather(find)?;
        self.mlp.gather(find)
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
        let parameters = Parameters::new(named)?;
        let norm = |name: String| Norm::new(&parameters, name, config.rms_eps);
        let mut blocks = Vec::new();
        for layer in 0..config.layers {
            let name = |part: &str| format!("model.layers.{layer}.{part}");
            let map = |parts: &[&str]| {
                let names: Vec<String> = parts.iter().map(|part| name(part)).collect();
                Map::new(&parameters, &names)
            };
            let head_norms = match config.architecture.qk_norm() {
                true => {
                    Some((norm(name("self_attn.q_norm.weight"))?, norm(name("self_attn.k_norm.weight"))?))
                }
                false => None,
            };
            blocks.push(Block {
                attention: SelfAttention {
                    norm: norm(name("input_layernorm.weight"))?,
                    qkv: map(&["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"])?,
                    output: map(&["self_attn.o_proj"])?,
                    head_norms,
                },
                mlp: Mlp {
                    norm: norm(name("post_attention_layernorm.weight"))?,
                    gate_up: map(&["mlp.gate_proj", "mlp.up_proj"])?,
                    down: map(&["mlp.down_proj"])?,
                },
            });
        }
        let embedding = parameters.require(EMBEDDING)?;
        let head = Map::of_weight(
            &parameters,
            if config.tie_word_embeddings { EMBEDDING } else { "lm_head.weight" },
        )?;
        let final_norm = norm("model.norm.weight".to_owned())?;
        let rope = Rope::new(&config, device)?;
        let decoder =
            Self { config, embedding, blocks, norm: final_norm, head, rope, kind, device, parameters };
        decoder.pack()?;
        Ok(decoder)
    }

    /// Has every map pack its weights now, one beside the other, by computing one token. Packed at their first use
    /// they would come to lie in the holes between a batch's activations, and the next layer's activations into new
    /// memory: 200 MiB more for good with micro-batches of 4096 tokens of SmolLM2-135M (measured before layers kept less). A GPU packs nothing.
    fn pack(&self) -> Result<(), ModelError> {
        if self.device.is_cuda() {
            return Ok(());
        }
        let _no_grad = tch::no_grad_guard();
        let first = Tensor::f_zeros([1], (Kind::Int64, self.device))?;
        let hidden = self.hidden(&first, &first, Attention::Packed(&Packed::new(&[0, 1], self.device)?))?;
        self.logits(&hidden).map(drop)
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

    /// Whether what it computes for a token is the same to the bit whatever rows are beside it.
    #[must_use]
    pub fn is_batch_invariant(&self) -> bool {
        invariance::of_model(&self.config, self.kind, self.device)
    }

    /// Where the weights are.
    #[must_use]
    pub fn device(&self) -> Device {
        self.device
    }

    /// Runs the model up to its head: ids and positions `[N]` i64 on the model's device → `[N, hidden]` after the
    /// final norm.
    ///
    /// # Errors
    /// When an argument's shape, kind or device is wrong, an id is not in the vocabulary, or memory is out.
    pub fn hidden(
        &self,
        ids: &Tensor,
        positions: &Tensor,
        attention: Attention<'_>,
    ) -> Result<Tensor, ModelError> {
        let rotation = self.rotation(ids, positions)?;
        let mut x = self.embed(ids)?;
        for layer in 0..self.blocks.len() {
            x = self.block(layer, &x, &rotation, attention)?;
        }
        self.norm.apply(&x)
    }

    /// The angles of `positions`, which must be those of `ids`.
    pub(crate) fn rotation(&self, ids: &Tensor, positions: &Tensor) -> Result<Rotation, ModelError> {
        self.check_tokens("token ids", ids)?;
        self.check_tokens("positions", positions)?;
        if ids.size() != positions.size() {
            return Err(ModelError::Input {
                what: "positions",
                got: format!("{:?}", positions.size()),
                needed: format!("the shape of the ids, {:?}", ids.size()),
            });
        }
        self.rope.rotation(positions, self.kind)
    }

    /// Embeddings `[N, hidden]` of ids `[N]`. Without autograd: see [`Self::gather_gradients`].
    pub(crate) fn embed(&self, ids: &Tensor) -> Result<Tensor, ModelError> {
        let _no_grad = tch::no_grad_guard();
        Ok(Tensor::f_embedding(&self.embedding, ids, -1, false, false)?)
    }

    /// Blocks there are.
    pub(crate) fn layers(&self) -> usize {
        self.blocks.len()
    }

    /// Block `layer` on rows `[N, hidden]`.
    pub(crate) fn block(
        &self,
        layer: usize,
        x: &Tensor,
        rotation: &Rotation,
        attention: Attention<'_>,
    ) -> Result<Tensor, ModelError> {
        self.blocks[layer].apply(&self.config, layer, x, rotation, attention)
    }

    /// The norm before the head.
    pub(crate) fn final_norm(&self, x: &Tensor) -> Result<Tensor, ModelError> {
        self.norm.apply(x)
    }

    /// The head: `[N, hidden]` → `[N, vocab]`, in f32 as it was summed, whatever the model's kind. No autograd.
    ///
    /// # Errors
    /// When the last dimension is not `hidden`, the kind is another, or memory is out.
    pub fn logits(&self, hidden: &Tensor) -> Result<Tensor, ModelError> {
        let _no_grad = tch::no_grad_guard();
        let size = hidden.size();
        if size.len() != 2 || size[1] != self.config.hidden || hidden.kind() != self.kind {
            return Err(ModelError::Input {
                what: "hidden states",
                got: format!("{size:?} {:?}", hidden.kind()),
                needed: format!("[N, {}] {:?}", self.config.hidden, self.kind),
            });
        }
        self.head.apply_wide(hidden)
    }

    /// The way back through the head: the gradient of hidden states `[N, hidden]` from that of their logits, both in
    /// the model's kind; the head's own is gathered.
    pub(crate) fn logits_backward(&self, hidden: &Tensor, gradient: &Tensor) -> Result<Tensor, ModelError> {
        self.head.backward(hidden, gradient)
    }

    /// From now on gradients of parameters are added to the f32 sums that `find` gives by name; `None` ends that.
    /// Only rows go through autograd: give it embeddings that ask for a gradient, and add theirs to the sum of
    /// [`EMBEDDING`].
    pub(crate) fn gather_gradients(&mut self, find: Option<FindSum<'_>>) -> Result<(), ModelError> {
        for block in &mut self.blocks {
            block.gather(find)?;
        }
        self.norm.gather(find)?;
        self.head.gather(find)
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
        if size.len() != 1
            || size.contains(&0)
            || tensor.kind() != Kind::Int64
            || tensor.device() != self.device
        {
            return Err(ModelError::Input {
                what,
                got: format!("{size:?} {:?} on {:?}", tensor.kind(), tensor.device()),
                needed: format!("[tokens] Int64 on {:?}", self.device),
            });
        }
        Ok(())
    }
}
