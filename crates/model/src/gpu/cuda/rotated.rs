//! Rotary position embedding of many tokens.

use super::params::{AnglesParams, RotateParams};
use candle_core::{DType, Result, Tensor, bail};
use sparse_attn::Step;
use sparse_attn::backend::cuda::{Kernels, Spread, address, by_tokens, uninitialised};

/// Pairs of a thread, and threads of a block.
const EACH: usize = 4;
const THREADS: usize = 256;

/// cos and sin of the angles of the tokens of `step`, times `magnitude`: `[tokens, frequencies]` each, where frequencies are radians per position,
/// `[frequencies]` f64.
///
/// # Errors
/// If they have another dtype, or their device is out of memory.
pub(crate) fn angles(frequencies: &Tensor, magnitude: f64, step: Step) -> Result<[Tensor; 2]> {
    let (pairs, device) = (frequencies.dims1()?, frequencies.device());
    if frequencies.dtype() != DType::F64 {
        bail!("cuda: frequencies in {:?}, they should be f64", frequencies.dtype());
    }
    let table = || uninitialised((step.len, pairs), DType::F32, device);
    let (cos, sin) = (table()?, table()?);
    let params = AnglesParams {
        frequencies: address(frequencies)?,
        cos: address(&cos)?,
        sin: address(&sin)?,
        start: step.start as i32,
        tokens: step.len as i32,
        pairs: pairs as i32,
        magnitude: magnitude as f32,
    };
    let spread = Spread::new([cos.elem_count().div_ceil(THREADS), 1, 1], THREADS);
    // SAFETY: the tensors have these shapes, and live until the stream frees them.
    unsafe { Kernels::of(device)?.launch("rotation_angles", spread, &params) }?;
    Ok([cos, sin])
}

/// Rotates `q` `[tokens, q_heads, head_dim]` and `k` `[tokens, kv_heads, head_dim]`, f32, by angles `cos` and `sin` `[tokens, head_dim / 2]`: queries
/// come back as `dtype`, f32, f16 or bf16.
///
/// # Errors
/// If shapes do not fit each other, or the device is out of memory.
pub(crate) fn rotated(q: &Tensor, k: &Tensor, [cos, sin]: [&Tensor; 2], dtype: DType) -> Result<(Tensor, Tensor)> {
    let ((tokens, q_heads, head_dim), (_, kv_heads, _)) = (q.dims3()?, k.dims3()?);
    let angles = [tokens, head_dim / 2];
    if k.dims() != [tokens, kv_heads, head_dim] || cos.dims() != angles || sin.dims() != angles || !head_dim.is_multiple_of(2 * EACH) {
        bail!("cuda: rotation of {:?} and {:?} by {:?} and {:?}", q.dims(), k.dims(), cos.dims(), sin.dims());
    }
    let name = match dtype {
        DType::F32 => "rotate_rows_f32",
        DType::F16 => "rotate_rows_f16",
        DType::BF16 => "rotate_rows_bf16",
        other => bail!("cuda: rotation to {other:?}"),
    };
    let ((q, q_at, q_row), (_k, k_at, k_row)) = (by_tokens(q)?, by_tokens(k)?);
    let outs = (uninitialised(q.shape(), dtype, q.device())?, uninitialised(k.shape(), DType::F32, k.device())?);
    let params = RotateParams {
        q: q_at,
        k: k_at,
        cos: address(cos)?,
        sin: address(sin)?,
        q_out: address(&outs.0)?,
        k_out: address(&outs.1)?,
        q_row: q_row as i32,
        k_row: k_row as i32,
        tokens: tokens as i32,
        q_heads: q_heads as i32,
        kv_heads: kv_heads as i32,
        head_dim: head_dim as i32,
    };
    let threads = tokens * (q_heads + kv_heads) * (head_dim / (2 * EACH));
    // SAFETY: the tensors have these shapes, and live until the stream frees them.
    unsafe { Kernels::of(q.device())?.launch_following(name, Spread::new([threads.div_ceil(THREADS), 1, 1], THREADS), &params) }?;
    Ok(outs)
}
