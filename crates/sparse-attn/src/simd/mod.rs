//! Vector code on the host: products of a few rows with many stored ones, weighted sums of stored rows.
//!
//! The kernels are written once over `lanes::Lanes`, 16 numbers at a time, and compiled for each instruction set; which one
//! runs is decided at run time. Every result is a sum in the same order whatever the instruction set's width, the number
//! of rows computed together, or the dtype's path, so that cutting work differently changes no bit.

mod kernels;
mod lanes;
mod softmax;

use crate::cache::{GROUP, KvDtype, LANES, Pool};
use candle_core::{CpuStorage, Result, Storage, bail};
use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};
use kernels::Column;
use lanes::Portable;

pub(crate) use kernels::Column as ValueColumn;
pub use softmax::exp;
pub(crate) use softmax::{exp_sum, max};

/// The numbers of a pool on the host.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Numbers<'a> {
    F32(&'a [f32]),
    F16(&'a [f16]),
    Bf16(&'a [bf16]),
    /// Integers in two's complement, and the scale of every group.
    Q8(&'a [u8], &'a [f16]),
}

/// The rows of a pool on the host: `width` numbers each.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Rows<'a> {
    pub(crate) numbers: Numbers<'a>,
    pub(crate) width: usize,
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

impl Rows<'_> {
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

    /// The numbers of `tile` (of rows in tiles), `[width, LANES]`, as f32.
    pub(crate) fn widen_tile(&self, tile: usize, out: &mut [f32]) {
        let from = tile * self.width * LANES..(tile + 1) * self.width * LANES;
        match self.numbers {
            Numbers::F32(values) => out.copy_from_slice(&values[from]),
            Numbers::F16(values) => values[from].convert_to_f32_slice(out),
            Numbers::Bf16(values) => values[from].convert_to_f32_slice(out),
            Numbers::Q8(values, scales) => {
                let groups = KvDtype::Q8_0.scales(self.width);
                for (d, (out, values)) in out.chunks_exact_mut(LANES).zip(values[from].chunks_exact(LANES)).enumerate() {
                    let scales = &scales[(tile * groups + d / GROUP) * LANES..][..LANES];
                    for ((out, value), scale) in out.iter_mut().zip(values).zip(scales) {
                        *out = f32::from(*value as i8) * scale.to_f32();
                    }
                }
            }
        }
    }

    /// The row of `slot` (of rows one after the other), `[width]`, as f32.
    pub(crate) fn widen_row(&self, slot: usize, out: &mut [f32]) {
        let from = slot * self.width..(slot + 1) * self.width;
        match self.numbers {
            Numbers::F32(values) => out.copy_from_slice(&values[from]),
            Numbers::F16(values) => values[from].convert_to_f32_slice(out),
            Numbers::Bf16(values) => values[from].convert_to_f32_slice(out),
            Numbers::Q8(values, scales) => {
                let groups = KvDtype::Q8_0.scales(self.width);
                for (group, (out, values)) in out.chunks_mut(GROUP).zip(values[from].chunks(GROUP)).enumerate() {
                    let scale = scales[slot * groups + group].to_f32();
                    out.iter_mut().zip(values).for_each(|(out, value)| *out = f32::from(*value as i8) * scale);
                }
            }
        }
    }
}

/// `out[row, LANES * i + lane] = q[row] . rows[LANES * tiles[i] + lane]`; `rows` lie in tiles.
///
/// - `q`: `[n, width]`
/// - `out`: `[n, LANES * tiles]`
pub(crate) fn dot_tiles(rows: Rows<'_>, q: &[f32], tiles: &[u32], out: &mut [f32]) {
    let count = q.len() / rows.width;
    let slots = tiles.iter().max().map_or(0, |tile| (*tile as usize + 1) * LANES);
    assert!(rows.holds(slots) && q.len() == count * rows.width, "dot_tiles: a tile is beyond the pool");
    assert!(out.len() == count * tiles.len() * LANES, "dot_tiles: the output has another shape");
    #[cfg(target_arch = "x86_64")]
    {
        if lanes::has_avx512() {
            // SAFETY: the processor has what the function needs; tiles and shapes were checked.
            return unsafe { kernels::dot_tiles_avx512(rows, q, tiles, out) };
        }
        if lanes::has_avx2() {
            // SAFETY: as above.
            return unsafe { kernels::dot_tiles_avx2(rows, q, tiles, out) };
        }
    }
    // SAFETY: tiles and shapes were checked.
    unsafe { kernels::dot_tiles::<Portable>(rows, q, tiles, out) }
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
    #[cfg(target_arch = "x86_64")]
    {
        if lanes::has_avx512() {
            // SAFETY: the processor has what the function needs; slots, weights and shapes were checked.
            return unsafe { kernels::add_weighted_avx512(rows, weights, stride, columns, out) };
        }
        if lanes::has_avx2() {
            // SAFETY: as above.
            return unsafe { kernels::add_weighted_avx2(rows, weights, stride, columns, out) };
        }
    }
    // SAFETY: slots, weights and shapes were checked.
    unsafe { kernels::add_weighted::<Portable>(rows, weights, stride, columns, out) }
}
