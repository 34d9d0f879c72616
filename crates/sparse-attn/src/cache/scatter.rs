//! Writing rows into a pool, and moving them inside it, in place: on the CPU here, elsewhere by the device's kernels.

use super::{KvDtype, Move, Order, PAGE_SIZE, Pool};
use crate::backend::cuda;
use crate::parallel::Places;
use candle_core::{CpuStorage, DType, InplaceOp1, InplaceOp2, Layout, Result, Tensor, bail};
use half::slice::HalfFloatSliceExt;

/// Rows that a thread takes at a time.
const ROWS_AT_ONCE: usize = 64;

/// Numbers that are rounded together.
const ROUNDED_AT_ONCE: usize = 128;

impl Pool {
    /// Stores `rows` `[.., width]`, as many as there are slots, into `slots` (`page * PAGE_SIZE + slot`).
    ///
    /// # Errors
    /// If the shapes differ or a slot is beyond the pool.
    pub fn write(&self, rows: &Tensor, slots: &[u32]) -> Result<()> {
        if rows.elem_count() != slots.len() * self.width() || rows.dims().last() != Some(&self.width()) {
            bail!("pool: rows {:?} for {} slots of {} numbers", rows.dims(), slots.len(), self.width());
        }
        if self.values().device().is_cuda() {
            self.check_slots(slots.iter().copied())?;
            return cuda::scatter_rows(self, rows, slots);
        }
        let write = Write { order: self.order(), slots };
        // Halves are rounded on their way into the pool.
        if rows.dtype() == DType::F32 && self.dtype() != KvDtype::Q8_0 {
            return self.values().inplace_op2(&rows.contiguous()?, &write);
        }
        let encoded = self.encode(&rows.reshape((slots.len(), self.width()))?)?;
        self.tensors().zip(encoded).try_for_each(|(tensor, rows)| tensor.inplace_op2(&rows, &write))
    }

    /// Copies slots of all `pools`, which are of as many pages, to other slots: none that is left is taken.
    ///
    /// # Errors
    /// If a slot is beyond the pools.
    pub fn apply(pools: [&Self; 2], moves: &[Move]) -> Result<()> {
        if moves.is_empty() {
            return Ok(());
        }
        let move_in = |pool: &Self| pool.tensors().try_for_each(|tensor| tensor.inplace_op1(&Apply { order: pool.order(), moves }));
        pools.into_iter().try_for_each(move_in)
    }
}

impl Pool {
    fn check_slots(&self, mut slots: impl Iterator<Item = u32>) -> Result<()> {
        let count = self.pages() * PAGE_SIZE;
        match slots.find(|slot| *slot as usize >= count) {
            Some(slot) => bail!("pool: slot {slot} is beyond its {count}"),
            None => Ok(()),
        }
    }
}

struct Write<'a> {
    order: Order,
    slots: &'a [u32],
}

impl InplaceOp2 for Write<'_> {
    fn name(&self) -> &'static str {
        "pool-write"
    }

    fn cpu_fwd(&self, pool: &mut CpuStorage, pool_layout: &Layout, rows: &CpuStorage, rows_layout: &Layout) -> Result<()> {
        let width = pool_layout.dims()[2];
        let (count, from) = (pool_layout.shape().elem_count(), rows_layout.start_offset());
        if self.slots.iter().any(|slot| (*slot as usize + 1) * width > count) {
            bail!("pool: a slot is beyond its {count} numbers");
        }
        match (pool, rows) {
            (CpuStorage::F32(pool), CpuStorage::F32(rows)) => self.copy(pool, &rows[from..], width),
            (CpuStorage::F16(pool), CpuStorage::F32(rows)) => self.round(pool, &rows[from..], width),
            (CpuStorage::BF16(pool), CpuStorage::F32(rows)) => self.round(pool, &rows[from..], width),
            (CpuStorage::F16(pool), CpuStorage::F16(rows)) => self.copy(pool, &rows[from..], width),
            (CpuStorage::BF16(pool), CpuStorage::BF16(rows)) => self.copy(pool, &rows[from..], width),
            (CpuStorage::U8(pool), CpuStorage::U8(rows)) => self.copy(pool, &rows[from..], width),
            _ => bail!("pool: it and the rows differ in dtype, or it is none that pools have"),
        }
        Ok(())
    }
}

impl Write<'_> {
    fn copy<T: Copy + Send + Sync>(&self, pool: &mut [T], rows: &[T], width: usize) {
        self.each(pool, |places, first| {
            for (slot, row) in self.slots[first..].iter().zip(rows[first * width..].chunks_exact(width)).take(ROWS_AT_ONCE) {
                // SAFETY: the slot is inside the pool, and no other row's.
                unsafe { self.put(places, *slot, width, 0, row) };
            }
        });
    }

    fn round<T: Copy + Default + Send + Sync>(&self, pool: &mut [T], rows: &[f32], width: usize)
    where
        [T]: HalfFloatSliceExt,
    {
        self.each(pool, |places, first| {
            let mut rounded = [T::default(); ROUNDED_AT_ONCE];
            for (slot, row) in self.slots[first..].iter().zip(rows[first * width..].chunks_exact(width)).take(ROWS_AT_ONCE) {
                for (part, from) in row.chunks(ROUNDED_AT_ONCE).zip((0..).step_by(ROUNDED_AT_ONCE)) {
                    let rounded = &mut rounded[..part.len()];
                    rounded.convert_from_f32_slice(part);
                    // SAFETY: the slot is inside the pool, and no other row's.
                    unsafe { self.put(places, *slot, width, from, rounded) };
                }
            }
        });
    }

    /// `rows(places of the pool, first row)` for each [`ROWS_AT_ONCE`] rows: on all threads, unless two rows go to one slot.
    fn each<T: Send>(&self, pool: &mut [T], rows: impl Fn(&Places<T>, usize) + Sync) {
        let places = Places::of(pool);
        let parts = self.slots.len().div_ceil(ROWS_AT_ONCE);
        if parts > 1 && are_distinct(self.slots) {
            candle_core::utils::barrier_pool().execute_chunked(parts, |range| range.for_each(|part| rows(&places, part * ROWS_AT_ONCE)));
        } else {
            (0..parts).for_each(|part| rows(&places, part * ROWS_AT_ONCE));
        }
    }

    /// Numbers `from..` of the row of a slot.
    ///
    /// # Safety
    /// The slot must be inside the pool, and no other thread may be writing it.
    unsafe fn put<T: Copy>(&self, pool: &Places<T>, slot: u32, width: usize, from: usize, values: &[T]) {
        let (first, stride) = self.order.place(slot, width);
        for (i, value) in (from..).zip(values) {
            // SAFETY: the caller's.
            unsafe { pool.at(first + i * stride).write(*value) };
        }
    }
}

fn are_distinct(slots: &[u32]) -> bool {
    let most = slots.iter().max().map_or(0, |slot| *slot as usize);
    let mut seen = vec![0u64; most / 64 + 1];
    slots.iter().all(|slot| {
        let (word, bit) = (*slot as usize / 64, 1 << (slot % 64));
        let new = seen[word] & bit == 0;
        seen[word] |= bit;
        new
    })
}

struct Apply<'a> {
    order: Order,
    moves: &'a [Move],
}

impl InplaceOp1 for Apply<'_> {
    fn name(&self) -> &'static str {
        "pool-move"
    }

    fn cpu_fwd(&self, pool: &mut CpuStorage, layout: &Layout) -> Result<()> {
        let width = layout.dims()[2];
        let count = layout.shape().elem_count();
        if self.moves.iter().any(|token| (token.from.max(token.to) as usize + 1) * width > count) {
            bail!("pool: a slot is beyond its {count} numbers");
        }
        match pool {
            CpuStorage::F32(pool) => self.copy(pool, width),
            CpuStorage::F16(pool) => self.copy(pool, width),
            CpuStorage::BF16(pool) => self.copy(pool, width),
            CpuStorage::U8(pool) => self.copy(pool, width),
            _ => bail!("pool: its dtype is none that pools have"),
        }
        Ok(())
    }
}

impl Apply<'_> {
    fn copy<T: Copy>(&self, pool: &mut [T], width: usize) {
        for token in self.moves {
            let ((from, stride), (to, _)) = (self.order.place(token.from, width), self.order.place(token.to, width));
            for i in 0..width {
                pool[to + i * stride] = pool[from + i * stride];
            }
        }
    }
}
