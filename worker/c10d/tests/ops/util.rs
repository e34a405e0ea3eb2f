//! Numbers to compute with, and ways to compare.

use agentfly_c10d::ops::{self, Packed};
use tch::{Device, Kind, Tensor};

/// The kinds the kernels are for.
pub(crate) const KINDS: [Kind; 2] = [Kind::Float, Kind::BFloat16];

/// Uniform numbers in [−1, 1): xorshift, the same in every run.
pub(crate) struct Numbers(u64);

impl Numbers {
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    pub(crate) fn bits(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    pub(crate) fn next(&mut self) -> f32 {
        (self.bits() >> 40) as f32 / (1 << 23) as f32 - 1.0
    }

    pub(crate) fn tensor(&mut self, shape: &[i64], kind: Kind) -> Tensor {
        let values: Vec<f32> = (0..shape.iter().product::<i64>()).map(|_| self.next()).collect();
        Tensor::from_slice(&values).view(shape).to_kind(kind)
    }

    /// 0..n in some order.
    pub(crate) fn shuffled(&mut self, n: i64) -> Vec<i64> {
        let mut order: Vec<i64> = (0..n).collect();
        for i in (1..order.len()).rev() {
            order.swap(i, (self.bits() >> 33) as usize % (i + 1));
        }
        order
    }
}

/// The norm by this weight.
pub(crate) fn norm<'a>(weight: &'a Tensor, grad: Option<&'a Tensor>, eps: f64) -> ops::Norm<'a> {
    ops::Norm { weight, grad, eps }
}

/// SwiGLU alone: before the map that changes nothing.
pub(crate) fn swiglu(x: &Tensor) -> Tensor {
    let width = x.size()[1] / 2;
    let same = Tensor::eye(width, (x.kind(), Device::Cpu));
    ops::Linear::new(&[&same], &[]).unwrap().apply_swiglu(x).unwrap()
}

/// A copy that asks for its gradient.
pub(crate) fn leaf(x: &Tensor, kind: Kind) -> Tensor {
    x.detach().to_kind(kind).copy().set_requires_grad(true)
}

/// Root mean square of a − b, as a share of b's.
pub(crate) fn distance(a: &Tensor, b: &Tensor) -> f64 {
    assert_eq!(a.size(), b.size());
    if b.numel() == 0 {
        return 0.0;
    }
    let (a, b) = (a.detach().to_kind(Kind::Double), b.detach().to_kind(Kind::Double));
    let rms = |x: Tensor| x.square().mean(Kind::Double).sqrt().double_value(&[]);
    rms(&a - &b) / rms(b).max(1e-30)
}

/// Asserts that `ours` is the truth: in f32 to its rounding; in bf16 about as near as libtorch's own bf16 comes.
pub(crate) fn assert_true(what: &str, ours: &Tensor, truth: &Tensor, libtorch: &Tensor) {
    let off = distance(ours, truth);
    let bound = match libtorch.kind() {
        Kind::BFloat16 => 2.0 * distance(libtorch, truth) + 1e-4,
        _ => 1e-6,
    };
    // Not `off > bound`: a NaN must fail.
    assert!(off <= bound, "{what}: {off:.3e} from the truth, at most {bound:.3e} allowed");
    let worst = (ours.detach().to_kind(Kind::Double) - truth.detach()).abs();
    let largest = truth.detach().abs();
    if worst.numel() > 0 {
        let (worst, largest) = (worst.max().double_value(&[]), largest.max().double_value(&[]));
        let share = if libtorch.kind() == Kind::BFloat16 { 3e-2 } else { 1e-5 };
        assert!(
            worst <= share * largest.max(1e-30),
            "{what}: one number is {worst:.3e} off, of {largest:.3e}"
        );
    }
}

fn raw(x: &Tensor) -> Tensor {
    let x = x.detach().contiguous();
    match x.kind() {
        Kind::Float => x.view_dtype(Kind::Int),
        Kind::BFloat16 | Kind::Half => x.view_dtype(Kind::Int16),
        _ => x,
    }
}

/// How many numbers differ in any bit.
pub(crate) fn different_bits(a: &Tensor, b: &Tensor) -> i64 {
    assert_eq!((a.size(), a.kind()), (b.size(), b.kind()));
    raw(a).ne_tensor(&raw(b)).sum(Kind::Int64).int64_value(&[])
}

pub(crate) fn assert_same_bits(what: &str, a: &Tensor, b: &Tensor) {
    let different = different_bits(a, b);
    assert_eq!(different, 0, "{what}: {different} of {} numbers differ in bits", a.numel());
}

/// Numbers given bit by bit: `bits` in the low half for bf16.
pub(crate) fn from_bits(bits: u32, kind: Kind) -> Tensor {
    match kind {
        Kind::BFloat16 => Tensor::from_slice(&[bits as u16 as i16]).view_dtype(kind),
        _ => Tensor::from_slice(&[bits as i32]).view_dtype(kind),
    }
}

pub(crate) fn indices(values: &[i64]) -> Tensor {
    Tensor::from_slice(values)
}

/// `[0, a, a + b, …]` of lengths.
pub(crate) fn starts(lengths: &[i64]) -> Vec<i64> {
    let ends = lengths.iter().scan(0, |end, length| {
        *end += length;
        Some(*end)
    });
    std::iter::once(0).chain(ends).collect()
}

/// Whole sequences of these lengths.
pub(crate) fn whole(lengths: &[i64]) -> Packed {
    Packed::new(&starts(lengths), Device::Cpu).unwrap()
}

pub(crate) fn has_kernels(kind: Kind) -> bool {
    ops::has_kernels(&Tensor::zeros([1], (kind, Device::Cpu)))
}

pub(crate) fn zeros(shape: &[i64], kind: Kind) -> Tensor {
    Tensor::zeros(shape, (kind, Device::Cpu))
}
