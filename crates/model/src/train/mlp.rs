//! A gate with a hidden layer, by AdamW on a sample of the tokens, from where the linear one ends.

use super::{LEAST, Seen};
use candle_core::{DType, Device, Result, Tensor, Var};
use candle_nn::{AdamW, Optimizer, ParamsAdamW};
use half::f16;
use rand::seq::SliceRandom;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use sparse_attn::token_router::Feedforward;
use std::ops::Range;

/// Tokens that are kept to learn from, at the most: every so-manieth of the texts.
pub(super) const MOST_SAMPLES: usize = 48 * 1024;

/// Tokens of a step, and steps.
const BATCH: usize = 512;
const STEPS: usize = 800;

/// The first learning rate; it falls to nothing along a cosine.
const RATE: f64 = 2e-3;
const DECAY: f64 = 1e-2;

/// Tokens of one layer, as they are learnt from.
#[derive(Debug)]
pub(super) struct Samples {
    every: usize,
    seen: usize,
    hidden: Vec<f16>, // [samples, width]
    labels: Vec<f32>, // [samples, kv_heads], logarithms
}

impl Samples {
    /// Of texts with so many tokens.
    pub(super) fn new(tokens: usize) -> Self {
        Self { every: tokens.div_ceil(MOST_SAMPLES).max(1), seen: 0, hidden: Vec::new(), labels: Vec::new() }
    }

    /// Bytes for texts of so many tokens.
    pub(super) fn bytes(tokens: usize, width: usize, kv_heads: usize) -> usize {
        tokens.min(MOST_SAMPLES) * (width * size_of::<f16>() + kv_heads * size_of::<f32>())
    }

    /// Adds some of the tokens `useful` of what was seen of a text.
    pub(super) fn add(&mut self, seen: &Seen, useful: Range<usize>, width: usize) {
        for token in useful {
            if self.seen.is_multiple_of(self.every) {
                self.hidden.extend(seen.hidden[token * width..][..width].iter().map(|x| f16::from_f32(*x)));
                self.labels.extend(seen.labels.iter().map(|labels| labels[token].max(LEAST).ln()));
            }
            self.seen += 1;
        }
    }

    /// A gate of `width` hidden numbers and two more for each head, which start as `linear`: a number is what GELU makes of it, less
    /// what it makes of its opposite. `weight . gelu(hidden x + bias) + bias`, the hidden weights such as 16 bits hold.
    pub(super) fn fit(&self, linear: &Feedforward, width: usize, seed: u64) -> Result<Feedforward> {
        let (kv_heads, columns) = linear.weight.dims2()?;
        let count = self.labels.len() / kv_heads;
        let scale = self.deviations(columns);
        let mut random = ChaCha8Rng::seed_from_u64(seed);
        let of_linear = linear.weight.to_vec2::<f32>()?;
        let rows = width + 2 * kv_heads;
        let mut hidden = Vec::with_capacity(rows * columns); // of features divided by their deviations
        for row in &of_linear {
            for sign in [1.0, -1.0] {
                hidden.extend(row.iter().zip(&scale).map(|(weight, scale)| sign * weight * scale));
            }
        }
        let spread = 1.0 / (columns as f32).sqrt();
        hidden.extend((0..width * columns).map(|_| random.random_range(-spread..spread)));
        let mut outer = vec![0f32; kv_heads * rows];
        for head in 0..kv_heads {
            (outer[head * rows + 2 * head], outer[head * rows + 2 * head + 1]) = (1.0, -1.0);
        }
        let device = &Device::Cpu;
        let hidden = Var::from_vec(hidden, (rows, columns), device)?;
        let inner_bias = Var::zeros(rows, DType::F32, device)?;
        let outer = Var::from_vec(outer, (kv_heads, rows), device)?;
        let bias = Var::from_tensor(&linear.bias)?;
        let variables = vec![hidden.clone(), inner_bias.clone(), outer.clone(), bias.clone()];
        let mut optimiser = AdamW::new(variables, ParamsAdamW { lr: RATE, weight_decay: DECAY, ..ParamsAdamW::default() })?;
        let inverse: Vec<f32> = scale.iter().map(|scale| 1.0 / scale).collect();
        let mut order: Vec<usize> = (0..count).collect();
        let mut next = count;
        for step in 0..STEPS {
            if next + BATCH > count {
                order.shuffle(&mut random);
                next = 0;
            }
            let (x, y) = self.batch(&order[next..count.min(next + BATCH)], &inverse, kv_heads)?;
            next += BATCH;
            let made = x.matmul(&hidden.t()?)?.broadcast_add(&inner_bias)?.gelu_erf()?;
            let made = made.matmul(&outer.t()?)?.broadcast_add(&bias)?;
            optimiser.set_learning_rate(RATE * 0.5 * (1.0 + (std::f64::consts::PI * step as f64 / STEPS as f64).cos()));
            optimiser.backward_step(&(made - y)?.sqr()?.mean_all()?)?;
        }
        let hidden = hidden.broadcast_mul(&Tensor::from_vec(inverse, columns, device)?)?.to_dtype(DType::F16)?.to_dtype(DType::F32)?;
        let plain = |variable: &Var| variable.as_detached_tensor();
        Ok(Feedforward { hidden: Some((hidden.detach(), plain(&inner_bias))), weight: plain(&outer), bias: plain(&bias) })
    }

    /// The root of the mean square of each feature; not much below the mean of all.
    fn deviations(&self, columns: usize) -> Vec<f32> {
        let mut squares = vec![0f64; columns];
        for row in self.hidden.chunks_exact(columns) {
            squares.iter_mut().zip(row).for_each(|(sum, x)| *sum += f64::from(x.to_f32()).powi(2));
        }
        let count = (self.hidden.len() / columns).max(1) as f64;
        let least = 0.05 * (squares.iter().sum::<f64>() / count / columns as f64).sqrt() + 1e-6;
        squares.iter().map(|sum| ((sum / count).sqrt() + least) as f32).collect()
    }

    /// Features times `inverse`, and labels, of some tokens.
    fn batch(&self, tokens: &[usize], inverse: &[f32], kv_heads: usize) -> Result<(Tensor, Tensor)> {
        let columns = inverse.len();
        let rows = tokens.iter().flat_map(|token| self.hidden[token * columns..][..columns].iter().zip(inverse));
        let x: Vec<f32> = rows.map(|(x, inverse)| x.to_f32() * inverse).collect();
        let y: Vec<f32> = tokens.iter().flat_map(|token| self.labels[token * kv_heads..][..kv_heads].iter().copied()).collect();
        Ok((Tensor::from_vec(x, (tokens.len(), columns), &Device::Cpu)?, Tensor::from_vec(y, (tokens.len(), kv_heads), &Device::Cpu)?))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Two heads whose labels a line fits in part: `|x_0|` is what the hidden layer is for.
    fn samples(tokens: usize) -> (Samples, Feedforward) {
        let x = Tensor::randn(0f32, 1.0, (tokens, 6), &Device::Cpu).unwrap();
        let rows = x.to_vec2::<f32>().unwrap();
        let label = |f: &dyn Fn(&[f32]) -> f32| rows.iter().map(|row| f(row).exp()).collect::<Vec<f32>>();
        let labels = vec![label(&|x| x[0].abs() - 3.0), label(&|x| 0.5 * x[1] - 2.0)];
        let seen = Seen { hidden: rows.concat(), labels };
        let mut samples = Samples::new(tokens);
        samples.add(&seen, 0..tokens, 6);
        let mut sums = super::super::sums::Sums::new(6, 2);
        sums.add(&seen, 0..tokens, 6).unwrap();
        (samples, sums.solve(1e-6, 6, 2).unwrap())
    }

    /// The mean square of what a gate misses of each head's labels.
    fn missed(samples: &Samples, gate: &Feedforward) -> Vec<f32> {
        let x: Vec<f32> = samples.hidden.iter().map(|x| x.to_f32()).collect();
        let scores = gate.score(&Tensor::from_vec(x, (samples.labels.len() / 2, 6), &Device::Cpu).unwrap()).unwrap();
        let labels = Tensor::from_slice(&samples.labels, scores.shape(), &Device::Cpu).unwrap();
        (scores - labels).unwrap().sqr().unwrap().mean(0).unwrap().to_vec1().unwrap()
    }

    #[test]
    fn a_hidden_layer_learns_what_a_line_cannot() {
        let (samples, linear) = samples(6000);
        let gate = samples.fit(&linear, 16, 1).unwrap();
        let (before, after) = (missed(&samples, &linear), missed(&samples, &gate));
        assert!(before[0] > 0.3 && after[0] < 0.15 * before[0], "{before:?} -> {after:?}");
        assert!(after[1] < 0.01, "what was right stays so: {before:?} -> {after:?}");
        // The same seed, the same gate.
        assert_eq!(missed(&samples, &samples.fit(&linear, 16, 1).unwrap()), after);
    }

    #[test]
    fn samples_are_spread_over_long_texts() {
        let seen = Seen { hidden: vec![0.5; 10 * 3], labels: vec![vec![0.1; 10]] };
        let mut samples = Samples::new(3 * MOST_SAMPLES);
        (0..4).for_each(|_| samples.add(&seen, 1..10, 3));
        assert_eq!((samples.seen, samples.labels.len(), samples.hidden.len()), (36, 12, 36));
    }
}
