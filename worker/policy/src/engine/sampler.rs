//! Draws a token for every row of a batch of logits.
//!
//! Called by the decode pass. What must stay true: a row's draw depends on its logits, its parameters and its
//! own uniform number alone; log-probs are those of the tempered distribution before top-k and top-p (at
//! temperature 0 of the untempered one). Top-k cuts first and top-p counts mass within what it left, as vLLM
//! does.

use agentfly_common::sampling::SamplingParams;
use tch::{Kind, Tensor};

use crate::model::ModelError;

/// Sampling parameters of B rows, on the device; `[B]` f32 each.
pub(crate) struct RowParams {
    /// What logits are divided by: the temperature, or 1 for greedy rows.
    divisor: Tensor,
    top_p: Tensor,
    top_k: Tensor,
    /// In (0, 1].
    uniform: Tensor,
    /// Bool.
    greedy: Tensor,
}

impl RowParams {
    /// Numbers a row.
    pub(crate) const COUNT: usize = 5;

    /// From `[COUNT, B]` f64, the rows as [`Plan::add`] returns them.
    pub(crate) fn from_rows(rows: &Tensor) -> Result<Self, ModelError> {
        let row = |i: i64| -> Result<Tensor, ModelError> { Ok(rows.f_select(0, i)?.f_to_kind(Kind::Float)?) };
        Ok(Self {
            divisor: row(0)?,
            top_p: row(1)?,
            top_k: row(2)?,
            uniform: row(3)?,
            greedy: row(4)?.f_to_kind(Kind::Bool)?,
        })
    }
}

/// What a batch needs computed, known on the host.
#[derive(Debug, Default)]
pub(crate) struct Plan {
    any_sampled: bool,
    /// Rows with top-k or top-p: only these are sorted.
    restricted: Vec<i64>,
    /// The most tokens top-k leaves any of them.
    widest: i64,
}

impl Plan {
    /// Notes a row's parameters; returns its numbers for [`RowParams`].
    pub(crate) fn add(
        &mut self,
        row: usize,
        sampling: &SamplingParams,
        uniform: f64,
        vocab: i64,
    ) -> [f64; RowParams::COUNT] {
        let greedy = sampling.temperature == 0.0;
        let top_k = sampling.top_k.map_or(vocab, |k| i64::from(k).min(vocab));
        if !greedy {
            self.any_sampled = true;
            if top_k < vocab || sampling.top_p < 1.0 {
                self.restricted.push(row as i64);
                self.widest = self.widest.max(top_k);
            }
        }
        let divisor = if greedy { 1.0 } else { sampling.temperature };
        [divisor, sampling.top_p, top_k as f64, uniform, f64::from(u8::from(greedy))]
    }
}

/// Token ids and their log-probs, `[2, B]` f64, from logits `[B, vocab]` f32.
pub(crate) fn sample(logits: &Tensor, params: &RowParams, plan: &Plan) -> Result<Tensor, ModelError> {
    let log_probs = logits.f_div(&params.divisor.f_unsqueeze(1)?)?.f_log_softmax(-1, Kind::Float)?;
    let mut tokens = log_probs.f_argmax(-1, false)?;
    if plan.any_sampled {
        let drawn = draw(&log_probs, params, plan)?;
        tokens = tokens.f_where_self(&params.greedy, &drawn)?;
    }
    let chosen = log_probs.f_gather(1, &tokens.f_unsqueeze(1)?, false)?.f_squeeze_dim(1)?;
    Ok(Tensor::f_stack(&[tokens.f_to_kind(Kind::Double)?, chosen.f_to_kind(Kind::Double)?], 0)?)
}

fn draw(log_probs: &Tensor, params: &RowParams, plan: &Plan) -> Result<Tensor, ModelError> {
    let rows = log_probs.size()[0];
    if plan.restricted.is_empty() {
        return draw_any(log_probs, &params.uniform);
    }
    if plan.restricted.len() as i64 == rows {
        return draw_restricted(log_probs, &params.uniform, &params.top_k, &params.top_p, plan.widest);
    }
    let index = Tensor::f_from_slice(&plan.restricted)?.f_to_device(log_probs.device())?;
    let pick = |x: &Tensor| x.f_index_select(0, &index);
    let drawn = draw_restricted(
        &pick(log_probs)?,
        &pick(&params.uniform)?,
        &pick(&params.top_k)?,
        &pick(&params.top_p)?,
        plan.widest,
    )?;
    Ok(draw_any(log_probs, &params.uniform)?.f_index_copy(0, &index, &drawn)?)
}

/// Inverse CDF over the whole vocabulary.
fn draw_any(log_probs: &Tensor, uniform: &Tensor) -> Result<Tensor, ModelError> {
    let vocab = log_probs.size()[1];
    let mass = log_probs.f_exp()?.f_cumsum(-1, Kind::Float)?;
    let total = mass.f_narrow(1, vocab - 1, 1)?;
    inverse_cdf(&mass, &uniform.f_unsqueeze(1)?.f_mul(&total)?, vocab)
}

/// Inverse CDF over each row's most likely tokens, at most `widest` of them.
fn draw_restricted(
    log_probs: &Tensor,
    uniform: &Tensor,
    top_k: &Tensor,
    top_p: &Tensor,
    widest: i64,
) -> Result<Tensor, ModelError> {
    let (sorted, ids) = log_probs.f_topk(widest, -1, true, true)?;
    let rank = Tensor::f_arange(widest, (Kind::Float, log_probs.device()))?;
    let in_k = rank.f_lt_tensor(&top_k.f_unsqueeze(1)?)?;
    let probs = sorted.f_exp()?.f_mul(&in_k.f_to_kind(Kind::Float)?)?;
    let mass = probs.f_cumsum(-1, Kind::Float)?;
    let nucleus = mass.f_narrow(1, widest - 1, 1)?.f_mul(&top_p.f_unsqueeze(1)?)?;
    // A token is in the nucleus if those before it do not reach its mass: what is kept is a prefix.
    let kept = mass.f_sub(&probs)?.f_lt_tensor(&nucleus)?.f_logical_and(&in_k)?;
    let last =
        kept.f_sum_dim_intlist([-1_i64].as_slice(), true, Kind::Int64)?.f_sub_scalar(1)?.f_clamp_min(0)?;
    let target = uniform.f_unsqueeze(1)?.f_mul(&mass.f_gather(1, &last, false)?)?;
    let place = inverse_cdf(&mass, &target, widest)?.f_unsqueeze(1)?.f_minimum(&last)?;
    Ok(ids.f_gather(1, &place, false)?.f_squeeze_dim(1)?)
}

/// The first index of each row whose cumulative mass reaches `target` (above 0, so it has mass itself).
fn inverse_cdf(mass: &Tensor, target: &Tensor, columns: i64) -> Result<Tensor, ModelError> {
    let found = target.f_searchsorted(mass, false, false, "left", None::<&Tensor>)?;
    // Past the end only when the mass is NaN: the log-prob then says so.
    Ok(found.f_clamp_max(columns - 1)?.f_squeeze_dim(1)?)
}
