//! 16 numbers at a time, on each instruction set.

use half::{bf16, f16};

/// 16 f32. All functions: the processor must have the instruction set, and pointers 16 readable (writable) elements.
pub(super) trait Lanes: Copy {
    /// Rows of [`super::dot_octets`] and of [`super::add_weighted`], and vectors of a row of the latter, that fit the registers.
    const WIDE: bool;
    unsafe fn zero() -> Self;
    unsafe fn splat(x: f32) -> Self;
    unsafe fn load(from: *const f32) -> Self;
    unsafe fn load_f16(from: *const f16) -> Self;
    unsafe fn load_bf16(from: *const bf16) -> Self;
    unsafe fn load_i8(from: *const i8) -> Self;
    /// 8 numbers at each.
    unsafe fn load_two(from: [*const f32; 2]) -> Self;
    unsafe fn load_two_f16(from: [*const f16; 2]) -> Self;
    unsafe fn load_two_bf16(from: [*const bf16; 2]) -> Self;
    unsafe fn load_two_i8(from: [*const i8; 2]) -> Self;
    unsafe fn store(self, to: *mut f32);
    /// `self * b`
    unsafe fn times(self, b: Self) -> Self;
    /// `self * b + c`, rounded once.
    unsafe fn times_plus(self, b: Self, c: Self) -> Self;
}

/// Plain arrays, for any processor.
#[derive(Clone, Copy)]
#[cfg_attr(target_arch = "aarch64", allow(dead_code, reason = "there only tests compare with it"))]
pub(super) struct Portable([f32; 16]);

#[cfg_attr(target_arch = "aarch64", allow(dead_code, reason = "there only tests compare with it"))]
impl Portable {
    #[inline(always)]
    fn each(f: impl FnMut(usize) -> f32) -> Self {
        Self(std::array::from_fn(f))
    }
}

impl Lanes for Portable {
    const WIDE: bool = false;

    #[inline(always)]
    unsafe fn zero() -> Self {
        Self([0.0; 16])
    }

    #[inline(always)]
    unsafe fn splat(x: f32) -> Self {
        Self([x; 16])
    }

    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self {
        // SAFETY: the caller's: 16 elements are readable.
        Self(unsafe { from.cast::<[f32; 16]>().read_unaligned() })
    }

    #[inline(always)]
    unsafe fn load_f16(from: *const f16) -> Self {
        // SAFETY: the caller's: 16 elements are readable.
        unsafe { Self::load_two_f16([from, from.add(8)]) }
    }

    #[inline(always)]
    unsafe fn load_bf16(from: *const bf16) -> Self {
        // SAFETY: the caller's: 16 elements are readable.
        unsafe { Self::load_two_bf16([from, from.add(8)]) }
    }

    #[inline(always)]
    unsafe fn load_i8(from: *const i8) -> Self {
        // SAFETY: the caller's: 16 elements are readable.
        unsafe { Self::load_two_i8([from, from.add(8)]) }
    }

    #[inline(always)]
    unsafe fn load_two(from: [*const f32; 2]) -> Self {
        // SAFETY: the caller's: 8 elements are readable at each.
        let values = from.map(|from| unsafe { from.cast::<[f32; 8]>().read_unaligned() });
        Self::each(|i| values[i / 8][i % 8])
    }

    #[inline(always)]
    unsafe fn load_two_f16(from: [*const f16; 2]) -> Self {
        // SAFETY: the caller's: 8 elements are readable at each.
        let values = from.map(|from| unsafe { from.cast::<[u16; 8]>().read_unaligned() });
        Self::each(|i| {
            let bits = values[i / 8][i % 8];
            // The exponent moves by multiplying; only infinities and NaN need more. No branch, so that vectors work.
            let magnitude = f32::from_bits(u32::from(bits & 0x7fff) << 13) * f32::from_bits(0x7780_0000);
            let special = if bits & 0x7c00 == 0x7c00 { 0x7f80_0000 } else { 0 };
            f32::from_bits(magnitude.to_bits() | special | u32::from(bits & 0x8000) << 16)
        })
    }

    #[inline(always)]
    unsafe fn load_two_bf16(from: [*const bf16; 2]) -> Self {
        // SAFETY: the caller's: 8 elements are readable at each.
        let values = from.map(|from| unsafe { from.cast::<[u16; 8]>().read_unaligned() });
        Self::each(|i| f32::from_bits(u32::from(values[i / 8][i % 8]) << 16))
    }

    #[inline(always)]
    unsafe fn load_two_i8(from: [*const i8; 2]) -> Self {
        // SAFETY: the caller's: 8 elements are readable at each.
        let values = from.map(|from| unsafe { from.cast::<[i8; 8]>().read_unaligned() });
        Self::each(|i| f32::from(values[i / 8][i % 8]))
    }

    #[inline(always)]
    unsafe fn store(self, to: *mut f32) {
        // SAFETY: the caller's: 16 elements are writable.
        unsafe { to.cast::<[f32; 16]>().write_unaligned(self.0) };
    }

    #[inline(always)]
    unsafe fn times(self, b: Self) -> Self {
        Self::each(|i| self.0[i] * b.0[i])
    }

    #[inline(always)]
    unsafe fn times_plus(self, b: Self, c: Self) -> Self {
        Self::each(|i| self.0[i].mul_add(b.0[i], c.0[i]))
    }
}

#[cfg(target_arch = "x86_64")]
pub(super) use x86::{Avx2, Avx512, has_avx2, has_avx512};

#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::Lanes;
    use half::{bf16, f16};
    use std::arch::x86_64::*;

    pub(in crate::simd) fn has_avx512() -> bool {
        is_x86_feature_detected!("avx512f") && has_avx2()
    }

    pub(in crate::simd) fn has_avx2() -> bool {
        is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") && is_x86_feature_detected!("f16c")
    }

    /// One register.
    #[derive(Clone, Copy)]
    pub(in crate::simd) struct Avx512(__m512);

    // SAFETY of all: the caller's, see the trait.
    #[allow(clippy::undocumented_unsafe_blocks, reason = "each is the trait's contract")]
    impl Lanes for Avx512 {
        const WIDE: bool = true;

        #[inline(always)]
        unsafe fn zero() -> Self {
            unsafe { Self(_mm512_setzero_ps()) }
        }

        #[inline(always)]
        unsafe fn splat(x: f32) -> Self {
            unsafe { Self(_mm512_set1_ps(x)) }
        }

        #[inline(always)]
        unsafe fn load(from: *const f32) -> Self {
            unsafe { Self(_mm512_loadu_ps(from)) }
        }

        #[inline(always)]
        unsafe fn load_f16(from: *const f16) -> Self {
            unsafe { Self(_mm512_cvtph_ps(_mm256_loadu_si256(from.cast()))) }
        }

        #[inline(always)]
        unsafe fn load_bf16(from: *const bf16) -> Self {
            unsafe { Self(_mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(_mm256_loadu_si256(from.cast()))))) }
        }

        #[inline(always)]
        unsafe fn load_i8(from: *const i8) -> Self {
            unsafe { Self(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(from.cast())))) }
        }

        #[inline(always)]
        unsafe fn load_two([a, b]: [*const f32; 2]) -> Self {
            unsafe {
                let (a, b) = (_mm512_castps256_ps512(_mm256_loadu_ps(a)), _mm256_castps_pd(_mm256_loadu_ps(b)));
                Self(_mm512_castpd_ps(_mm512_insertf64x4::<1>(_mm512_castps_pd(a), b)))
            }
        }

        #[inline(always)]
        unsafe fn load_two_f16([a, b]: [*const f16; 2]) -> Self {
            unsafe { Self(_mm512_cvtph_ps(_mm256_set_m128i(_mm_loadu_si128(b.cast()), _mm_loadu_si128(a.cast())))) }
        }

        #[inline(always)]
        unsafe fn load_two_bf16([a, b]: [*const bf16; 2]) -> Self {
            unsafe {
                let both = _mm256_set_m128i(_mm_loadu_si128(b.cast()), _mm_loadu_si128(a.cast()));
                Self(_mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(both))))
            }
        }

        #[inline(always)]
        unsafe fn load_two_i8([a, b]: [*const i8; 2]) -> Self {
            unsafe {
                let both = _mm_unpacklo_epi64(_mm_loadl_epi64(a.cast()), _mm_loadl_epi64(b.cast()));
                Self(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(both)))
            }
        }

        #[inline(always)]
        unsafe fn store(self, to: *mut f32) {
            unsafe { _mm512_storeu_ps(to, self.0) }
        }

        #[inline(always)]
        unsafe fn times(self, b: Self) -> Self {
            unsafe { Self(_mm512_mul_ps(self.0, b.0)) }
        }

        #[inline(always)]
        unsafe fn times_plus(self, b: Self, c: Self) -> Self {
            unsafe { Self(_mm512_fmadd_ps(self.0, b.0, c.0)) }
        }
    }

    /// Two registers.
    #[derive(Clone, Copy)]
    pub(in crate::simd) struct Avx2(__m256, __m256);

    // SAFETY of all: the caller's, see the trait.
    #[allow(clippy::undocumented_unsafe_blocks, reason = "each is the trait's contract")]
    impl Lanes for Avx2 {
        const WIDE: bool = false;

        #[inline(always)]
        unsafe fn zero() -> Self {
            unsafe { Self(_mm256_setzero_ps(), _mm256_setzero_ps()) }
        }

        #[inline(always)]
        unsafe fn splat(x: f32) -> Self {
            unsafe { Self(_mm256_set1_ps(x), _mm256_set1_ps(x)) }
        }

        #[inline(always)]
        unsafe fn load(from: *const f32) -> Self {
            unsafe { Self::load_two([from, from.add(8)]) }
        }

        #[inline(always)]
        unsafe fn load_f16(from: *const f16) -> Self {
            unsafe { Self::load_two_f16([from, from.add(8)]) }
        }

        #[inline(always)]
        unsafe fn load_bf16(from: *const bf16) -> Self {
            unsafe { Self::load_two_bf16([from, from.add(8)]) }
        }

        #[inline(always)]
        unsafe fn load_i8(from: *const i8) -> Self {
            unsafe { Self::load_two_i8([from, from.add(8)]) }
        }

        #[inline(always)]
        unsafe fn load_two([a, b]: [*const f32; 2]) -> Self {
            unsafe { Self(_mm256_loadu_ps(a), _mm256_loadu_ps(b)) }
        }

        #[inline(always)]
        unsafe fn load_two_f16([a, b]: [*const f16; 2]) -> Self {
            unsafe { Self(_mm256_cvtph_ps(_mm_loadu_si128(a.cast())), _mm256_cvtph_ps(_mm_loadu_si128(b.cast()))) }
        }

        #[inline(always)]
        unsafe fn load_two_bf16([a, b]: [*const bf16; 2]) -> Self {
            unsafe {
                let (a, b) = (_mm256_cvtepu16_epi32(_mm_loadu_si128(a.cast())), _mm256_cvtepu16_epi32(_mm_loadu_si128(b.cast())));
                Self(_mm256_castsi256_ps(_mm256_slli_epi32::<16>(a)), _mm256_castsi256_ps(_mm256_slli_epi32::<16>(b)))
            }
        }

        #[inline(always)]
        unsafe fn load_two_i8([a, b]: [*const i8; 2]) -> Self {
            unsafe {
                let (a, b) = (_mm256_cvtepi8_epi32(_mm_loadl_epi64(a.cast())), _mm256_cvtepi8_epi32(_mm_loadl_epi64(b.cast())));
                Self(_mm256_cvtepi32_ps(a), _mm256_cvtepi32_ps(b))
            }
        }

        #[inline(always)]
        unsafe fn store(self, to: *mut f32) {
            unsafe {
                _mm256_storeu_ps(to, self.0);
                _mm256_storeu_ps(to.add(8), self.1);
            }
        }

        #[inline(always)]
        unsafe fn times(self, b: Self) -> Self {
            unsafe { Self(_mm256_mul_ps(self.0, b.0), _mm256_mul_ps(self.1, b.1)) }
        }

        #[inline(always)]
        unsafe fn times_plus(self, b: Self, c: Self) -> Self {
            unsafe { Self(_mm256_fmadd_ps(self.0, b.0, c.0), _mm256_fmadd_ps(self.1, b.1, c.1)) }
        }
    }
}

#[cfg(target_arch = "aarch64")]
pub(super) use arm::Neon;

#[cfg(target_arch = "aarch64")]
mod arm {
    use super::Lanes;
    use half::{bf16, f16};
    use std::arch::aarch64::*;

    /// Four registers. Every processor of this architecture has the instructions.
    #[derive(Clone, Copy)]
    pub(in crate::simd) struct Neon([float32x4_t; 4]);

    /// 16 numbers as two registers of 8, of 16 bits each.
    #[inline(always)]
    unsafe fn load_16_bits([a, b]: [*const u16; 2]) -> [uint16x4_t; 4] {
        // SAFETY: the caller's: 8 elements are readable at each.
        unsafe {
            let (a, b) = (vld1q_u16(a), vld1q_u16(b));
            [vget_low_u16(a), vget_high_u16(a), vget_low_u16(b), vget_high_u16(b)]
        }
    }

    // SAFETY of all: the caller's, see the trait.
    #[allow(clippy::undocumented_unsafe_blocks, reason = "each is the trait's contract")]
    impl Lanes for Neon {
        const WIDE: bool = false;

        #[inline(always)]
        unsafe fn zero() -> Self {
            unsafe { Self::splat(0.0) }
        }

        #[inline(always)]
        unsafe fn splat(x: f32) -> Self {
            unsafe { Self([vdupq_n_f32(x); 4]) }
        }

        #[inline(always)]
        unsafe fn load(from: *const f32) -> Self {
            unsafe { Self::load_two([from, from.add(8)]) }
        }

        #[inline(always)]
        unsafe fn load_f16(from: *const f16) -> Self {
            unsafe { Self::load_two_f16([from, from.add(8)]) }
        }

        #[inline(always)]
        unsafe fn load_bf16(from: *const bf16) -> Self {
            unsafe { Self::load_two_bf16([from, from.add(8)]) }
        }

        #[inline(always)]
        unsafe fn load_i8(from: *const i8) -> Self {
            unsafe { Self::load_two_i8([from, from.add(8)]) }
        }

        #[inline(always)]
        unsafe fn load_two([a, b]: [*const f32; 2]) -> Self {
            unsafe { Self([vld1q_f32(a), vld1q_f32(a.add(4)), vld1q_f32(b), vld1q_f32(b.add(4))]) }
        }

        #[inline(always)]
        unsafe fn load_two_f16(from: [*const f16; 2]) -> Self {
            unsafe { Self(load_16_bits(from.map(|from| from.cast())).map(|x| vcvt_f32_f16(vreinterpret_f16_u16(x)))) }
        }

        #[inline(always)]
        unsafe fn load_two_bf16(from: [*const bf16; 2]) -> Self {
            unsafe { Self(load_16_bits(from.map(|from| from.cast())).map(|x| vreinterpretq_f32_u32(vshll_n_u16::<16>(x)))) }
        }

        #[inline(always)]
        unsafe fn load_two_i8([a, b]: [*const i8; 2]) -> Self {
            unsafe {
                let (a, b) = (vmovl_s8(vld1_s8(a)), vmovl_s8(vld1_s8(b)));
                let quarters = [vget_low_s16(a), vget_high_s16(a), vget_low_s16(b), vget_high_s16(b)];
                Self(quarters.map(|x| vcvtq_f32_s32(vmovl_s16(x))))
            }
        }

        #[inline(always)]
        unsafe fn store(self, to: *mut f32) {
            unsafe {
                vst1q_f32(to, self.0[0]);
                vst1q_f32(to.add(4), self.0[1]);
                vst1q_f32(to.add(8), self.0[2]);
                vst1q_f32(to.add(12), self.0[3]);
            }
        }

        #[inline(always)]
        unsafe fn times(self, b: Self) -> Self {
            let (a, b) = (self.0, b.0);
            unsafe { Self([vmulq_f32(a[0], b[0]), vmulq_f32(a[1], b[1]), vmulq_f32(a[2], b[2]), vmulq_f32(a[3], b[3])]) }
        }

        #[inline(always)]
        unsafe fn times_plus(self, b: Self, c: Self) -> Self {
            let (a, b, c) = (self.0, b.0, c.0);
            unsafe {
                Self([vfmaq_f32(c[0], a[0], b[0]), vfmaq_f32(c[1], a[1], b[1]), vfmaq_f32(c[2], a[2], b[2]), vfmaq_f32(c[3], a[3], b[3])])
            }
        }
    }
}
