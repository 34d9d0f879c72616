//! ggml's blocks in the order that kernels read: planes of what is alike, see kernels/cuda/weights.cuh.

use candle_core::quantized::GgmlDType;
use candle_core::{Result, bail};
use half::f16;
use sparse_attn::parallel;

/// How the kernels tell matrices apart: `Format` of weights.cuh.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(i32)]
pub(super) enum Format {
    F32 = 0,
    F16,
    Bf16,
    Affine4,
    Affine5,
    Q8_0,
    Q4K,
    Q5K,
    Q6K,
}

impl Format {
    /// The end of the names of its kernels, in kernels/cuda/products.cu.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::F16 => "f16",
            Self::Bf16 => "bf16",
            Self::Affine4 => "affine4",
            Self::Affine5 => "affine5",
            Self::Q8_0 => "q8_0",
            Self::Q4K => "q4_k",
            Self::Q5K => "q5_k",
            Self::Q6K => "q6_k",
        }
    }

    /// The name of the kernel for matrices of these formats: there is one of each, and one for different ones.
    pub(super) fn kernel(stem: &str, formats: impl IntoIterator<Item = Self>) -> String {
        let mut formats = formats.into_iter();
        let first = formats.next().unwrap_or(Self::F32);
        format!("{stem}_{}", if formats.all(|other| other == first) { first.name() } else { "any" })
    }
}

/// A part of a block as it lies in a plane: reads the block, and the number of a unit of 32 weights in it; writes that unit's bytes.
type Unit = fn(&[u8], usize, &mut [u8]);

/// The planes of `bytes`, blocks of `dtype`; `None`: there is no kernel for them.
pub(super) fn planes(bytes: &[u8], dtype: GgmlDType) -> Result<Option<(Format, Vec<Vec<u8>>)>> {
    let block = dtype.type_size();
    if !bytes.len().is_multiple_of(block) {
        bail!("cuda: {} bytes are no blocks of {block} ({dtype:?})", bytes.len());
    }
    let units = dtype.block_size() / 32;
    // `width` bytes for each unit, or for each block.
    let of_units = |width: usize, unit: Unit| plane(bytes, block, units, width, unit);
    let of_blocks = |width: usize, unit: Unit| plane(bytes, block, 1, width, unit);
    Ok(Some(match dtype {
        // w = d * (q - 8) = d * q - 8 d
        GgmlDType::Q4_0 => {
            (Format::Affine4, vec![of_units(16, |b, _, out| out.copy_from_slice(&b[2..18])), of_units(4, |b, _, out| affine(b, -8.0, out))])
        }
        GgmlDType::Q4_1 => {
            let pair = of_units(4, |b, _, out| out.copy_from_slice(&b[..4]));
            (Format::Affine4, vec![of_units(16, |b, _, out| out.copy_from_slice(&b[4..20])), pair])
        }
        GgmlDType::Q5_0 => {
            let nibbles = of_units(16, |b, _, out| out.copy_from_slice(&b[6..22]));
            let high = of_units(4, |b, _, out| out.copy_from_slice(&b[2..6]));
            (Format::Affine5, vec![nibbles, of_units(4, |b, _, out| affine(b, -16.0, out)), high])
        }
        GgmlDType::Q5_1 => {
            let nibbles = of_units(16, |b, _, out| out.copy_from_slice(&b[8..24]));
            let pair = of_units(4, |b, _, out| out.copy_from_slice(&b[..4]));
            (Format::Affine5, vec![nibbles, pair, of_units(4, |b, _, out| out.copy_from_slice(&b[4..8]))])
        }
        GgmlDType::Q8_0 => {
            let scales = of_units(2, |b, _, out| out.copy_from_slice(&b[..2]));
            (Format::Q8_0, vec![of_units(32, |b, _, out| out.copy_from_slice(&b[2..34])), scales])
        }
        // d, dmin, scales in 6 bits [12], nibbles [128].
        GgmlDType::Q4K => {
            let nibbles = of_units(16, |b, unit, out| k_nibbles(&b[16..], unit, out));
            (Format::Q4K, vec![nibbles, of_units(2, k_scales), of_blocks(4, |b, _, out| out.copy_from_slice(&b[..4]))])
        }
        // The same, with fifth bits [32] before the nibbles.
        GgmlDType::Q5K => {
            let nibbles = of_units(16, |b, unit, out| k_nibbles(&b[48..], unit, out));
            let high = of_units(4, |b, unit, out| {
                let bits = (0..32).fold(0u32, |bits, i| bits | u32::from(b[16 + i] >> unit & 1) << i);
                out.copy_from_slice(&bits.to_le_bytes());
            });
            (Format::Q5K, vec![nibbles, of_units(2, k_scales), of_blocks(4, |b, _, out| out.copy_from_slice(&b[..4])), high])
        }
        // Low nibbles [128], high pairs [64], scales [16], d.
        GgmlDType::Q6K => {
            let scales = of_units(2, |b, unit, out| out.copy_from_slice(&b[192 + 2 * unit..194 + 2 * unit]));
            (
                Format::Q6K,
                vec![of_units(16, q6_nibbles), of_units(8, q6_pairs), scales, of_blocks(2, |b, _, out| out.copy_from_slice(&b[208..]))],
            )
        }
        _ => return Ok(None),
    }))
}

/// Blocks that a thread takes at a time.
const BLOCKS_AT_ONCE: usize = 1024;

/// A plane: `width` bytes for each of the `units` of every block.
fn plane(bytes: &[u8], block: usize, units: usize, width: usize, unit: Unit) -> Vec<u8> {
    let stride = units * width;
    parallel::filled(bytes.len() / block * stride, BLOCKS_AT_ONCE * stride, |part, out: &mut [u8]| {
        for (from, to) in bytes[part * BLOCKS_AT_ONCE * block..].chunks_exact(block).zip(out.chunks_exact_mut(stride)) {
            to.chunks_exact_mut(width).enumerate().for_each(|(number, out)| unit(from, number, out));
        }
    })
}

/// The scale that a block begins with, and it times `zero`, a power of two.
fn affine(block: &[u8], zero: f32, out: &mut [u8]) {
    let scale = f16::from_le_bytes([block[0], block[1]]);
    out[..2].copy_from_slice(&block[..2]);
    out[2..].copy_from_slice(&f16::from_f32(scale.to_f32() * zero).to_le_bytes());
}

/// Nibbles of one of eight units: units 2 j and 2 j + 1 are the low and the high ones of 32 bytes.
fn k_nibbles(bytes: &[u8], unit: usize, out: &mut [u8]) {
    let weight = |i: usize| bytes[unit / 2 * 32 + i] >> (4 * (unit % 2)) & 0xf;
    out.iter_mut().enumerate().for_each(|(i, out)| *out = weight(i) | weight(16 + i) << 4);
}

/// The factors of scale and shift of one of eight units, of 6 bits each in 12 bytes.
fn k_scales(block: &[u8], unit: usize, out: &mut [u8]) {
    let s = &block[4..16];
    let (scale, shift) = match unit {
        0..4 => (s[unit] & 63, s[unit + 4] & 63),
        _ => (s[unit + 4] & 0xf | s[unit - 4] >> 6 << 4, s[unit + 4] >> 4 | s[unit] >> 6 << 4),
    };
    out.copy_from_slice(&[scale, shift]);
}

/// Low nibbles of one of eight units of Q6_K: half n has 64 bytes, whose low and high nibbles are units k and k + 2 of the half.
fn q6_nibbles(block: &[u8], unit: usize, out: &mut [u8]) {
    let (n, k) = (unit / 4, unit % 4);
    let weight = |i: usize| block[64 * n + 32 * (k % 2) + i] >> (4 * (k / 2)) & 0xf;
    out.iter_mut().enumerate().for_each(|(i, out)| *out = weight(i) | weight(16 + i) << 4);
}

/// What is above them: pairs of bits, in the order of weights.cuh.
fn q6_pairs(block: &[u8], unit: usize, out: &mut [u8]) {
    let (n, k) = (unit / 4, unit % 4);
    let weight = |i: usize| block[128 + 32 * n + i] >> (2 * k) & 3;
    for (place, out) in out.iter_mut().enumerate() {
        let (half, b) = (place / 4, place % 4);
        *out = (0..4).fold(0, |byte, j| byte | weight(16 * half + 4 * j + b) << (2 * j));
    }
}
