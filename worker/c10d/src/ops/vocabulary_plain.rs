//! Over the vocabulary by libtorch's operators, all rows at once: what GPUs run. [`super::vocabulary`] has checked the
//! arguments; tests run it on the CPU beside that device's kernels.
//!
//! What must stay true: the log-prob of a token is the same bits whether it was drawn or is learned from, as both go
//! through [`log_probs`], which treats each row by itself; and nothing here waits for the device but the one copy of
//! drawn tokens to the host.

use tch::{Device, Kind, TchError, Tensor};

use super::vocabulary::{Draw, SAMPLED_AT_A_TIME, TokenTerms, scale};
use crate::{Error, Result, upload};

/// Log-probs `[n, vocabulary]` f32 of logits, of which `scaled` makes tempered ones.
fn log_probs(
    logits: &Tensor,
    scaled: impl FnOnce(&Tensor) -> std::result::Result<Tensor, TchError>,
) -> std::result::Result<Tensor, TchError> {
    // From the largest: far from zero a product would lose the small differences.
    let below = logits.f_sub(&logits.f_amax([-1_i64].as_slice(), true)?)?;
    scaled(&below)?.f_log_softmax(-1, Kind::Float)
}

/// The same under one temperature.
fn tempered(logits: &Tensor, temperature: f64) -> std::result::Result<Tensor, TchError> {
    log_probs(logits, |z| z.f_mul_scalar(f64::from(scale(temperature))))
}

/// Log-probs with 0 in place of those of tokens that cannot come: they are multiplied by probability 0.
fn possible(log_probs: &Tensor, probs: &Tensor) -> std::result::Result<Tensor, TchError> {
    log_probs.f_masked_fill(&probs.f_eq(0.0)?, 0.0)
}

/// As [`super::token_terms`].
pub(super) fn token_terms(logits: &Tensor, targets: &Tensor, temperature: f64) -> Result<TokenTerms> {
    let _no_grad = tch::no_grad_guard();
    let terms = || {
        let log_probs = tempered(logits, temperature)?;
        let log_prob = log_probs.f_gather(1, &targets.f_unsqueeze(1)?, false)?.f_squeeze_dim(1)?;
        let probs = log_probs.f_exp()?;
        let entropy = possible(&log_probs, &probs)?
            .f_mul(&probs)?
            .f_sum_dim_intlist([-1_i64].as_slice(), false, Kind::Float)?
            .f_neg()?;
        Ok(TokenTerms { log_prob, entropy, lse: None, temperature })
    };
    terms().map_err(|e| Error::of_libtorch("log-probs of tokens", &e))
}

/// As [`TokenTerms::backward`]: (g·(1{target} − p) − h·p·(log p + H)) · scale.
pub(super) fn backward(
    terms: &TokenTerms,
    logits: &Tensor,
    targets: &Tensor,
    g_log_prob: &Tensor,
    g_entropy: &Tensor,
    kind: Kind,
) -> Result<Tensor> {
    let _no_grad = tch::no_grad_guard();
    let gradient = || {
        let log_probs = tempered(logits, terms.temperature)?;
        let probs = log_probs.f_exp()?;
        let (g, h) = (g_log_prob.f_unsqueeze(1)?, g_entropy.f_unsqueeze(1)?);
        let of_entropy = possible(&log_probs, &probs)?.f_add(&terms.entropy.f_unsqueeze(1)?)?.f_mul(&h)?;
        let all = of_entropy.f_add(&g)?.f_mul(&probs)?.f_neg()?;
        let all = all.f_scatter_add(1, &targets.f_unsqueeze(1)?, &g)?;
        all.f_mul_scalar(f64::from(scale(terms.temperature)))?.f_to_kind(kind)
    };
    gradient().map_err(|e| Error::of_libtorch("gradient of logits", &e))
}

/// As [`super::sample`].
pub(super) fn sample(logits: &Tensor, draws: &[Draw]) -> Result<(Vec<i64>, Vec<f32>)> {
    let rows = SAMPLED_AT_A_TIME / logits.size()[1];
    sample_in_pieces(logits, draws, usize::try_from(rows).unwrap_or(0).max(1))
}

/// The same for so many rows at a time: what operators make on their way is several times the logits.
fn sample_in_pieces(logits: &Tensor, draws: &[Draw], rows: usize) -> Result<(Vec<i64>, Vec<f32>)> {
    let _no_grad = tch::no_grad_guard();
    let failed = |e: TchError| Error::of_libtorch("drawing tokens", &e);
    let (mut tokens, mut log_probs) = (Vec::new(), Vec::new());
    for (i, draws) in draws.chunks(rows).enumerate() {
        let piece = logits.f_narrow(0, (i * rows) as i64, draws.len() as i64).map_err(failed)?;
        let plan = Plan::new(draws, logits.size()[1]);
        let params = Params::new(draws, logits.device())?;
        let restricted = upload(&plan.restricted, logits.device())?;
        let (ids, of_ids) = drawn(&piece, &plan, &params, &restricted).map_err(failed)?;
        tokens.push(ids);
        log_probs.push(of_ids);
    }
    let to_host = || {
        let both = Tensor::f_cat(&tokens.into_iter().chain(log_probs).collect::<Vec<_>>(), 0)?;
        let mut values = vec![0_f64; both.numel()];
        let count = values.len();
        both.f_to_device(Device::Cpu)?.f_contiguous()?.f_copy_data(&mut values, count)?;
        Ok(values)
    };
    let values: Vec<f64> = to_host().map_err(failed)?;
    let (tokens, log_probs) = values.split_at(draws.len());
    Ok((tokens.iter().map(|&id| id as i64).collect(), log_probs.iter().map(|&x| x as f32).collect()))
}

/// What a batch needs computed, known on the host.
#[derive(Debug, Default, PartialEq)]
struct Plan {
    any_sampled: bool,
    /// Rows with top-k or top-p: only these are sorted.
    restricted: Vec<i64>,
    /// The most tokens top-k leaves any of them.
    widest: i64,
}

impl Plan {
    fn new(draws: &[Draw], vocabulary: i64) -> Self {
        let mut plan = Self::default();
        for (i, draw) in draws.iter().enumerate().filter(|(_, draw)| draw.temperature != 0.0) {
            plan.any_sampled = true;
            if draw.top_k < vocabulary || draw.top_p < 1.0 {
                plan.restricted.push(i as i64);
                plan.widest = plan.widest.max(draw.top_k.min(vocabulary));
            }
        }
        plan
    }
}

/// How rows are drawn, on the device; `[n, 1]` each.
struct Params {
    /// f32.
    scales: Tensor,
    /// f64, as the next two: masses are.
    top_p: Tensor,
    top_k: Tensor,
    uniform: Tensor,
    /// Bool.
    greedy: Tensor,
}

impl Params {
    fn new(draws: &[Draw], device: Device) -> Result<Self> {
        let row = |draw: &Draw| {
            let greedy = draw.temperature == 0.0;
            let scale = scale(if greedy { 1.0 } else { draw.temperature });
            [f64::from(scale), draw.top_p, draw.top_k as f64, draw.uniform, f64::from(u8::from(greedy))]
        };
        let all = upload(&draws.iter().flat_map(row).collect::<Vec<f64>>(), device)?;
        let columns = || {
            let all = all.f_view([draws.len() as i64, 5])?;
            let column = |i: i64| all.f_narrow(1, i, 1);
            Ok(Self {
                scales: column(0)?.f_to_kind(Kind::Float)?,
                top_p: column(1)?,
                top_k: column(2)?,
                uniform: column(3)?.f_contiguous()?,
                greedy: column(4)?.f_to_kind(Kind::Bool)?,
            })
        };
        columns().map_err(|e| Error::of_libtorch("drawing tokens", &e))
    }

    fn pick(&self, rows: &Tensor) -> std::result::Result<Self, TchError> {
        let pick = |x: &Tensor| x.f_index_select(0, rows);
        Ok(Self {
            scales: pick(&self.scales)?,
            top_p: pick(&self.top_p)?,
            top_k: pick(&self.top_k)?,
            uniform: pick(&self.uniform)?,
            greedy: pick(&self.greedy)?,
        })
    }
}

/// A token of each row and its log-prob, `[n, 1]` f64 each.
fn drawn(
    logits: &Tensor,
    plan: &Plan,
    params: &Params,
    restricted: &Tensor,
) -> std::result::Result<(Tensor, Tensor), TchError> {
    let log_probs = log_probs(logits, |z| z.f_mul(&params.scales))?;
    // Of the logits: two of them may have one log-prob.
    let mut tokens = logits.f_argmax(-1, true)?;
    if plan.any_sampled {
        let sampled = if plan.restricted.len() as i64 == logits.size()[0] {
            draw_restricted(&log_probs, params, plan.widest)?
        } else {
            let mut sampled = draw_any(&log_probs, &params.uniform)?;
            if !plan.restricted.is_empty() {
                let rows = log_probs.f_index_select(0, restricted)?;
                let some = draw_restricted(&rows, &params.pick(restricted)?, plan.widest)?;
                sampled = sampled.f_index_copy(0, restricted, &some)?;
            }
            sampled
        };
        tokens = tokens.f_where_self(&params.greedy, &sampled)?;
    }
    let chosen = log_probs.f_gather(1, &tokens, false)?;
    Ok((tokens.f_to_kind(Kind::Double)?, chosen.f_to_kind(Kind::Double)?))
}

/// By the inverse of the cumulative distribution over the whole vocabulary.
fn draw_any(log_probs: &Tensor, uniform: &Tensor) -> std::result::Result<Tensor, TchError> {
    let vocabulary = log_probs.size()[1];
    let mass = log_probs.f_exp()?.f_cumsum(-1, Kind::Double)?;
    let total = mass.f_narrow(1, vocabulary - 1, 1)?;
    inverse_cdf(&mass, &uniform.f_mul(&total)?, vocabulary)
}

/// The same over each row's most likely tokens, at most `widest` of them. Equals stay in the vocabulary's order, as in
/// the CPU's kernel: hence a stable sort.
fn draw_restricted(
    log_probs: &Tensor,
    params: &Params,
    widest: i64,
) -> std::result::Result<Tensor, TchError> {
    let (sorted, ids) = log_probs.f_sort_stable(true, -1, true)?;
    let (sorted, ids) = (sorted.f_narrow(1, 0, widest)?, ids.f_narrow(1, 0, widest)?);
    let rank = Tensor::f_arange(widest, (Kind::Double, log_probs.device()))?;
    let in_k = rank.f_lt_tensor(&params.top_k)?;
    let probs = sorted.f_exp()?.f_to_kind(Kind::Double)?.f_mul(&in_k.f_to_kind(Kind::Double)?)?;
    let mass = probs.f_cumsum(-1, Kind::Double)?;
    let nucleus = mass.f_narrow(1, widest - 1, 1)?.f_mul(&params.top_p)?;
    // A token is in the nucleus if those before it do not reach its mass: what is kept is a prefix.
    let kept = mass.f_sub(&probs)?.f_lt_tensor(&nucleus)?.f_logical_and(&in_k)?;
    let last =
        kept.f_sum_dim_intlist([-1_i64].as_slice(), true, Kind::Int64)?.f_sub_scalar(1)?.f_clamp_min(0)?;
    let aim = params.uniform.f_mul(&mass.f_gather(1, &last, false)?)?;
    let place = inverse_cdf(&mass, &aim, widest)?.f_minimum(&last)?;
    ids.f_gather(1, &place, false)
}

/// The first index of each row whose cumulative mass reaches `aim` (above 0, so it has mass itself); `[n, 1]`.
fn inverse_cdf(mass: &Tensor, aim: &Tensor, columns: i64) -> std::result::Result<Tensor, TchError> {
    // Past the end only when the mass is NaN: the log-prob then says so.
    aim.f_searchsorted(mass, false, false, "left", None::<&Tensor>)?.f_clamp_max(columns - 1)
}

#[cfg(test)]
mod tests;
