//! Draws a token for every row of a batch of logits.
//!
//! Called by the decode pass. What must stay true: a row's draw depends on its logits, its parameters and its
//! own uniform number alone; log-probs are those of the tempered distribution before top-k and top-p (at
//! temperature 0 of the untempered one). Top-k cuts first and top-p counts mass within what it left, as vLLM
//! does.

use agentfly_c10d::ops::{self, Draw};
use agentfly_common::sampling::SamplingParams;
use tch::{Device, Kind, Tensor};

use crate::model::ModelError;

/// How a row of logits is drawn.
#[derive(Debug)]
pub(crate) struct Row {
    pub(crate) sampling: SamplingParams,
    /// In (0, 1].
    pub(crate) uniform: f64,
}

/// A token and its log-prob for each row of logits `[B, vocab]` f32: on the CPU by one pass over each row, on a GPU by
/// libtorch's operators over all rows at once.
pub(crate) fn sample(logits: &Tensor, rows: &[Row]) -> Result<Vec<(u32, f32)>, ModelError> {
    let vocab = logits.size()[1];
    if logits.device() != Device::Cpu {
        return on_device(logits, rows);
    }
    let draw = |row: &Row| Draw {
        temperature: row.sampling.temperature,
        top_p: row.sampling.top_p,
        top_k: row.sampling.top_k.map_or(vocab, |k| i64::from(k).min(vocab)),
        uniform: row.uniform,
    };
    let (tokens, log_probs) = ops::sample(logits, &rows.iter().map(draw).collect::<Vec<_>>())?;
    Ok(tokens.into_iter().map(|id| id as u32).zip(log_probs).collect())
}

/// Sampling parameters of B rows, on the device; `[B]` f32 each.
struct RowParams {
    /// What logits are divided by: the temperature, or 1 for greedy rows.
    divisor: Tensor,
    top_p: Tensor,
    top_k: Tensor,
    /// In (0, 1].
    uniform: Tensor,
    /// Bool.
    greedy: Tensor,
}

/// What a batch needs computed, known on the host.
#[derive(Debug, Default)]
struct Plan {
    any_sampled: bool,
    /// Rows with top-k or top-p: only these are sorted.
    restricted: Vec<i64>,
    /// The most tokens top-k leaves any of them.
    widest: i64,
}

impl RowParams {
    fn new(rows: &[Row], vocab: i64, device: Device) -> Result<(Self, Plan), ModelError> {
        let (mut plan, mut host) = (Plan::default(), Vec::new());
        for (i, row) in rows.iter().enumerate() {
            let SamplingParams { temperature, top_p, top_k, .. } = row.sampling;
            let greedy = temperature == 0.0;
            let top_k = top_k.map_or(vocab, |k| i64::from(k).min(vocab));
            if !greedy {
                plan.any_sampled = true;
                if top_k < vocab || top_p < 1.0 {
                    plan.restricted.push(i as i64);
                    plan.widest = plan.widest.max(top_k);
                }
            }
            let divisor = if greedy { 1.0 } else { temperature };
            host.extend([divisor, top_p, top_k as f64, row.uniform, f64::from(u8::from(greedy))]);
        }
        let all = Tensor::f_from_slice(&host)?.f_view([rows.len() as i64, 5])?.f_to_device(device)?;
        let column =
            |i: i64| -> Result<Tensor, ModelError> { Ok(all.f_select(1, i)?.f_to_kind(Kind::Float)?) };
        let params = Self {
            divisor: column(0)?,
            top_p: column(1)?,
            top_k: column(2)?,
            uniform: column(3)?,
            greedy: column(4)?.f_to_kind(Kind::Bool)?,
        };
        Ok((params, plan))
    }
}

fn on_device(logits: &Tensor, rows: &[Row]) -> Result<Vec<(u32, f32)>, ModelError> {
    let (params, plan) = RowParams::new(rows, logits.size()[1], logits.device())?;
    let log_probs = logits.f_div(&params.divisor.f_unsqueeze(1)?)?.f_log_softmax(-1, Kind::Float)?;
    let mut tokens = log_probs.f_argmax(-1, false)?;
    if plan.any_sampled {
        let drawn = draw(&log_probs, &params, &plan)?;
        tokens = tokens.f_where_self(&params.greedy, &drawn)?;
    }
    let chosen = log_probs.f_gather(1, &tokens.f_unsqueeze(1)?, false)?.f_squeeze_dim(1)?;
    let both = Tensor::f_stack(&[tokens.f_to_kind(Kind::Double)?, chosen.f_to_kind(Kind::Double)?], 0)?;
    let n = rows.len();
    let mut values = vec![0_f64; 2 * n];
    both.f_to_device(Device::Cpu)?.f_contiguous()?.f_copy_data(&mut values, 2 * n)?;
    Ok((0..n).map(|i| (values[i] as u32, values[n + i] as f32)).collect())
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
