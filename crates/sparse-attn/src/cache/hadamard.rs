//! The rotation of keys that are stored in 8 bits, and of the queries that read them.
//!
//! A few dimensions of a key are far larger than the others in many models (Qwen 2.5 has biases there), and a scale that holds them
//! leaves little of their group. The Hadamard transform spreads each dimension over its whole group, and changes no product of two
//! vectors that are both transformed. Source of the idea: QuaRot, arXiv:2404.00456. What it spares is in models/README.md.

use super::{GROUP, Pool};
use crate::{parallel, vectorised};
use candle_core::{Result, Tensor};
use std::borrow::Cow;

/// Rows that a thread transforms at a time.
const ROWS_AT_ONCE: usize = 64;

impl Pool {
    /// `rows` `[.., width]` as the pool's rows are meant, or those as they were before: transformed, or as they are.
    pub(crate) fn transformed<'a>(&self, rows: impl Into<Cow<'a, [f32]>>) -> Cow<'a, [f32]> {
        let rows = rows.into();
        if !self.is_transformed() {
            return rows;
        }
        let width = self.width();
        Cow::Owned(parallel::filled(rows.len(), ROWS_AT_ONCE * width, |part, out| {
            out.copy_from_slice(&rows[part * ROWS_AT_ONCE * width..][..out.len()]);
            transform(out, width);
        }))
    }
}

vectorised! {
    /// The orthonormal Hadamard transform of each whole [`GROUP`] of dimensions of each row, in place; it is its own inverse.
    fn transform(rows: &mut [f32], width: usize) -> () = transform_loop;
}

#[inline(always)]
fn transform_loop(rows: &mut [f32], width: usize) {
    for row in rows.chunks_exact_mut(width) {
        for group in row.as_chunks_mut::<GROUP>().0 {
            let mut step = 1;
            while step < GROUP {
                let old = *group;
                for i in 0..GROUP {
                    group[i] = if i & step == 0 { old[i] + old[i ^ step] } else { old[i ^ step] - old[i] };
                }
                step *= 2;
            }
            group.iter_mut().for_each(|x| *x *= FACTOR);
        }
    }
}

/// `1 / sqrt(GROUP)`
const FACTOR: f32 = 0.176_776_7;

/// The same as a product with a matrix, on any device: `rows` `[n, width]`, f32.
pub(super) fn product(rows: &Tensor) -> Result<Tensor> {
    let (count, width) = rows.dims2()?;
    let whole = width / GROUP * GROUP;
    let sign = |at: usize| if ((at / GROUP) & (at % GROUP)).count_ones().is_multiple_of(2) { FACTOR } else { -FACTOR };
    let matrix: Vec<f32> = (0..GROUP * GROUP).map(sign).collect();
    let matrix = Tensor::from_vec(matrix, (GROUP, GROUP), rows.device())?;
    let groups = rows.narrow(1, 0, whole)?.contiguous()?.reshape((count * whole / GROUP, GROUP))?;
    let turned = if whole > 0 { groups.matmul(&matrix)? } else { groups };
    Tensor::cat(&[turned.reshape((count, whole))?, rows.narrow(1, whole, width - whole)?], 1)
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::Device;

    #[test]
    fn it_is_a_rotation_and_its_own_inverse() -> Result<()> {
        for width in [20, 32, 64, 80, 128] {
            let x = Tensor::randn(0f32, 1.0, (5, width), &Device::Cpu)?;
            let mut turned = x.flatten_all()?.to_vec1::<f32>()?;
            transform(&mut turned, width);
            let near = |a: &[f32], b: &[f32]| a.iter().zip(b).all(|(a, b)| (a - b).abs() < 1e-4);
            assert!(near(&turned, &product(&x)?.flatten_all()?.to_vec1::<f32>()?));
            let dots =
                |rows: &[f32]| -> Vec<f32> { rows.chunks(width).map(|row| row.iter().zip(rows).map(|(a, b)| a * b).sum()).collect() };
            assert!(near(&dots(&turned), &dots(&x.flatten_all()?.to_vec1::<f32>()?)));
            transform(&mut turned, width);
            assert!(near(&turned, &x.flatten_all()?.to_vec1::<f32>()?));
        }
        Ok(())
    }

    #[test]
    fn a_large_dimension_is_spread_over_its_group() {
        let mut row = [0f32; 2 * GROUP];
        (row[5], row[40]) = (32.0, 1.0);
        transform(&mut row, 2 * GROUP);
        assert!(row[..GROUP].iter().all(|x| (x.abs() - 32.0 * FACTOR).abs() < 1e-5));
        assert!(row[GROUP..].iter().all(|x| (x.abs() - FACTOR).abs() < 1e-6));
    }
}
