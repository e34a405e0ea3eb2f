//! The machine's limit: the fastest product of two matrices that libtorch reaches with a rank's set-up.

use std::time::{Duration, Instant};

use serde::Deserialize;
use serde_json::{Map, json};
use tch::{Device, Kind, Tensor};

use crate::DtypeArg;
use crate::work;

/// `[m, k] × [k, n]`: what a small model's layers and head do, and two square ones.
const SHAPES: [(i64, i64, i64); 6] = [
    (1024, 576, 1536),
    (1024, 1536, 576),
    (2048, 576, 1536),
    (1024, 576, 49152),
    (2048, 2048, 2048),
    (4096, 4096, 4096),
];

#[derive(Debug, Deserialize)]
struct Request {
    /// For each shape.
    seconds: f64,
}

/// Products that a GPU is given at a time: it is waited for once.
const ON_A_GPU: u32 = 16;

/// The best of as many products as fit into `seconds`, in GFLOPS.
fn best(kind: Kind, device: Device, (m, k, n): (i64, i64, i64), seconds: f64) -> anyhow::Result<f64> {
    let _no_grad = tch::no_grad_guard();
    let fresh = |rows, columns| -> anyhow::Result<Tensor> {
        Ok(Tensor::f_randn([rows, columns], (Kind::Float, device))?.f_to_kind(kind)?)
    };
    let at_once = if device.is_cuda() { ON_A_GPU } else { 1 };
    let (x, weight) = (fresh(m, k)?, fresh(n, k)?);
    let (began, mut fastest) = (Instant::now(), Duration::MAX);
    while began.elapsed().as_secs_f64() < seconds || fastest == Duration::MAX {
        let started = Instant::now();
        let mut product = x.f_linear(&weight, None::<&Tensor>)?;
        for _ in 1..at_once {
            product = x.f_linear(&weight, None::<&Tensor>)?;
        }
        // Reading a number waits for the GPU, and for nothing on a CPU.
        let _number = product.f_double_value(&[0, 0])?;
        fastest = fastest.min(started.elapsed() / at_once);
    }
    Ok(2.0 * (m * k * n) as f64 / fastest.as_secs_f64() / 1e9)
}

/// Answers requests until they end.
pub(crate) fn serve(dtype: DtypeArg, device: Device) -> anyhow::Result<()> {
    let kind = match dtype {
        DtypeArg::F32 => Kind::Float,
        DtypeArg::Bf16 => Kind::BFloat16,
    };
    work::serve(|request: Request| {
        let started = Instant::now();
        let (mut shapes, mut peak) = (Map::new(), 0.0_f64);
        for shape in SHAPES {
            let gflops = best(kind, device, shape, request.seconds)?;
            peak = peak.max(gflops);
            let (m, k, n) = shape;
            shapes.insert(format!("{m}x{k}x{n}"), json!(gflops));
        }
        Ok(json!({"seconds": started.elapsed().as_secs_f64(), "gflops": peak, "shapes": shapes}))
    })
}
