//! Linear maps of one input computed as one, over weights packed for the CPU's matrix unit.

use std::ffi::c_void;

use tch::{Device, Kind, Tensor};

use super::pointwise::Norm;
use super::{expect, expect_rows, ffi, is, is_floating, one, shown, size};
use crate::Result;
use crate::error::check;
use crate::group::pointer;

/// y = x · [W₁; W₂; …]ᵀ + [b₁; b₂; …]. Holds the weights by reference and keeps them packed; a change of a weight
/// in place, an optimizer's, packs it anew at the next use.
#[derive(Debug)]
pub struct Linear {
    raw: *mut ffi::RawLinear,
    shapes: Vec<Vec<i64>>,
    inputs: i64,
    outputs: i64,
    kind: Kind,
    device: Device,
    biased: bool,
}

// SAFETY: the C++ object holds reference-counted tensors and is used through `&self` by one thread at a time: the
// type is not Sync.
unsafe impl Send for Linear {}

impl Linear {
    /// Of weights `[nᵢ, k]`, each with a bias `[nᵢ]` or none with one; all of one kind and device.
    ///
    /// # Errors
    /// [`crate::ErrorKind::InvalidArgument`] when the shapes do not fit.
    pub fn new(weights: &[&Tensor], biases: &[&Tensor]) -> Result<Self> {
        let operation = "making a linear map";
        let first = weights.first();
        expect(operation, first.is_some(), || "of no weights".to_owned())?;
        let mut outputs = 0;
        let (mut inputs, mut kind, mut device) = (0, Kind::Float, Device::Cpu);
        for (i, weight) in weights.iter().enumerate() {
            let &[rows, columns] = size(weight).as_slice() else {
                return Err(crate::Error::invalid(
                    operation,
                    format!("weight {i} is {}, no matrix", shown(weight)),
                ));
            };
            if i == 0 {
                (inputs, kind, device) = (columns, weight.kind(), weight.device());
            }
            let alike = columns == inputs && is(weight, kind, device) && weight.is_contiguous();
            expect(operation, alike && inputs > 0 && is_floating(weight), || {
                format!("weight {i} is {}, not dense [n, {inputs}] {kind:?} on {device:?}", shown(weight))
            })?;
            outputs += rows;
        }
        expect(operation, biases.is_empty() || biases.len() == weights.len(), || {
            format!("{} weights but {} biases", weights.len(), biases.len())
        })?;
        for (bias, weight) in biases.iter().zip(weights) {
            let fits = is(bias, kind, device) && bias.size() == [weight.size()[0]];
            expect(operation, fits, || format!("bias {} beside weight {}", shown(bias), shown(weight)))?;
        }
        let weight_list: Vec<*mut c_void> = weights.iter().map(|w| pointer(w)).collect();
        let bias_list: Vec<*mut c_void> = biases.iter().map(|b| pointer(b)).collect();
        let bias_pointer = if biases.is_empty() { std::ptr::null() } else { bias_list.as_ptr() };
        let mut raw = std::ptr::null_mut();
        // SAFETY: lists of `weights.len()` live tensors, or null; an out-pointer to a live local.
        let code =
            unsafe { ffi::af_linear_new(weight_list.as_ptr(), bias_pointer, weights.len(), &raw mut raw) };
        check(code, || operation.to_owned())?;
        let shapes = weights.iter().map(|w| w.size()).collect();
        Ok(Self { raw, shapes, inputs, outputs, kind, device, biased: !biases.is_empty() })
    }

    /// Adds from now on the gradients of each weight (and bias) to these sums, f32 and shaped as they are; empty
    /// lists end that. They are added where x asks for a gradient: the way back goes through x.
    ///
    /// # Errors
    /// [`crate::ErrorKind::InvalidArgument`] when a sum does not fit its weight.
    pub fn train(&self, grads: &[&Tensor], bias_grads: &[&Tensor]) -> Result<()> {
        let operation = "giving a linear map its gradients";
        let fits = |sums: &[&Tensor], biases: bool| {
            sums.is_empty()
                || (sums.len() == self.shapes.len()
                    && sums.iter().zip(&self.shapes).all(|(sum, shape)| {
                        let shape = if biases { &shape[..1] } else { shape };
                        is(sum, Kind::Float, self.device) && sum.size() == shape && sum.is_contiguous()
                    }))
        };
        expect(operation, fits(grads, false) && fits(bias_grads, true), || {
            format!("sums must be dense f32, one for each weight of {:?}", self.shapes)
        })?;
        let biased = bias_grads.is_empty() || self.biased;
        expect(operation, biased, || "it has no biases".to_owned())?;
        let list = |sums: &[&Tensor]| sums.iter().map(|s| pointer(s)).collect::<Vec<*mut c_void>>();
        let (grads, bias_grads) = (list(grads), list(bias_grads));
        let or_null = |l: &Vec<*mut c_void>| if l.is_empty() { std::ptr::null() } else { l.as_ptr() };
        // SAFETY: the map is live; lists are null or as long as its weights.
        let code = unsafe { ffi::af_linear_train(self.raw, or_null(&grads), or_null(&bias_grads)) };
        check(code, || operation.to_owned())
    }

    /// `[n, k]` → `[n, Σ nᵢ]` in x's kind.
    ///
    /// # Errors
    /// When the shape or kind does not fit, or memory is out.
    pub fn apply(&self, x: &Tensor) -> Result<Tensor> {
        self.call(x, false)
    }

    /// Of x after the norm: [`Self::apply`] of [`rms_norm`](super::rms_norm). What the norm gives is not kept for the
    /// way back but computed again.
    ///
    /// # Errors
    /// As [`Self::apply`] and [`rms_norm`](super::rms_norm).
    pub fn apply_norm(&self, x: &Tensor, norm: &Norm<'_>) -> Result<Tensor> {
        self.fits("a linear map", x)?;
        norm.check(x)?;
        let grad = norm.grad.map_or(std::ptr::null_mut(), pointer);
        // SAFETY: the map is live; x, and the norm's tensors with it, have its inputs' width and kind.
        one(
            || format!("a linear map of {}, normed, to {}", shown(x), self.outputs),
            |out| unsafe {
                ffi::af_linear_apply_norm(self.raw, pointer(x), pointer(norm.weight), grad, norm.eps, out)
            },
        )
    }

    /// Of silu(gate) · up of rows `[gate | up]` (SwiGLU, Shazeer 2020): `[n, 2·k]` → `[n, Σ nᵢ]`. The product is not
    /// kept for the way back but computed again.
    ///
    /// # Errors
    /// As [`Self::apply`].
    pub fn apply_swiglu(&self, x: &Tensor) -> Result<Tensor> {
        self.fits_times("a linear map after SwiGLU", x, 2)?;
        // SAFETY: the map is live and x is rows of twice its inputs' width, of their kind.
        one(
            || format!("a linear map of SwiGLU of {} to {}", shown(x), self.outputs),
            |out| unsafe { ffi::af_linear_apply_swiglu(self.raw, pointer(x), out) },
        )
    }

    /// The same in f32, as it was summed. For the head: logits that were never rounded. (On a CPU without this
    /// project's kernel for the kind, libtorch rounds them to the kind first.)
    ///
    /// # Errors
    /// As [`Self::apply`].
    pub fn apply_wide(&self, x: &Tensor) -> Result<Tensor> {
        self.call(x, true)
    }

    /// For a single weight: the gradient of x from that of y, both in the weight's kind; adds the weight's own.
    ///
    /// # Errors
    /// As [`Self::apply`].
    pub fn backward(&self, x: &Tensor, gradient: &Tensor) -> Result<Tensor> {
        let operation = "a linear map's backward";
        self.fits(operation, x)?;
        let fits = is(gradient, self.kind, self.device)
            && gradient.size() == [x.size()[0], self.outputs]
            && gradient.is_contiguous()
            && x.is_contiguous()
            && self.shapes.len() == 1;
        expect(operation, fits, || format!("gradient {} for inputs {}", shown(gradient), shown(x)))?;
        // SAFETY: live tensors whose shapes and kinds fit the map.
        one(
            || operation.to_owned(),
            |out| unsafe { ffi::af_linear_backward(self.raw, pointer(x), pointer(gradient), out) },
        )
    }

    fn call(&self, x: &Tensor, wide: bool) -> Result<Tensor> {
        self.fits("a linear map", x)?;
        // SAFETY: the map is live and x is rows of its inputs' width and kind.
        one(
            || format!("a linear map of {} to {}", shown(x), self.outputs),
            |out| unsafe { ffi::af_linear_apply(self.raw, pointer(x), i32::from(wide), out) },
        )
    }

    fn fits(&self, operation: &'static str, x: &Tensor) -> Result<()> {
        self.fits_times(operation, x, 1)
    }

    /// Whether x is rows of so many times the map's inputs.
    fn fits_times(&self, operation: &'static str, x: &Tensor, times: i64) -> Result<()> {
        let (_, width) = expect_rows(operation, x)?;
        let needed = self.inputs.checked_mul(times);
        expect(operation, needed == Some(width) && is(x, self.kind, self.device), || {
            let inputs = self.inputs;
            format!("needs rows of {times} × {inputs} {:?} on {:?}, got {}", self.kind, self.device, shown(x))
        })
    }
}

impl Drop for Linear {
    fn drop(&mut self) {
        // SAFETY: `raw` came from the shim and is released here only.
        unsafe { ffi::af_linear_drop(self.raw) }
    }
}
