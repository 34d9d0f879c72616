//! The two kernels, over any lanes and any storage.
//!
//! In loops over indices: a closure would not be compiled for the instructions of the function around it.

#![allow(clippy::needless_range_loop, reason = "lists in registers, side by side")]

use super::lanes::Lanes;
#[cfg(target_arch = "x86_64")]
use super::lanes::{Avx2, Avx512};
use super::{Numbers, Rows};
use crate::cache::{GROUP, LANES, OCTET};
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
    unsafe fn one_scale(self, scale_at: usize) -> Self::Scale;
    /// 8 scales at each.
    unsafe fn two_scales(self, scale_at: [usize; 2]) -> Self::Scale;
    unsafe fn load(self, at: usize, scale: Self::Scale) -> L;
    /// 8 numbers at each.
    unsafe fn load_two(self, at: [usize; 2], scale: Self::Scale) -> L;
    /// One number.
    unsafe fn one(self, at: usize, scale_at: usize) -> f32;
    /// Asks for the number at `at` and its neighbours, which need not be there.
    fn prefetch(self, at: usize);
}

/// Asks the processor to bring a line nearer.
#[inline(always)]
fn prefetch<T>(_from: *const T) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: a hint: any address will do.
    unsafe {
        std::arch::x86_64::_mm_prefetch::<{ std::arch::x86_64::_MM_HINT_T0 }>(_from.cast());
    }
    #[cfg(target_arch = "aarch64")]
    // SAFETY: a hint: any address will do, and nothing is written.
    unsafe {
        std::arch::asm!("prfm pldl1keep, [{}]", in(reg) _from, options(nostack, preserves_flags, readonly));
    }
}

macro_rules! plain_source {
    ($type:ty, $load:ident, $load_two:ident, $one:expr) => {
        impl<L: Lanes> Source<L> for *const $type {
            type Scale = ();

            #[inline(always)]
            unsafe fn one_scale(self, _scale_at: usize) {}

            #[inline(always)]
            unsafe fn load(self, at: usize, _scale: ()) -> L {
                // SAFETY: the caller's: the numbers from `at` on are there.
                unsafe { L::$load(self.add(at)) }
            }

            #[inline(always)]
            unsafe fn two_scales(self, _scale_at: [usize; 2]) {}

            #[inline(always)]
            unsafe fn load_two(self, [a, b]: [usize; 2], _scale: ()) -> L {
                // SAFETY: the caller's: the numbers are there.
                unsafe { L::$load_two([self.add(a), self.add(b)]) }
            }

            #[inline(always)]
            unsafe fn one(self, at: usize, _scale_at: usize) -> f32 {
                // SAFETY: the caller's: the number is there.
                $one(unsafe { *self.add(at) })
            }

            #[inline(always)]
            fn prefetch(self, at: usize) {
                prefetch(self.wrapping_add(at));
            }
        }
    };
}

plain_source!(f32, load, load_two, |x: f32| x);
plain_source!(f16, load_f16, load_two_f16, f16::to_f32);
plain_source!(bf16, load_bf16, load_two_bf16, bf16::to_f32);

#[derive(Clone, Copy)]
struct Q8 {
    integers: *const i8,
    scales: *const f16,
}

impl<L: Lanes> Source<L> for Q8 {
    type Scale = L;

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
    unsafe fn two_scales(self, [a, b]: [usize; 2]) -> L {
        // SAFETY: the caller's: the scales are there.
        unsafe { L::load_two_f16([self.scales.add(a), self.scales.add(b)]) }
    }

    #[inline(always)]
    unsafe fn load_two(self, [a, b]: [usize; 2], scale: L) -> L {
        // SAFETY: the caller's: the numbers are there.
        unsafe { L::load_two_i8([self.integers.add(a), self.integers.add(b)]).times(scale) }
    }

    #[inline(always)]
    unsafe fn one(self, at: usize, scale_at: usize) -> f32 {
        // SAFETY: the caller's: the number and its scale are there.
        unsafe { f32::from(*self.integers.add(at)) * (*self.scales.add(scale_at)).to_f32() }
    }

    #[inline(always)]
    fn prefetch(self, at: usize) {
        prefetch(self.integers.wrapping_add(at));
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

/// Two octets, which fill the lanes.
type Pair = [u32; 2];

/// Whether a pair is one tile.
#[inline(always)]
fn is_tile(pair: &Pair) -> bool {
    pair[0].is_multiple_of(2) && pair[1] == pair[0] + 1
}

/// Where the octets of `pair` begin, of rows of `width` in tiles.
#[inline(always)]
fn starts(pair: &Pair, width: usize) -> [usize; 2] {
    pair.map(|octet| octet as usize / 2 * width * LANES + octet as usize % 2 * OCTET)
}

/// See [`super::dot_octets`], which checks the shapes.
#[inline(always)]
pub(super) unsafe fn dot_octets<L: Lanes>(rows: Rows<'_>, q: &[f32], pairs: &[Pair], out: &mut [f32]) {
    // SAFETY: the caller checked that the octets are inside the pool.
    with_source!(rows, source => unsafe { dot_all::<L, _>(source, rows.width, q, pairs, out) });
}

#[inline(always)]
unsafe fn dot_all<L: Lanes, S: Source<L>>(source: S, width: usize, q: &[f32], pairs: &[Pair], out: &mut [f32]) {
    let (count, stride) = (q.len() / width, pairs.len() * LANES);
    let mut row = 0;
    while row < count {
        let (q, out) = (&q[row * width..], &mut out[row * stride..]);
        let left = count - row;
        // SAFETY: as many rows are left as each handles.
        row += unsafe {
            match left {
                12.. if L::WIDE => dot_rows::<L, S, 12>(source, width, q, pairs, row == 0, out),
                8.. if L::WIDE => dot_rows::<L, S, 8>(source, width, q, pairs, row == 0, out),
                6.. if L::WIDE => dot_rows::<L, S, 6>(source, width, q, pairs, row == 0, out),
                4.. if L::WIDE => dot_rows::<L, S, 4>(source, width, q, pairs, row == 0, out),
                3 if L::WIDE => dot_rows::<L, S, 3>(source, width, q, pairs, row == 0, out),
                2.. => dot_rows::<L, S, 2>(source, width, q, pairs, row == 0, out),
                _ => dot_rows::<L, S, 1>(source, width, q, pairs, row == 0, out),
            }
        };
    }
}

/// `R` rows of `q` against all pairs; returns `R`. `first`: no row met them before.
#[inline(always)]
unsafe fn dot_rows<L: Lanes, S: Source<L>, const R: usize>(
    source: S,
    width: usize,
    q: &[f32],
    pairs: &[Pair],
    first: bool,
    out: &mut [f32],
) -> usize {
    let stride = pairs.len() * LANES;
    let q = q.as_ptr();
    let mut at = 0;
    // SAFETY: `q` has R rows of `width`, `out` R rows of `stride`; the octets are inside the pool.
    unsafe {
        while at < pairs.len() {
            let (pairs, out) = (&pairs[at..], out.as_mut_ptr().add(at * LANES));
            let count = pairs.len().min(2);
            // The first time that these keys are met is when they come from afar.
            let next = if first { &pairs[count..] } else { &[] };
            match (count, pairs[..count].iter().all(is_tile)) {
                (2, true) => dot_block::<L, S, R, 2, true>(source, width, q, [pairs, next], out, stride),
                (2, false) => dot_block::<L, S, R, 2, false>(source, width, q, [pairs, next], out, stride),
                (_, true) => dot_block::<L, S, R, 1, true>(source, width, q, [pairs, next], out, stride),
                (_, false) => dot_block::<L, S, R, 1, false>(source, width, q, [pairs, next], out, stride),
            }
            at += count;
        }
    }
    R
}

/// Dimensions of a tile of 16-bit numbers in a line of the caches.
const LINE: usize = 2;

/// `R` rows of `q` against `P` pairs of octets; `TILES`: each is a tile. `next`: what will be read after them.
#[inline(always)]
unsafe fn dot_block<L: Lanes, S: Source<L>, const R: usize, const P: usize, const TILES: bool>(
    source: S,
    width: usize,
    q: *const f32,
    [pairs, next]: [&[Pair]; 2],
    out: *mut f32,
    stride: usize,
) {
    let groups = width.div_ceil(GROUP);
    // SAFETY: the caller's: see `dot_rows`.
    unsafe {
        let (mut at, mut scales_at) = ([[0; 2]; P], [[0; 2]; P]);
        for p in 0..P {
            (at[p], scales_at[p]) = (starts(&pairs[p], width), starts(&pairs[p], groups));
        }
        let mut next_at = [[0; 2]; P];
        for (at, pair) in next_at.iter_mut().zip(next) {
            *at = starts(pair, width);
        }
        let mut sums = [[L::zero(); P]; R];
        for group in 0..groups {
            let mut scales = [source.two_scales([scales_at[0][0] + group * LANES, scales_at[0][1] + group * LANES]); P];
            for p in 1..P {
                scales[p] = source.two_scales([scales_at[p][0] + group * LANES, scales_at[p][1] + group * LANES]);
            }
            for d in group * GROUP..width.min((group + 1) * GROUP) {
                if d % LINE == 0 && !next.is_empty() {
                    for p in 0..P {
                        source.prefetch(next_at[p][0] + d * LANES);
                        if !TILES {
                            source.prefetch(next_at[p][1] + d * LANES);
                        }
                    }
                }
                let mut keys = [L::zero(); P];
                for p in 0..P {
                    keys[p] = if TILES {
                        source.load(at[p][0] + d * LANES, scales[p])
                    } else {
                        source.load_two([at[p][0] + d * LANES, at[p][1] + d * LANES], scales[p])
                    };
                }
                for row in 0..R {
                    let x = L::splat(*q.add(row * width + d));
                    for p in 0..P {
                        sums[row][p] = x.times_plus(keys[p], sums[row][p]);
                    }
                }
            }
        }
        for row in 0..R {
            for p in 0..P {
                sums[row][p].store(out.add(row * stride + p * LANES));
            }
        }
    }
}

/// See [`super::widen_octets`], which checks the shapes.
#[inline(always)]
pub(super) unsafe fn widen_octets<L: Lanes>(rows: Rows<'_>, pairs: &[Pair], out: &mut [f32]) {
    // SAFETY: the caller checked that the octets are inside the pool, and that `out` has room.
    with_source!(rows, source => unsafe { widen_pairs::<L, _>(source, rows.width, pairs, out.as_mut_ptr()) });
}

#[inline(always)]
unsafe fn widen_pairs<L: Lanes, S: Source<L>>(source: S, width: usize, pairs: &[Pair], mut out: *mut f32) {
    // SAFETY: the caller's.
    unsafe {
        for pair in pairs {
            let (at, scales_at) = (starts(pair, width), starts(pair, width.div_ceil(GROUP)));
            for d in 0..width {
                let group = d / GROUP * LANES;
                let scales = source.two_scales([scales_at[0] + group, scales_at[1] + group]);
                source.load_two([at[0] + d * LANES, at[1] + d * LANES], scales).store(out);
                out = out.add(LANES);
            }
        }
    }
}

/// See [`super::widen_columns`], which checks the shapes.
#[inline(always)]
pub(super) unsafe fn widen_columns<L: Lanes>(rows: Rows<'_>, columns: &[Column], out: &mut [f32]) {
    // SAFETY: the caller checked that the slots are inside the pool, and that `out` has room.
    with_source!(rows, source => unsafe { widen_rows::<L, _>(source, rows.width, columns, out.as_mut_ptr()) });
}

#[inline(always)]
unsafe fn widen_rows<L: Lanes, S: Source<L>>(source: S, width: usize, columns: &[Column], mut out: *mut f32) {
    let groups = width.div_ceil(GROUP);
    // SAFETY: the caller's.
    unsafe {
        for column in columns {
            let slot = column.slot as usize;
            let mut d = 0;
            while d + LANES <= width {
                source.load(slot * width + d, source.one_scale(slot * groups + d / GROUP)).store(out.add(d));
                d += LANES;
            }
            for d in d..width {
                *out.add(d) = source.one(slot * width + d, slot * groups + d / GROUP);
            }
            out = out.add(width);
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
                6.. if L::WIDE => add_rows::<L, S, 6, 4>(source, width, weights, stride, columns, out),
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

/// How many rows before its turn a row is asked for.
const AHEAD: usize = 8;

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
        for (index, column) in columns.iter().enumerate() {
            if let Some(later) = columns.get(index + AHEAD) {
                source.prefetch(later.slot as usize * width + d);
                source.prefetch(later.slot as usize * width + d + C * LANES / 2);
            }
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

/// Compiles a kernel for an instruction set.
#[cfg(target_arch = "x86_64")]
macro_rules! compiled {
    ($features:literal, $lanes:ty, $($kernel:ident as $name:ident($($argument:ident: $type:ty),*);)*) => {$(
        #[target_feature(enable = $features)]
        pub(super) unsafe fn $name($($argument: $type),*) {
            // SAFETY: the caller's.
            unsafe { $kernel::<$lanes>($($argument),*) }
        }
    )*};
}

#[cfg(target_arch = "x86_64")]
compiled! { "avx512f,avx2,fma,f16c", Avx512,
    dot_octets as dot_octets_avx512(rows: Rows<'_>, q: &[f32], pairs: &[Pair], out: &mut [f32]);
    widen_octets as widen_octets_avx512(rows: Rows<'_>, pairs: &[Pair], out: &mut [f32]);
    widen_columns as widen_columns_avx512(rows: Rows<'_>, columns: &[Column], out: &mut [f32]);
    add_weighted as add_weighted_avx512(rows: Rows<'_>, weights: &[f32], stride: usize, columns: &[Column], out: &mut [f32]);
}

#[cfg(target_arch = "x86_64")]
compiled! { "avx2,fma,f16c", Avx2,
    dot_octets as dot_octets_avx2(rows: Rows<'_>, q: &[f32], pairs: &[Pair], out: &mut [f32]);
    widen_octets as widen_octets_avx2(rows: Rows<'_>, pairs: &[Pair], out: &mut [f32]);
    widen_columns as widen_columns_avx2(rows: Rows<'_>, columns: &[Column], out: &mut [f32]);
    add_weighted as add_weighted_avx2(rows: Rows<'_>, weights: &[f32], stride: usize, columns: &[Column], out: &mut [f32]);
}

#[cfg(test)]
mod tests {
    use super::super::lanes::Portable;
    use super::*;

    impl Rows<'_> {
        fn number(&self, at: usize, scale_at: usize) -> f32 {
            match self.numbers {
                Numbers::F32(values) => values[at],
                Numbers::F16(values) => values[at].to_f32(),
                Numbers::Bf16(values) => values[at].to_f32(),
                Numbers::Q8(values, scales) => f32::from(values[at] as i8) * scales[scale_at].to_f32(),
            }
        }
    }

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
                    // A tile, and octets of several.
                    let pairs = [[4, 5], [0, 3], [7, 6]];
                    let mut portable = vec![0f32; count * 48];
                    // SAFETY: the octets are inside, the shapes fit.
                    unsafe { dot_octets::<Portable>(rows, &q, &pairs, &mut portable) };
                    let mut out = vec![0f32; count * 48];
                    super::super::dot_octets(rows, &q, &pairs, &mut out);
                    assert_eq!(out, portable);
                    let (mut wide, mut portable) = (vec![0f32; 3 * width * LANES], vec![0f32; 3 * width * LANES]);
                    super::super::widen_octets(rows, &pairs, &mut wide);
                    // SAFETY: as above.
                    unsafe { widen_octets::<Portable>(rows, &pairs, &mut portable) };
                    assert_eq!(wide, portable);
                    let number = |slot: usize, d: usize| {
                        rows.number(slot / LANES * width * LANES + d * LANES + slot % LANES, {
                            (slot / LANES * width.div_ceil(GROUP) + d / GROUP) * LANES + slot % LANES
                        })
                    };
                    for lane in 0..48 {
                        let slot = pairs[lane / 16][lane % 16 / 8] as usize * OCTET + lane % 8;
                        (0..width).for_each(|d| assert_eq!(wide[(lane / 16 * width + d) * LANES + lane % 16], number(slot, d)));
                        for row in 0..count {
                            let want: f64 = (0..width).map(|d| f64::from(q[row * width + d]) * f64::from(number(slot, d))).sum();
                            assert!((f64::from(out[row * 48 + lane]) - want).abs() < 1e-3 * (1.0 + want.abs()));
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
                    let (mut wide, mut portable) = (vec![0f32; 4 * width], vec![0f32; 4 * width]);
                    super::super::widen_columns(rows, &columns, &mut wide);
                    // SAFETY: as above.
                    unsafe { widen_columns::<Portable>(rows, &columns, &mut portable) };
                    assert_eq!(wide, portable);
                    let groups = width.div_ceil(GROUP);
                    for (column, wide) in columns.iter().zip(wide.chunks(width)) {
                        let slot = column.slot as usize;
                        (0..width).for_each(|d| assert_eq!(wide[d], rows.number(slot * width + d, slot * groups + d / GROUP)));
                    }
                    for row in 0..count {
                        let mut want: Vec<f64> = start[row * width..(row + 1) * width].iter().map(|x| f64::from(*x)).collect();
                        for (column, wide) in columns.iter().zip(wide.chunks(width)) {
                            let weight = f64::from(weights[row * 5 + column.weight as usize]);
                            want.iter_mut().zip(wide).for_each(|(sum, x)| *sum += weight * f64::from(*x));
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
