//! Advantages against numbers that verl's own functions gave (`tests/golden/golden_algos.json`, 64-bit).
#![allow(clippy::unwrap_used, reason = "helpers of tests fail by panicking")]

use agentfly_coordinator::core::advantage::{Estimator, Scored, advantages};
use serde_json::Value;

fn numbers(value: &Value) -> Vec<f64> {
    value.as_array().unwrap().iter().map(|number| number.as_f64().unwrap()).collect()
}

fn matrix(value: &Value) -> Vec<Vec<f64>> {
    value.as_array().unwrap().iter().map(numbers).collect()
}

fn estimator(key: &str) -> Option<Estimator> {
    let name = key.split(['[', '@']).next()?;
    Estimator::named(name, !key.contains("norm_std=False"))
}

#[test]
fn advantages_equal_verls() {
    let golden: Value = serde_json::from_str(include_str!("../../tests/golden/golden_algos.json")).unwrap();
    let inputs = &golden["inputs"];
    let mask = matrix(&inputs["response_mask"]);
    let scores = numbers(&inputs["outcome_scores"]);
    let mut compared = Vec::new();
    for (key, entry) in golden["advantages"].as_object().unwrap() {
        let Some(estimator) = estimator(key) else { continue };
        let uid = inputs[entry["inputs"]["uid"].as_str().unwrap()].as_array().unwrap();
        let chains: Vec<Scored> = (0..scores.len())
            .map(|row| Scored {
                group: u32::from(uid[row].as_str().unwrap().as_bytes()[0]),
                score: scores[row],
                tokens: mask[row].iter().filter(|&&m| m == 1.0).count(),
            })
            .collect();
        let found = advantages(estimator, &chains).unwrap();
        for (row, expected) in matrix(&entry["advantages"]).iter().enumerate() {
            for (token, expected) in expected.iter().enumerate() {
                let got = found[row] * mask[row][token];
                assert!(
                    (got - expected).abs() < 1e-10,
                    "{key}, row {row}, token {token}: {got} and not {expected}"
                );
            }
        }
        compared.push(key.as_str());
    }
    for name in
        ["grpo[norm_std=True]", "grpo[norm_std=True,singleton]", "grpo[norm_std=False]", "rloo[singleton]"]
    {
        assert!(compared.contains(&format!("{name}@main").as_str()), "{name} is missing in {compared:?}");
    }
    assert_eq!(compared.len(), 26, "{compared:?}");
}
