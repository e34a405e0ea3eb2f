use std::time::Instant;
use agentfly_c10d::ops::*;
use tch::{Device, Kind, Tensor};
fn time(what: &str, n: usize, mut f: impl FnMut(usize)) {
    for i in 0..n { f(i); }
    let mut best = f64::MAX;
    for _ in 0..7 { let t = Instant::now(); for i in 0..n { f(i); } best = best.min(t.elapsed().as_secs_f64()); }
    println!("{what}: {:.2} ms", best * 1e3);
}
fn main() {
    let th: i32 = std::env::args().nth(1).unwrap().parse().unwrap();
    let m: i64 = std::env::args().nth(2).unwrap().parse().unwrap();
    tch::set_num_threads(th);
    let _g = tch::no_grad_guard();
    let o = (Kind::BFloat16, Device::Cpu);
    let r = |s: &[i64]| Tensor::randn(s, (Kind::Float, Device::Cpu)).to_kind(Kind::BFloat16);
    for (name, k, n) in [("qkv", 576i64, 960i64), ("o", 576, 576), ("gate_up", 576, 3072), ("down", 1536, 576)] {
        let w: Vec<Tensor> = (0..30).map(|_| r(&[n, k])).collect();
        let l: Vec<Linear> = w.iter().map(|w| Linear::new(&[w], &[]).unwrap()).collect();
        let x = r(&[m, k]);
        time(&format!("{name} x30 ({:.0} MB, {:.2} GFLOP)", 30.0 * (k * n * 2) as f64 / 1e6, 60.0 * (m * k * n) as f64 / 1e9), 30, |i| { let _ = l[i].apply(&x).unwrap(); });
        time(&format!("  {name} same weight x30"), 30, |_| { let _ = l[0].apply(&x).unwrap(); });
    }
    let e = r(&[49152, 576]);
    let l = Linear::new(&[&e], &[]).unwrap();
    let x = r(&[m, 576]);
    time("head wide", 1, |_| { let _ = l.apply_wide(&x).unwrap(); });
    let z = l.apply_wide(&x).unwrap();
    let d: Vec<Draw> = (0..m).map(|i| Draw { temperature: 1.0, top_p: 1.0, top_k: 49152, uniform: (i as f64 + 0.5) / m as f64 }).collect();
    time("sample", 1, |_| { let _ = sample(&z, &d).unwrap(); });
    let h = Heads { queries: 9, keys: 3, dim: 64 };
    let qkv = r(&[m, 960]);
    let n = page_numbers(&qkv, 64).unwrap();
    let pages = Tensor::zeros([m * 4, 30, 3 * n], o);
    let step = PagedStep { starts: Tensor::arange(m + 1, (Kind::Int64, Device::Cpu)), lengths: Tensor::full([m], 200, (Kind::Int64, Device::Cpu)), table: Tensor::arange(m * 4, (Kind::Int64, Device::Cpu)).view([m, 4]) };
    time("attention x30, 200 cached", 30, |i| { let _ = paged_attention(&qkv, &pages, i as i64, &step, h).unwrap(); });
    let t2 = Tensor::arange(m * 4, (Kind::Int64, Device::Cpu)).view([m, 4]);
    let _ = t2.narrow(1, 0, 3).copy_(&Tensor::arange(3, (Kind::Int64, Device::Cpu)).view([1, 3]).expand([m, 3], false));
    let t2 = t2 .shallow_clone();
    let step2 = PagedStep { starts: Tensor::arange(m + 1, (Kind::Int64, Device::Cpu)), lengths: Tensor::full([m], 193, (Kind::Int64, Device::Cpu)), table: t2 };
    time("attention x30, shared pages", 30, |i| { let _ = paged_attention(&qkv, &pages, i as i64, &step2, h).unwrap(); });
    time("attention x30, shared pages, one layer", 30, |_| { let _ = paged_attention(&qkv, &pages, 0, &step2, h).unwrap(); });
    time("check x30", 30, |_| step.check(m, m * 4).unwrap());
    let w = r(&[576]);
    time("norm x61", 61, |_| { let _ = rms_norm(&x, &w, None, 1e-5).unwrap(); });
    let c = Tensor::randn([m, 32], (Kind::Float, Device::Cpu));
    time("rope x30", 30, |_| { let _ = rope(&qkv, &c, &c, 12).unwrap(); });
    let gu = r(&[m, 3072]);
    time("swiglu x30", 30, |_| { let _ = swiglu(&gu).unwrap(); });
    time("add x60", 60, |_| { let _ = x.f_add(&x).unwrap(); });
}
