//! Writing rows into a pool, and moving them inside it, in place. On the CPU; a device's backend brings its own.

use super::{KvDtype, LANES, Move, Order, Pool};
use candle_core::{CpuStorage, DType, InplaceOp1, InplaceOp2, Layout, Result, Tensor, bail};
use half::slice::HalfFloatSliceExt;

impl Pool {
    /// Stores `rows` `[slots, width]` into `slots` (`page * PAGE_SIZE + slot`).
    ///
    /// # Errors
    /// If the shapes differ or a slot is beyond the pool.
    pub fn write(&self, rows: &Tensor, slots: &[u32]) -> Result<()> {
        if rows.dims() != [slots.len(), self.width()] {
            bail!("pool: rows {:?} for {} slots of {} numbers", rows.dims(), slots.len(), self.width());
        }
        // Halves are rounded on their way into the pool.
        let halves = matches!(self.dtype(), KvDtype::F16 | KvDtype::Bf16) && rows.dtype() == DType::F32;
        let encoded = if halves { vec![rows.contiguous()?] } else { self.encode(rows)? };
        for (tensor, rows) in self.tensors().zip(encoded) {
            tensor.inplace_op2(&rows, &Write { order: self.order(), slots })?;
        }
        Ok(())
    }

    /// Copies slots to other slots, one move after the other.
    ///
    /// # Errors
    /// If a slot is beyond the pool.
    pub fn apply(&self, moves: &[Move]) -> Result<()> {
        if moves.is_empty() {
            return Ok(());
        }
        self.tensors().try_for_each(|tensor| tensor.inplace_op1(&Apply { order: self.order(), moves }))
    }
}

/// Where a slot's numbers lie: the first one, and the distance to the next.
fn place(order: Order, slot: u32, width: usize) -> (usize, usize) {
    let slot = slot as usize;
    match order {
        Order::Tiles => (slot / LANES * LANES * width + slot % LANES, LANES),
        Order::Rows => (slot * width, 1),
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
    fn copy<T: Copy>(&self, pool: &mut [T], rows: &[T], width: usize) {
        for (slot, row) in self.slots.iter().zip(rows.chunks_exact(width)) {
            let (first, stride) = place(self.order, *slot, width);
            for (i, value) in row.iter().enumerate() {
                pool[first + i * stride] = *value;
            }
        }
    }
}

impl Write<'_> {
    fn round<T: Copy + Default>(&self, pool: &mut [T], rows: &[f32], width: usize)
    where
        [T]: HalfFloatSliceExt,
    {
        let mut rounded = vec![T::default(); width];
        for (slot, row) in self.slots.iter().zip(rows.chunks_exact(width)) {
            rounded.convert_from_f32_slice(row);
            let (first, stride) = place(self.order, *slot, width);
            for (i, value) in rounded.iter().enumerate() {
                pool[first + i * stride] = *value;
            }
        }
    }
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
            let ((from, stride), (to, _)) = (place(self.order, token.from, width), place(self.order, token.to, width));
            for i in 0..width {
                pool[to + i * stride] = pool[from + i * stride];
            }
        }
    }
}
