//! What a model makes of a text: its likelihood, that of a few ways to go on, and what a setting of attention costs, position by
//! position.

use crate::CausalLm;
use candle_core::{Result, Tensor, bail};
use rayon::prelude::*;
use sparse_attn::cache::ReadCount;
use sparse_attn::{KvCache, KvDtypes, RoutedAttention};
use std::ops::ControlFlow;

/// Rows of logits that are alive at once.
const ROWS: usize = 64;

/// The two next-token distributions at one position.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct PositionScore {
    /// `-ln p(next token)`, of the reference and of the other setting.
    pub nll: [f64; 2],
    /// `KL(reference || other)`, in nats.
    pub kl: f64,
    /// Whether both find the same token likeliest.
    pub same_top: bool,
    /// The largest difference of two logits: 0 if the rows are the same, bit for bit but for the sign of a zero.
    pub difference: f32,
}

/// Compares two rows of logits before the token `next`.
pub fn score_position(reference: &[f32], other: &[f32], next: u32) -> PositionScore {
    let (a, b) = (log_total(reference), log_total(other));
    let log = |logits: &[f32], total: f64, id: usize| f64::from(logits[id]) - total;
    let kl = (0..reference.len())
        .map(|id| {
            let (p, q) = (log(reference, a, id), log(other, b, id));
            f64::from((p as f32).exp()) * (p - q)
        })
        .sum::<f64>();
    let top = |logits: &[f32]| (0..logits.len()).fold(0, |best, id| if logits[id] > logits[best] { id } else { best });
    let next = next as usize;
    // Rounding can leave a divergence of equal distributions just below 0.
    PositionScore {
        nll: [-log(reference, a, next), -log(other, b, next)],
        kl: kl.max(0.0),
        same_top: top(reference) == top(other),
        difference: reference.iter().zip(other).fold(0.0, |most, (a, b)| if a == b { most } else { (a - b).abs().max(most) }),
    }
}

/// `ln sum exp(logits)`
fn log_total(logits: &[f32]) -> f64 {
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    // Exponentials in f32, their sum in f64: a vocabulary is large.
    f64::from(max) + logits.iter().map(|logit| f64::from((logit - max).exp())).sum::<f64>().ln()
}

/// A way to attend and to store keys and values.
#[derive(Debug, Clone)]
pub struct Setting {
    /// How it attends.
    pub attention: RoutedAttention,
    /// How keys and values are stored.
    pub dtypes: KvDtypes,
}

impl Setting {
    /// An empty cache for `capacity` tokens of `model`.
    fn cache(&self, model: &dyn CausalLm, capacity: usize) -> Result<KvCache> {
        KvCache::new(&self.attention.layer_specs(&model.config().layer_specs()), self.dtypes, model.device(), capacity)
    }
}

/// What a setting did to a text.
#[derive(Debug, Clone)]
pub struct SettingScore {
    /// A score for every scored position.
    pub positions: Vec<PositionScore>,
    /// Bytes of its cache at the end.
    pub kv_bytes: usize,
    /// Keys that it read at the scored positions.
    pub read: ReadCount,
}

/// Runs `tokens` through the reference and every other setting, in chunks, and scores the prediction of every token from
/// position `from + 1` on. `progress` is told how many tokens are done, and may stop it there.
///
/// # Errors
/// If there is nothing to score, an id is beyond the vocabulary, or memory runs out.
pub fn compare(
    model: &dyn CausalLm,
    reference: &Setting,
    others: &[Setting],
    tokens: &[u32],
    from: usize,
    chunk: usize,
    mut progress: impl FnMut(usize) -> ControlFlow<()>,
) -> Result<Vec<SettingScore>> {
    if tokens.len() < from + 2 {
        bail!("{} tokens leave nothing to score after position {from}", tokens.len());
    }
    let settings: Vec<&Setting> = std::iter::once(reference).chain(others).collect();
    let mut caches = settings.iter().map(|setting| setting.cache(model, tokens.len())).collect::<Result<Vec<_>>>()?;
    let empty = || SettingScore { positions: Vec::new(), kv_bytes: 0, read: ReadCount::default() };
    let mut scores: Vec<SettingScore> = others.iter().map(|_| empty()).collect();
    for (index, part) in tokens.chunks(chunk.max(1)).enumerate() {
        let start = index * chunk.max(1);
        if progress(start).is_break() {
            break;
        }
        let hidden = settings.iter().zip(&mut caches).map(|(setting, cache)| model.forward(part, &setting.attention, cache));
        let hidden = hidden.collect::<Result<Vec<_>>>()?;
        if start + part.len() > from {
            for (score, cache) in scores.iter_mut().zip(&caches[1..]) {
                score.read.add(cache.read_count());
            }
        }
        // The last token has no successor to predict.
        let scored = from.max(start)..(start + part.len()).min(tokens.len() - 1);
        let mut at = scored.start;
        while at < scored.end {
            let rows = ROWS.min(scored.end - at);
            let logits = |hidden: &Tensor| model.logits(&hidden.narrow(0, at - start, rows)?.contiguous()?)?.to_vec2::<f32>();
            let reference = logits(&hidden[0])?;
            for (score, hidden) in scores.iter_mut().zip(&hidden[1..]) {
                let other = logits(hidden)?;
                let rows = (0..rows).into_par_iter();
                score.positions.par_extend(rows.map(|row| score_position(&reference[row], &other[row], tokens[at + row + 1])));
            }
            at += rows;
        }
    }
    for (score, cache) in scores.iter_mut().zip(&mut caches[1..]) {
        cache.trim()?;
        score.kv_bytes = cache.allocated_bytes();
    }
    Ok(scores)
}

/// `ln p` of all of `tokens`, every one predicted once: in windows of `window` tokens that follow each other, each with the token
/// before it as its first context (`prefix` before the first of all); the last window reaches back, so that it is whole. lm-evaluation-harness'
/// `loglikelihood_rolling`.
///
/// `progress` is told how many tokens are done, and may stop it: then the result is `None`.
///
/// # Errors
/// If there are no tokens, an id is beyond the vocabulary, or memory runs out.
pub fn log_likelihood(
    model: &dyn CausalLm,
    setting: &Setting,
    prefix: u32,
    tokens: &[u32],
    window: usize,
    chunk: usize,
    mut progress: impl FnMut(usize) -> ControlFlow<()>,
) -> Result<Option<f64>> {
    if tokens.is_empty() || window == 0 {
        bail!("{} tokens in windows of {window}: nothing to predict", tokens.len());
    }
    let all: Vec<u32> = std::iter::once(prefix).chain(tokens.iter().copied()).collect();
    let (mut total, mut done) = (0.0, 0);
    while done < tokens.len() {
        let scored = window.min(tokens.len() - done);
        let end = done + scored;
        // The token at `i` of `tokens` is predicted by that at `i` of `all`.
        let inputs = &all[end.saturating_sub(window)..end];
        let mut cache = setting.cache(model, inputs.len())?;
        let (mut at, chunk) = (0, chunk.max(1));
        for part in inputs.chunks(chunk) {
            if progress(done).is_break() {
                return Ok(None);
            }
            let hidden = model.forward(part, &setting.attention, &mut cache)?;
            let first = at.max(inputs.len() - scored);
            if first < at + part.len() {
                let next = &all[end - inputs.len() + 1..];
                total += log_probabilities(model, &hidden, first - at, &next[first..at + part.len()])?;
            }
            at += part.len();
        }
        done = end;
    }
    Ok(Some(total))
}

/// `ln p` of each of `continuations` after `context`, the sum over its tokens. lm-evaluation-harness' `loglikelihood`.
///
/// # Errors
/// If the context or a continuation is empty, an id is beyond the vocabulary, or memory runs out.
pub fn continuations(
    model: &dyn CausalLm,
    setting: &Setting,
    context: &[u32],
    continuations: &[Vec<u32>],
    chunk: usize,
) -> Result<Vec<f64>> {
    let longest = continuations.iter().map(Vec::len).max().unwrap_or(0);
    if context.is_empty() || continuations.iter().any(Vec::is_empty) {
        bail!("a context of {} tokens and continuations of up to {longest}: neither may be empty", context.len());
    }
    let mut cache = setting.cache(model, context.len() + longest)?;
    let mut last = None;
    for part in context.chunks(chunk.max(1)) {
        let hidden = model.forward(part, &setting.attention, &mut cache)?;
        last = Some(hidden.narrow(0, part.len() - 1, 1)?);
    }
    let Some(last) = last else { return Ok(Vec::new()) };
    let score = |continuation: &Vec<u32>| {
        let first = log_probabilities(model, &last, 0, &continuation[..1])?;
        let inputs = &continuation[..continuation.len() - 1];
        if inputs.is_empty() {
            return Ok(first);
        }
        let hidden = model.forward(inputs, &setting.attention, &mut cache.fork()?)?;
        Ok(first + log_probabilities(model, &hidden, 0, &continuation[1..])?)
    };
    continuations.iter().map(score).collect()
}

/// The sum of `ln p` of `next`, the tokens that follow the rows of `hidden` from `first` on.
fn log_probabilities(model: &dyn CausalLm, hidden: &Tensor, first: usize, next: &[u32]) -> Result<f64> {
    let mut total = 0.0;
    for (index, next) in next.chunks(ROWS).enumerate() {
        let rows = hidden.narrow(0, first + index * ROWS, next.len())?.contiguous()?;
        let logits = model.logits(&rows)?.to_vec2::<f32>()?;
        let vocab_size = model.config().vocab_size;
        if let Some(id) = next.iter().find(|id| **id as usize >= vocab_size) {
            bail!("token id {id} is beyond the vocabulary of {vocab_size}");
        }
        // In this order whatever the threads, so that a sum is the same every time.
        let each: Vec<f64> = logits.par_iter().zip(next).map(|(logits, id)| f64::from(logits[*id as usize]) - log_total(logits)).collect();
        total += each.iter().sum::<f64>();
    }
    Ok(total)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scores_are_the_textbook_ones() {
        // p = (1/2, 1/4, 1/4), q = (1/4, 1/2, 1/4)
        let (p, q) = ([0.5f32, 0.25, 0.25].map(f32::ln), [0.25f32, 0.5, 0.25].map(f32::ln));
        let score = score_position(&p, &q, 0);
        assert!((score.nll[0] - 2f64.ln()).abs() < 1e-6 && (score.nll[1] - 4f64.ln()).abs() < 1e-6);
        // 1/2 ln 2 - 1/4 ln 2
        assert!((score.kl - 0.25 * 2f64.ln()).abs() < 1e-6 && !score.same_top);
        // A shift of all logits changes nothing.
        let shifted = q.map(|logit| logit + 100.0);
        assert!((score_position(&p, &shifted, 0).kl - score.kl).abs() < 1e-5);
        let same = score_position(&p, &p, 2);
        assert!(same.kl == 0.0 && same.same_top && same.difference == 0.0);
        assert!((score.difference - 2f32.ln()).abs() < 1e-6);
    }
}
