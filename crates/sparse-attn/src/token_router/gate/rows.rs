//! Products of which every row comes from its token alone.

use crate::simd::with_f32;
use crate::{parallel, vectorised};
use candle_core::{DType, Device, Result, Tensor, bail};

/// Tokens that a thread takes at a time.
const TOKENS_AT_ONCE: usize = 16;

/// `x . weight'`, `[tokens, width] . [rows, width]'`, on the host, one token at a time: a product of many may add in another order than that
/// of one, and a score at the threshold would then depend on how a prompt was cut.
pub(super) fn times(x: &Tensor, weight: &Tensor) -> Result<Tensor> {
    affine(x, weight, &[])
}

/// The same and `bias` `[rows]`, where there is one.
pub(super) fn affine(x: &Tensor, weight: &Tensor, bias: &[f32]) -> Result<Tensor> {
    let width = x.dim(1)?;
    if weight.dims2()?.1 != width {
        bail!("gate: made for a width of {}, got {width}", weight.dims()[1]);
    }
    let count = weight.dim(0)?;
    let out = with_f32(x, |x| {
        with_f32(weight, |columns| {
            Ok(parallel::filled(x.len() / width * count, TOKENS_AT_ONCE * count, |part, out| {
                let rows = x[part * TOKENS_AT_ONCE * width..].chunks_exact(width);
                for (row, out) in rows.zip(out.chunks_exact_mut(count)) {
                    out.iter_mut().zip(columns.chunks_exact(width)).for_each(|(out, column)| *out = dot(row, column));
                    out.iter_mut().zip(bias).for_each(|(out, bias)| *out += bias);
                }
            }))
        })
    })?;
    Tensor::from_vec(out, (x.dim(0)?, count), &Device::Cpu)
}

/// All numbers, as f32.
pub(super) fn numbers(tensor: &Tensor) -> Result<Vec<f32>> {
    tensor.to_dtype(DType::F32)?.flatten_all()?.to_vec1()
}

/// `x` divided by the root of its mean square and `1e-6`, times `weight`.
pub(super) fn rms_norm(x: &mut [f32], weight: &[f32]) {
    let mean = x.iter().map(|x| x * x).sum::<f32>() / x.len() as f32;
    let factor = 1.0 / (mean + 1e-6).sqrt();
    x.iter_mut().zip(weight).for_each(|(x, weight)| *x *= factor * weight);
}

vectorised! {
    pub(super) fn dot(a: &[f32], b: &[f32]) -> f32 = dot_loop;
}

/// In 16 sums, which the compiler turns into vectors.
#[inline(always)]
fn dot_loop(a: &[f32], b: &[f32]) -> f32 {
    let mut sums = [0f32; 16];
    let (a_chunks, b_chunks) = (a.chunks_exact(16), b.chunks_exact(16));
    let rest: f32 = a_chunks.remainder().iter().zip(b_chunks.remainder()).map(|(x, y)| x * y).sum();
    for (a, b) in a_chunks.zip(b_chunks) {
        for i in 0..16 {
            sums[i] = a[i].mul_add(b[i], sums[i]);
        }
    }
    sums.iter().sum::<f32>() + rest
}
