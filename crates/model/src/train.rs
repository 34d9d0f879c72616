//! Training a token router: a linear gate for every head, by ridge regression in closed form, or one with a hidden layer.
//!
//! The label of a token is how much it is missed once it leaves the window: the root of the mean square of the attention that later
//! queries beyond the window give to it, over the queries of its head's group; its logarithm is what the gate learns to predict
//! from the attention input. The divergence that dropping a token causes grows with the square of what it is given, so the mean
//! square says what all queries lose by it; the largest attention of any query, the label of KVzip (arXiv:2505.23416) and KVzap
//! (arXiv:2601.07891), only what the unluckiest does (models/README.md compares them). One ordinary pass over a text gives all
//! labels; where the model is then asked to repeat the text, as KVzip does, labels also know of what a later question may need.
//! Nothing but sums is kept of a text, so they may be as many as there is time for; a hidden layer learns from a sample of their tokens.

mod mlp;
mod sums;

use crate::CausalLm;
use crate::calibrate::Calibrated;
use crate::router_file::RouterFile;
use crate::weights::hex;
use candle_core::{DType, Device, Result, Tensor, bail};
use mlp::Samples;
use rayon::prelude::*;
use serde_json::Value;
use sha2::{Digest, Sha256};
use sparse_attn::simd::exp;
use sparse_attn::token_router::{Feedforward, GateLayer};
use sparse_attn::{Attended, KvCache, KvDtype, Observer, RoutedAttention, vectorised};
use std::ops::{ControlFlow, Range};
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use sums::Sums;

/// Labels below this are as good as none: the logarithm has to end somewhere.
const LEAST: f32 = 1e-7;

/// Kept fractions that the curve of a router is measured at, from many to few.
const FRACTIONS: [f32; 17] = [0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6, 0.55, 0.5, 0.45, 0.4, 0.35, 0.3, 0.25, 0.2, 0.15];

/// How much work may be lost to a crash.
const SAVE_EVERY: Duration = Duration::from_secs(120);

/// How a router is trained.
#[derive(Debug, Clone)]
pub struct TrainOptions {
    /// Token ids that ask for the text to be repeated: each text is read, followed by these and itself once more. Empty: it is read
    /// once.
    pub repeat: Vec<u32>,
    /// Newest tokens, which are always there: a label counts queries beyond them.
    pub window: usize,
    /// First tokens, which are always kept and teach nothing.
    pub sinks: usize,
    /// Weight of the ridge, relative to the mean square of a feature.
    pub ridge: f64,
    /// Numbers of a hidden layer, which learns on from the linear gate; `None`: that is all.
    pub hidden: Option<usize>,
    /// The kept fraction that the threshold is set for.
    pub keep: f32,
    /// The least that a head keeps, as a fraction.
    pub floor: f32,
    /// Tokens computed at once.
    pub chunk: usize,
    /// Where what was learnt so far is kept, so that the same training goes on from it: when it is stopped, and every few minutes. Not
    /// with a hidden layer: that wants the tokens again.
    pub state: Option<PathBuf>,
}

impl Default for TrainOptions {
    fn default() -> Self {
        Self { repeat: Vec::new(), window: 256, sinks: 4, ridge: 1e-3, hidden: None, keep: 0.5, floor: 0.05, chunk: 512, state: None }
    }
}

/// What was learnt, and how well it predicts labels of texts that were not used.
#[derive(Debug)]
pub struct Trained {
    /// The router.
    pub router: RouterFile,
    /// Correlation of scores with logarithms of labels on held-out text, the mean over layers and heads.
    pub correlation: f64,
}

/// Attention inputs and labels of a text, one layer.
#[derive(Debug, Default)]
struct Seen {
    hidden: Vec<f32>,      // [tokens, width]
    labels: Vec<Vec<f32>>, // [kv_heads][tokens]
}

/// Attention inputs of the running text, and the squares of the attention that its tokens got so far, one layer.
#[derive(Debug, Default)]
struct Running {
    hidden: Vec<f32>,    // [tokens, width], of the repetition too
    heads: Vec<Squares>, // [kv_heads]
}

/// Sums of squares of the attention that later queries beyond the window gave to each token: those of the text, and those
/// of its repetition.
#[derive(Debug, Default)]
struct Squares {
    text: Vec<f32>,
    repetition: Vec<f32>,
}

impl Squares {
    fn add(&mut self, other: &Self) {
        for (all, new) in [(&mut self.text, &other.text), (&mut self.repetition, &other.repetition)] {
            all.resize(all.len().max(new.len()), 0.0);
            all.iter_mut().zip(new).for_each(|(all, new)| *all += new);
        }
    }

    /// The root of the mean squares of a text of `tokens`; of both readings, as much by each.
    fn labels(&self, tokens: usize, window: usize) -> Vec<f32> {
        let at = |list: &[f32], token: usize| list.get(token).copied().unwrap_or(0.0);
        let label = |token: usize| {
            let later = tokens.saturating_sub(token + window).max(1);
            (at(&self.text, token) / later as f32 + at(&self.repetition, token) / tokens as f32).sqrt()
        };
        (0..tokens).map(label).collect()
    }
}

/// Collects them as the model reads.
#[derive(Debug)]
struct Labels {
    tokens: usize, // of the text; what follows repeats it
    window: usize,
    layers: Vec<Mutex<Running>>,
}

impl Labels {
    fn new(layers: usize, tokens: usize, window: usize) -> Self {
        Self { tokens, window, layers: (0..layers).map(|_| Mutex::default()).collect() }
    }

    /// What was seen of a layer; it is forgotten here.
    fn take(&self, layer: usize) -> Seen {
        let Running { hidden, heads } = self.layers[layer].lock().map(|mut seen| std::mem::take(&mut *seen)).unwrap_or_default();
        Seen { hidden, labels: heads.iter().map(|head| head.labels(self.tokens, self.window)).collect() }
    }
}

vectorised! {
    /// Adds the square of the softmax of each score to its sum; `scores` are left as exponentials.
    fn add_squares(sums: &mut [f32], scores: &mut [f32]) -> () = add_squares_loop;
}

#[inline(always)]
fn add_squares_loop(sums: &mut [f32], scores: &mut [f32]) {
    let max = scores.iter().fold(f32::NEG_INFINITY, |max, score| max.max(*score));
    scores.iter_mut().for_each(|score| *score = exp(*score - max));
    let factor = 1.0 / scores.iter().map(|weight| f64::from(*weight)).sum::<f64>() as f32;
    for (sum, weight) in sums.iter_mut().zip(scores) {
        let weight = *weight * factor;
        *sum = weight.mul_add(weight, *sum);
    }
}

impl Observer for Labels {
    fn attended(&self, seen: Attended<'_>) -> Result<()> {
        if seen.store.sliding_window().is_some() {
            return Ok(()); // reads no more than its window, and keeps no more
        }
        let kv_heads = seen.store.shape().kv_heads();
        let new = if seen.q.device().is_cpu() {
            (0..kv_heads).into_par_iter().map(|head| self.on_host(&seen, head)).collect::<Result<Vec<_>>>()?
        } else {
            self.on_device(&seen)?
        };
        let hidden = seen.hidden.to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>()?;
        if let Ok(mut layer) = self.layers[seen.layer].lock() {
            layer.hidden.extend(hidden);
            layer.heads.resize_with(kv_heads, Squares::default);
            layer.heads.iter_mut().zip(&new).for_each(|(all, new)| all.add(new));
        }
        Ok(())
    }
}

impl Labels {
    /// What the queries of a step give to the keys of a head.
    fn on_host(&self, seen: &Attended<'_>, head: usize) -> Result<Squares> {
        let (shape, step) = (seen.store.shape(), seen.step);
        let (head_dim, group_size) = (shape.head_dim(), shape.group_size());
        let (positions, keys) = seen.store.admitted_keys(head, 0..step.end())?;
        let keys = Tensor::from_vec(keys, (positions.len(), head_dim), &Device::Cpu)?;
        let q = seen.q.narrow(1, head * group_size, group_size)?.to_dtype(DType::F32)?.contiguous()?;
        let scores = (q.reshape((step.len * group_size, head_dim))?.matmul(&keys.t()?)? * f64::from(seen.scale))?;
        let mut scores = scores.flatten_all()?.to_vec1::<f32>()?; // [tokens * group_size, end]
        let mut squares = Squares { text: vec![0.0; step.end()], repetition: vec![0.0; step.end()] };
        for (row, scores) in scores.chunks_exact_mut(step.end()).enumerate() {
            let t = step.start + row / group_size;
            let sums = if t < self.tokens { &mut squares.text } else { &mut squares.repetition };
            // Beyond the window of this query.
            let far = (t + 1).saturating_sub(self.window);
            add_squares(&mut sums[..far], &mut scores[..=t]);
        }
        Ok(squares)
    }

    /// The same of every head, where keys and queries are: plain tensor code.
    fn on_device(&self, seen: &Attended<'_>) -> Result<Vec<Squares>> {
        let (shape, step, device) = (seen.store.shape(), seen.step, seen.q.device());
        let (group_size, rows) = (shape.group_size(), step.len * shape.group_size());
        let of_text = self.tokens.clamp(step.start, step.end()) - step.start;
        let queries: Vec<f32> = (0..rows).map(|row| (step.start + row / group_size) as f32).collect();
        let keys = Tensor::arange(0f32, step.end() as f32, device)?.unsqueeze(0)?;
        let distance = Tensor::from_vec(queries, (rows, 1), device)?.broadcast_sub(&keys)?; // [rows, end]
        let (seen_keys, far) = (distance.ge(0f64)?, distance.ge(self.window as f64)?.to_dtype(DType::F32)?);
        let hidden = Tensor::full(f32::NEG_INFINITY, distance.shape(), device)?;
        let of_head = |head: usize| -> Result<Squares> {
            let (_, keys, _) = seen.store.rows(head, step.end())?;
            let q = seen.q.narrow(1, head * group_size, group_size)?.to_dtype(DType::F32)?.contiguous()?;
            let scores = (q.reshape((rows, shape.head_dim()))?.matmul(&keys.t()?)? * f64::from(seen.scale))?;
            let weights = candle_nn::ops::softmax_last_dim(&seen_keys.where_cond(&scores, &hidden)?)?;
            let squares = (weights.sqr()? * &far)?;
            let sums = |first: usize, count: usize| match count {
                0 => Ok(Vec::new()),
                _ => squares.narrow(0, first * group_size, count * group_size)?.sum(0)?.to_vec1(),
            };
            Ok(Squares { text: sums(0, of_text)?, repetition: sums(of_text, step.len - of_text)? })
        };
        (0..shape.kv_heads()).map(of_head).collect()
    }
}

/// Trains a gate on `texts` and sets its threshold on `held_out`, each a sequence of token ids longer than two windows.
/// `fingerprint` names the weights; `training` is put into the file. `progress` is told how many texts are done, and may stop
/// it before the next: then there is no router. It starts above 0 where an interrupted training goes on.
///
/// # Errors
/// If there is no text of either kind, one is too short, an id is beyond the vocabulary, or memory runs out.
pub fn train(
    model: &dyn CausalLm,
    dense: &RoutedAttention,
    [texts, held_out]: [&[Vec<u32>]; 2],
    options: &TrainOptions,
    fingerprint: String,
    training: Value,
    mut progress: impl FnMut(usize) -> ControlFlow<()>,
) -> Result<Option<Trained>> {
    if texts.is_empty() || held_out.is_empty() {
        bail!("training needs a text to learn from, and one to set the threshold on");
    }
    let config = model.config();
    let (layers, width, kv_heads) = (config.num_layers, config.hidden_size, config.heads.kv_heads());
    // Layers with a sliding window drop what leaves it anyway: they have no gate to learn.
    let learns = config.sliding_window.iter().map(Option::is_none);
    let mut sums: Vec<Option<Sums>> = learns.map(|learns| learns.then(|| Sums::new(width, kv_heads))).collect();
    let key = key(&fingerprint, texts, options);
    let state = options.state.as_deref().filter(|_| options.hidden.is_none());
    let tokens = texts.iter().map(|text| useful(text.len(), options).len()).sum();
    let mut samples: Vec<Option<Samples>> =
        sums.iter().map(|sums| sums.as_ref().filter(|_| options.hidden.is_some()).map(|_| Samples::new(tokens))).collect();
    let known = state.map_or(Ok(0), |path| sums::resume(path, &key, &mut sums))?;
    let mut saved = Instant::now();
    for (done, text) in texts.iter().enumerate().skip(known) {
        let stops = progress(done).is_break();
        if let Some(path) = state.filter(|_| done > known && (stops || saved.elapsed() > SAVE_EVERY)) {
            sums::save(path, &key, done, &sums)?;
            saved = Instant::now();
        }
        if stops {
            return Ok(None);
        }
        let labels = read(model, dense, text, options)?;
        for (layer, sums) in sums.iter_mut().enumerate().filter_map(|(layer, sums)| Some((layer, sums.as_mut()?))) {
            let seen = labels.take(layer);
            sums.add(&seen, useful(text.len(), options), width)?;
            if let Some(samples) = &mut samples[layer] {
                samples.add(&seen, useful(text.len(), options), width);
            }
        }
    }
    if let Some(path) = state.filter(|_| known < texts.len()) {
        sums::save(path, &key, texts.len(), &sums)?;
    }
    let solve = |sums: Option<Sums>| sums.map(|sums| sums.solve(options.ridge, width, kv_heads)).transpose();
    let mut gates = sums.into_iter().map(solve).collect::<Result<Vec<_>>>()?;
    if let Some(hidden) = options.hidden {
        if progress(texts.len()).is_break() {
            return Ok(None);
        }
        // A layer's products are too small for many threads.
        gates.par_iter_mut().zip(samples).enumerate().try_for_each(|(layer, (gate, samples))| {
            let (Some(gate), Some(samples)) = (gate, samples) else { return Ok(()) };
            *gate = samples.fit(gate, hidden, layer as u64)?;
            Ok::<_, candle_core::Error>(())
        })?;
    }
    // Scores and labels of held-out text: [layers * kv_heads][tokens].
    let mut scores: Vec<Vec<f32>> = vec![Vec::new(); layers * kv_heads];
    let mut truths = scores.clone();
    for (done, text) in held_out.iter().enumerate() {
        if progress(texts.len() + done).is_break() {
            return Ok(None);
        }
        let labels = read(model, dense, text, options)?;
        for (layer, gate) in gates.iter().enumerate().filter_map(|(layer, gate)| Some((layer, gate.as_ref()?))) {
            let seen = labels.take(layer);
            let hidden = Tensor::from_slice(&seen.hidden[..text.len() * width], (text.len(), width), &Device::Cpu)?;
            let predicted = gate.score(&hidden)?.t()?.to_vec2::<f32>()?;
            for (head, (predicted, labels)) in predicted.iter().zip(&seen.labels).enumerate() {
                let useful = useful(text.len(), options);
                scores[layer * kv_heads + head].extend(&predicted[useful.clone()]);
                truths[layer * kv_heads + head].extend(labels[useful].iter().map(|label| label.max(LEAST).ln()));
            }
        }
    }
    let correlations =
        scores.iter().zip(&truths).filter(|(scores, _)| !scores.is_empty()).map(|(scores, truths)| correlation(scores, truths));
    let correlations: Vec<f64> = correlations.collect();
    if correlations.is_empty() {
        bail!("every layer of this model has a sliding window: there is nothing for a token router to drop");
    }
    let correlation = correlations.iter().sum::<f64>() / correlations.len() as f64;
    lift_to_floor(&mut gates, &mut scores, options, kv_heads)?;
    let Calibrated { tau, curve } = calibrated(scores.concat(), options.keep);
    let layers = gates.into_iter().map(|gate| gate.map_or(GateLayer::Open, GateLayer::Feedforward)).collect();
    let router = RouterFile { fingerprint, window: options.window, sinks: options.sinks, tau, curve, training, layers };
    router.gate(None)?;
    Ok(Some(Trained { router, correlation }))
}

/// Bytes that are kept of `tokens` tokens of a layer for a hidden layer to learn from.
pub fn sample_bytes(tokens: usize, width: usize, kv_heads: usize) -> usize {
    Samples::bytes(tokens, width, kv_heads)
}

/// Names what sums are of: the model, the texts, and what is read of them.
fn key(fingerprint: &str, texts: &[Vec<u32>], options: &TrainOptions) -> String {
    let mut hash = Sha256::new();
    let mut add = |ids: &[u32]| {
        hash.update((ids.len() as u64).to_le_bytes());
        ids.iter().for_each(|id| hash.update(id.to_le_bytes()));
    };
    add(&options.repeat);
    texts.iter().for_each(|text| add(text));
    hash.update(format!("{fingerprint} {} {}", options.window, options.sinks));
    hex(&hash.finalize())
}

/// Tokens that teach something: not the sinks, and with enough queries beyond their window.
fn useful(tokens: usize, options: &TrainOptions) -> Range<usize> {
    options.sinks.min(tokens)..tokens.saturating_sub(2 * options.window)
}

/// Reads a text and collects attention inputs and labels.
fn read(model: &dyn CausalLm, dense: &RoutedAttention, text: &[u32], options: &TrainOptions) -> Result<Arc<Labels>> {
    if useful(text.len(), options).is_empty() {
        bail!("a text of {} tokens is too short for a window of {}", text.len(), options.window);
    }
    let labels = Arc::new(Labels::new(model.config().num_layers, text.len(), options.window));
    let attention = dense.to_dense().observed(labels.clone());
    let mut ids = text.to_vec();
    if !options.repeat.is_empty() {
        ids.extend(options.repeat.iter().chain(text));
    }
    // GPUs attend to 16-bit keys only.
    let dtype = if model.device().is_cpu() { KvDtype::F32 } else { KvDtype::F16 };
    let mut cache = KvCache::new(&model.config().layer_specs(), dtype.into(), model.device(), ids.len())?;
    for part in ids.chunks(options.chunk.max(1)) {
        model.forward(part, &attention, &mut cache)?;
    }
    Ok(labels)
}

/// The threshold that keeps `keep` of these scores, and the curve of many.
pub(crate) fn calibrated(mut scores: Vec<f32>, keep: f32) -> Calibrated {
    scores.sort_unstable_by(f32::total_cmp);
    let curve = FRACTIONS.iter().map(|fraction| (threshold(&scores, *fraction), *fraction)).collect();
    Calibrated { tau: threshold(&scores, keep), curve }
}

/// The score that `fraction` of `sorted`, ascending, reach.
fn threshold(sorted: &[f32], fraction: f32) -> f32 {
    let below = ((1.0 - f64::from(fraction)) * sorted.len() as f64).round() as usize;
    sorted[below.min(sorted.len() - 1)]
}

/// Raises heads that would keep less than the floor at the threshold: a head that keeps nothing is blind beyond its window.
fn lift_to_floor(gates: &mut [Option<Feedforward>], scores: &mut [Vec<f32>], options: &TrainOptions, kv_heads: usize) -> Result<()> {
    let mut all: Vec<f32> = scores.concat();
    all.sort_unstable_by(f32::total_cmp);
    let tau = threshold(&all, options.keep);
    for (layer, gate) in gates.iter_mut().enumerate() {
        let Some(gate) = gate else { continue };
        let mut bias = gate.bias.to_vec1::<f32>()?;
        for (head, bias) in bias.iter_mut().enumerate() {
            let scores = &mut scores[layer * kv_heads + head];
            if scores.is_empty() {
                continue;
            }
            let mut sorted = scores.clone();
            sorted.sort_unstable_by(f32::total_cmp);
            let lift = (tau - threshold(&sorted, options.floor)).max(0.0);
            *bias += lift;
            scores.iter_mut().for_each(|score| *score += lift);
        }
        gate.bias = Tensor::from_vec(bias, kv_heads, &Device::Cpu)?;
    }
    Ok(())
}

/// Pearson's.
fn correlation(a: &[f32], b: &[f32]) -> f64 {
    let mean = |values: &[f32]| values.iter().map(|x| f64::from(*x)).sum::<f64>() / values.len() as f64;
    let (mean_a, mean_b) = (mean(a), mean(b));
    let (mut ab, mut aa, mut bb) = (0f64, 0f64, 0f64);
    for (a, b) in a.iter().zip(b) {
        let (a, b) = (f64::from(*a) - mean_a, f64::from(*b) - mean_b);
        ab += a * b;
        aa += a * a;
        bb += b * b;
    }
    ab / (aa * bb).sqrt().max(1e-12)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn labels_are_mean_squares_of_both_readings_however_they_were_cut() {
        // Four tokens, a window of 1: token 0 has three later queries of the text, and four of the repetition.
        let (text, repetition) = ([[0.5f32, 0.0], [0.1, 0.4], [0.2, 0.2]], [[0.3f32, 0.0]; 4]);
        let mut whole = Squares::default();
        for (row, weights) in text.iter().chain(&repetition).enumerate() {
            let squares: Vec<f32> = weights.iter().map(|weight| weight * weight).collect();
            let one =
                if row < 3 { Squares { text: squares, repetition: Vec::new() } } else { Squares { text: Vec::new(), repetition: squares } };
            whole.add(&one);
        }
        let labels = whole.labels(4, 1);
        let expected = [((0.25 + 0.01 + 0.04) / 3.0 + 0.09f32).sqrt(), ((0.16 + 0.04) / 2.0f32).sqrt(), 0.0, 0.0];
        assert!(labels.iter().zip(expected).all(|(label, expected)| (label - expected).abs() < 1e-6), "{labels:?} {expected:?}");
        let mut sums = vec![0f32; 2];
        add_squares(&mut sums, &mut [0.0, 0.0, f32::NEG_INFINITY, 0.0]);
        assert!(sums.iter().all(|sum| (sum - 1.0 / 9.0).abs() < 1e-6), "{sums:?}");
    }

    #[test]
    fn thresholds_keep_what_they_say_and_heads_their_floor() {
        let sorted: Vec<f32> = (0..1000).map(|i| i as f32).collect();
        for fraction in [0.1, 0.5, 0.9] {
            let tau = threshold(&sorted, fraction);
            let kept = sorted.iter().filter(|score| **score >= tau).count();
            assert_eq!(kept, (1000.0 * fraction) as usize);
        }
        // Head 1 is far below head 0.
        let mut scores = vec![sorted.clone(), sorted.iter().map(|x| x - 5000.0).collect()];
        let mut gates = vec![Some(Feedforward {
            hidden: None,
            weight: Tensor::zeros((2, 3), DType::F32, &Device::Cpu).unwrap(),
            bias: Tensor::zeros(2, DType::F32, &Device::Cpu).unwrap(),
        })];
        let options = TrainOptions { keep: 0.5, floor: 0.1, ..TrainOptions::default() };
        lift_to_floor(&mut gates, &mut scores, &options, 2).unwrap();
        assert_eq!(scores[1].iter().filter(|score| **score >= 0.0).count(), 100);
        let bias = gates[0].as_ref().unwrap().bias.to_vec1::<f32>().unwrap();
        assert_eq!((bias[0], bias[1]), (0.0, scores[1][0] + 5000.0));
        assert!((correlation(&sorted, &sorted) - 1.0).abs() < 1e-9);
    }
}
