//! The steps between products, on the host: one pass each, on all threads. A GPU runs candle's own operations, or a kernel of its own.

use crate::config::Activation;
use crate::gpu;
use candle_core::{CpuStorage, CustomOp2, CustomOp3, DType, InplaceOp2, Layout, Result, Shape, Tensor, bail};
use sparse_attn::simd::exp;
use sparse_attn::{Place, parallel, vectorised};

/// `activation(gate) * up`, of one shape, f32, on the host in the place of `gate`, which nobody else may hold: these are a model's widest
/// rows. On a GPU as `dtype`, f32 or bf16, in `place`.
///
/// # Errors
/// If the shapes differ.
pub(super) fn gated(activation: Activation, gate: Tensor, up: &Tensor, dtype: DType, place: &mut Place) -> Result<Tensor> {
    if gate.device().is_cpu() {
        let gate = gate.contiguous()?;
        gate.inplace_op2(&up.contiguous()?, &Gated(activation))?;
        return Ok(gate);
    }
    gpu::gated(activation, &gate, up, dtype, place)
}

/// `a + b`, of one shape, f32.
///
/// # Errors
/// If the shapes differ.
pub(crate) fn add(a: &Tensor, b: &Tensor) -> Result<Tensor> {
    if a.device().is_cpu() { a.contiguous()?.apply_op2_no_bwd(&b.contiguous()?, &Add) } else { a + b }
}

/// `x / sqrt(mean(x^2) + eps) * weight` over the last axis of `x`, f32.
///
/// # Errors
/// If the widths differ.
pub(super) fn rms_norm(x: &Tensor, weight: &Tensor, eps: f32) -> Result<Tensor> {
    let x = x.contiguous()?;
    if x.device().is_cpu() { x.apply_op2_no_bwd(weight, &RmsNorm { eps }) } else { candle_nn::ops::rms_norm(&x, weight, eps) }
}

/// Rotates `q` and `k` `[tokens, heads, head_dim]`: the pair `(x[i], x[i + head_dim / 2])` of a token by its i-th angle, `cos` and `sin`
/// `[tokens, head_dim / 2]`; f32. On a GPU `q` comes back as `dtype`.
///
/// # Errors
/// If the shapes differ.
pub(super) fn rotate(q: &Tensor, k: &Tensor, cos: &Tensor, sin: &Tensor, dtype: DType) -> Result<(Tensor, Tensor)> {
    let one = |x: &Tensor| x.contiguous()?.apply_op3_no_bwd(cos, sin, &Rotate);
    if q.device().is_cpu() { Ok((one(q)?, one(k)?)) } else { gpu::rotated(q, k, [cos, sin], dtype) }
}

/// Numbers that a thread takes at a time, about.
const CHUNK: usize = 4096;

/// What a contiguous tensor holds.
fn numbers<'a>(storage: &'a CpuStorage, layout: &Layout) -> Result<&'a [f32]> {
    Ok(&storage.as_slice::<f32>()?[layout.start_offset()..][..layout.shape().elem_count()])
}

/// Fills `count` numbers, some rows of `width` at a time: `fill(first row, rows)`.
fn fill_rows(count: usize, width: usize, fill: impl Fn(usize, &mut [f32]) + Sync) -> CpuStorage {
    let rows = (CHUNK / width.max(1)).max(1);
    CpuStorage::F32(parallel::filled(count, rows * width.max(1), |index, chunk| fill(index * rows, chunk)))
}

/// Of two tensors that must have one shape.
fn one_shape(name: &str, a: &Layout, b: &Layout) -> Result<Shape> {
    if a.shape() != b.shape() {
        bail!("{name}: {:?} and {:?} differ", a.shape(), b.shape());
    }
    Ok(a.shape().clone())
}

struct Gated(Activation);

impl InplaceOp2 for Gated {
    fn name(&self) -> &'static str {
        "gated"
    }

    fn cpu_fwd(&self, gate: &mut CpuStorage, gate_layout: &Layout, up: &CpuStorage, up_layout: &Layout) -> Result<()> {
        one_shape("gated", gate_layout, up_layout)?;
        let CpuStorage::F32(gate) = gate else { bail!("gated: the gate is not f32") };
        let gate = &mut gate[gate_layout.start_offset()..][..gate_layout.shape().elem_count()];
        let mut parts: Vec<_> = gate.chunks_mut(CHUNK).zip(numbers(up, up_layout)?.chunks(CHUNK)).collect();
        parallel::for_each_mut(&mut parts, || (), |(), _, (gate, up)| gated_chunk(self.0, gate, up));
        Ok(())
    }
}

struct Add;

impl CustomOp2 for Add {
    fn name(&self) -> &'static str {
        "add"
    }

    fn cpu_fwd(&self, a: &CpuStorage, a_layout: &Layout, b: &CpuStorage, b_layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let shape = one_shape("add", a_layout, b_layout)?;
        let (a, b) = (numbers(a, a_layout)?, numbers(b, b_layout)?);
        let fill = |at: usize, out: &mut [f32]| add_chunk(&a[at..at + out.len()], &b[at..at + out.len()], out);
        Ok((fill_rows(a.len(), 1, fill), shape))
    }
}

struct RmsNorm {
    eps: f32,
}

impl CustomOp2 for RmsNorm {
    fn name(&self) -> &'static str {
        "rms-norm"
    }

    fn cpu_fwd(&self, x: &CpuStorage, x_layout: &Layout, weight: &CpuStorage, weight_layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let shape = x_layout.shape().clone();
        let (x, weight) = (numbers(x, x_layout)?, numbers(weight, weight_layout)?);
        if shape.dims().last() != Some(&weight.len()) || weight.is_empty() {
            bail!("rms-norm: x {shape:?}, {} weights", weight.len());
        }
        let fill = |row: usize, out: &mut [f32]| norm_rows(&x[row * weight.len()..][..out.len()], weight, self.eps, out);
        Ok((fill_rows(x.len(), weight.len(), fill), shape))
    }
}

struct Rotate;

impl CustomOp3 for Rotate {
    fn name(&self) -> &'static str {
        "rotate"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        x_layout: &Layout,
        cos: &CpuStorage,
        cos_layout: &Layout,
        sin: &CpuStorage,
        sin_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (tokens, heads, head_dim) = x_layout.shape().dims3()?;
        let half = head_dim / 2;
        if head_dim != 2 * half || cos_layout.dims() != [tokens, half] || sin_layout.dims() != [tokens, half] {
            bail!("rotate: x {:?}, cos {:?}, sin {:?}", x_layout.shape(), cos_layout.shape(), sin_layout.shape());
        }
        let (x, cos, sin) = (numbers(x, x_layout)?, numbers(cos, cos_layout)?, numbers(sin, sin_layout)?);
        let fill = |row: usize, out: &mut [f32]| {
            for (token, (x, out)) in (row..).zip(x[row * heads * head_dim..].chunks(heads * head_dim).zip(out.chunks_mut(heads * head_dim)))
            {
                let at = token * half..(token + 1) * half;
                rotate_heads(x, &cos[at.clone()], &sin[at], out);
            }
        };
        Ok((fill_rows(x.len(), heads * head_dim, fill), x_layout.shape().clone()))
    }
}

vectorised! {
    fn gated_chunk(activation: Activation, gate: &mut [f32], up: &[f32]) -> () = gated_loop;
    fn add_chunk(a: &[f32], b: &[f32], out: &mut [f32]) -> () = add_loop;
    fn norm_rows(x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) -> () = norm_loop;
    /// Heads of one token.
    fn rotate_heads(x: &[f32], cos: &[f32], sin: &[f32], out: &mut [f32]) -> () = rotate_loop;
}

#[inline(always)]
fn gated_loop(activation: Activation, gate: &mut [f32], up: &[f32]) {
    let rows = gate.iter_mut().zip(up);
    match activation {
        Activation::Silu => rows.for_each(|(gate, up)| *gate *= sigmoid(*gate) * up),
        // 1 + tanh(u) = 2 sigmoid(2u)
        Activation::GeluTanh => rows.for_each(|(gate, up)| {
            let u = (2.0 / std::f32::consts::PI).sqrt() * *gate * (0.044715 * *gate).mul_add(*gate, 1.0);
            *gate *= sigmoid(2.0 * u) * up;
        }),
    }
}

#[inline(always)]
fn sigmoid(x: f32) -> f32 {
    let x = if x < -87.0 { -87.0 } else { x };
    1.0 / (1.0 + exp(-x))
}

#[inline(always)]
fn add_loop(a: &[f32], b: &[f32], out: &mut [f32]) {
    for ((out, a), b) in out.iter_mut().zip(a).zip(b) {
        *out = a + b;
    }
}

#[inline(always)]
fn norm_loop(x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
    const LANES: usize = 16;
    for (x, out) in x.chunks_exact(weight.len()).zip(out.chunks_exact_mut(weight.len())) {
        let mut lanes = [0f32; LANES];
        let (chunks, rest) = x.as_chunks::<LANES>();
        for chunk in chunks {
            for i in 0..LANES {
                lanes[i] = chunk[i].mul_add(chunk[i], lanes[i]);
            }
        }
        let squares = lanes.iter().sum::<f32>() + rest.iter().map(|x| x * x).sum::<f32>();
        let factor = 1.0 / (squares / weight.len() as f32 + eps).sqrt();
        for ((out, x), weight) in out.iter_mut().zip(x).zip(weight) {
            *out = x * factor * weight;
        }
    }
}

#[inline(always)]
fn rotate_loop(x: &[f32], cos: &[f32], sin: &[f32], out: &mut [f32]) {
    let half = cos.len();
    for (x, out) in x.chunks_exact(2 * half).zip(out.chunks_exact_mut(2 * half)) {
        let ((a, b), (out_a, out_b)) = (x.split_at(half), out.split_at_mut(half));
        for i in 0..half {
            out_a[i] = a[i] * cos[i] - b[i] * sin[i];
            out_b[i] = a[i] * sin[i] + b[i] * cos[i];
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::Device;

    fn difference(a: &Tensor, b: &Tensor) -> Result<f32> {
        (a - b)?.abs()?.flatten_all()?.max(0)?.to_scalar::<f32>()
    }

    #[test]
    fn the_gate_is_what_candle_computes() -> Result<()> {
        for activation in [Activation::Silu, Activation::GeluTanh] {
            let gate = Tensor::arange(-9000f32, 9000.0, &Device::Cpu)?.affine(0.01, 0.0)?.reshape((100, 180))?;
            let up = Tensor::randn(0f32, 1.0, (100, 180), &Device::Cpu)?;
            let want = match activation {
                Activation::Silu => gate.silu()?,
                Activation::GeluTanh => gate.gelu()?,
            };
            let off = difference(&gated(activation, gate.copy()?, &up, DType::F32, &mut Place::default())?, &(want * &up)?)?;
            assert!(off < 1e-4, "{activation:?}: {off}");
            let nan = gated(activation, (&gate * f64::NAN)?, &up, DType::F32, &mut Place::default())?.flatten_all()?.to_vec1::<f32>()?;
            assert!(nan.iter().all(|x| x.is_nan()));
        }
        Ok(())
    }

    #[test]
    fn norm_rotation_and_sum_are_what_candle_computes() -> Result<()> {
        for (tokens, heads, head_dim) in [(1, 3, 8), (50, 5, 64), (7, 9, 96)] {
            let x = Tensor::randn(0f32, 1.0, (tokens, heads, head_dim), &Device::Cpu)?;
            let y = Tensor::randn(0f32, 1.0, (tokens, heads, head_dim), &Device::Cpu)?;
            let weight = Tensor::randn(0f32, 1.0, head_dim, &Device::Cpu)?;
            assert!(difference(&rms_norm(&x, &weight, 1e-5)?, &candle_nn::ops::rms_norm(&x, &weight, 1e-5)?)? < 1e-5);
            let angles = Tensor::randn(0f32, 3.0, (tokens, head_dim / 2), &Device::Cpu)?;
            let want = candle_nn::rotary_emb::rope_thd(&x.unsqueeze(0)?, &angles.cos()?, &angles.sin()?)?.squeeze(0)?;
            let (q, k) = rotate(&x, &x.narrow(1, 0, 1)?, &angles.cos()?, &angles.sin()?, DType::F32)?;
            assert!(difference(&q, &want)? < 1e-5 && difference(&k, &want.narrow(1, 0, 1)?)? < 1e-5);
            assert_eq!(difference(&add(&x, &y)?, &(&x + &y)?)?, 0.0);
        }
        let (a, b) =
            (Tensor::zeros((2, 3), candle_core::DType::F32, &Device::Cpu)?, Tensor::zeros((3, 2), candle_core::DType::F32, &Device::Cpu)?);
        assert!(add(&a, &b).is_err() && rms_norm(&a, &b.flatten_all()?, 1e-5).is_err());
        Ok(())
    }
}
