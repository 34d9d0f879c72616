//! The step between the products of a feedforward part, for many tokens.

use super::params::GateRowsParams;
use crate::config::Activation;
use candle_core::{DType, Result, Tensor, bail};
use sparse_attn::Place;
use sparse_attn::backend::cuda::{Kernels, Spread, address, by_tokens};

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

/// `activation(gate) * up`, `[tokens, columns]` both, f32; as `dtype`: f32, or bf16 for products that round to it anyway; in `place`.
///
/// # Errors
/// If the shapes differ, or the device is out of memory.
pub(crate) fn gated(activation: Activation, gate: &Tensor, up: &Tensor, dtype: DType, place: &mut Place) -> Result<Tensor> {
    let (tokens, columns) = gate.dims2()?;
    if gate.dims() != up.dims() || !columns.is_multiple_of(EACH) {
        bail!("gated: {:?} and {:?} differ, or are no multiple of {EACH}", gate.shape(), up.shape());
    }
    let ((gate, gate_at, gate_row), (_up, up_at, up_row)) = (by_tokens(gate)?, by_tokens(up)?);
    let out = place.take((tokens, columns), dtype, gate.device())?;
    let params = GateRowsParams {
        gate: gate_at,
        up: up_at,
        out: address(&out)?,
        count: gate.elem_count() as i64,
        columns: columns as i32,
        gate_row: gate_row as i32,
        up_row: up_row as i32,
        activation: code(activation),
        is_rounded: i32::from(dtype == DType::BF16),
    };
    let spread = Spread::new([gate.elem_count().div_ceil(EACH * THREADS), 1, 1], THREADS);
    // SAFETY: the tensors have this many numbers, and live until the stream frees them.
    unsafe { Kernels::of(gate.device())?.launch_following("gate_rows", spread, &params) }?;
    Ok(out)
}
