//! Vector code on the host: products of a few rows with many stored ones, weighted sums of stored rows.
//!
//! The kernels are written once over `lanes::Lanes`, 16 numbers at a time, and compiled for each instruction set; which one
//! runs is decided at run time. Every result is a sum in the same order whatever the instruction set's width, the number
//! of rows computed together, or the dtype's path, so that cutting work differently changes no bit.

/// Functions that run a plain loop (an `#[inline(always)]` function of the same arguments) compiled for the instruction set at hand:
/// AVX-512, AVX2, or the target's own. The compiler makes the vectors; closures inside would not be compiled for them.
///
/// ```
/// #[inline(always)]
/// fn add_loop(sums: &mut [f32], x: &[f32]) {
///     sums.iter_mut().zip(x).for_each(|(sum, x)| *sum += x);
/// }
/// sparse_attn::vectorised! {
///     /// `sums += x`
///     fn add(sums: &mut [f32], x: &[f32]) -> () = add_loop;
/// }
/// let mut sums = [1.0; 40];
/// add(&mut sums, &[2.0; 40]);
/// assert_eq!(sums, [3.0; 40]);
/// ```
#[macro_export]
macro_rules! vectorised {
    ($($(#[$meta:meta])* $visibility:vis fn $name:ident($($argument:ident: $type:ty),*) -> $result:ty = $loop:ident;)*) => {$(
        $(#[$meta])*
        $visibility fn $name($($argument: $type),*) -> $result {
            #[cfg(target_arch = "x86_64")]
            {
                #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")]
                fn avx512($($argument: $type),*) -> $result {
                    $loop($($argument),*)
                }
                #[target_feature(enable = "avx2,fma")]
                fn avx2($($argument: $type),*) -> $result {
                    $loop($($argument),*)
                }
                if $crate::simd::has_avx512_loops() {
                    // SAFETY: the processor has these instructions, just asked.
                    return unsafe { avx512($($argument),*) };
                }
                if ::std::arch::is_x86_feature_detected!("avx2") && ::std::arch::is_x86_feature_detected!("fma") {
                    // SAFETY: the processor has these instructions, just asked.
                    return unsafe { avx2($($argument),*) };
                }
            }
            $loop($($argument),*)
        }
    )*};
}

/// Whether [`vectorised!`] takes the widest way.
#[cfg(target_arch = "x86_64")]
pub fn has_avx512_loops() -> bool {
    is_x86_feature_detected!("avx512f")
        && is_x86_feature_detected!("avx512bw")
        && is_x86_feature_detected!("avx512dq")
        && is_x86_feature_detected!("avx512vl")
        && is_x86_feature_detected!("fma")
}

mod kernels;
mod lanes;
mod softmax;

use crate::cache::{GROUP, KvDtype, LANES, OCTET, Order, Pool};
use crate::parallel;
use candle_core::{CpuStorage, DType, Device, Result, Storage, Tensor, bail};
use half::{bf16, f16};
use kernels::Column;

pub(crate) use kernels::Column as ValueColumn;
pub(crate) use softmax::{all_finite, exp_sum, max, raise};
pub use softmax::{exp, halved};

/// Stored numbers on the host.
#[derive(Debug, Clone, Copy)]
pub enum Numbers<'a> {
    /// As they are.
    F32(&'a [f32]),
    /// In 16 bits.
    F16(&'a [f16]),
    /// In 16 bits.
    Bf16(&'a [bf16]),
    /// Integers in two's complement, and the scale of every group.
    Q8(&'a [u8], &'a [f16]),
}

/// Stored rows on the host.
#[derive(Debug, Clone, Copy)]
pub struct Rows<'a> {
    /// Their numbers.
    pub numbers: Numbers<'a>,
    /// Numbers in a row.
    pub width: usize,
}

/// Calls `f` with the numbers of `tensor`, as f32, one after the other; they are fetched where they are not on the host.
///
/// # Errors
/// What `f` returns, or if they cannot be fetched.
pub fn with_f32<R>(tensor: &Tensor, f: impl FnOnce(&[f32]) -> Result<R>) -> Result<R> {
    let tensor = tensor.to_dtype(DType::F32)?.contiguous()?.to_device(&Device::Cpu)?;
    let (storage, layout) = tensor.storage_and_layout();
    match &*storage {
        Storage::Cpu(storage) => f(&storage.as_slice::<f32>()?[layout.start_offset()..][..tensor.elem_count()]),
        _ => bail!("code for the host got a tensor on {:?}", tensor.device().location()),
    }
}

/// Calls `f` with the rows of `pool`.
///
/// # Errors
/// If the pool is not on the host.
pub(crate) fn with_rows<R>(pool: &Pool, f: impl FnOnce(Rows<'_>) -> R) -> Result<R> {
    let (values, _) = pool.values().storage_and_layout();
    let scales = pool.scales().map(|scales| scales.storage_and_layout().0);
    let numbers = match (&*values, scales.as_deref()) {
        (Storage::Cpu(CpuStorage::F32(values)), None) => Numbers::F32(values),
        (Storage::Cpu(CpuStorage::F16(values)), None) => Numbers::F16(values),
        (Storage::Cpu(CpuStorage::BF16(values)), None) => Numbers::Bf16(values),
        (Storage::Cpu(CpuStorage::U8(values)), Some(Storage::Cpu(CpuStorage::F16(scales)))) => Numbers::Q8(values, scales),
        _ => bail!("the cpu backend got a cache of another device"),
    };
    Ok(f(Rows { numbers, width: pool.width() }))
}

/// Rows that a thread gathers at a time.
const ROWS_AT_ONCE: usize = 64;

impl Rows<'_> {
    /// The rows `slots` as f32, `[slots, width]`; all lie in `order`.
    ///
    /// # Panics
    /// If a slot is beyond the rows.
    pub fn gather(&self, order: Order, slots: &[u32]) -> Vec<f32> {
        let (width, groups) = (self.width, self.width.div_ceil(GROUP));
        assert!(self.holds(slots.iter().max().map_or(0, |slot| *slot as usize + 1)), "gather: a slot is beyond the pool");
        parallel::filled(slots.len() * width, ROWS_AT_ONCE * width, |part, out| {
            for (slot, out) in slots[part * ROWS_AT_ONCE..].iter().zip(out.chunks_exact_mut(width)) {
                let (first, stride) = order.place(*slot, width);
                match self.numbers {
                    Numbers::F32(values) => (0..width).for_each(|i| out[i] = values[first + i * stride]),
                    Numbers::F16(values) => (0..width).for_each(|i| out[i] = values[first + i * stride].to_f32()),
                    Numbers::Bf16(values) => (0..width).for_each(|i| out[i] = values[first + i * stride].to_f32()),
                    Numbers::Q8(values, scales) => {
                        let (first_scale, scale_stride) = order.place(*slot, groups);
                        for (i, out) in out.iter_mut().enumerate() {
                            let scale = scales[first_scale + i / GROUP * scale_stride].to_f32();
                            *out = f32::from(values[first + i * stride] as i8) * scale;
                        }
                    }
                }
            }
        })
    }

    fn len(&self) -> usize {
        match self.numbers {
            Numbers::F32(values) => values.len(),
            Numbers::F16(values) => values.len(),
            Numbers::Bf16(values) => values.len(),
            Numbers::Q8(values, _) => values.len(),
        }
    }

    /// Whether slots `0..slots` lie inside, scales included.
    fn holds(&self, slots: usize) -> bool {
        let scales = match self.numbers {
            Numbers::Q8(_, scales) => scales.len() / KvDtype::Q8_0.scales(self.width),
            _ => usize::MAX,
        };
        slots <= scales && slots * self.width <= self.len()
    }
}

/// Calls a kernel compiled for this processor.
macro_rules! call {
    ($avx512:ident, $avx2:ident, $portable:ident, ($($argument:expr),*)) => {{
        #[cfg(target_arch = "x86_64")]
        {
            if lanes::has_avx512() {
                // SAFETY: the processor has what the function needs; places and shapes were checked.
                return unsafe { kernels::$avx512($($argument),*) };
            }
            if lanes::has_avx2() {
                // SAFETY: as above.
                return unsafe { kernels::$avx2($($argument),*) };
            }
        }
        #[cfg(target_arch = "aarch64")]
        type Any = lanes::Neon;
        #[cfg(not(target_arch = "aarch64"))]
        type Any = lanes::Portable;
        // SAFETY: places and shapes were checked.
        unsafe { kernels::$portable::<Any>($($argument),*) }
    }};
}

/// Slots up to the last one of some octets.
fn slots_of(pairs: &[[u32; 2]]) -> usize {
    pairs.as_flattened().iter().max().map_or(0, |octet| (*octet as usize + 1) * OCTET)
}

/// `out[row, OCTET * i + lane] = q[row] . rows[OCTET * octets[i] + lane]`, where `octets` are those of `pairs` one after the other;
/// `rows` lie in tiles.
///
/// - `q`: `[n, width]`
/// - `out`: `[n, OCTET * octets]`
///
/// # Panics
/// If an octet is beyond the rows, or a list has another length.
pub fn dot_octets(rows: Rows<'_>, q: &[f32], pairs: &[[u32; 2]], out: &mut [f32]) {
    let count = q.len() / rows.width;
    assert!(rows.holds(slots_of(pairs)) && q.len() == count * rows.width, "dot_octets: an octet is beyond the pool");
    assert!(out.len() == count * pairs.len() * LANES, "dot_octets: the output has another shape");
    call!(dot_octets_avx512, dot_octets_avx2, dot_octets, (rows, q, pairs, out))
}

/// The numbers of octets as tiles of f32: `out` `[pairs, width, LANES]`; `rows` lie in tiles.
pub(crate) fn widen_octets(rows: Rows<'_>, pairs: &[[u32; 2]], out: &mut [f32]) {
    assert!(rows.holds(slots_of(pairs)), "widen_octets: an octet is beyond the pool");
    assert!(out.len() == pairs.len() * rows.width * LANES, "widen_octets: the output has another shape");
    call!(widen_octets_avx512, widen_octets_avx2, widen_octets, (rows, pairs, out))
}

/// The rows of `columns` as f32: `out` `[columns, width]`; `rows` lie one after the other.
pub(crate) fn widen_columns(rows: Rows<'_>, columns: &[Column], out: &mut [f32]) {
    let slots = columns.iter().map(|column| column.slot as usize + 1).max().unwrap_or(0);
    assert!(rows.holds(slots) && out.len() == columns.len() * rows.width, "widen_columns: a slot is beyond the pool");
    call!(widen_columns_avx512, widen_columns_avx2, widen_columns, (rows, columns, out))
}

/// `out[row] += sum_i weights[row, columns[i].weight] * rows[columns[i].slot]`; `rows` lie one after the other.
///
/// - `weights`: `[n, stride]`
/// - `out`: `[n, width]`
pub(crate) fn add_weighted(rows: Rows<'_>, weights: &[f32], stride: usize, columns: &[Column], out: &mut [f32]) {
    let count = out.len() / rows.width;
    let slots = columns.iter().map(|column| column.slot as usize + 1).max().unwrap_or(0);
    let widest = columns.iter().map(|column| column.weight as usize + 1).max().unwrap_or(0);
    assert!(rows.holds(slots) && out.len() == count * rows.width, "add_weighted: a slot is beyond the pool");
    assert!(widest <= stride && weights.len() >= count * stride, "add_weighted: a weight is beyond its row");
    call!(add_weighted_avx512, add_weighted_avx2, add_weighted, (rows, weights, stride, columns, out))
}
