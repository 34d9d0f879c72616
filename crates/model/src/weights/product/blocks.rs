//! ggml's blocks, unpacked 64 numbers at a time.
//!
//! A number is `scale * (u - offset) + minimum` with `u` unsigned, `offset` the format's, and scale and minimum shared by
//! 16 neighbours at least. Layouts: ggml-common.h of llama.cpp.

use super::activations::{Activations, QUAD};
use candle_core::quantized::GgmlDType;
use half::f16;

/// Numbers unpacked at a time.
pub(super) const STEP: usize = 64;

/// Neighbours that share a scale, in every format.
pub(super) const RUN: usize = 16;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Format {
    Q4_0,
    Q4_1,
    Q5_0,
    Q5_1,
    Q8_0,
    Q4K,
    Q5K,
    Q6K,
}

/// 64 numbers.
pub(super) struct Unpacked {
    pub(super) integers: [u8; STEP],
    pub(super) scales: [f32; STEP / RUN],
    pub(super) minima: [f32; STEP / RUN],
}

impl Format {
    pub(super) fn of(dtype: GgmlDType) -> Option<Self> {
        Some(match dtype {
            GgmlDType::Q4_0 => Self::Q4_0,
            GgmlDType::Q4_1 => Self::Q4_1,
            GgmlDType::Q5_0 => Self::Q5_0,
            GgmlDType::Q5_1 => Self::Q5_1,
            GgmlDType::Q8_0 => Self::Q8_0,
            GgmlDType::Q4K => Self::Q4K,
            GgmlDType::Q5K => Self::Q5K,
            GgmlDType::Q6K => Self::Q6K,
            _ => return None,
        })
    }

    /// What a row's length must be a multiple of.
    pub(super) fn multiple(self) -> usize {
        self.block().0.max(STEP)
    }

    /// Numbers and bytes of a block.
    pub(super) const fn block(self) -> (usize, usize) {
        match self {
            Self::Q4_0 => (32, 18),
            Self::Q4_1 => (32, 20),
            Self::Q5_0 => (32, 22),
            Self::Q5_1 => (32, 24),
            Self::Q8_0 => (32, 34),
            Self::Q4K => (256, 144),
            Self::Q5K => (256, 176),
            Self::Q6K => (256, 210),
        }
    }

    pub(super) fn row_bytes(self, columns: usize) -> usize {
        let (numbers, bytes) = self.block();
        columns / numbers * bytes
    }

    /// What is subtracted from the unsigned integers.
    pub(super) const fn offset(self) -> i32 {
        match self {
            Self::Q4_0 => 8,
            Self::Q5_0 => 16,
            Self::Q6K => 32,
            Self::Q8_0 => 128,
            Self::Q4_1 | Self::Q5_1 | Self::Q4K | Self::Q5K => 0,
        }
    }

    /// `row . x`; `row` holds as many numbers as `x`.
    pub(super) fn dot(self, row: &[u8], x: &Activations) -> f32 {
        assert_eq!(row.len(), self.row_bytes(x.integers.len()), "a row of another length");
        #[cfg(target_arch = "x86_64")]
        {
            if super::avx512::is_here() {
                // SAFETY: the processor has the instructions, the lengths agree.
                return unsafe { super::avx512::dot(self, row, x) };
            }
            if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
                // SAFETY: the processor has AVX2 and FMA, just asked.
                return unsafe { self.dot_avx2(row, x) };
            }
        }
        self.dot_plain(row, x)
    }

    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx2,fma")]
    fn dot_avx2(self, row: &[u8], x: &Activations) -> f32 {
        self.dot_plain(row, x)
    }

    /// In plain loops, which the compiler turns into the vectors of its caller.
    #[inline(always)]
    pub(super) fn dot_plain(self, row: &[u8], x: &Activations) -> f32 {
        let mut sum = 0f32;
        self.each_step(row, |step, unpacked| {
            for run in 0..STEP / RUN {
                let from = step * STEP + run * RUN;
                let integers = &x.integers[from..from + RUN];
                let products = unpacked.integers[run * RUN..].iter().zip(integers).map(|(u, x)| i32::from(*u) * i32::from(*x));
                let total: i32 = x.sums[from / QUAD..(from + RUN) / QUAD].iter().sum();
                let product = products.sum::<i32>() - self.offset() * total;
                sum += x.scales[from / QUAD] * (unpacked.scales[run] * product as f32 + unpacked.minima[run] * total as f32);
            }
        });
        sum
    }

    /// Calls `f` with every 64 numbers of a row.
    #[inline(always)]
    pub(super) fn each_step(self, row: &[u8], mut f: impl FnMut(usize, Unpacked)) {
        let (numbers, bytes) = self.block();
        let bytes_at_once = if numbers < STEP { 2 * bytes } else { bytes };
        let steps_at_once = numbers.max(STEP) / STEP;
        for (at, bytes) in row.chunks_exact(bytes_at_once).enumerate() {
            for step in 0..steps_at_once {
                f(at * steps_at_once + step, self.unpack(bytes, step));
            }
        }
    }

    /// Numbers `64 * step ..` of `bytes`: two blocks of 32, or one of 256.
    #[inline(always)]
    fn unpack(self, bytes: &[u8], step: usize) -> Unpacked {
        let half = |at: usize| f16::from_le_bytes([bytes[at], bytes[at + 1]]).to_f32();
        let mut out = Unpacked { integers: [0; STEP], scales: [0.0; 4], minima: [0.0; 4] };
        match self {
            Self::Q4_0 | Self::Q4_1 | Self::Q5_0 | Self::Q5_1 | Self::Q8_0 => {
                let size = self.block().1;
                for block in 0..2 {
                    let at = block * size;
                    let integers = &mut out.integers[32 * block..32 * (block + 1)];
                    out.scales[2 * block..2 * block + 2].fill(half(at));
                    let has_minimum = matches!(self, Self::Q4_1 | Self::Q5_1);
                    if has_minimum {
                        out.minima[2 * block..2 * block + 2].fill(half(at + 2));
                    }
                    let body = at + if has_minimum { 4 } else { 2 };
                    match self {
                        Self::Q8_0 => integers.iter_mut().zip(&bytes[body..]).for_each(|(u, byte)| *u = byte ^ 0x80),
                        Self::Q4_0 | Self::Q4_1 => nibbles(&bytes[body..body + 16], integers),
                        _ => {
                            nibbles(&bytes[body + 4..body + 20], integers);
                            let high = u32::from_le_bytes([bytes[body], bytes[body + 1], bytes[body + 2], bytes[body + 3]]);
                            integers.iter_mut().enumerate().for_each(|(i, u)| *u |= ((high >> i & 1) << 4) as u8);
                        }
                    }
                }
            }
            Self::Q4K | Self::Q5K => {
                let (scales, minima) = scales_and_minima(&std::array::from_fn(|i| bytes[4 + i]));
                for part in 0..2 {
                    out.scales[2 * part..2 * part + 2].fill(half(0) * f32::from(scales[2 * step + part]));
                    out.minima[2 * part..2 * part + 2].fill(-half(2) * f32::from(minima[2 * step + part]));
                }
                let low = if self == Self::Q4K { 16 } else { 48 };
                for i in 0..32 {
                    let byte = bytes[low + 32 * step + i];
                    (out.integers[i], out.integers[32 + i]) = (byte & 15, byte >> 4);
                    if self == Self::Q5K {
                        let high = bytes[16 + i] >> (2 * step);
                        out.integers[i] |= (high & 1) << 4;
                        out.integers[32 + i] |= (high >> 1 & 1) << 4;
                    }
                }
            }
            Self::Q6K => {
                let (low, high) = (64 * (step / 2), 128 + 32 * (step / 2));
                let shift = 4 * (step % 2);
                for i in 0..32 {
                    let high = bytes[high + i] >> shift;
                    out.integers[i] = (bytes[low + i] >> shift & 15) | (high & 3) << 4;
                    out.integers[32 + i] = (bytes[low + 32 + i] >> shift & 15) | (high >> 2 & 3) << 4;
                }
                for run in 0..4 {
                    out.scales[run] = half(208) * f32::from(bytes[192 + 4 * step + run] as i8);
                }
            }
        }
        out
    }
}

#[inline(always)]
fn nibbles(bytes: &[u8], out: &mut [u8]) {
    let (low, high) = out.split_at_mut(16);
    for ((low, high), byte) in low.iter_mut().zip(high).zip(bytes) {
        (*low, *high) = (byte & 15, byte >> 4);
    }
}

/// The eight 6-bit scales and minima of Q4_K and Q5_K, four at a time: the first four of each have 6 bits of a byte, the others 4 bits of
/// the last four bytes and the 2 that the first ones left.
#[inline(always)]
pub(super) fn scales_and_minima(packed: &[u8; 12]) -> ([u8; 8], [u8; 8]) {
    let word = |at: usize| u32::from_le_bytes([packed[at], packed[at + 1], packed[at + 2], packed[at + 3]]);
    let (a, b, c) = (word(0), word(4), word(8));
    let two = |low: u32, high: u32| (u64::from(low) | u64::from(high) << 32).to_le_bytes();
    let (six, four, left) = (0x3f3f_3f3f, 0x0f0f_0f0f, 0x0303_0303);
    (two(a & six, c & four | (a >> 6 & left) << 4), two(b & six, c >> 4 & four | (b >> 6 & left) << 4))
}
