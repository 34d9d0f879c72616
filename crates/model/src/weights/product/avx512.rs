//! One weight row and one token with AVX-512 VNNI: 64 products in an instruction.

use super::activations::{Activations, GROUP, QUAD};
use super::blocks::{Format, STEP, scales_and_minima};
use super::sixteen::{Layout, Q4_0, Q4_1, Q5_0, Q5_1, Q6K, Q8_0};
use std::arch::x86_64::*;

/// Whether the processor has what [`dot`] needs.
pub(super) fn is_here() -> bool {
    is_x86_feature_detected!("avx512f")
        && is_x86_feature_detected!("avx512bw")
        && is_x86_feature_detected!("avx512dq")
        && is_x86_feature_detected!("avx512vnni")
        && is_x86_feature_detected!("avx2")
        && is_x86_feature_detected!("f16c")
}

/// `row . x`
///
/// # Safety
/// The processor must have what [`is_here`] asks for, and `row` as many numbers as `x`.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vnni,avx2,f16c")]
pub(super) unsafe fn dot(format: Format, row: &[u8], x: &Activations) -> f32 {
    // SAFETY: the lengths agree: each block's numbers have their activations.
    unsafe {
        match format {
            Format::Q4_0 => pairs::<Q4_0>(row.as_ptr(), x),
            Format::Q4_1 => pairs::<Q4_1>(row.as_ptr(), x),
            Format::Q5_0 => pairs::<Q5_0>(row.as_ptr(), x),
            Format::Q5_1 => pairs::<Q5_1>(row.as_ptr(), x),
            Format::Q8_0 => pairs::<Q8_0>(row.as_ptr(), x),
            Format::Q4K => k_4_or_5::<false>(row, x),
            Format::Q5K => k_4_or_5::<true>(row, x),
            Format::Q6K => k_6(row, x),
        }
    }
}

/// Formats with blocks of 32 numbers: two at a time.
#[inline(always)]
unsafe fn pairs<L: Layout>(row: *const u8, x: &Activations) -> f32 {
    // SAFETY: the caller's: as many blocks as activations.
    unsafe {
        let (mut even, mut odd) = (_mm512_setzero_ps(), _mm512_setzero_ps());
        for step in 0..x.integers.len() / STEP {
            let pair = row.add(step * L::BYTES);
            if step % 2 == 0 {
                even = add::<L>(even, pair, x, step * STEP);
            } else {
                odd = add::<L>(odd, pair, x, step * STEP);
            }
        }
        _mm512_reduce_add_ps(_mm512_add_ps(even, odd))
    }
}

/// Adds the 64 products of two blocks with the activations from `at` on to `sum`.
#[inline(always)]
unsafe fn add<L: Layout>(sum: __m512, pair: *const u8, x: &Activations, at: usize) -> __m512 {
    // SAFETY: the caller's: `at + 64` activations are there, two blocks, and the instructions.
    unsafe {
        let (scale, minimum) = scales(pair, L::BYTES / 2);
        let quads = at / QUAD;
        let values = _mm512_loadu_si512(x.integers.as_ptr().add(at).cast());
        let x_scale = _mm512_loadu_ps(x.scales.as_ptr().add(quads));
        let mut products = _mm512_dpbusd_epi32(_mm512_setzero_si512(), L::numbers(pair, 0), values);
        let mut scaled;
        if L::OFFSET != 0 {
            let sums = _mm512_loadu_si512(x.sums.as_ptr().add(quads).cast());
            products = _mm512_sub_epi32(products, _mm512_mullo_epi32(sums, _mm512_set1_epi32(L::OFFSET)));
        }
        scaled = _mm512_mul_ps(_mm512_cvtepi32_ps(products), scale);
        if L::MINIMUM {
            let sums = _mm512_loadu_si512(x.sums.as_ptr().add(quads).cast());
            scaled = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sums), minimum, scaled);
        }
        _mm512_fmadd_ps(scaled, x_scale, sum)
    }
}

/// Scale and minimum of two blocks: the first two halves of each, the second one meaningless where there is no minimum.
#[inline(always)]
unsafe fn scales(block: *const u8, block_bytes: usize) -> (__m512, __m512) {
    // SAFETY: the caller's: both blocks are there, and longer than 4 bytes.
    unsafe {
        let (a, b) = (block.cast::<i32>().read_unaligned(), block.add(block_bytes).cast::<i32>().read_unaligned());
        let four = _mm512_castps128_ps512(_mm_cvtph_ps(_mm_set_epi32(0, 0, b, a)));
        let scale = _mm512_set_epi32(2, 2, 2, 2, 2, 2, 2, 2, 0, 0, 0, 0, 0, 0, 0, 0);
        let minimum = _mm512_set_epi32(3, 3, 3, 3, 3, 3, 3, 3, 1, 1, 1, 1, 1, 1, 1, 1);
        (_mm512_permutexvar_ps(scale, four), _mm512_permutexvar_ps(minimum, four))
    }
}

#[inline(always)]
pub(super) unsafe fn half(at: *const u8) -> f32 {
    // SAFETY: the caller's: two bytes.
    unsafe { _mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128(i32::from(at.cast::<u16>().read_unaligned())))) }
}

/// Eight bytes as numbers.
#[inline(always)]
pub(super) unsafe fn eight(bytes: [u8; 8]) -> __m256 {
    // SAFETY: the caller's: the instructions.
    unsafe { _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_cvtsi64_si128(i64::from_le_bytes(bytes)))) }
}

/// Lanes that take number `first` in their lower half and `second` in the upper one.
#[inline(always)]
unsafe fn halves(first: i32, second: i32) -> __m512i {
    // SAFETY: the caller's: the instructions.
    unsafe { _mm512_inserti64x4::<1>(_mm512_set1_epi32(first), _mm256_set1_epi32(second)) }
}

/// Blocks of 256 numbers, 128 at a time: the low halves of 64 bytes are their runs of 32 number 0 and 2, the high ones 1 and 3, which is how
/// `x.exchanged` lies. A run's scale meets that of its activations once for a block, minima meet sums of activations alone.
#[inline(always)]
unsafe fn k_4_or_5<const FIVE: bool>(row: &[u8], x: &Activations) -> f32 {
    let block_bytes = if FIVE { 176 } else { 144 };
    // SAFETY: the caller's: as many blocks as activations.
    unsafe {
        let (mut low_sum, mut high_sum, mut minimum) = (_mm512_setzero_ps(), _mm512_setzero_ps(), _mm256_setzero_ps());
        let fifteen = _mm512_set1_epi8(15);
        for (index, block) in row.chunks_exact(block_bytes).enumerate() {
            let p = block.as_ptr();
            let (scales, minima) = scales_and_minima(&*p.add(4).cast::<[u8; 12]>());
            let x_scales = _mm256_mul_ps(_mm256_loadu_ps(x.group_scales.as_ptr().add(8 * index)), _mm256_set1_ps(half(p)));
            let scales = _mm512_castps256_ps512(_mm256_mul_ps(eight(scales), x_scales));
            let x_sums = _mm256_mul_ps(_mm256_loadu_ps(x.group_sums.as_ptr().add(8 * index)), _mm256_set1_ps(half(p.add(2))));
            minimum = _mm256_fmadd_ps(eight(minima), x_sums, minimum);
            for part in 0..2 {
                let bytes = _mm512_loadu_si512(p.add(if FIVE { 48 } else { 16 } + 64 * part).cast());
                let mut low = _mm512_and_si512(bytes, fifteen);
                let mut high = _mm512_and_si512(_mm512_srli_epi16::<4>(bytes), fifteen);
                let first = 4 * part as i32;
                if FIVE {
                    let fifth = _mm512_broadcast_i64x4(_mm256_loadu_si256(p.add(16).cast()));
                    let bits = |run: i32| {
                        let bits = _mm512_inserti64x4::<1>(_mm512_set1_epi8(1 << run), _mm256_set1_epi8(4 << run));
                        _mm512_maskz_set1_epi8(_mm512_test_epi8_mask(fifth, bits), 16)
                    };
                    low = _mm512_or_si512(low, bits(first));
                    high = _mm512_or_si512(high, bits(first + 1));
                }
                let values = x.exchanged.as_ptr().add(index * 256 + part * 128);
                let low = _mm512_dpbusd_epi32(_mm512_setzero_si512(), low, _mm512_loadu_si512(values.cast()));
                let high = _mm512_dpbusd_epi32(_mm512_setzero_si512(), high, _mm512_loadu_si512(values.add(64).cast()));
                let scale = _mm512_permutexvar_ps(halves(first, first + 2), scales);
                low_sum = _mm512_fmadd_ps(_mm512_cvtepi32_ps(low), scale, low_sum);
                let scale = _mm512_permutexvar_ps(halves(first + 1, first + 3), scales);
                high_sum = _mm512_fmadd_ps(_mm512_cvtepi32_ps(high), scale, high_sum);
            }
        }
        let minimum = _mm512_reduce_add_ps(_mm512_zextps256_ps512(minimum));
        _mm512_reduce_add_ps(_mm512_add_ps(low_sum, high_sum)) - minimum
    }
}

/// Blocks of 256 numbers, a scale for every 16; what they are off by, 32, meets sums of activations alone.
#[inline(always)]
unsafe fn k_6(row: &[u8], x: &Activations) -> f32 {
    // SAFETY: the caller's: as many blocks as activations.
    unsafe {
        let mut sums = [_mm512_setzero_ps(); 2];
        let mut offset = _mm512_setzero_ps();
        let twice = _mm512_set_epi32(7, 7, 6, 6, 5, 5, 4, 4, 3, 3, 2, 2, 1, 1, 0, 0);
        for (index, block) in row.chunks_exact(210).enumerate() {
            let p = block.as_ptr();
            let scales = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(p.add(192).cast())));
            let scales = _mm512_mul_ps(scales, _mm512_set1_ps(half(p.add(208))));
            offset = _mm512_fmadd_ps(scales, _mm512_loadu_ps(x.half_sums.as_ptr().add(16 * index)), offset);
            let x_scales = _mm512_castps256_ps512(_mm256_loadu_ps(x.group_scales.as_ptr().add(8 * index)));
            let scales = _mm512_mul_ps(scales, _mm512_permutexvar_ps(twice, x_scales));
            for step in 0..4 {
                let integers = Q6K::numbers(p, step);
                let values = _mm512_loadu_si512(x.integers.as_ptr().add((index * 4 + step) * STEP).cast());
                let products = _mm512_cvtepi32_ps(_mm512_dpbusd_epi32(_mm512_setzero_si512(), integers, values));
                let s = 4 * step as i32;
                let lanes =
                    _mm512_set_epi32(s + 3, s + 3, s + 3, s + 3, s + 2, s + 2, s + 2, s + 2, s + 1, s + 1, s + 1, s + 1, s, s, s, s);
                sums[step % 2] = _mm512_fmadd_ps(products, _mm512_permutexvar_ps(lanes, scales), sums[step % 2]);
            }
        }
        _mm512_reduce_add_ps(_mm512_fmadd_ps(offset, _mm512_set1_ps(-32.0), _mm512_add_ps(sums[0], sums[1])))
    }
}

/// See [`super::activations::round_row`].
///
/// # Safety
/// The processor must have AVX-512.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vnni,avx2,f16c")]
pub(super) unsafe fn round_groups(x: &[f32], integers: &mut [i8], scales: &mut [f32]) {
    for ((x, integers), scale) in x.as_chunks::<GROUP>().0.iter().zip(integers.as_chunks_mut::<GROUP>().0).zip(scales) {
        // SAFETY: each half of a group is a vector.
        unsafe {
            let halves = [_mm512_loadu_ps(x.as_ptr()), _mm512_loadu_ps(x.as_ptr().add(GROUP / 2))];
            let largest = _mm512_reduce_max_ps(_mm512_max_ps(_mm512_abs_ps(halves[0]), _mm512_abs_ps(halves[1])));
            // NaN is above nothing, but must not vanish.
            let nan = _mm512_cmp_ps_mask::<_CMP_UNORD_Q>(halves[0], halves[1]) != 0;
            *scale = if nan { f32::NAN } else { largest / 127.0 };
            let inverse = _mm512_set1_ps(if *scale > 0.0 { 1.0 / *scale } else { 0.0 });
            for (half, numbers) in halves.into_iter().enumerate() {
                let rounded = _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(_mm512_mul_ps(numbers, inverse)));
                _mm_storeu_si128(integers.as_mut_ptr().add(half * GROUP / 2).cast(), rounded);
            }
        }
    }
}
