//! The step between the products of a feedforward part, for many tokens.

use super::params::GateRowsParams;
use crate::config::Activation;
use candle_core::{DType, Result, Tensor, bail};
use sparse_attn::backend::cuda::{Kernels, Spread, address, uninitialised};

/// Numbers of a thread, and threads of a block.
const EACH: usize = 4;
const THREADS: usize = 256;

/// The kernels' number for an activation.
pub(super) fn code(activation: Activation) -> i32 {
    match activation {
        Activation::Silu => 0,
        Activation::GeluTanh => 1,
    }
}

/// `activation(gate) * up`, of one shape, f32; as `dtype`: f32, or bf16 for products that round to it anyway.
///
/// # Errors
/// If the shapes differ, or the device is out of memory.
pub(crate) fn gated(activation: Activation, gate: &Tensor, up: &Tensor, dtype: DType) -> Result<Tensor> {
    if gate.dims() != up.dims() || !gate.elem_count().is_multiple_of(EACH) {
        bail!("gated: {:?} and {:?} differ, or are no multiple of {EACH}", gate.shape(), up.shape());
    }
    let (gate, up) = (gate.contiguous()?, up.contiguous()?);
    let out = uninitialised(gate.shape(), dtype, gate.device())?;
    let params = GateRowsParams {
        gate: address(&gate)?,
        up: address(&up)?,
        out: address(&out)?,
        count: gate.elem_count() as i64,
        activation: code(activation),
        is_rounded: i32::from(dtype == DType::BF16),
    };
    let spread = Spread::new([gate.elem_count().div_ceil(EACH * THREADS), 1, 1], THREADS);
    // SAFETY: the tensors have this many numbers, and live until the stream frees them.
    unsafe { Kernels::of(gate.device())?.launch("gate_rows", spread, &params) }?;
    Ok(out)
}
