//! The decoder once more, for tests: written out with libtorch's plain operators and autograd, in f64. What the
//! model computes by its own operators, forward and back, is held to it.

use tch::{Device, Kind, Tensor};

use super::{Decoder, ModelConfig};

/// A model's weights as f64 leaves of autograd.
pub(crate) struct PlainModel {
    config: ModelConfig,
    pub(crate) parameters: Vec<(String, Tensor)>,
}

impl PlainModel {
    pub(crate) fn of(decoder: &Decoder) -> Self {
        let leaf = |t: &Tensor| t.detach().to_kind(Kind::Double).copy().set_requires_grad(true);
        let parameters = decoder.parameters().iter().map(|(name, t)| (name.to_owned(), leaf(t))).collect();
        Self { config: decoder.config().clone(), parameters }
    }

    fn find(&self, name: &str) -> Option<&Tensor> {
        self.parameters.iter().find(|(n, _)| n == name).map(|(_, tensor)| tensor)
    }

    fn get(&self, name: &str) -> &Tensor {
        self.find(name).unwrap_or_else(|| panic!("no {name}"))
    }

    fn linear(&self, x: &Tensor, name: &str) -> Tensor {
        x.linear(self.get(&format!("{name}.weight")), self.find(&format!("{name}.bias")))
    }

    fn norm(&self, x: &Tensor, name: &str) -> Tensor {
        let mean = (x * x).mean_dim([-1_i64].as_slice(), true, Kind::Double);
        x * (mean + self.config.rms_eps).rsqrt() * self.get(name)
    }

    /// Heads `[n, heads, dim]` turned by their tokens' angles. Without RoPE scaling.
    fn rotate(&self, x: &Tensor) -> Tensor {
        let half = self.config.head_dim / 2;
        let exponent =
            Tensor::arange(half, (Kind::Double, Device::Cpu)) * (-2.0 / self.config.head_dim as f64);
        let frequency = (exponent * self.config.rope_theta.ln()).exp();
        let position = Tensor::arange(x.size()[0], (Kind::Double, Device::Cpu)).unsqueeze(1);
        let angle = (position * frequency).unsqueeze(1);
        let (a, b) = (x.narrow(2, 0, half), x.narrow(2, half, half));
        Tensor::cat(&[&a * angle.cos() - &b * angle.sin(), &b * angle.cos() + &a * angle.sin()], 2)
    }

    fn attention(&self, x: &Tensor, layer: &str) -> Tensor {
        let config = &self.config;
        let rows = x.size()[0];
        let heads = |part: &str, count: i64| {
            self.linear(x, &format!("{layer}.self_attn.{part}_proj")).view([rows, count, config.head_dim])
        };
        let (mut q, mut k) = (heads("q", config.heads), heads("k", config.kv_heads));
        if config.architecture.qk_norm() {
            q = self.norm(&q, &format!("{layer}.self_attn.q_norm.weight"));
            k = self.norm(&k, &format!("{layer}.self_attn.k_norm.weight"));
        }
        let shared = config.heads / config.kv_heads;
        let by_query = |t: Tensor| t.repeat_interleave_self_int(shared, 1, None).transpose(0, 1);
        let (q, k) = (self.rotate(&q).transpose(0, 1), by_query(self.rotate(&k)));
        let v = by_query(heads("v", config.kv_heads));
        let future = Tensor::ones([rows, rows], (Kind::Bool, Device::Cpu)).triu(1);
        let scores = q.matmul(&k.transpose(1, 2)) / (config.head_dim as f64).sqrt();
        let mixed = scores.masked_fill(&future, f64::NEG_INFINITY).softmax(-1, Kind::Double).matmul(&v);
        let mixed = mixed.transpose(0, 1).reshape([rows, config.heads * config.head_dim]);
        self.linear(&mixed, &format!("{layer}.self_attn.o_proj"))
    }

    /// Log-probs `[n, vocab]` f64 of what follows each token.
    pub(crate) fn log_probs(&self, ids: &[u32], temperature: f64) -> Tensor {
        let ids: Vec<i64> = ids.iter().map(|&id| i64::from(id)).collect();
        let embedding = self.get("model.embed_tokens.weight");
        let mut x = embedding.index_select(0, &Tensor::from_slice(&ids));
        for layer in 0..self.config.layers {
            let layer = format!("model.layers.{layer}");
            x = &x + self.attention(&self.norm(&x, &format!("{layer}.input_layernorm.weight")), &layer);
            let normed = self.norm(&x, &format!("{layer}.post_attention_layernorm.weight"));
            let gated = self.linear(&normed, &format!("{layer}.mlp.gate_proj")).silu()
                * self.linear(&normed, &format!("{layer}.mlp.up_proj"));
            x = &x + self.linear(&gated, &format!("{layer}.mlp.down_proj"));
        }
        let head = self.find("lm_head.weight").unwrap_or(embedding);
        let logits = self.norm(&x, "model.norm.weight").linear(head, None::<&Tensor>);
        (logits / temperature).log_softmax(-1, Kind::Double)
    }
}
