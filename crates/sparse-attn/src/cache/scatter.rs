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
        if pools[0].values().device().is_cuda() {
            for pool in pools {
                pool.check_slots(moves.iter().map(|token| token.from.max(token.to)))?;
            }
            return cuda::copy_rows(pools, pools, moves);
        }
        let move_in = |pool: &Self| pool.tensors().try_for_each(|tensor| tensor.inplace_op1(&Apply { order: pool.order(), moves }));
        pools.into_iter().try_for_each(move_in)
    }
}

impl Pool {
    /// Only the `pages` of both `pools`, in this order, as they are after `moves`: lists that are one after the other what [`Pool::apply`]
    /// takes. The pools themselves may be changed by them, or not.
    ///
    /// # Errors
    /// As [`Pool::apply`], or if the device has no memory for it.
    pub fn compacted(pools: [&Self; 2], moves: &[Vec<Move>], pages: &[u32]) -> Result<[Self; 2]> {
        if !pools[0].values().device().is_cuda() {
            moves.iter().try_for_each(|moves| Self::apply(pools, moves))?;
            return Ok([pools[0].selected(pages)?, pools[1].selected(pages)?]);
        }
        pools[0].check_slots(pages.iter().map(|page| page * PAGE_SIZE as u32))?;
        pools[0].check_slots(moves.iter().flatten().map(|token| token.from.max(token.to)))?;
        let copies = copies_of(moves, pages, pools[0].pages());
        let new = [pools[0].uninitialised(pages.len())?, pools[1].uninitialised(pages.len())?];
        if !copies.is_empty() {
            cuda::copy_rows(pools, [&new[0], &new[1]], &copies)?;
        }
        Ok(new)
    }

    fn check_slots(&self, mut slots: impl Iterator<Item = u32>) -> Result<()> {
        let count = self.pages() * PAGE_SIZE;
        match slots.find(|slot| *slot as usize >= count) {
            Some(slot) => bail!("pool: slot {slot} is beyond its {count}"),
            None => Ok(()),
        }
    }
}

/// What [`Pool::compacted`] copies: for each slot of the new pools, where its numbers are in those of `count` pages, before `moves`.
fn copies_of(moves: &[Vec<Move>], pages: &[u32], count: usize) -> Vec<Move> {
    let slots = pages.iter().flat_map(|page| page * PAGE_SIZE as u32..(page + 1) * PAGE_SIZE as u32);
    let mut copies: Vec<Move> = slots.zip(0..).map(|(from, to)| Move { from, to }).collect();
    let mut places = vec![None; count];
    for (place, page) in pages.iter().enumerate() {
        places[*page as usize] = Some(place * PAGE_SIZE);
    }
    let place_of = |slot: u32| places[slot as usize / PAGE_SIZE].map(|place| place + slot as usize % PAGE_SIZE);
    for token in moves.iter().flatten() {
        // What an earlier list moved there, or what was there from the first.
        let from = place_of(token.from).map_or(token.from, |place| copies[place].from);
        if let Some(place) = place_of(token.to) {
            copies[place].from = from;
        }
    }
    copies
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_copy_is_what_moves_and_a_selection_of_pages_make() {
        let slot = |page: u32, slot: u32| page * PAGE_SIZE as u32 + slot;
        // Page 3 is in no list of pages; what the first list puts on page 4 moves on by the second.
        let moves = [
            (0..40)
                .map(|i| Move { from: slot(3, i), to: slot(4, i) })
                .chain([Move { from: slot(0, 1), to: slot(2, 63) }])
                .collect::<Vec<_>>(),
            (0..30).map(|i| Move { from: slot(4, 10 + i), to: slot(2, i) }).collect(),
        ];
        let pages = [4, 0, 2];
        let mut numbers: Vec<usize> = (0..5 * PAGE_SIZE).collect();
        let copies = copies_of(&moves, &pages, 5);
        let copied: Vec<usize> = copies.iter().map(|copy| numbers[copy.from as usize]).collect();
        for token in moves.iter().flatten() {
            numbers[token.to as usize] = numbers[token.from as usize];
        }
        let selected: Vec<usize> = pages.iter().flat_map(|page| numbers[slot(*page, 0) as usize..][..PAGE_SIZE].to_vec()).collect();
        assert_eq!(copied, selected);
        assert!(copies.iter().zip(0..).all(|(copy, to)| copy.to == to));
    }
}
