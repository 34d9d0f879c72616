use super::rows::{dot, numbers, rms_norm};
use crate::parallel;
use crate::simd::with_f32;
use candle_core::{Device, Result, Tensor, bail};

/// The gate of WG-KV (arXiv:2512.17452), as published: two layers of each head's own on its key before and after rope.
///
/// `sigmoid(w_2 . gelu(W_1 [norm(k before rope), norm(k)] + b_1) + b_2)`, 0 to 1. f32.
#[derive(Debug, Clone)]
pub struct KeyGate {
    /// `[head_dim]`
    pub pre_key_norm: Tensor,
    /// `[head_dim]`
    pub post_key_norm: Tensor,
    /// `[kv_heads * width, 2 * head_dim, 1]` and `[kv_heads * width]`
    pub conv1: (Tensor, Tensor),
    /// `[kv_heads, width, 1]` and `[kv_heads]`
    pub conv2: (Tensor, Tensor),
}

impl KeyGate {
    /// Keys before and after rope, both `[tokens, kv_heads, head_dim]` -> `[tokens, kv_heads]`
    ///
    /// # Errors
    /// If the shapes differ.
    pub fn score(&self, before_rope: &Tensor, after_rope: &Tensor) -> Result<Tensor> {
        let (tokens, kv_heads, head_dim) = after_rope.dims3()?;
        let [own_heads, own_dim] = self.shape()?;
        if [own_heads, own_dim] != [kv_heads, head_dim] || before_rope.dims() != after_rope.dims() {
            bail!("gate: made for {own_heads} heads of {own_dim}, got keys {:?} and {:?}", before_rope.dims(), after_rope.dims());
        }
        let (before, after) = (numbers(before_rope)?, numbers(after_rope)?);
        let (before_norm, after_norm) = (numbers(&self.pre_key_norm)?, numbers(&self.post_key_norm)?);
        let inner_bias = numbers(&self.conv1.1)?;
        let (outer, outer_bias) = (numbers(&self.conv2.0)?, numbers(&self.conv2.1)?);
        let width = self.conv2.0.dim(1)?;
        let score = |index: usize, inner: &[f32]| {
            let head = index % kv_heads;
            let mut x = before[index * head_dim..][..head_dim].to_vec();
            rms_norm(&mut x, &before_norm);
            x.extend_from_slice(&after[index * head_dim..][..head_dim]);
            rms_norm(&mut x[head_dim..], &after_norm);
            let rows = inner[head * width * 2 * head_dim..][..width * 2 * head_dim].chunks_exact(2 * head_dim);
            let hidden: Vec<f32> = rows.zip(&inner_bias[head * width..]).map(|(row, bias)| gelu(dot(row, &x) + bias)).collect();
            1.0 / (1.0 + (-dot(&outer[head * width..][..width], &hidden) - outer_bias[head]).exp())
        };
        let scores = with_f32(&self.conv1.0, |inner| Ok(parallel::map(tokens * kv_heads, |index| score(index, inner))))?;
        Tensor::from_vec(scores, (tokens, kv_heads), &Device::Cpu)
    }

    /// `[kv_heads, head_dim]`
    pub(super) fn shape(&self) -> Result<[usize; 2]> {
        let (kv_heads, width, _) = self.conv2.0.dims3()?;
        let head_dim = self.pre_key_norm.dims1()?;
        let shapes = [
            ("post_key_norm.weight", self.post_key_norm.dims(), vec![head_dim]),
            ("conv1.weight", self.conv1.0.dims(), vec![kv_heads * width, 2 * head_dim, 1]),
            ("conv1.bias", self.conv1.1.dims(), vec![kv_heads * width]),
            ("conv2.weight", self.conv2.0.dims(), vec![kv_heads, width, 1]),
            ("conv2.bias", self.conv2.1.dims(), vec![kv_heads]),
        ];
        for (name, got, want) in shapes {
            if got != want {
                bail!(
                    "{name} is {got:?}, not {want:?} as conv2.weight {:?} and pre_key_norm.weight [{head_dim}] ask for",
                    self.conv2.0.dims()
                );
            }
        }
        Ok([kv_heads, head_dim])
    }
}

/// With the error function, as in PyTorch's default.
fn gelu(x: f32) -> f32 {
    0.5 * x * (1.0 + candle_core::cpu::erf::erf_f32(x * std::f32::consts::FRAC_1_SQRT_2))
}
