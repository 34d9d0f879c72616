//! Training a token router: a linear gate for every head, by ridge regression in closed form.
//!
//! The label of a token is how much it is missed once it leaves the window: the largest attention that any later query beyond
//! the window gives to it, over the queries of its head's group; its logarithm is what the gate learns to predict from the
//! attention input. One ordinary pass over a text gives all labels (KVzap, arXiv:2601.07891); where the model is then asked to
//! repeat the text, labels also know of what a later question may need (KVzip, arXiv:2505.23416). Nothing but sums is kept
//! of a text, so they may be as many as there is time for.

mod sums;

use crate::CausalLm;
use crate::calibrate::Calibrated;
use crate::router_file::RouterFile;
use crate::weights::hex;
use candle_core::{DType, Device, Result, Tensor, bail};
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
    /// The kept fraction that the threshold is set for.
    pub keep: f32,
    /// The least that a head keeps, as a fraction.
    pub floor: f32,
    /// Tokens computed at once.
    pub chunk: usize,
    /// Where what was learnt so far is kept, so that the same training goes on from it: when it is stopped, and every few minutes.
    pub state: Option<PathBuf>,
}

impl Default for TrainOptions {
    fn default() -> Self {
        Self { repeat: Vec::new(), window: 256, sinks: 4, ridge: 1e-3, keep: 0.5, floor: 0.05, chunk: 512, state: None }
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

/// Attention inputs and labels of the running text, one layer.
#[derive(Debug, Default)]
struct Seen {
    hidden: Vec<f32>,      // [tokens, width]
    labels: Vec<Vec<f32>>, // [kv_heads][tokens]
}

/// Collects them as the model reads.
#[derive(Debug)]
struct Labels {
    window: usize,
    layers: Vec<Mutex<Seen>>,
}

impl Labels {
    fn new(layers: usize, window: usize) -> Self {
        Self { window, layers: (0..layers).map(|_| Mutex::default()).collect() }
    }

    /// What was seen of a layer; it is forgotten here.
    fn take(&self, layer: usize) -> Seen {
        self.layers[layer].lock().map(|mut seen| std::mem::take(&mut *seen)).unwrap_or_default()
    }
}

vectorised! {
    /// Each label becomes the softmax of its score where that is more; `scores` are left as exponentials.
    fn raise_labels(labels: &mut [f32], scores: &mut [f32]) -> () = raise_loop;
}

#[inline(always)]
fn raise_loop(labels: &mut [f32], scores: &mut [f32]) {
    let max = scores.iter().fold(f32::NEG_INFINITY, |max, score| max.max(*score));
    scores.iter_mut().for_each(|score| *score = exp(*score - max));
    let factor = 1.0 / scores.iter().map(|weight| f64::from(*weight)).sum::<f64>() as f32;
    for (label, weight) in labels.iter_mut().zip(scores) {
        let weight = *weight * factor;
        *label = if weight > *label { weight } else { *label };
    }
}

impl Observer for Labels {
    fn attended(&self, seen: Attended<'_>) -> Result<()> {
        if seen.store.sliding_window().is_some() {
            return Ok(()); // reads no more than its window, and keeps no more
        }
        let shape = seen.store.shape();
        let (head_dim, group_size, step) = (shape.head_dim(), shape.group_size(), seen.step);
        let on_host = |head: usize| -> Result<Vec<f32>> {
            let (positions, keys) = seen.store.admitted_keys(head, 0..step.end())?;
            let keys = Tensor::from_vec(keys, (positions.len(), head_dim), &Device::Cpu)?;
            let q = seen.q.narrow(1, head * group_size, group_size)?.to_dtype(DType::F32)?.contiguous()?;
            let scores = (q.reshape((step.len * group_size, head_dim))?.matmul(&keys.t()?)? * f64::from(seen.scale))?;
            let mut scores = scores.flatten_all()?.to_vec1::<f32>()?; // [tokens * group_size, end]
            let mut labels = vec![0f32; step.end()];
            for (row, scores) in scores.chunks_exact_mut(step.end()).enumerate() {
                let t = step.start + row / group_size;
                // Beyond the window of this query.
                let far = (t + 1).saturating_sub(self.window);
                raise_labels(&mut labels[..far], &mut scores[..=t]);
            }
            Ok(labels)
        };
        let labels = if seen.q.device().is_cpu() {
            (0..shape.kv_heads()).into_par_iter().map(on_host).collect::<Result<Vec<_>>>()?
        } else {
            on_device(&seen, self.window)?
        };
        let hidden = seen.hidden.to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>()?;
        if let Ok(mut layer) = self.layers[seen.layer].lock() {
            layer.hidden.extend(hidden);
            layer.labels.resize(shape.kv_heads(), Vec::new());
            for (all, new) in layer.labels.iter_mut().zip(labels) {
                all.resize(new.len(), 0.0);
                all.iter_mut().zip(new).for_each(|(all, new)| *all = all.max(new));
            }
        }
        Ok(())
    }
}

/// The labels that the queries of a step give to the keys of each head, where those are: plain tensor code.
fn on_device(seen: &Attended<'_>, window: usize) -> Result<Vec<Vec<f32>>> {
    let (shape, step, device) = (seen.store.shape(), seen.step, seen.q.device());
    let (group_size, rows) = (shape.group_size(), step.len * shape.group_size());
    let queries: Vec<f32> = (0..rows).map(|row| (step.start + row / group_size) as f32).collect();
    let keys = Tensor::arange(0f32, step.end() as f32, device)?.unsqueeze(0)?;
    let distance = Tensor::from_vec(queries, (rows, 1), device)?.broadcast_sub(&keys)?; // [rows, end]
    let (seen_keys, far) = (distance.ge(0f64)?, distance.ge(window as f64)?.to_dtype(DType::F32)?);
    let hidden = Tensor::full(f32::NEG_INFINITY, distance.shape(), device)?;
    let of_head = |head: usize| -> Result<Vec<f32>> {
        let (_, keys, _) = seen.store.rows(head, step.end())?;
        let q = seen.q.narrow(1, head * group_size, group_size)?.to_dtype(DType::F32)?.contiguous()?.reshape((rows, shape.head_dim()))?;
        let scores = (q.matmul(&keys.t()?)? * f64::from(seen.scale))?;
        let weights = candle_nn::ops::softmax_last_dim(&seen_keys.where_cond(&scores, &hidden)?)?;
        (weights * &far)?.max(0)?.to_vec1()
    };
    (0..shape.kv_heads()).map(of_head).collect()
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
    let state = options.state.as_deref();
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
            sums.add(&labels.take(layer), useful(text.len(), options), width)?;
        }
    }
    if let Some(path) = state.filter(|_| known < texts.len()) {
        sums::save(path, &key, texts.len(), &sums)?;
    }
    let solve = |sums: Option<Sums>| sums.map(|sums| sums.solve(options.ridge, width, kv_heads)).transpose();
    let mut gates = sums.into_iter().map(solve).collect::<Result<Vec<_>>>()?;
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

/// Tokens that teach something: not the sinks, and with enough queries beyond their window, which a repetition gives to all.
fn useful(tokens: usize, options: &TrainOptions) -> Range<usize> {
    let end = if options.repeat.is_empty() { tokens.saturating_sub(2 * options.window) } else { tokens };
    options.sinks.min(tokens)..end
}

/// Reads a text and collects attention inputs and labels.
fn read(model: &dyn CausalLm, dense: &RoutedAttention, text: &[u32], options: &TrainOptions) -> Result<Arc<Labels>> {
    if useful(text.len(), options).is_empty() {
        bail!("a text of {} tokens is too short for a window of {}", text.len(), options.window);
    }
    let labels = Arc::new(Labels::new(model.config().num_layers, options.window));
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
