//! The learning rate as a function of the training step (verl's `lr_scheduler_type` with warm-up, which is
//! Hugging Face's constant and cosine). Pure.

use std::f64::consts::TAU;

use serde::{Deserialize, Serialize};

/// The curve after warm-up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Schedule {
    /// Flat.
    Constant,
    /// Half a cosine (with `num_cycles` ½) down to `min_lr_ratio`.
    Cosine,
}

/// A schedule with its numbers; steps count training steps, not optimizer updates.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LrSchedule {
    /// The rate that the curve multiplies.
    pub lr: f64,
    /// The curve.
    pub kind: Schedule,
    /// Steps of linear warm-up from 0: with any warm-up, step 0 has rate 0.
    pub warmup_steps: u64,
    /// Where the cosine ends.
    pub total_steps: u64,
    /// The cosine's floor, as a part of `lr`.
    pub min_lr_ratio: f64,
    /// Full waves between warm-up and end.
    pub num_cycles: f64,
}

impl LrSchedule {
    /// The rate of training step `step`, 0-based.
    #[must_use]
    pub fn rate(&self, step: u64) -> f64 {
        self.lr * self.factor(step)
    }

    fn factor(&self, step: u64) -> f64 {
        let warmup = self.warmup_steps.max(1) as f64;
        if step < self.warmup_steps {
            return step as f64 / warmup;
        }
        match self.kind {
            Schedule::Constant => 1.0,
            Schedule::Cosine => {
                let span = self.total_steps.saturating_sub(self.warmup_steps).max(1) as f64;
                let progress = (step - self.warmup_steps) as f64 / span;
                let (half_width, middle) =
                    ((1.0 - self.min_lr_ratio) / 2.0, f64::midpoint(1.0, self.min_lr_ratio));
                let wave = half_width * (TAU * self.num_cycles * progress).cos() + middle;
                wave.max(self.min_lr_ratio)
            }
        }
    }
}
