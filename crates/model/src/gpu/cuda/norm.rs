//! The step between layers, for many tokens.

use super::super::Along;
use super::params::{NormParams, UnpackNormParams};
use super::parts::Part;
use super::unpack;
use candle_core::{DType, Result, Tensor, bail};
use sparse_attn::Place;
use sparse_attn::backend::cuda::{Kernels, Spread, address};

/// Widest residual stream that kernels norm, in numbers: four times what a thread block of the most threads takes at a time.
pub(super) const WIDEST: usize = 16 * 1024;

/// Adds `y` to `x` in its place, or the norm of it by a weight; both `[tokens, columns]`, f32. Returns the norm of the sum by `weight`, f32
/// or bf16, in `place`; weights that are to be unpacked are `along`, and where bf16 is to be kept, it is, there or in a copy.
///
/// # Errors
/// If shapes differ, there is no kernel for that width, or the device is out of memory.
pub(crate) fn add_norm(
    x: &Tensor,
    y: Option<(&Tensor, Option<&Tensor>)>,
    weight: &Tensor,
    eps: f32,
    dtype: DType,
    place: &mut Place,
    along: Along<'_>,
) -> Result<Tensor> {
    let (tokens, columns) = x.dims2()?;
    let y = y.map(|(y, norm)| Ok::<_, candle_core::Error>((y.contiguous()?, norm))).transpose()?;
    let others = y.iter().any(|(y, norm)| y.shape() != x.shape() || norm.is_some_and(|norm| norm.dims() != [columns]));
    if others || weight.dims() != [columns] || columns > WIDEST || !columns.is_multiple_of(4) {
        let y = y.as_ref().map(|(y, _)| y.shape());
        bail!("cuda: norm of {:?} with {y:?} by {:?}, of up to {WIDEST} numbers", x.shape(), weight.shape());
    }
    let is_rounded = dtype == DType::BF16;
    let part = along.kept.filter(|_| is_rounded).map(|parts| parts.take([tokens, columns], x.device())).transpose()?.flatten();
    let mut take = || place.take((tokens, columns), dtype, x.device());
    let (out, copy) = match part {
        Some(Part::Outcome(part)) => (part, 0),
        Some(Part::Copy(to)) => (take()?, to),
        None => (take()?, 0),
    };
    let params = NormParams {
        x: address(x)?,
        y: y.as_ref().map_or(Ok(0), |(y, _)| address(y))?,
        y_weight: y.as_ref().and_then(|(_, norm)| *norm).map_or(Ok(0), address)?,
        weight: address(weight)?,
        out: if is_rounded { 0 } else { address(&out)? },
        out_q8: 0,
        rounded: if is_rounded { address(&out)? } else { 0 },
        copy,
        columns: columns as i32,
        eps,
        ..NormParams::default()
    };
    // Alone, and beside weights that are unpacked.
    let (name, beside, threads) = match columns {
        ..=1024 => ("add_norm_rows_256_1", Some("unpack_and_norm_rows_256_1"), unpack::THREADS),
        1025..=4096 => ("add_norm_rows_256_4", Some("unpack_and_norm_rows_256_4"), unpack::THREADS),
        _ => ("add_norm_rows_1024_4", None, 1024),
    };
    let kernels = Kernels::of(x.device())?;
    if let Some(unpacked) = along.unpacked {
        if let Some(beside) = beside
            && let Some(unpack) = unpacked.take_due()
        {
            // A launch less: what short prompts of small models wait for.
            let spread = Spread::new([unpack::blocks(&unpack) + tokens, 1, 1], threads);
            // SAFETY: the tensors have these shapes, and live until the stream frees them, here and below.
            unsafe { kernels.launch_following(beside, spread, &UnpackNormParams { unpack, norm: params }) }?;
            return Ok(out);
        }
        unpacked.launch()?;
    }
    // SAFETY: as above.
    unsafe { kernels.launch_following(name, Spread::new([tokens, 1, 1], threads), &params) }?;
    Ok(out)
}
