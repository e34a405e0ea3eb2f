//! The learner's pure functions against numbers that verl's own functions gave in f64 (`tests/golden/golden_algos.json`;
//! commits in its `meta`).
#![allow(clippy::unwrap_used, reason = "helpers of tests fail by panicking, too")]

use agentfly_c10d::ops::token_terms;
use agentfly_policy::learner::{
    Aggregation, ClipRange, Denominators, KlEstimator, LrSchedule, OffPolicySums, Schedule, ppo_clip,
};
use serde_json::Value;
use tch::{Kind, Tensor};

const TOLERANCE: f64 = 1e-10;

fn golden() -> Value {
    serde_json::from_str(include_str!("../../../tests/golden/golden_algos.json")).unwrap()
}

/// The numbers of a nested array, in order.
fn numbers(value: &Value) -> Vec<f64> {
    match value {
        Value::Array(items) => items.iter().flat_map(numbers).collect(),
        number => vec![number.as_f64().unwrap()],
    }
}

/// A `[B, T]` array's values at the tokens with loss, row after row.
fn masked(value: &Value, mask: &[f64]) -> Vec<f64> {
    numbers(value).into_iter().zip(mask).filter(|(_, m)| **m == 1.0).map(|(x, _)| x).collect()
}

fn close(got: f64, want: f64, tolerance: f64, what: &str) {
    assert!((got - want).abs() <= tolerance, "{what}: {got} is not {want}");
}

fn all_close(got: &Tensor, want: &[f64], what: &str) {
    let got = Vec::<f64>::try_from(got.flatten(0, -1)).unwrap();
    assert_eq!(got.len(), want.len(), "{what}");
    for (index, (got, want)) in got.iter().zip(want).enumerate() {
        close(*got, *want, TOLERANCE, &format!("{what}, element {index}"));
    }
}

/// Weights of the tokens with loss under a mode.
fn weights(mode: Aggregation, mask: &[f64], width: usize, denominators: Option<Denominators>) -> Tensor {
    let rows: Vec<usize> = mask.chunks(width).map(|row| row.iter().filter(|m| **m == 1.0).count()).collect();
    let denominators = denominators.unwrap_or(Denominators {
        loss_tokens: rows.iter().sum::<usize>() as u64,
        rows: rows.iter().filter(|n| **n > 0).count() as u64,
        scale_factor: width as f64,
    });
    let weights: Vec<f64> = rows
        .iter()
        .flat_map(|&n| std::iter::repeat_n(mode.token_weight(n.max(1), &denominators), n))
        .collect();
    Tensor::from_slice(&weights)
}

#[test]
fn the_policy_loss_has_verls_value_gradient_and_metrics() {
    let golden = golden();
    let inputs = &golden["inputs"];
    let mask = numbers(&inputs["response_mask"]);
    let column = |name: &str| Tensor::from_slice(&masked(&inputs[name], &mask));
    let mut seen = 0;
    for (name, entry) in golden["policy_loss"].as_object().unwrap() {
        let Some(variant) = name.strip_prefix("vanilla[").and_then(|n| n.strip_suffix("]@main")) else {
            continue;
        };
        // Importance weights of a rollout correction: the learner has none.
        if variant.contains("rollout_is") {
            continue;
        }
        seen += 1;
        let mode: Aggregation = variant.split(',').next().unwrap().parse().unwrap();
        let high = if variant.contains("symmetric") { 0.2 } else { 0.28 };
        let wild = variant.contains("wild");
        let log_prob = column(if wild { "log_prob_wild" } else { "log_prob" }).set_requires_grad(true);
        let advantages =
            column(if variant.contains("adv=seq") { "advantages_seq" } else { "advantages_tok" });
        let clip = ClipRange { low: 0.2, high, dual: 3.0 };
        let terms = ppo_clip(&log_prob, &column("old_log_prob"), &advantages, clip);

        let two_ranks = variant.contains("dp2");
        let hundred = Denominators { loss_tokens: 100, rows: 8, scale_factor: 1.0 };
        // verl multiplies by the number of ranks, since it averages gradients over them; here they are summed.
        let ranks = if two_ranks { 2.0 } else { 1.0 };
        let loss =
            (&terms.loss * weights(mode, &mask, 10, two_ranks.then_some(hundred))).sum(Kind::Double) * ranks;
        loss.backward();
        close(loss.double_value(&[]), entry["loss"].as_f64().unwrap(), TOLERANCE, name);
        all_close(&log_prob.grad(), &masked(&entry["grad_log_prob"], &mask), name);
        for (metric, got) in [
            ("actor/pg_clipfrac", &terms.clipped),
            ("actor/pg_clipfrac_lower", &terms.clipped_lower),
            ("actor/ppo_kl", &terms.kl),
        ] {
            let want = entry["metrics"][metric].as_f64().unwrap();
            close(got.mean(Kind::Double).double_value(&[]), want, TOLERANCE, &format!("{name} {metric}"));
        }
    }
    assert_eq!(seen, 11);
}

#[test]
fn every_kl_estimator_has_verls_value_and_gradient() {
    let golden = golden();
    let inputs = &golden["inputs"];
    let reference = Tensor::from_slice(&numbers(&inputs["ref_log_prob"]));
    for name in ["kl", "k1", "abs", "mse", "k2", "low_var_kl", "k3", "k1+", "abs+", "k3+"] {
        let entry = &golden["kl"][name];
        let (value, gradient) = match name.ends_with('+') {
            true => ("intended_value", "intended_grad"),
            false => ("value", "dvalue_dlogprob"),
        };
        let log_prob = Tensor::from_slice(&numbers(&inputs["log_prob"])).set_requires_grad(true);
        let kl = name.parse::<KlEstimator>().unwrap().estimate(&log_prob, &reference);
        kl.sum(Kind::Double).backward();
        all_close(&kl.detach(), &numbers(&entry[value]), name);
        all_close(&log_prob.grad(), &numbers(&entry[gradient]), &format!("gradient of {name}"));
    }
    let demo = &golden["kl"]["k3_clamp_demo"];
    let d = Tensor::from_slice(&numbers(&demo["logp_minus_ref"]));
    for name in ["k2", "k3"] {
        let kl = name.parse::<KlEstimator>().unwrap().estimate(&d, &d.zeros_like());
        all_close(&kl, &numbers(&demo[name]), &format!("{name} far away"));
    }
    assert!("k4".parse::<KlEstimator>().unwrap_err().to_string().contains("\"k4\" is no KL estimator"));
    assert_eq!("k3+".parse::<KlEstimator>().unwrap().to_string(), "low_var_kl+");
}

#[test]
fn every_aggregation_has_verls_value_also_with_an_empty_row() {
    let golden = golden();
    let entries = golden["agg_loss"].as_object().unwrap();
    let masks = [("", &golden["inputs"]["response_mask"]), ("[empty_row]", &entries["mask_with_empty_row"])];
    for name in ["token-mean", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm"] {
        let mode: Aggregation = name.parse().unwrap();
        for (suffix, mask) in masks {
            let mask = numbers(mask);
            let values = Tensor::from_slice(&masked(&entries["loss_mat"], &mask));
            let got = (values * weights(mode, &mask, 10, None)).sum(Kind::Double).double_value(&[]);
            let entry = format!("{name}{suffix}@main");
            close(got, entries[&entry].as_f64().unwrap(), TOLERANCE, &entry);
        }
    }
    let mask = numbers(&golden["inputs"]["response_mask"]);
    let values = Tensor::from_slice(&masked(&entries["loss_mat"], &mask));
    for (entry, mode, loss_tokens, rows, scale_factor) in [
        ("token-mean[dp_size=2,batch_num_tokens=100]@main", Aggregation::TokenMean, 100, 16, 1.0),
        (
            "seq-mean-token-sum[dp_size=2,global_batch_size=16]@main",
            Aggregation::SeqMeanTokenSum,
            100,
            16,
            1.0,
        ),
        (
            "seq-mean-token-mean[dp_size=2,global_batch_size=16]@main",
            Aggregation::SeqMeanTokenMean,
            100,
            16,
            1.0,
        ),
        (
            "seq-mean-token-sum-norm[dp_size=2,global_batch_size=16,loss_scale_factor=20]@main",
            Aggregation::SeqMeanTokenSumNorm,
            100,
            16,
            20.0,
        ),
    ] {
        let global = Denominators { loss_tokens, rows, scale_factor };
        let got =
            (&values * weights(mode, &mask, 10, Some(global))).sum(Kind::Double).double_value(&[]) * 2.0;
        close(got, entries[entry].as_f64().unwrap(), TOLERANCE, entry);
    }
}

#[test]
fn log_probs_and_entropy_are_verls() {
    let golden = golden();
    let helpers = &golden["helpers"];
    let labels: Vec<i64> = numbers(&helpers["labels"]).into_iter().map(|x| x as i64).collect();
    let logits = numbers(&helpers["logits"]);
    let logits = Tensor::from_slice(&logits).view([labels.len() as i64, -1]).to_kind(Kind::Float);
    let targets = Tensor::from_slice(&labels);
    let terms = token_terms(&logits, &targets, 1.0).unwrap();
    // The operators compute in f32.
    for (got, name) in [(&terms.log_prob, "logprobs_from_logits"), (&terms.entropy, "entropy_from_logits")] {
        for (i, want) in numbers(&helpers[name]).iter().enumerate() {
            let got = got.double_value(&[i as i64]);
            assert!((got - want).abs() < 2e-6, "{name}, element {i}: {got} is not {want}");
        }
    }
}

#[test]
fn the_whole_objective_has_verls_value_and_gradient() {
    let golden = golden();
    let (inputs, example) = (&golden["inputs"], &golden["actor_objective_example"]);
    let mask = numbers(&inputs["response_mask"]);
    let column = |value: &Value| Tensor::from_slice(&masked(value, &mask));
    let log_prob = column(&inputs["log_prob"]).set_requires_grad(true);
    let w = weights(Aggregation::TokenMean, &mask, 10, None);
    let clip = ClipRange { low: 0.2, high: 0.28, dual: 3.0 };
    let old = column(&inputs["old_log_prob"]);
    let pg = ppo_clip(&log_prob, &old, &column(&inputs["advantages_tok"]), clip).loss;
    let kl = "mse".parse::<KlEstimator>().unwrap().estimate(&log_prob, &column(&inputs["ref_log_prob"]));
    let total = ((pg + kl * 0.001 - column(&example["entropy"]) * 0.001) * w).sum(Kind::Double);
    total.backward();
    let want = example["total[entropy_coeff=0.001,kl_loss_coef=0.001]"].as_f64().unwrap();
    close(total.double_value(&[]), want, TOLERANCE, "objective");
    all_close(&log_prob.grad(), &masked(&example["grad_log_prob"], &mask), "gradient of the objective");
}

#[test]
fn learning_rates_are_verls() {
    let golden = golden();
    let constant = |warmup_steps| LrSchedule {
        lr: 1.0,
        kind: Schedule::Constant,
        warmup_steps,
        total_steps: 10,
        min_lr_ratio: 0.0,
        num_cycles: 0.5,
    };
    let cosine = |warmup_steps, total_steps, min_lr_ratio| LrSchedule {
        kind: Schedule::Cosine,
        total_steps,
        min_lr_ratio,
        ..constant(warmup_steps)
    };
    for (name, schedule) in [
        ("constant[warmup=4]", constant(4)),
        ("constant[warmup=0]", constant(0)),
        ("cosine[warmup=3,total=12,min_lr_ratio=0.1]", cosine(3, 12, 0.1)),
        ("cosine[warmup=0,total=8,min_lr_ratio=0.0]", cosine(0, 8, 0.0)),
    ] {
        for (step, want) in numbers(&golden["lr"][name]).into_iter().enumerate() {
            close(schedule.rate(step as u64), want, TOLERANCE, &format!("{name} at step {step}"));
        }
    }
}

#[test]
fn off_policy_metrics_are_verls() {
    let golden = golden();
    let inputs = &golden["inputs"];
    let mut sums = OffPolicySums::default();
    let rows = |name: &str| -> Vec<Vec<f32>> {
        let (values, mask) = (numbers(&inputs[name]), numbers(&inputs["response_mask"]));
        let keep = |(row, mask): (&[f64], &[f64])| {
            row.iter().zip(mask).filter(|(_, m)| **m == 1.0).map(|(x, _)| *x as f32).collect()
        };
        values.chunks(10).zip(mask.chunks(10)).map(keep).collect()
    };
    for (trained, rollout) in rows("old_log_prob").iter().zip(rows("rollout_log_prob")) {
        sums.add_row(trained, &rollout);
    }
    sums.add_row(&[], &[]);
    let metrics = sums.metrics();
    for (name, want) in golden["rollout_correction"]["offpolicy_metrics@main"].as_object().unwrap() {
        let got = metrics[format!("rollout_corr/{name}").as_str()];
        close(got, want.as_f64().unwrap(), 2e-6, name); // log-probs are carried in f32
    }
}
