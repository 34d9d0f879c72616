//! Rotary position embedding, with the ways to stretch it.

use super::fused;
use crate::config::{RopeConfig, RopeScaling};
use crate::gpu;
use crate::weights::{Name, Scope};
use candle_core::{DType, Device, Result, Tensor};
use sparse_attn::Step;
use std::sync::OnceLock;

/// The frequencies of one kind of layer.
#[derive(Debug, Clone)]
pub struct Rope {
    inverse_frequencies: Vec<f64>, // [head_dim / 2]
    /// The same on a GPU, once one asked for them.
    on_device: OnceLock<Tensor>,
    magnitude: f64,
}

/// cos and sin of the positions of a step, `[tokens, head_dim / 2]`: made once per step, used by every layer.
#[derive(Debug, Clone)]
pub struct RopeTables {
    cos: Tensor,
    sin: Tensor,
}

impl Rope {
    /// Frequencies as the config says.
    pub fn new(config: &RopeConfig, head_dim: usize) -> Self {
        let plain: Vec<f64> = (0..head_dim / 2).map(|i| config.theta.powf(-((2 * i) as f64) / head_dim as f64)).collect();
        let (inverse_frequencies, magnitude) = match config.scaling {
            RopeScaling::None => (plain, 1.0),
            RopeScaling::Linear { factor } => (plain.iter().map(|f| f / factor).collect(), 1.0),
            RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_context } => {
                let stretch = |f: &f64| llama3(*f, factor, low_freq_factor, high_freq_factor, original_context as f64);
                (plain.iter().map(stretch).collect(), 1.0)
            }
            RopeScaling::Yarn { factor, original_context, beta_fast, beta_slow, attention_factor } => {
                (yarn(&plain, config.theta, factor, original_context as f64, beta_fast, beta_slow), attention_factor)
            }
        };
        Self { inverse_frequencies, on_device: OnceLock::new(), magnitude }
    }

    /// [`Rope::new`], divided by the factors that llama.cpp's converter bakes Llama 3's scaling into.
    ///
    /// # Errors
    /// If the factors have another shape.
    pub fn load(scope: &Scope<'_>, config: &RopeConfig, head_dim: usize) -> Result<Self> {
        let mut rope = Self::new(config, head_dim);
        // Hugging Face checkpoints have no such tensor: the name there matches nothing.
        let factors = Name { hf: "rope_freqs.weight", gguf: "rope_freqs.weight" };
        if let Some(factors) = scope.optional_tensor(factors, &[head_dim / 2])? {
            for (frequency, factor) in rope.inverse_frequencies.iter_mut().zip(factors.to_vec1::<f32>()?) {
                *frequency /= f64::from(factor);
            }
        }
        Ok(rope)
    }

    /// Radians per position of each pair, `[head_dim / 2]`.
    pub fn inverse_frequencies(&self) -> &[f64] {
        &self.inverse_frequencies
    }

    /// [`Rope::inverse_frequencies`] on `device`, `[head_dim / 2]` f64: brought once to the first one that asks, which is the model's.
    ///
    /// # Errors
    /// If it is out of memory.
    pub(crate) fn frequencies_on(&self, device: &Device) -> Result<Tensor> {
        if let Some(frequencies) = self.on_device.get().filter(|frequencies| frequencies.device().same_device(device)) {
            return Ok(frequencies.clone());
        }
        let frequencies = Tensor::new(self.inverse_frequencies(), device)?;
        self.on_device.get_or_init(|| frequencies.clone());
        Ok(frequencies)
    }

    /// What rotated pairs are multiplied with.
    pub fn magnitude(&self) -> f64 {
        self.magnitude
    }

    /// The tables of a step.
    ///
    /// # Errors
    /// If the device is out of memory.
    pub fn tables(&self, step: Step, device: &Device) -> Result<RopeTables> {
        if device.is_cuda() {
            // A long prompt's take a millisecond and more on the host, while the GPU has nothing to do.
            let [cos, sin] = gpu::angles(&self.frequencies_on(device)?, self.magnitude, step)?;
            return Ok(RopeTables { cos, sin });
        }
        let angles = || (step.start..step.end()).flat_map(|t| self.inverse_frequencies.iter().map(move |f| t as f64 * f));
        let tensor = |values: Vec<f32>| Tensor::from_vec(values, (step.len, self.inverse_frequencies.len()), device);
        Ok(RopeTables {
            cos: tensor(angles().map(|angle| (angle.cos() * self.magnitude) as f32).collect())?,
            sin: tensor(angles().map(|angle| (angle.sin() * self.magnitude) as f32).collect())?,
        })
    }
}

impl RopeTables {
    /// cos and sin.
    pub fn angles(&self) -> [&Tensor; 2] {
        [&self.cos, &self.sin]
    }

    /// Rotates queries and keys `[tokens, heads, head_dim]`, f32: the pair `(x[i], x[i + head_dim / 2])` by the i-th angle. A GPU rounds queries to
    /// `dtype`.
    ///
    /// # Errors
    /// If the shapes differ.
    pub fn apply(&self, q: &Tensor, k: &Tensor, dtype: DType) -> Result<(Tensor, Tensor)> {
        fused::rotate(q, k, &self.cos, &self.sin, dtype)
    }
}

/// Llama 3.1's rule for one frequency. Source: `_compute_llama3_parameters` of transformers.
fn llama3(frequency: f64, factor: f64, low: f64, high: f64, original: f64) -> f64 {
    let wavelength = std::f64::consts::TAU / frequency;
    if wavelength < original / high {
        frequency
    } else if wavelength > original / low {
        frequency / factor
    } else {
        let smooth = (original / wavelength - low) / (high - low);
        (1.0 - smooth) * frequency / factor + smooth * frequency
    }
}

/// YaRN, arXiv:2309.00071. Source of the rounding: `_compute_yarn_parameters` of transformers.
fn yarn(plain: &[f64], theta: f64, factor: f64, original: f64, beta_fast: f64, beta_slow: f64) -> Vec<f64> {
    let head_dim = 2.0 * plain.len() as f64;
    // The pair that makes `rotations` turns over the trained length.
    let pair = |rotations: f64| head_dim * (original / (rotations * std::f64::consts::TAU)).ln() / (2.0 * theta.ln());
    let low = pair(beta_fast).floor().max(0.0);
    let high = pair(beta_slow).ceil().min(head_dim - 1.0);
    let width = if high == low { 0.001 } else { high - low };
    let stretched = |i: usize| ((i as f64 - low) / width).clamp(0.0, 1.0);
    plain.iter().enumerate().map(|(i, f)| f / factor * stretched(i) + f * (1.0 - stretched(i))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frequencies(scaling: RopeScaling, theta: f64, head_dim: usize) -> Vec<f64> {
        Rope::new(&RopeConfig { theta, scaling }, head_dim).inverse_frequencies
    }

    fn close(got: &[f64], want: &[(usize, f64)]) {
        for (i, want) in want {
            assert!((got[*i] - want).abs() < 1e-6 * want, "pair {i}: {} instead of {want}", got[*i]);
        }
    }

    #[test]
    fn yarn_keeps_fast_pairs_and_stretches_slow_ones() {
        // Qwen2.5's own setting.
        let scaling = RopeScaling::Yarn { factor: 4.0, original_context: 32768, beta_fast: 32.0, beta_slow: 1.0, attention_factor: 1.0 };
        let (got, plain) = (frequencies(scaling, 1e6, 128), frequencies(RopeScaling::None, 1e6, 128));
        // low = floor(128 ln(32768 / 64 pi) / 2 ln 1e6) = 23, high = ceil(128 ln(32768 / 2 pi) / 2 ln 1e6) = 40.
        close(&got, &[(0, plain[0]), (23, plain[23]), (40, plain[40] / 4.0), (63, plain[63] / 4.0)]);
        close(&got, &[(30, plain[30] * (10.0 / 17.0) + plain[30] / 4.0 * (7.0 / 17.0))]);
    }

    #[test]
    fn linear_and_llama3_scale_as_published() {
        let plain = frequencies(RopeScaling::None, 5e5, 128);
        close(&frequencies(RopeScaling::Linear { factor: 8.0 }, 5e5, 128), &[(0, plain[0] / 8.0), (63, plain[63] / 8.0)]);
        let llama3 = RopeScaling::Llama3 { factor: 8.0, low_freq_factor: 1.0, high_freq_factor: 4.0, original_context: 8192 };
        let got = frequencies(llama3, 5e5, 128);
        // Wavelength of pair 28 is 1956 < 8192/4, of pair 36 it is 10087 > 8192; pair 32 (4443) is on the ramp.
        let smooth = (8192.0 * plain[32] / std::f64::consts::TAU - 1.0) / 3.0;
        close(&got, &[(28, plain[28]), (36, plain[36] / 8.0), (32, plain[32] * (smooth + (1.0 - smooth) / 8.0))]);
    }
}
