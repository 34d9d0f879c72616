//! What AVX-512 makes of each format's blocks: 64 integers of a row, and the scales of sixteen rows beside each other.

use super::avx512::{eight, half};
use super::blocks::{RUN, STEP, scales_and_minima};
use std::arch::x86_64::*;

/// Weight rows side by side: as many as a vector has lanes.
pub(super) const LANES: usize = 16;

/// Rows of blocks that follow each other in memory.
#[derive(Clone, Copy)]
pub(super) struct Rows {
    pub(super) first: *const u8,
    pub(super) row_bytes: usize,
}

/// Scales and minima of sixteen rows, a vector for every run of one row's numbers that has its own.
pub(super) struct Scales {
    pub(super) scales: [__m512; 16],
    pub(super) minima: [__m512; 8],
}

impl Scales {
    /// None yet.
    #[inline(always)]
    pub(super) unsafe fn zero() -> Self {
        // SAFETY: the caller's: the instructions.
        unsafe { Self { scales: [_mm512_setzero_ps(); 16], minima: [_mm512_setzero_ps(); 8] } }
    }
}

/// A format. Its functions need AVX-512 and whole blocks.
pub(super) trait Layout {
    /// Numbers whose scales are found at once: of one large block, or of two small ones.
    const NUMBERS: usize;
    /// Their bytes.
    const BYTES: usize;
    /// Runs of [`RUN`] numbers that share a scale.
    const RUNS: usize = 2;
    /// Whether scales have minima beside them.
    const MINIMUM: bool = false;
    /// What the integers are off by.
    const OFFSET: i32 = 0;

    /// Integers `STEP * step ..` of a row, from where its `NUMBERS` begin.
    unsafe fn numbers(block: *const u8, step: usize) -> __m512i;

    /// Scales of `NUMBERS` of each row.
    unsafe fn scales(rows: Rows, to: &mut Scales);
}

/// `$body` with `$layout` as the layout of `$format`.
macro_rules! with_layout {
    ($format:expr, $layout:ident => $body:expr) => {
        with_layout!(@ $format, $layout, $body, Q4_0 Q4_1 Q5_0 Q5_1 Q8_0 Q4K Q5K Q6K)
    };
    (@ $format:expr, $layout:ident, $body:expr, $($name:ident)*) => {
        match $format {
            $(Format::$name => {
                type $layout = $name;
                $body
            })*
        }
    };
}
pub(super) use with_layout;

macro_rules! pair {
    ($name:ident, $bytes:literal, minimum $minimum:literal, offset $offset:literal, $numbers:ident from $body:literal) => {
        pub(super) struct $name;

        impl Layout for $name {
            const NUMBERS: usize = STEP;
            const BYTES: usize = 2 * $bytes;
            const MINIMUM: bool = $minimum;
            const OFFSET: i32 = $offset;

            #[inline(always)]
            unsafe fn numbers(block: *const u8, _step: usize) -> __m512i {
                // SAFETY: the caller's: two blocks.
                unsafe { $numbers(block.add($body), block.add($bytes + $body)) }
            }

            #[inline(always)]
            unsafe fn scales(rows: Rows, to: &mut Scales) {
                // SAFETY: the caller's: two blocks a row.
                unsafe {
                    for block in 0..2 {
                        let pairs = words(rows.from(block * $bytes));
                        to.scales[block] = _mm512_cvtph_ps(_mm512_cvtepi32_epi16(pairs));
                        if $minimum {
                            to.minima[block] = _mm512_cvtph_ps(_mm512_cvtepi32_epi16(_mm512_srli_epi32::<16>(pairs)));
                        }
                    }
                }
            }
        }
    };
}

pair!(Q4_0, 18, minimum false, offset 8, nibbles from 2);
pair!(Q4_1, 20, minimum true, offset 0, nibbles from 4);
pair!(Q5_0, 22, minimum false, offset 16, fives from 2);
pair!(Q5_1, 24, minimum true, offset 0, fives from 4);
pair!(Q8_0, 34, minimum false, offset 128, bytes from 2);

pub(super) struct Q4K;
pub(super) struct Q5K;
pub(super) struct Q6K;

impl Layout for Q4K {
    const NUMBERS: usize = 256;
    const BYTES: usize = 144;
    const MINIMUM: bool = true;

    #[inline(always)]
    unsafe fn numbers(block: *const u8, step: usize) -> __m512i {
        // SAFETY: the caller's: a block.
        unsafe { low_then_high(block.add(16 + 32 * step)) }
    }

    #[inline(always)]
    unsafe fn scales(rows: Rows, to: &mut Scales) {
        // SAFETY: the caller's: a block a row.
        unsafe { six_bit_scales(rows, to) }
    }
}

impl Layout for Q5K {
    const NUMBERS: usize = 256;
    const BYTES: usize = 176;
    const MINIMUM: bool = true;

    #[inline(always)]
    unsafe fn numbers(block: *const u8, step: usize) -> __m512i {
        // SAFETY: the caller's: a block.
        unsafe {
            let fifth = _mm512_broadcast_i64x4(_mm256_loadu_si256(block.add(16).cast()));
            let bits = _mm512_inserti64x4::<1>(_mm512_set1_epi8(1 << (2 * step)), _mm256_set1_epi8(2 << (2 * step)));
            let fifth = _mm512_maskz_set1_epi8(_mm512_test_epi8_mask(fifth, bits), 16);
            _mm512_or_si512(low_then_high(block.add(48 + 32 * step)), fifth)
        }
    }

    #[inline(always)]
    unsafe fn scales(rows: Rows, to: &mut Scales) {
        // SAFETY: the caller's: a block a row.
        unsafe { six_bit_scales(rows, to) }
    }
}

impl Layout for Q6K {
    const NUMBERS: usize = 256;
    const BYTES: usize = 210;
    const RUNS: usize = 1;
    const OFFSET: i32 = 32;

    #[inline(always)]
    unsafe fn numbers(block: *const u8, step: usize) -> __m512i {
        // SAFETY: the caller's: a block.
        unsafe {
            let low = _mm512_loadu_si512(block.add(64 * (step / 2)).cast());
            let high = _mm256_loadu_si256(block.add(128 + 32 * (step / 2)).cast());
            // Of each high byte, two bits for either half.
            let (low, high) = if step.is_multiple_of(2) {
                (low, _mm512_inserti64x4::<1>(_mm512_castsi256_si512(_mm256_slli_epi16::<4>(high)), _mm256_slli_epi16::<2>(high)))
            } else {
                (_mm512_srli_epi16::<4>(low), _mm512_inserti64x4::<1>(_mm512_castsi256_si512(high), _mm256_srli_epi16::<2>(high)))
            };
            let low = _mm512_and_si512(low, _mm512_set1_epi8(15));
            _mm512_or_si512(low, _mm512_and_si512(high, _mm512_set1_epi8(0x30)))
        }
    }

    #[inline(always)]
    unsafe fn scales(rows: Rows, to: &mut Scales) {
        // SAFETY: the caller's: a block a row.
        unsafe {
            let mut of_rows = [_mm512_setzero_si512(); LANES];
            for (lane, scales) in of_rows.iter_mut().enumerate() {
                let block = rows.at(lane);
                let integers = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(block.add(192).cast())));
                *scales = _mm512_castps_si512(_mm512_mul_ps(integers, _mm512_set1_ps(half(block.add(208)))));
            }
            for (to, scales) in to.scales.iter_mut().zip(transpose(of_rows)) {
                *to = _mm512_castsi512_ps(scales);
            }
        }
    }
}

impl Rows {
    /// The row in this lane.
    #[inline(always)]
    pub(super) unsafe fn at(self, lane: usize) -> *const u8 {
        // SAFETY: the caller's: as many rows follow each other.
        unsafe { self.first.add(lane * self.row_bytes) }
    }

    /// The rows from this byte of each on.
    #[inline(always)]
    pub(super) unsafe fn from(self, byte: usize) -> Self {
        // SAFETY: the caller's: as many bytes a row.
        Self { first: unsafe { self.first.add(byte) }, ..self }
    }
}

/// The first four bytes of each row.
#[inline(always)]
unsafe fn words(rows: Rows) -> __m512i {
    // SAFETY: the caller's: four bytes a row.
    unsafe {
        let mut words = [0i32; LANES];
        for (lane, word) in words.iter_mut().enumerate() {
            *word = rows.at(lane).cast::<i32>().read_unaligned();
        }
        let [a, b, c, d, e, f, g, h, i, j, k, l, m, n, o, p] = words;
        _mm512_setr_epi32(a, b, c, d, e, f, g, h, i, j, k, l, m, n, o, p)
    }
}

/// The 4-bit numbers of two blocks, low halves of the bytes first.
#[inline(always)]
unsafe fn nibbles(a: *const u8, b: *const u8) -> __m512i {
    // SAFETY: the caller's: 16 bytes at each.
    unsafe {
        let (a, b) = (_mm_loadu_si128(a.cast()), _mm_loadu_si128(b.cast()));
        let a = _mm256_inserti128_si256::<1>(_mm256_castsi128_si256(a), _mm_srli_epi16::<4>(a));
        let b = _mm256_inserti128_si256::<1>(_mm256_castsi128_si256(b), _mm_srli_epi16::<4>(b));
        _mm512_and_si512(_mm512_inserti64x4::<1>(_mm512_castsi256_si512(a), b), _mm512_set1_epi8(15))
    }
}

/// The 5-bit numbers of two blocks: their fifth bits, then the others.
#[inline(always)]
unsafe fn fives(a: *const u8, b: *const u8) -> __m512i {
    // SAFETY: the caller's: 20 bytes at each.
    unsafe {
        let fifth = u64::from(a.cast::<u32>().read_unaligned()) | u64::from(b.cast::<u32>().read_unaligned()) << 32;
        _mm512_or_si512(nibbles(a.add(4), b.add(4)), _mm512_maskz_set1_epi8(fifth, 16))
    }
}

/// The 8-bit numbers of two blocks, without their signs.
#[inline(always)]
unsafe fn bytes(a: *const u8, b: *const u8) -> __m512i {
    // SAFETY: the caller's: 32 bytes at each.
    unsafe {
        let (a, b) = (_mm256_loadu_si256(a.cast()), _mm256_loadu_si256(b.cast()));
        _mm512_xor_si512(_mm512_inserti64x4::<1>(_mm512_castsi256_si512(a), b), _mm512_set1_epi8(-128))
    }
}

/// The low halves of 32 bytes, then the high ones.
#[inline(always)]
unsafe fn low_then_high(from: *const u8) -> __m512i {
    // SAFETY: the caller's: 32 bytes.
    unsafe {
        let bytes = _mm256_loadu_si256(from.cast());
        let both = _mm512_inserti64x4::<1>(_mm512_castsi256_si512(bytes), _mm256_srli_epi16::<4>(bytes));
        _mm512_and_si512(both, _mm512_set1_epi8(15))
    }
}

/// The eight scales and minima of a block of Q4_K or Q5_K, of each row.
#[inline(always)]
unsafe fn six_bit_scales(rows: Rows, to: &mut Scales) {
    // SAFETY: the caller's: a block a row.
    unsafe {
        let (mut scales, mut minima) = ([_mm512_setzero_ps(); 8], [_mm512_setzero_ps(); 8]);
        for pair in 0..8 {
            // Rows 0 and 4, 1 and 5, ..: as `transpose_eight` wants them.
            let first = pair / 4 * 8 + pair % 4;
            let ((scale, minimum), (scale_4, minimum_4)) = (six_bit_row(rows.at(first)), six_bit_row(rows.at(first + 4)));
            scales[pair] = _mm512_insertf32x8::<1>(_mm512_castps256_ps512(scale), scale_4);
            minima[pair] = _mm512_insertf32x8::<1>(_mm512_castps256_ps512(minimum), minimum_4);
        }
        for (to, scales) in to.scales.iter_mut().zip(transpose_eight(scales)) {
            *to = scales;
        }
        to.minima = transpose_eight(minima);
    }
}

/// The scales and minima of a row's block.
#[inline(always)]
unsafe fn six_bit_row(block: *const u8) -> (__m256, __m256) {
    // SAFETY: the caller's: a block.
    unsafe {
        let (scales, minima) = scales_and_minima(&*block.add(4).cast::<[u8; 12]>());
        let (scale, minimum) = (_mm256_set1_ps(half(block)), _mm256_set1_ps(-half(block.add(2))));
        (_mm256_mul_ps(eight(scales), scale), _mm256_mul_ps(eight(minima), minimum))
    }
}

/// Eight numbers of sixteen rows, two rows a vector (0 and 4, 1 and 5, 2 and 6, 3 and 7, 8 and 12, ..), into vectors of sixteen lanes.
#[inline(always)]
unsafe fn transpose_eight(pairs: [__m512; 8]) -> [__m512; 8] {
    // SAFETY: the caller's: the instructions.
    unsafe {
        let mut out = pairs;
        let lower = fours([pairs[0], pairs[1], pairs[2], pairs[3]]);
        let upper = fours([pairs[4], pairs[5], pairs[6], pairs[7]]);
        for i in 0..4 {
            out[i] = _mm512_shuffle_f32x4::<0x88>(lower[i], upper[i]);
            out[4 + i] = _mm512_shuffle_f32x4::<0xdd>(lower[i], upper[i]);
        }
        out
    }
}

/// Four rows of four lanes, the other way round, in each 128 bits.
#[inline(always)]
unsafe fn fours([a, b, c, d]: [__m512; 4]) -> [__m512; 4] {
    // SAFETY: the caller's: the instructions.
    unsafe {
        let (ab, ab_high) = (_mm512_castps_pd(_mm512_unpacklo_ps(a, b)), _mm512_castps_pd(_mm512_unpackhi_ps(a, b)));
        let (cd, cd_high) = (_mm512_castps_pd(_mm512_unpacklo_ps(c, d)), _mm512_castps_pd(_mm512_unpackhi_ps(c, d)));
        [
            _mm512_castpd_ps(_mm512_unpacklo_pd(ab, cd)),
            _mm512_castpd_ps(_mm512_unpackhi_pd(ab, cd)),
            _mm512_castpd_ps(_mm512_unpacklo_pd(ab_high, cd_high)),
            _mm512_castpd_ps(_mm512_unpackhi_pd(ab_high, cd_high)),
        ]
    }
}

/// Sixteen rows of sixteen lanes, the other way round.
#[inline(always)]
pub(super) unsafe fn transpose(rows: [__m512i; LANES]) -> [__m512i; LANES] {
    // SAFETY: the caller's: the instructions.
    unsafe {
        let mut pairs = rows;
        for i in 0..8 {
            pairs[2 * i] = _mm512_unpacklo_epi32(rows[2 * i], rows[2 * i + 1]);
            pairs[2 * i + 1] = _mm512_unpackhi_epi32(rows[2 * i], rows[2 * i + 1]);
        }
        // fours[4 g + i]: lane i of each 128 bits, of rows 4 g to 4 g + 3.
        let mut fours = pairs;
        for g in 0..4 {
            let [a, b, c, d] = [pairs[4 * g], pairs[4 * g + 1], pairs[4 * g + 2], pairs[4 * g + 3]];
            fours[4 * g] = _mm512_unpacklo_epi64(a, c);
            fours[4 * g + 1] = _mm512_unpackhi_epi64(a, c);
            fours[4 * g + 2] = _mm512_unpacklo_epi64(b, d);
            fours[4 * g + 3] = _mm512_unpackhi_epi64(b, d);
        }
        let mut out = fours;
        for i in 0..4 {
            let quarters = quarters([fours[i], fours[4 + i], fours[8 + i], fours[12 + i]]);
            for (quarter, lanes) in quarters.into_iter().enumerate() {
                out[4 * quarter + i] = lanes;
            }
        }
        out
    }
}

/// `[quarter 0 of each, quarter 1 of each, ..]`
#[inline(always)]
unsafe fn quarters([a, b, c, d]: [__m512i; 4]) -> [__m512i; 4] {
    // SAFETY: the caller's: the instructions.
    unsafe {
        let (ab_even, cd_even) = (_mm512_shuffle_i32x4::<0x88>(a, b), _mm512_shuffle_i32x4::<0x88>(c, d));
        let (ab_odd, cd_odd) = (_mm512_shuffle_i32x4::<0xdd>(a, b), _mm512_shuffle_i32x4::<0xdd>(c, d));
        [
            _mm512_shuffle_i32x4::<0x88>(ab_even, cd_even),
            _mm512_shuffle_i32x4::<0x88>(ab_odd, cd_odd),
            _mm512_shuffle_i32x4::<0xdd>(ab_even, cd_even),
            _mm512_shuffle_i32x4::<0xdd>(ab_odd, cd_odd),
        ]
    }
}

/// Sums of each row's lanes: of every [`RUN`] numbers, which are four lanes, or of twice as many where `runs` is two (then the first two
/// vectors are all).
#[inline(always)]
pub(super) unsafe fn run_sums(rows: [__m512i; LANES], runs: usize) -> [__m512i; 4] {
    const { assert!(RUN == 16) };
    // SAFETY: the caller's: the instructions.
    unsafe {
        let mut fours = [_mm512_setzero_si512(); 4];
        for (i, four) in fours.iter_mut().enumerate() {
            let (a, b) = (add_halves(rows[4 * i], rows[4 * i + 1]), add_halves(rows[4 * i + 2], rows[4 * i + 3]));
            *four = _mm512_add_epi32(_mm512_unpacklo_epi64(a, b), _mm512_unpackhi_epi64(a, b));
        }
        if runs == 1 {
            return quarters(fours);
        }
        let [a, b, c, d] = fours;
        let ab = _mm512_add_epi32(_mm512_shuffle_i32x4::<0x88>(a, b), _mm512_shuffle_i32x4::<0xdd>(a, b));
        let cd = _mm512_add_epi32(_mm512_shuffle_i32x4::<0x88>(c, d), _mm512_shuffle_i32x4::<0xdd>(c, d));
        let zero = _mm512_setzero_si512();
        [_mm512_shuffle_i32x4::<0x88>(ab, cd), _mm512_shuffle_i32x4::<0xdd>(ab, cd), zero, zero]
    }
}

/// In each 128 bits, lanes 0 and 2 of `a`, of `b`, and lanes 1 and 3 of `a`, of `b`, added.
#[inline(always)]
unsafe fn add_halves(a: __m512i, b: __m512i) -> __m512i {
    // SAFETY: the caller's: the instructions.
    unsafe { _mm512_add_epi32(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b)) }
}
