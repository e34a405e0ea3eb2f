//! Rewards where a wrong reading would pay for nothing, or pay nothing for a right answer.

use super::*;

/// A sandbox that calls everything equal: whatever reaches it is paid for.
fn gullible() -> Arc<dyn PythonRunner> {
    Arc::new(Broken(Ok(RunStatus::Success)))
}

#[tokio::test]
async fn an_empty_answer_is_wrong_and_never_asked_about() {
    for name in ["math_equal_reward", "math_equal_reward_strict"] {
        for (response, answer) in [("\\boxed{}", "72"), ("\\boxed{ }", "x+y"), ("", "72"), ("\\boxed{x}", "")]
        {
            let got = score(name, response, json!({"answer": answer}), true, gullible()).await.unwrap();
            assert_eq!(got.value, 0.0, "{name}: {response:?} against {answer:?}");
        }
    }
}

#[tokio::test]
async fn only_the_tool_rewards_ask_for_a_tool() {
    for (name, paid) in [
        ("math_reward", 1.0),
        ("math_equal_reward_strict", 1.0),
        ("math_reward_tool", 0.0),
        ("math_equal_reward_tool_strict", 0.0),
    ] {
        let got = score(name, "\\boxed{72}", json!({"answer": 72}), false, gullible()).await.unwrap();
        assert_eq!(got.value, paid, "{name}");
    }
}

#[test]
fn a_reward_goes_by_the_name_it_was_asked_for() {
    for name in [
        "math_equal_reward",
        "math_equal_reward_tool",
        "math_equal_reward_strict",
        "math_equal_reward_tool_strict",
        "qa_f1_reward",
        "qa_em_reward",
    ] {
        assert_eq!(reward(name, &gullible()).unwrap().name(), name);
    }
}

#[test]
fn the_normal_form_of_short_formulas() {
    for (text, normal) in [
        ("x=5", "5"),
        ("ab=5", "5"),
        ("abc=5", "abc=5"),
        ("x=y=5", "x=y=5"),
        ("\\sqrt3+1", "\\sqrt{3}+1"),
        ("2\\sqrt{3}", "2\\sqrt{3}"),
        ("\\frac12+1", "\\frac{1}{2}+1"),
        ("\\frac1{72}", "\\frac{1}{72}"),
        ("\\frac1", "\\frac1"),
        ("0/5", "\\frac{0}{5}"),
        ("-3/4", "\\frac{-3}{4}"),
        ("07/5", "07/5"),
        ("a/5", "a/5"),
        ("5/a", "5/a"),
        (".5", "\\frac{1}{2}"),
        ("50\\%", "50"),
    ] {
        assert_eq!(normalise(text).unwrap(), normal, "{text}");
    }
}

#[test]
fn a_tuple_is_not_a_large_number_under_the_strict_rule() {
    use crate::rewards::normalise::{Commas, normalise_with};
    for text in ["1234,567", ",345", "x,345", "12,34", "1,234,56", "1,23x", "1,234.x"] {
        assert_eq!(normalise_with(text, Commas::Thousands).unwrap(), text, "its commas mean something");
    }
    assert_eq!(normalise_with("12,345", Commas::Thousands).unwrap(), "12345");
}

#[tokio::test]
async fn what_is_wrong_is_worth_nothing_to_exact_match_and_f1() {
    for (name, row) in [
        ("qa_em_reward", json!({"golden_answers": ["Rome", "Roma"]})),
        ("qa_f1_reward", json!({"answer": "Rome"})),
    ] {
        let got = score(name, "Paris", row, true, gullible()).await.unwrap();
        assert_eq!((got.value, got.parts["em"], got.parts["f1"]), (0.0, 0.0, 0.0), "{name}");
    }
}

#[test]
fn a_yes_within_a_sentence_is_not_half_a_yes() {
    for (prediction, answer) in
        [("yes", "yes it is"), ("yes it is", "yes"), ("no", "no way"), ("noanswer here", "noanswer")]
    {
        assert_eq!(qa_scores(prediction, answer).f1, 0.0, "{prediction:?} against {answer:?}");
    }
    assert_eq!(qa_scores("Yes.", "yes").f1, 1.0);
}

#[tokio::test]
async fn references_that_are_no_texts_are_told_and_not_compared() {
    for bad in [json!([]), json!(["Rome", 1]), json!({"a": "Rome"})] {
        let told = score("qa_em_reward", "Rome", json!({"golden_answers": bad}), true, gullible())
            .await
            .unwrap_err();
        assert!(told.to_string().contains("not a list of texts"), "{told}");
    }
}

#[tokio::test]
async fn python_is_asked_only_where_rounding_to_twelve_digits_could_matter() {
    let paid = async |response: &str, answer: &str| {
        let response = format!("\\boxed{{{response}}}");
        score("math_reward", &response, json!({"answer": answer}), true, gullible()).await.unwrap().value
    };
    for close in ["0.3333333333333333", "-0.3333333333333333"] {
        let third = if close.starts_with('-') { "-\\frac{1}{3}" } else { "\\frac{1}{3}" };
        assert_eq!(paid(close, third).await, 1.0, "{close} is left to Python");
        assert_eq!(paid(third, close).await, 1.0, "{close} is left to Python");
    }
    for (far, answer) in [
        ("0.33333", "\\frac{1}{3}"),
        ("-0.3333333333333333", "\\frac{1}{3}"),
        ("0", "0.000000000000001"),
        ("72", "73"),
    ] {
        assert_eq!(paid(far, answer).await, 0.0, "{far} against {answer} needs no Python");
        assert_eq!(paid(answer, far).await, 0.0, "{answer} against {far} needs no Python");
    }
    assert_eq!(
        paid("\\frac{999999999999999999}{1}", "999999999999999998.0").await,
        1.0,
        "19 digits are Python's"
    );
    assert_eq!(paid("0.12345678901234567", "0.22345678901234567").await, 0.0, "18 digits are read");
}

#[tokio::test]
async fn the_strict_rule_parses_no_answer_of_more_than_256_characters() {
    let long = |chars: usize| format!("y+{}", "x".repeat(chars - 2));
    for (response, answer, paid) in
        [(256, 256, 1.0), (257, 256, 0.0), (256, 257, 0.0), (300, 4, 0.0), (4, 300, 0.0)]
    {
        let row = json!({"answer": long(answer)});
        let response = format!("\\boxed{{{}+z}}", &long(response)[..response - 2]);
        assert_eq!(
            score("math_equal_reward_strict", &response, row, true, gullible()).await.unwrap().value,
            paid,
            "{response}"
        );
    }
}

#[tokio::test]
async fn a_machine_that_was_busy_once_does_not_cost_a_right_answer() {
    let python: Arc<dyn PythonRunner> = Arc::new(Slow { runs: 1, ..Slow::default() });
    let got = score("math_reward", "\\boxed{x+y}", json!({"answer": "y+x"}), true, python).await.unwrap();
    assert_eq!(got.value, 1.0);
}
