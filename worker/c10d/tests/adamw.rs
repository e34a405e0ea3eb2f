//! The fused kernel is AdamW: verl's numbers (torch.optim.AdamW after clip_grad_norm_), and its checks.

use agentfly_c10d::{AdamWHyper, AdamWState, ErrorKind, fused_adamw};
use tch::{Kind, Tensor};

const HYPER: AdamWHyper = AdamWHyper { lr: 0.01, beta1: 0.9, beta2: 0.999, weight_decay: 0.01, eps: 1e-8 };

/// Clipped gradient and weights after the step, four steps in a row from `[0.5, -1, 2, 0.1]`.
const STEPS: [([f64; 4], [f64; 4]); 4] = [
    (
        [0.1, -0.2, 0.3, 0.05],
        [0.489_950_000_999_999_9, -0.989_900_000_5, 1.989_800_000_333_333_4, 0.089_990_001_999_999_61],
    ),
    (
        [0.599_999_880_000_024, -0.799_999_840_000_032, 0.0, 0.0],
        [
            0.481_459_753_475_173_45,
            -0.980_957_245_524_899_4,
            1.982_900_438_107_882_3,
            0.083_280_422_354_118_84,
        ],
    ),
    (
        [-0.5, 0.25, 0.1, -0.1],
        [
            0.480_429_641_480_522_75,
            -0.976_171_516_540_732_9,
            1.975_766_943_579_911_4,
            0.086_672_438_489_152_49,
        ],
    ),
    (
        [0.0; 4],
        [0.479_577_231_706_875, -0.972_234_075_468_367_3, 1.969_888_469_414_426_7, 0.089_449_126_223_963_53],
    ),
];

#[test]
fn four_steps_match_torch_to_1e_12() {
    let params = [Tensor::from_slice(&[0.5f64, -1.0, 2.0, 0.1])];
    let (m, v) = ([params[0].zeros_like()], [params[0].zeros_like()]);
    for (index, (grad, after)) in STEPS.iter().enumerate() {
        let grads = [Tensor::from_slice(grad)];
        let state = AdamWState { params: &params, grads: &grads, exp_avgs: &m, exp_avg_sqs: &v };
        fused_adamw(state, index as u64 + 1, &HYPER, None).unwrap();
        let got = Vec::<f64>::try_from(&params[0]).unwrap();
        for (got, want) in got.iter().zip(after) {
            assert!((got - want).abs() < 1e-12, "step {}: {got} is not {want}", index + 1);
        }
    }
}

#[test]
fn lists_that_do_not_match_are_refused() {
    let (four, three) =
        ([Tensor::zeros([4], tch::kind::FLOAT_CPU)], [Tensor::zeros([3], tch::kind::FLOAT_CPU)]);
    let doubles = [four[0].to_kind(Kind::Double)];
    let state = AdamWState { params: &four, grads: &four, exp_avgs: &four, exp_avg_sqs: &four };
    for (bad, part) in [
        (AdamWState { grads: &three, ..state }, "grads[0]"),
        (AdamWState { exp_avgs: &doubles, ..state }, "exp_avgs[0]"),
        (AdamWState { exp_avg_sqs: &[], ..state }, "0 exp_avg_sqs"),
    ] {
        let error = fused_adamw(bad, 1, &HYPER, None).unwrap_err();
        assert_eq!(error.kind, ErrorKind::InvalidArgument);
        assert!(error.to_string().contains(part), "{part:?} is not in {error}");
    }
    assert!(fused_adamw(state, 0, &HYPER, None).unwrap_err().to_string().contains("count from 1"));
}

#[test]
fn gradients_are_divided_by_their_scale_on_the_way() {
    let start = || [Tensor::from_slice(&[0.5f32, -1.0, 2.0, 0.1])];
    let zeros = || [Tensor::zeros([4], tch::kind::FLOAT_CPU)];
    let step = |grads: [f32; 4], scale: Option<f64>| {
        let (params, grads, m, v) = (start(), [Tensor::from_slice(&grads)], zeros(), zeros());
        let state = AdamWState { params: &params, grads: &grads, exp_avgs: &m, exp_avg_sqs: &v };
        fused_adamw(state, 1, &AdamWHyper { eps: 0.5, ..HYPER }, scale).unwrap();
        Vec::<f32>::try_from(&params[0]).unwrap()
    };
    let (plain, scaled) = (step([0.1, -0.2, 0.3, 0.05], None), step([0.4, -0.8, 1.2, 0.2], Some(4.0)));
    assert!(plain.iter().zip(&scaled).all(|(a, b)| (a - b).abs() < 1e-6), "{plain:?} {scaled:?}");
    assert_ne!(plain, step([0.4, -0.8, 1.2, 0.2], None));
}
