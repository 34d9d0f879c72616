//! Writing a step's keys or values into their pages, in place.

use crate::cache::{PAGE_SIZE, PageTable, Step};
use candle_core::{CpuStorage, InplaceOp2, Layout, Result, Tensor, bail};

/// Stores `new` `[step.len, kv_heads, head_dim]` into `pool` `[pages, PAGE_SIZE, head_dim]`.
pub(super) fn write(pool: &Tensor, new: &Tensor, step: Step, table: &PageTable) -> Result<()> {
    pool.inplace_op2(&new.to_dtype(pool.dtype())?.contiguous()?, &WritePages { step, table })
}

struct WritePages<'a> {
    step: Step,
    table: &'a PageTable,
}

impl InplaceOp2 for WritePages<'_> {
    fn name(&self) -> &'static str {
        "write-pages"
    }

    fn cpu_fwd(&self, pool: &mut CpuStorage, pool_layout: &Layout, new: &CpuStorage, new_layout: &Layout) -> Result<()> {
        let (_, kv_heads, head_dim) = new_layout.shape().dims3()?;
        let (from, to) = (new_layout.start_offset(), pool_layout.start_offset());
        match (pool, new) {
            (CpuStorage::F32(pool), CpuStorage::F32(new)) => self.copy(&mut pool[to..], &new[from..], kv_heads, head_dim),
            (CpuStorage::F16(pool), CpuStorage::F16(new)) => self.copy(&mut pool[to..], &new[from..], kv_heads, head_dim),
            (CpuStorage::BF16(pool), CpuStorage::BF16(new)) => self.copy(&mut pool[to..], &new[from..], kv_heads, head_dim),
            _ => bail!("write: the pool and the new tokens differ in dtype, or it is none of f32, f16 and bf16"),
        }
        Ok(())
    }
}

impl WritePages<'_> {
    fn copy<T: Copy>(&self, pool: &mut [T], new: &[T], kv_heads: usize, head_dim: usize) {
        for (token, rows) in new.chunks_exact(kv_heads * head_dim).take(self.step.len).enumerate() {
            let position = self.step.start + token;
            for (head, row) in rows.chunks_exact(head_dim).enumerate() {
                let page = self.table.head(head)[position / PAGE_SIZE] as usize;
                let slot = page * PAGE_SIZE + position % PAGE_SIZE;
                pool[slot * head_dim..][..head_dim].copy_from_slice(row);
            }
        }
    }
}
