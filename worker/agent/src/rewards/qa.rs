//! Question-answering rewards: token F1 and exact match, as SQuAD and HotpotQA define them.
//!
//! Pure; the registry names them `qa_f1_reward` and `qa_em_reward`.

use std::collections::HashMap;

use agentfly_common::trajectory::Reward;
use async_trait::async_trait;
use serde_json::Value;

use super::{RewardFault, RewardFunction, RewardInput, text_field};

/// Which number is the reward.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum QaMetric {
    /// `qa_f1_reward`: token F1 with the row's `answer`.
    F1,
    /// `qa_em_reward`: exact match of the `<answer>` content (or the whole reply) with any of the row's
    /// `golden_answers`.
    ExactMatch,
}

/// How close a prediction is to a reference; each in [0, 1].
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct QaScores {
    /// Harmonic mean of precision and recall.
    pub f1: f64,
    /// Shared tokens over predicted tokens.
    pub precision: f64,
    /// Shared tokens over reference tokens.
    pub recall: f64,
    /// 1 when the normalised texts are equal.
    pub em: f64,
}

/// Lower case, without ASCII punctuation and the articles, single spaces.
pub(super) fn normalise_answer(text: &str) -> String {
    let bare: String = text.to_lowercase().chars().filter(|c| !c.is_ascii_punctuation()).collect();
    let words = bare.split_whitespace().filter(|w| !matches!(*w, "a" | "an" | "the"));
    words.collect::<Vec<_>>().join(" ")
}

/// Token overlap and exact match of `prediction` with `answer`.
#[must_use]
pub fn qa_scores(prediction: &str, answer: &str) -> QaScores {
    let (prediction, answer) = (normalise_answer(prediction), normalise_answer(answer));
    let mut scores = QaScores { em: f64::from(u8::from(prediction == answer)), ..QaScores::default() };
    let closed = |text: &str| matches!(text, "yes" | "no" | "noanswer");
    if prediction != answer && (closed(&prediction) || closed(&answer)) {
        return scores;
    }
    let mut left: HashMap<&str, usize> = HashMap::new();
    for word in answer.split_whitespace() {
        *left.entry(word).or_default() += 1;
    }
    let mut shared = 0_usize;
    for word in prediction.split_whitespace() {
        if let Some(count) = left.get_mut(word).filter(|count| **count > 0) {
            *count -= 1;
            shared += 1;
        }
    }
    if shared == 0 {
        return scores;
    }
    scores.precision = shared as f64 / prediction.split_whitespace().count() as f64;
    scores.recall = shared as f64 / answer.split_whitespace().count() as f64;
    scores.f1 = 2.0 * scores.precision * scores.recall / (scores.precision + scores.recall);
    scores
}

/// The two rewards.
#[derive(Debug, Clone, Copy)]
pub struct QaReward {
    metric: QaMetric,
}

impl QaReward {
    /// The reward of this metric.
    #[must_use]
    pub fn new(metric: QaMetric) -> Self {
        Self { metric }
    }

    fn references(&self, input: &RewardInput<'_>) -> Result<Vec<String>, RewardFault> {
        if self.metric == QaMetric::F1 {
            return Ok(vec![text_field(self.name(), input, "answer")?]);
        }
        match input.row.get("golden_answers") {
            Some(Value::Array(all)) if !all.is_empty() && all.iter().all(Value::is_string) => {
                Ok(all.iter().filter_map(Value::as_str).map(str::to_owned).collect())
            }
            Some(other) if other.is_array() || other.is_object() => Err(RewardFault::BadField {
                reward: self.name(),
                row_id: input.row_id.to_owned(),
                field: "golden_answers",
                value: other.to_string().chars().take(100).collect(),
                wanted: "a list of texts",
            }),
            _ => Ok(vec![text_field(self.name(), input, "golden_answers")?]),
        }
    }
}

/// The text between the last `<answer>` and the `</answer>` after it, or the whole text.
fn answer_tag(text: &str) -> &str {
    let inside = text.rsplit_once("<answer>").and_then(|(_, rest)| rest.split_once("</answer>"));
    inside.map_or(text, |(content, _)| content).trim()
}

#[async_trait]
impl RewardFunction for QaReward {
    fn name(&self) -> &'static str {
        match self.metric {
            QaMetric::F1 => "qa_f1_reward",
            QaMetric::ExactMatch => "qa_em_reward",
        }
    }

    async fn score(&self, input: RewardInput<'_>) -> Result<Reward, RewardFault> {
        let references = self.references(&input)?;
        let prediction = match self.metric {
            QaMetric::F1 => input.final_response,
            QaMetric::ExactMatch => answer_tag(input.final_response),
        };
        let all: Vec<QaScores> = references.iter().map(|r| qa_scores(prediction, r)).collect();
        let best = |of: fn(&QaScores) -> f64| all.iter().map(of).fold(0.0, f64::max);
        let (f1, em) = (best(|s| s.f1), best(|s| s.em));
        let mut parts = vec![("f1".to_owned(), f1), ("em".to_owned(), em)];
        let value = match self.metric {
            QaMetric::F1 => {
                parts.push(("precision".to_owned(), best(|s| s.precision)));
                parts.push(("recall".to_owned(), best(|s| s.recall)));
                f1
            }
            QaMetric::ExactMatch => em,
        };
        Ok(Reward { value, parts: parts.into_iter().collect() })
    }
}
