//! The two kernels, over any lanes and any storage.
//!
//! In loops over indices: a closure would not be compiled for the instructions of the function around it.

#![allow(clippy::needless_range_loop, reason = "lists in registers, side by side")]

use super::lanes::Lanes;
#[cfg(target_arch = "x86_64")]
use super::lanes::{Avx2, Avx512};
use super::{Numbers, Rows};
use crate::cache::{GROUP, LANES};
use half::{bf16, f16};

/// A stored row and where its weights stand.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Column {
    /// The row.
    pub(crate) slot: u32,
    /// The index of its weight in each row of weights.
    pub(crate) weight: u32,
}

/// Where numbers come from, 16 at a time. `at`: of the first number; `scale_at`: of its scale.
trait Source<L: Lanes>: Copy {
    /// A scale for several numbers, loaded once.
    type Scale: Copy;
    unsafe fn scales(self, scale_at: usize) -> Self::Scale;
    unsafe fn one_scale(self, scale_at: usize) -> Self::Scale;
    unsafe fn load(self, at: usize, scale: Self::Scale) -> L;
    /// One number.
    unsafe fn one(self, at: usize, scale_at: usize) -> f32;
}

macro_rules! plain_source {
    ($type:ty, $load:ident, $one:expr) => {
        impl<L: Lanes> Source<L> for *const $type {
            type Scale = ();

            #[inline(always)]
            unsafe fn scales(self, _scale_at: usize) {}

            #[inline(always)]
            unsafe fn one_scale(self, _scale_at: usize) {}

            #[inline(always)]
            unsafe fn load(self, at: usize, _scale: ()) -> L {
                // SAFETY: the caller's: the numbers from `at` on are there.
                unsafe { L::$load(self.add(at)) }
            }

            #[inline(always)]
            unsafe fn one(self, at: usize, _scale_at: usize) -> f32 {
                // SAFETY: the caller's: the number is there.
                $one(unsafe { *self.add(at) })
            }
        }
    };
}

plain_source!(f32, load, |x: f32| x);
plain_source!(f16, load_f16, f16::to_f32);
plain_source!(bf16, load_bf16, bf16::to_f32);

#[derive(Clone, Copy)]
struct Q8 {
    integers: *const i8,
    scales: *const f16,
}

impl<L: Lanes> Source<L> for Q8 {
    type Scale = L;

    #[inline(always)]
    unsafe fn scales(self, scale_at: usize) -> L {
        // SAFETY: the caller's: the scales are there.
        unsafe { L::load_f16(self.scales.add(scale_at)) }
    }

    #[inline(always)]
    unsafe fn one_scale(self, scale_at: usize) -> L {
        // SAFETY: the caller's: the scale is there.
        unsafe { L::splat((*self.scales.add(scale_at)).to_f32()) }
    }

    #[inline(always)]
    unsafe fn load(self, at: usize, scale: L) -> L {
        // SAFETY: the caller's: the numbers from `at` on are there.
        unsafe { L::load_i8(self.integers.add(at)).times(scale) }
    }

    #[inline(always)]
    unsafe fn one(self, at: usize, scale_at: usize) -> f32 {
        // SAFETY: the caller's: the number and its scale are there.
        unsafe { f32::from(*self.integers.add(at)) * (*self.scales.add(scale_at)).to_f32() }
    }
}

/// Runs `$body` with `$source` the numbers of `$rows`.
macro_rules! with_source {
    ($rows:expr, $source:ident => $body:expr) => {
        match $rows.numbers {
            Numbers::F32(values) => {
                let $source = values.as_ptr();
                $body
            }
            Numbers::F16(values) => {
                let $source = values.as_ptr();
                $body
            }
            Numbers::Bf16(values) => {
                let $source = values.as_ptr();
                $body
            }
            Numbers::Q8(values, scales) => {
                let $source = Q8 { integers: values.as_ptr().cast(), scales: scales.as_ptr() };
                $body
            }
        }
    };
}

/// See [`super::dot_tiles`], which checks the shapes.
#[inline(always)]
pub(super) unsafe fn dot_tiles<L: Lanes>(rows: Rows<'_>, q: &[f32], tiles: &[u32], out: &mut [f32]) {
    // SAFETY: the caller checked that the tiles are inside the pool.
    with_source!(rows, source => unsafe { dot_all::<L, _>(source, rows.width, q, tiles, out) });
}

#[inline(always)]
unsafe fn dot_all<L: Lanes, S: Source<L>>(source: S, width: usize, q: &[f32], tiles: &[u32], out: &mut [f32]) {
    let (count, stride) = (q.len() / width, tiles.len() * LANES);
    let mut row = 0;
    while row < count {
        let (q, out) = (&q[row * width..], &mut out[row * stride..]);
        let left = count - row;
        // SAFETY: as many rows are left as each handles.
        row += unsafe {
            match left {
                8.. if L::WIDE => dot_rows::<L, S, 8>(source, width, q, tiles, out),
                4.. if L::WIDE => dot_rows::<L, S, 4>(source, width, q, tiles, out),
                3 if L::WIDE => dot_rows::<L, S, 3>(source, width, q, tiles, out),
                2.. => dot_rows::<L, S, 2>(source, width, q, tiles, out),
                _ => dot_rows::<L, S, 1>(source, width, q, tiles, out),
            }
        };
    }
}

/// `R` rows of `q` against all tiles; returns `R`.
#[inline(always)]
unsafe fn dot_rows<L: Lanes, S: Source<L>, const R: usize>(source: S, width: usize, q: &[f32], tiles: &[u32], out: &mut [f32]) -> usize {
    let stride = tiles.len() * LANES;
    let mut at = 0;
    // SAFETY: `q` has R rows of `width`, `out` R rows of `stride`; the tiles are inside the pool.
    unsafe {
        while at + 2 <= tiles.len() {
            dot_block::<L, S, R, 2>(source, width, q.as_ptr(), &tiles[at..], out.as_mut_ptr().add(at * LANES), stride);
            at += 2;
        }
        if at < tiles.len() {
            dot_block::<L, S, R, 1>(source, width, q.as_ptr(), &tiles[at..], out.as_mut_ptr().add(at * LANES), stride);
        }
    }
    R
}

/// `R` rows of `q` against `T` tiles.
#[inline(always)]
unsafe fn dot_block<L: Lanes, S: Source<L>, const R: usize, const T: usize>(
    source: S,
    width: usize,
    q: *const f32,
    tiles: &[u32],
    out: *mut f32,
    stride: usize,
) {
    let groups = width.div_ceil(GROUP);
    // SAFETY: the caller's: see `dot_rows`.
    unsafe {
        let mut sums = [[L::zero(); T]; R];
        for group in 0..groups {
            let mut scales = [source.scales((tiles[0] as usize * groups + group) * LANES); T];
            for t in 1..T {
                scales[t] = source.scales((tiles[t] as usize * groups + group) * LANES);
            }
            for d in group * GROUP..width.min((group + 1) * GROUP) {
                let mut keys = [L::zero(); T];
                for t in 0..T {
                    keys[t] = source.load((tiles[t] as usize * width + d) * LANES, scales[t]);
                }
                for row in 0..R {
                    let x = L::splat(*q.add(row * width + d));
                    for t in 0..T {
                        sums[row][t] = x.times_plus(keys[t], sums[row][t]);
                    }
                }
            }
        }
        for row in 0..R {
            for t in 0..T {
                sums[row][t].store(out.add(row * stride + t * LANES));
            }
        }
    }
}

/// See [`super::add_weighted`], which checks the shapes.
#[inline(always)]
pub(super) unsafe fn add_weighted<L: Lanes>(rows: Rows<'_>, weights: &[f32], stride: usize, columns: &[Column], out: &mut [f32]) {
    // SAFETY: the caller checked that slots and weights are inside.
    with_source!(rows, source => unsafe { add_all::<L, _>(source, rows.width, weights, stride, columns, out) });
}

#[inline(always)]
unsafe fn add_all<L: Lanes, S: Source<L>>(source: S, width: usize, weights: &[f32], stride: usize, columns: &[Column], out: &mut [f32]) {
    let count = out.len() / width;
    let mut row = 0;
    while row < count {
        let (weights, out) = (&weights[row * stride..], &mut out[row * width..]);
        // SAFETY: as many rows are left as each handles.
        row += unsafe {
            match count - row {
                4.. if L::WIDE => add_rows::<L, S, 4, 4>(source, width, weights, stride, columns, out),
                3 if L::WIDE => add_rows::<L, S, 3, 4>(source, width, weights, stride, columns, out),
                2.. if L::WIDE => add_rows::<L, S, 2, 4>(source, width, weights, stride, columns, out),
                2.. => add_rows::<L, S, 2, 2>(source, width, weights, stride, columns, out),
                _ => add_rows::<L, S, 1, 2>(source, width, weights, stride, columns, out),
            }
        };
    }
}

/// `R` rows of sums, `C` vectors at a time; returns `R`.
#[inline(always)]
unsafe fn add_rows<L: Lanes, S: Source<L>, const R: usize, const C: usize>(
    source: S,
    width: usize,
    weights: &[f32],
    stride: usize,
    columns: &[Column],
    out: &mut [f32],
) -> usize {
    let mut d = 0;
    // SAFETY: `weights` has R rows of `stride`, `out` R rows of `width`; the columns are inside both.
    unsafe {
        while d + C * LANES <= width {
            add_block::<L, S, R, C>(source, width, d, weights, stride, columns, out);
            d += C * LANES;
        }
        while d + LANES <= width {
            add_block::<L, S, R, 1>(source, width, d, weights, stride, columns, out);
            d += LANES;
        }
        let groups = width.div_ceil(GROUP);
        for row in 0..R {
            for d in d..width {
                let sum = columns.iter().fold(out[row * width + d], |sum, column| {
                    let slot = column.slot as usize;
                    let value = source.one(slot * width + d, slot * groups + d / GROUP);
                    weights[row * stride + column.weight as usize].mul_add(value, sum)
                });
                out[row * width + d] = sum;
            }
        }
    }
    R
}

/// `R` rows of sums, `C` vectors from dimension `d` on.
#[inline(always)]
unsafe fn add_block<L: Lanes, S: Source<L>, const R: usize, const C: usize>(
    source: S,
    width: usize,
    d: usize,
    weights: &[f32],
    stride: usize,
    columns: &[Column],
    out: &mut [f32],
) {
    let groups = width.div_ceil(GROUP);
    let (weights, out) = (weights.as_ptr(), out.as_mut_ptr());
    // SAFETY: the caller's: see `add_rows`.
    unsafe {
        let mut sums = [[L::zero(); C]; R];
        for row in 0..R {
            for c in 0..C {
                sums[row][c] = L::load(out.add(row * width + d + c * LANES));
            }
        }
        for column in columns {
            let slot = column.slot as usize;
            let mut values = [L::zero(); C];
            for c in 0..C {
                let d = d + c * LANES;
                values[c] = source.load(slot * width + d, source.one_scale(slot * groups + d / GROUP));
            }
            for row in 0..R {
                let weight = L::splat(*weights.add(row * stride + column.weight as usize));
                for c in 0..C {
                    sums[row][c] = weight.times_plus(values[c], sums[row][c]);
                }
            }
        }
        for row in 0..R {
            for c in 0..C {
                sums[row][c].store(out.add(row * width + d + c * LANES));
            }
        }
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx2,fma,f16c")]
pub(super) unsafe fn dot_tiles_avx512(rows: Rows<'_>, q: &[f32], tiles: &[u32], out: &mut [f32]) {
    // SAFETY: the caller's.
    unsafe { dot_tiles::<Avx512>(rows, q, tiles, out) }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) unsafe fn dot_tiles_avx2(rows: Rows<'_>, q: &[f32], tiles: &[u32], out: &mut [f32]) {
    // SAFETY: the caller's.
    unsafe { dot_tiles::<Avx2>(rows, q, tiles, out) }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx2,fma,f16c")]
pub(super) unsafe fn add_weighted_avx512(rows: Rows<'_>, weights: &[f32], stride: usize, columns: &[Column], out: &mut [f32]) {
    // SAFETY: the caller's.
    unsafe { add_weighted::<Avx512>(rows, weights, stride, columns, out) }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) unsafe fn add_weighted_avx2(rows: Rows<'_>, weights: &[f32], stride: usize, columns: &[Column], out: &mut [f32]) {
    // SAFETY: the caller's.
    unsafe { add_weighted::<Avx2>(rows, weights, stride, columns, out) }
}

#[cfg(test)]
mod tests {
    use super::super::lanes::Portable;
    use super::*;

    /// Rows of `width` numbers in every storage, with room for four tiles.
    fn storages(width: usize, test: impl Fn(Rows<'_>)) {
        let numbers: Vec<f32> = (0..4 * LANES * width).map(|i| ((i * 7919) % 1009) as f32 / 500.0 - 1.0).collect();
        let halves: Vec<f16> = numbers.iter().map(|x| f16::from_f32(*x)).collect();
        let brains: Vec<bf16> = numbers.iter().map(|x| bf16::from_f32(*x)).collect();
        let bytes: Vec<u8> = (0..numbers.len()).map(|i| (i * 31) as u8).collect();
        let scales: Vec<f16> = (0..4 * LANES * width.div_ceil(GROUP)).map(|i| f16::from_f32(i as f32 / 1000.0)).collect();
        for numbers in [Numbers::F32(&numbers), Numbers::F16(&halves), Numbers::Bf16(&brains), Numbers::Q8(&bytes, &scales)] {
            test(Rows { numbers, width });
        }
    }

    #[test]
    fn every_instruction_set_gives_the_same_bits_and_the_sums_are_right() {
        for width in [8, 16, 64, 80, 96, 128, 256] {
            storages(width, |rows| {
                for count in [1, 2, 3, 7, 16] {
                    let q: Vec<f32> = (0..count * width).map(|i| ((i * 31) % 97) as f32 / 50.0 - 1.0).collect();
                    let tiles = [2, 0, 3];
                    let mut portable = vec![0f32; count * 48];
                    // SAFETY: the tiles are inside, the shapes fit.
                    unsafe { dot_tiles::<Portable>(rows, &q, &tiles, &mut portable) };
                    let mut out = vec![0f32; count * 48];
                    super::super::dot_tiles(rows, &q, &tiles, &mut out);
                    assert_eq!(out, portable);
                    let mut tile = vec![0f32; width * LANES];
                    rows.widen_tile(3, &mut tile);
                    for row in 0..count {
                        for lane in 0..LANES {
                            let want: f64 = (0..width).map(|d| f64::from(q[row * width + d]) * f64::from(tile[d * LANES + lane])).sum();
                            assert!((f64::from(out[row * 48 + 32 + lane]) - want).abs() < 1e-3 * (1.0 + want.abs()));
                        }
                    }

                    let columns: Vec<Column> =
                        [5, 60, 17, 17].iter().zip([1, 0, 3, 2]).map(|(slot, weight)| Column { slot: *slot, weight }).collect();
                    let weights: Vec<f32> = (0..count * 5).map(|i| (i % 11) as f32 / 7.0).collect();
                    let start: Vec<f32> = (0..count * width).map(|i| (i % 5) as f32).collect();
                    let (mut portable, mut out) = (start.clone(), start.clone());
                    // SAFETY: slots and weights are inside, the shapes fit.
                    unsafe { add_weighted::<Portable>(rows, &weights, 5, &columns, &mut portable) };
                    super::super::add_weighted(rows, &weights, 5, &columns, &mut out);
                    assert_eq!(out, portable);
                    let mut wide = vec![0f32; width];
                    for row in 0..count {
                        let mut want: Vec<f64> = start[row * width..(row + 1) * width].iter().map(|x| f64::from(*x)).collect();
                        for column in &columns {
                            rows.widen_row(column.slot as usize, &mut wide);
                            let weight = f64::from(weights[row * 5 + column.weight as usize]);
                            want.iter_mut().zip(&wide).for_each(|(sum, x)| *sum += weight * f64::from(*x));
                        }
                        for (got, want) in out[row * width..].iter().zip(want) {
                            assert!((f64::from(*got) - want).abs() < 1e-3 * (1.0 + want.abs()), "{got} {want}");
                        }
                    }
                }
            });
        }
    }

    #[test]
    fn half_floats_widen_exactly_special_ones_included() {
        for first in (0..=u16::MAX).step_by(16) {
            let halves: [f16; 16] = std::array::from_fn(|i| f16::from_bits(first + i as u16));
            let mut out = [0f32; 16];
            // SAFETY: 16 of each are there.
            unsafe { Portable::load_f16(halves.as_ptr()).store(out.as_mut_ptr()) };
            for (half, out) in halves.iter().zip(out) {
                assert!(half.to_f32() == out || (half.is_nan() && out.is_nan()), "{:x}", half.to_bits());
            }
        }
    }
}
