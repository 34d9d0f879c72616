//! The gate of an MLP: `activation(gate) * up` in one pass.

use crate::config::Activation;
use candle_core::{CpuStorage, CustomOp2, Layout, Result, Shape, Tensor, bail};
use sparse_attn::simd::exp;
use sparse_attn::{parallel, vectorised};

/// `activation(gate) * up`, both `[tokens, width]`, f32.
///
/// # Errors
/// If the shapes differ.
pub(super) fn gated(activation: Activation, gate: &Tensor, up: &Tensor) -> Result<Tensor> {
    if gate.device().is_cpu() {
        return gate.contiguous()?.apply_op2_no_bwd(&up.contiguous()?, &Gated(activation));
    }
    match activation {
        Activation::Silu => gate.silu()? * up,
        Activation::GeluTanh => gate.gelu()? * up,
    }
}

/// Numbers that a thread takes at a time.
const CHUNK: usize = 4096;

struct Gated(Activation);

impl CustomOp2 for Gated {
    fn name(&self) -> &'static str {
        "gated"
    }

    fn cpu_fwd(&self, gate: &CpuStorage, gate_layout: &Layout, up: &CpuStorage, up_layout: &Layout) -> Result<(CpuStorage, Shape)> {
        if gate_layout.shape() != up_layout.shape() {
            bail!("gated: gate {:?}, up {:?}", gate_layout.shape(), up_layout.shape());
        }
        let (count, shape) = (gate_layout.shape().elem_count(), gate_layout.shape().clone());
        let gate = &gate.as_slice::<f32>()?[gate_layout.start_offset()..][..count];
        let up = &up.as_slice::<f32>()?[up_layout.start_offset()..][..count];
        let mut out = vec![0f32; count];
        let mut chunks: Vec<_> = out.chunks_mut(CHUNK).zip(gate.chunks(CHUNK).zip(up.chunks(CHUNK))).collect();
        parallel::for_each_mut(&mut chunks, || (), |(), _, (out, (gate, up))| gated_chunk(self.0, gate, up, out));
        Ok((CpuStorage::F32(out), shape))
    }
}

vectorised! {
    fn gated_chunk(activation: Activation, gate: &[f32], up: &[f32], out: &mut [f32]) -> () = gated_loop;
}

#[inline(always)]
fn gated_loop(activation: Activation, gate: &[f32], up: &[f32], out: &mut [f32]) {
    let rows = out.iter_mut().zip(gate).zip(up);
    match activation {
        Activation::Silu => rows.for_each(|((out, gate), up)| *out = gate * sigmoid(*gate) * up),
        // 1 + tanh(u) = 2 sigmoid(2u)
        Activation::GeluTanh => rows.for_each(|((out, gate), up)| {
            let u = (2.0 / std::f32::consts::PI).sqrt() * gate * (0.044715 * gate).mul_add(*gate, 1.0);
            *out = gate * sigmoid(2.0 * u) * up;
        }),
    }
}

#[inline(always)]
fn sigmoid(x: f32) -> f32 {
    let x = if x < -87.0 { -87.0 } else { x };
    1.0 / (1.0 + exp(-x))
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::Device;

    #[test]
    fn it_is_what_candle_computes() -> Result<()> {
        for activation in [Activation::Silu, Activation::GeluTanh] {
            let gate = Tensor::arange(-9000f32, 9000.0, &Device::Cpu)?.affine(0.01, 0.0)?.reshape((100, 180))?;
            let up = Tensor::randn(0f32, 1.0, (100, 180), &Device::Cpu)?;
            let want = match activation {
                Activation::Silu => gate.silu()?,
                Activation::GeluTanh => gate.gelu()?,
            };
            let difference = (gated(activation, &gate, &up)? - (want * &up)?)?.abs()?.flatten_all()?.max(0)?.to_scalar::<f32>()?;
            assert!(difference < 1e-4, "{activation:?}: {difference}");
            let nan = gated(activation, &(&gate * f64::NAN)?, &up)?.flatten_all()?.to_vec1::<f32>()?;
            assert!(nan.iter().all(|x| x.is_nan()));
        }
        Ok(())
    }
}
