//! Linear maps and norms by the names of their weights, and where their gradients are gathered.
//!
//! What must stay true: they hold the very tensors of [`super::Parameters`]; gradients are summed in f32 outside of
//! autograd, so that bf16 gradients are never summed in bf16.

use agentfly_c10d::ops::{self, Linear};
use tch::Tensor;

use super::error::ModelError;
use super::parameters::Parameters;

/// Finds the f32 sum of a parameter's gradient, shaped as the parameter.
pub(crate) type FindSum<'a> = &'a dyn Fn(&str) -> Result<Tensor, ModelError>;

/// Maps of one input computed as one: `[N, k]` → `[N, Σ nᵢ]`, the outputs side by side.
#[derive(Debug)]
pub(crate) struct Map {
    linear: Linear,
    weights: Vec<String>,
    biases: Vec<String>,
}

impl Map {
    /// Of the layers `names`: each one's `.weight`, and `.bias` where the model has it.
    pub(crate) fn new(parameters: &Parameters, names: &[String]) -> Result<Self, ModelError> {
        let weights: Vec<String> = names.iter().map(|name| format!("{name}.weight")).collect();
        let biases = names.iter().map(|name| format!("{name}.bias"));
        let biases: Vec<String> = biases.filter(|name| parameters.get(name).is_some()).collect();
        Self::of(parameters, weights, biases)
    }

    /// Of these weights, without biases.
    pub(crate) fn of_weight(parameters: &Parameters, name: &str) -> Result<Self, ModelError> {
        Self::of(parameters, vec![name.to_owned()], Vec::new())
    }

    fn of(parameters: &Parameters, weights: Vec<String>, biases: Vec<String>) -> Result<Self, ModelError> {
        let all = |names: &[String]| -> Result<Vec<Tensor>, ModelError> {
            names.iter().map(|name| parameters.require(name)).collect()
        };
        let (of_weights, of_biases) = (all(&weights)?, all(&biases)?);
        let refs = |tensors: &'_ [Tensor]| tensors.iter().map(Tensor::shallow_clone).collect::<Vec<_>>();
        let (weight_list, bias_list) = (refs(&of_weights), refs(&of_biases));
        let linear =
            Linear::new(&weight_list.iter().collect::<Vec<_>>(), &bias_list.iter().collect::<Vec<_>>())?;
        Ok(Self { linear, weights, biases })
    }

    pub(crate) fn apply(&self, x: &Tensor) -> Result<Tensor, ModelError> {
        Ok(self.linear.apply(x)?)
    }

    /// Of what the norm makes of x.
    pub(crate) fn apply_norm(&self, norm: &Norm, x: &Tensor) -> Result<Tensor, ModelError> {
        Ok(self.linear.apply_norm(x, &norm.of())?)
    }

    /// Of SwiGLU of rows `[gate | up]`: `[N, 2 k]` → `[N, Σ nᵢ]`.
    pub(crate) fn apply_swiglu(&self, x: &Tensor) -> Result<Tensor, ModelError> {
        Ok(self.linear.apply_swiglu(x)?)
    }

    /// In f32, as it was summed.
    pub(crate) fn apply_wide(&self, x: &Tensor) -> Result<Tensor, ModelError> {
        Ok(self.linear.apply_wide(x)?)
    }

    /// The gradient of x from that of y; the weight's is gathered.
    pub(crate) fn backward(&self, x: &Tensor, gradient: &Tensor) -> Result<Tensor, ModelError> {
        Ok(self.linear.backward(x, gradient)?)
    }

    /// Gathers gradients into these sums from now on, or no longer.
    pub(crate) fn gather(&self, find: Option<FindSum<'_>>) -> Result<(), ModelError> {
        let Some(find) = find else { return Ok(self.linear.train(&[], &[])?) };
        let all = |names: &[String]| names.iter().map(|name| find(name)).collect::<Result<Vec<_>, _>>();
        let (weights, biases) = (all(&self.weights)?, all(&self.biases)?);
        Ok(self.linear.train(&weights.iter().collect::<Vec<_>>(), &biases.iter().collect::<Vec<_>>())?)
    }
}

/// Scales to unit root mean square, then by a weight.
#[derive(Debug)]
pub(crate) struct Norm {
    weight: Tensor,
    name: String,
    eps: f64,
    sum: Option<Tensor>,
}

impl Norm {
    pub(crate) fn new(parameters: &Parameters, name: String, eps: f64) -> Result<Self, ModelError> {
        Ok(Self { weight: parameters.require(&name)?, name, eps, sum: None })
    }

    pub(crate) fn apply(&self, x: &Tensor) -> Result<Tensor, ModelError> {
        Ok(ops::rms_norm(x, &self.of())?)
    }

    fn of(&self) -> ops::Norm<'_> {
        ops::Norm { weight: &self.weight, grad: self.sum.as_ref(), eps: self.eps }
    }

    /// As [`Map::gather`].
    pub(crate) fn gather(&mut self, find: Option<FindSum<'_>>) -> Result<(), ModelError> {
        self.sum = find.map(|find| find(&self.name)).transpose()?;
        Ok(())
    }
}
