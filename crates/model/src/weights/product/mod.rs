//! Products of activations with matrices in ggml blocks.
//!
//! Activations become 8-bit integers with a scale for every 32; each weight row is then unpacked 64 numbers at a time
//! and multiplied in integers, straight from the checkpoint's own bytes: no second copy of the weights.

mod activations;
#[cfg(target_arch = "x86_64")]
mod avx512;
mod blocks;
#[cfg(target_arch = "x86_64")]
mod few;
#[cfg(target_arch = "x86_64")]
mod many;
#[cfg(target_arch = "x86_64")]
mod sixteen;

use super::{Arithmetic, Precision, SumOrder};
use activations::Activations;
use blocks::Format;
use candle_core::quantized::QTensor;
use candle_core::{Device, Result, Tensor};
#[cfg(target_arch = "x86_64")]
use sixteen::{LANES, Rows};
use sparse_attn::parallel::{Places, Unset};
use sparse_attn::simd::with_f32;
use std::ops::Range;

/// Weight rows that a thread takes at a time, at least.
const ROWS_AT_ONCE: usize = 16;

/// From this many tokens on, weights are unpacked once for all, where that takes vector code; fewer are multiplied here on every processor.
pub(crate) const MANY_TOKENS: usize = 16;

/// Whether [`multiply`] is the way for this matrix and that many tokens.
pub(super) fn supports(weight: &QTensor, tokens: usize, order: SumOrder) -> bool {
    let columns = weight.shape().dims().get(1).copied().unwrap_or(0);
    let fits = weight.device().is_cpu() && Format::of(weight.dtype()).is_some_and(|format| columns % format.multiple() == 0 && columns > 0);
    fits && (tokens < MANY_TOKENS || unpacks_fast() || order == SumOrder::Fixed)
}

/// Whether unpacked weights meet many tokens in vector code here.
pub(super) fn unpacks_fast() -> bool {
    #[cfg(target_arch = "x86_64")]
    return avx512::is_here();
    #[cfg(not(target_arch = "x86_64"))]
    false
}

/// `x W'` for several matrices that read the same `x` `[tokens, columns]`: `[tokens, rows]` each, f32. All must be
/// [`supports`]ed, and as wide as `x`.
///
/// # Errors
/// If a width differs or the matrices are not on the CPU.
pub(super) fn multiply(x: &Tensor, weights: &[&QTensor], arithmetic: Arithmetic) -> Result<Vec<Tensor>> {
    let (tokens, columns) = x.dims2()?;
    with_f32(x, |x| multiply_host(x, [tokens, columns], weights, arithmetic))
}

/// `x`: `[tokens, columns]`
fn multiply_host(x: &[f32], [tokens, columns]: [usize; 2], weights: &[&QTensor], arithmetic: Arithmetic) -> Result<Vec<Tensor>> {
    let mut products = multiply_rounded(x, [tokens, columns], weights, arithmetic.order)?;
    if arithmetic.precision == Precision::Int16 {
        let rounded = |row: &[f32]| Activations::new(row).values();
        let rest: Vec<f32> = x
            .chunks_exact(columns)
            .flat_map(|row| row.iter().zip(rounded(row)).map(|(x, rounded)| x - rounded).collect::<Vec<_>>())
            .collect();
        for (product, more) in products.iter_mut().zip(multiply_rounded(&rest, [tokens, columns], weights, arithmetic.order)?) {
            product.iter_mut().zip(more).for_each(|(sum, more)| *sum += more);
        }
    }
    products.into_iter().map(|out| Tensor::from_vec(out, (tokens, ()), &Device::Cpu)).collect()
}

/// [`multiply`] with activations in 8 bits.
fn multiply_rounded(x: &[f32], [tokens, columns]: [usize; 2], weights: &[&QTensor], order: SumOrder) -> Result<Vec<Vec<f32>>> {
    let (mut parts, mut outs) = (Vec::with_capacity(weights.len()), Vec::with_capacity(weights.len()));
    let mut total = 0;
    for weight in weights {
        let (rows, width) = weight.shape().dims2()?;
        let Some(format) = Format::of(weight.dtype()).filter(|format| width == columns && width % format.multiple() == 0) else {
            candle_core::bail!("product: {:?} {:?} does not fit activations {:?}", weight.dtype(), weight.shape(), [tokens, columns]);
        };
        let bytes = weight.data()?;
        let row_bytes = format.row_bytes(columns);
        if bytes.len() != rows * row_bytes {
            candle_core::bail!("product: {} bytes for {rows} rows of {row_bytes}", bytes.len());
        }
        parts.push(Part { format, bytes, row_bytes, rows: total..total + rows });
        outs.push(Unset::new(tokens * rows));
        total += rows;
    }
    let places: Vec<Places<f32>> = outs.iter_mut().map(Unset::places).collect();
    fill(x, columns, &parts, &places, order);
    // SAFETY: each row of each matrix met every token.
    Ok(outs.into_iter().map(|out| unsafe { out.set() }).collect())
}

/// Every row of every matrix against every token, into `outs` `[tokens, rows]`.
fn fill(x: &[f32], columns: usize, parts: &[Part<'_>], outs: &[Places<f32>], order: SumOrder) {
    #[cfg(target_arch = "x86_64")]
    if unpacks_fast() && (x.len() / columns >= MANY_TOKENS || order == SumOrder::Fixed) {
        return fill_by_sixteen(&many::Batch::new(x, columns), parts, outs);
    }
    fill_by_row(x, columns, parts, outs);
}

/// Each row against each token: in one order for any number of them.
fn fill_by_row(x: &[f32], columns: usize, parts: &[Part<'_>], outs: &[Places<f32>]) {
    let rows_of_x: Vec<Activations> = x.chunks_exact(columns).map(Activations::new).collect();
    let total = parts.last().map_or(0, |part| part.rows.end);
    let chunks = total.div_ceil(ROWS_AT_ONCE);
    candle_core::utils::barrier_pool().execute_chunked(chunks, |range| {
        let range = range.start * ROWS_AT_ONCE..total.min(range.end * ROWS_AT_ONCE);
        for (part, out) in parts.iter().zip(outs) {
            let here = range.start.max(part.rows.start)..range.end.min(part.rows.end);
            for row in here {
                let at = row - part.rows.start;
                let weight = &part.bytes[at * part.row_bytes..(at + 1) * part.row_bytes];
                for (token, x) in rows_of_x.iter().enumerate() {
                    let value = part.format.dot(weight, x);
                    // SAFETY: `out` holds tokens * rows numbers; each (token, row) is written by the one thread that
                    // execute_chunked gave this row to, and none is read until it returns.
                    unsafe { *out.at(token * part.rows.len() + at) = value };
                }
            }
        }
    });
}

/// Sixteen rows at a time: unpacked for all tokens, or against one after the other as they are unpacked. Both sum in one order.
#[cfg(target_arch = "x86_64")]
fn fill_by_sixteen(x: &many::Batch, parts: &[Part<'_>], outs: &[Places<f32>]) {
    let panels: Vec<(usize, usize)> =
        parts.iter().enumerate().flat_map(|(part, of)| (0..of.rows.len()).step_by(LANES).map(move |row| (part, row))).collect();
    candle_core::utils::barrier_pool().execute_chunked(panels.len(), |range| {
        let (mut panel, mut padded) = (many::Panel::default(), Vec::new());
        for (index, first) in &panels[range] {
            let (part, out) = (&parts[*index], &outs[*index]);
            let (rows, lanes) = (part.rows.len(), LANES.min(part.rows.len() - first));
            let mut bytes = &part.bytes[first * part.row_bytes..(first + lanes) * part.row_bytes];
            if lanes < LANES {
                padded.clear();
                padded.extend_from_slice(bytes);
                padded.resize(LANES * part.row_bytes, 0);
                bytes = &padded;
            }
            let sixteen = Rows { first: bytes.as_ptr(), row_bytes: part.row_bytes };
            // SAFETY: the caller asked for the instructions. Sixteen rows of x.columns are there. `out` holds tokens * rows numbers; these
            // columns of it are written by the one thread that got this panel.
            unsafe {
                if x.tokens < MANY_TOKENS {
                    for token in 0..x.tokens {
                        let products = few::multiply(part.format, sixteen, x, token);
                        (0..lanes).for_each(|lane| *out.at(token * rows + first + lane) = products[lane]);
                    }
                } else {
                    panel.fill(part.format, sixteen, x.columns);
                    many::multiply(part.format, &panel, x, out.at(*first), rows, lanes);
                }
            }
        }
    });
}

/// One of the matrices.
struct Part<'a> {
    format: Format,
    bytes: std::borrow::Cow<'a, [u8]>,
    row_bytes: usize,
    /// Of all rows.
    rows: Range<usize>,
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::quantized::GgmlDType;

    const FORMATS: [GgmlDType; 8] = [
        GgmlDType::Q4_0,
        GgmlDType::Q4_1,
        GgmlDType::Q5_0,
        GgmlDType::Q5_1,
        GgmlDType::Q8_0,
        GgmlDType::Q4K,
        GgmlDType::Q5K,
        GgmlDType::Q6K,
    ];

    #[test]
    fn many_tokens_give_what_one_gives() -> Result<()> {
        for dtype in FORMATS {
            let (rows, columns, tokens) = (37, 512, 29);
            let weight = QTensor::quantize(&Tensor::randn(0f32, 1.0, (rows, columns), &Device::Cpu)?, dtype)?;
            let x = Tensor::randn(0f32, 1.0, (tokens, columns), &Device::Cpu)?;
            let many = multiply(&x, &[&weight, &weight], Arithmetic::default())?;
            for token in 0..tokens {
                let one = multiply(&x.narrow(0, token, 1)?, &[&weight], Arithmetic::default())?;
                for many in &many {
                    let difference = (many.narrow(0, token, 1)? - &one[0])?.abs()?.flatten_all()?.max(0)?.to_scalar::<f32>()?;
                    assert!(difference < 2e-4, "{dtype:?} token {token}: {difference}");
                }
            }
        }
        Ok(())
    }

    #[test]
    fn in_a_fixed_order_a_token_is_the_same_in_any_company() -> Result<()> {
        let arithmetic = Arithmetic { order: SumOrder::Fixed, ..Arithmetic::default() };
        for dtype in FORMATS {
            let (rows, columns, tokens) = (37, 512, 29);
            let weight = QTensor::quantize(&Tensor::randn(0f32, 1.0, (rows, columns), &Device::Cpu)?, dtype)?;
            let x = Tensor::randn(0f32, 1.0, (tokens, columns), &Device::Cpu)?;
            let all = multiply(&x, &[&weight], arithmetic)?.remove(0).to_vec2::<f32>()?;
            for chunk in [1, 2, 3, 5, 16, 28] {
                for first in (0..tokens).step_by(chunk) {
                    let count = chunk.min(tokens - first);
                    let part = multiply(&x.narrow(0, first, count)?, &[&weight], arithmetic)?.remove(0).to_vec2::<f32>()?;
                    assert_eq!(part, all[first..first + count], "{dtype:?}: {count} tokens from {first} on");
                }
            }
        }
        Ok(())
    }

    #[test]
    fn two_parts_are_exact() -> Result<()> {
        for tokens in [1, 20] {
            let weight = QTensor::quantize(&Tensor::randn(0f32, 1.0, (40, 512), &Device::Cpu)?, GgmlDType::Q4_1)?;
            let x = Tensor::randn(0f32, 1.0, (tokens, 512), &Device::Cpu)?;
            let exact = x.matmul(&weight.dequantize(&Device::Cpu)?.t()?)?;
            let error = |precision| -> Result<f32> {
                (&multiply(&x, &[&weight], Arithmetic { precision, ..Arithmetic::default() })?[0] - &exact)?
                    .abs()?
                    .flatten_all()?
                    .max(0)?
                    .to_scalar::<f32>()
            };
            let (rounded, exact) = (error(Precision::Int8)?, error(Precision::Int16)?);
            assert!(rounded > 0.05 && exact < 0.005, "{tokens} tokens: {rounded}, {exact}");
        }
        Ok(())
    }

    #[test]
    fn every_format_is_the_product_of_the_unpacked_matrix() -> Result<()> {
        for dtype in FORMATS {
            let (rows, columns) = (70, 768);
            let dense: Vec<f32> =
                (0..rows * columns).map(|i| ((i * 7919 % 2003) as f32 / 1000.0 - 1.0) * (1.0 + (i / 97 % 5) as f32)).collect();
            let weight = QTensor::quantize(&Tensor::from_vec(dense, (rows, columns), &Device::Cpu)?, dtype)?;
            let unpacked = weight.dequantize(&Device::Cpu)?.to_vec2::<f32>()?;
            let x: Vec<f32> = (0..3 * columns).map(|i| ((i * 31 % 1009) as f32 / 500.0 - 1.0) * (1.0 + (i / 40 % 7) as f32)).collect();
            assert!(supports(&weight, 1, SumOrder::Fastest));
            let x_tensor = Tensor::from_vec(x.clone(), (3, columns), &Device::Cpu)?;
            let out = multiply(&x_tensor, &[&weight, &weight], Arithmetic::default())?;
            assert_eq!(out[0].to_vec2::<f32>()?, out[1].to_vec2::<f32>()?);
            let out = out[0].to_vec2::<f32>()?;
            let format = Format::of(dtype).expect("supported");
            for token in 0..3 {
                let x = &x[token * columns..(token + 1) * columns];
                let activations = Activations::new(x);
                let rounded = activations.values();
                for row in 0..rows {
                    // With activations rounded as the kernel rounds them, only the order of sums is left.
                    let exact: f64 = rounded.iter().zip(&unpacked[row]).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum();
                    let size: f64 = rounded.iter().zip(&unpacked[row]).map(|(a, b)| (f64::from(*a) * f64::from(*b)).abs()).sum();
                    let got = out[token][row];
                    assert!((f64::from(got) - exact).abs() <= 1e-5 * size, "{dtype:?} {token} {row}: {got}, not {exact}");
                    // The plain code is the other instruction sets' twin.
                    let bytes = weight.data()?;
                    let plain = format.dot_plain(&bytes[row * format.row_bytes(columns)..][..format.row_bytes(columns)], &activations);
                    assert!((f64::from(plain) - exact).abs() <= 1e-5 * size, "{dtype:?} plain: {plain}, not {exact}");
                }
                let error: f64 = x.iter().zip(&rounded).map(|(a, b)| f64::from((a - b).abs())).fold(0.0, f64::max);
                let largest = x.iter().fold(0f32, |max, x| max.max(x.abs()));
                assert!(error <= f64::from(largest) / 127.0, "{error}");
            }
        }
        Ok(())
    }
}
