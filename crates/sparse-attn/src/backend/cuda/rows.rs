//! Rows in pools: written, moved, summarised.

use super::params::{MoveParams, ScatterParams, SummaryParams};
use super::{Kernels, Spread, address, summary_code};
use crate::cache::{KvDtype, LayerStore, Move, Pool, Summaries, Summary};
use candle_core::{DType, Result, Tensor, bail};
use std::ops::Range;

fn name(stem: &str, pool: &Pool) -> Result<String> {
    match pool.dtype() {
        dtype @ (KvDtype::F16 | KvDtype::Bf16) => Ok(format!("{stem}_{}", dtype.name())),
        other => bail!("cuda: there are no kernels for keys and values in {}, only in f16 and bf16", other.name()),
    }
}

/// Stores `rows` `[slots, width]` into slots of `pool`, which the caller has checked to lie inside.
pub(crate) fn scatter_rows(pool: &Pool, rows: &Tensor, slots: &[u32]) -> Result<()> {
    let kernels = Kernels::of(rows.device())?;
    let rows = rows.to_dtype(DType::F32)?.contiguous()?;
    let slots = Tensor::new(slots, rows.device())?;
    let count = slots.elem_count();
    let params = ScatterParams {
        rows: address(&rows)?,
        slots: address(&slots)?,
        pool: address(pool.values())?,
        count: count as i32,
        width: pool.width() as i32,
    };
    // SAFETY: the slots lie inside the pool; what the kernel reads lives until the stream frees it.
    unsafe { kernels.launch(&name("scatter_rows", pool)?, Spread::new([count, 1, 1], pool.width().min(256)), &params) }
}

/// Copies slots of `pool` to others, one move after the other; the caller has checked that all lie inside.
pub(crate) fn move_rows(pool: &Pool, moves: &[Move]) -> Result<()> {
    let kernels = Kernels::of(pool.values().device())?;
    let list: Vec<u32> = moves.iter().flat_map(|token| [token.from, token.to]).collect();
    let list = Tensor::new(list, pool.values().device())?;
    let params =
        MoveParams { pool: address(pool.values())?, moves: address(&list)?, count: moves.len() as i32, width: pool.width() as i32 };
    // SAFETY: the slots lie inside the pool; what the kernel reads lives until the stream frees it.
    unsafe { kernels.launch(&name("move_rows", pool)?, Spread::new([1, 1, 1], pool.width().min(1024)), &params) }
}

/// Summarises `blocks` of a layer that keeps every token, for which `summaries` has room.
pub(crate) fn summarise(store: &LayerStore, summaries: &Summaries, kind: Summary, blocks: Range<usize>, block_size: usize) -> Result<()> {
    let kernels = Kernels::of(store.k().values().device())?;
    let (pages, head_dim) = (store.device_pages()?, store.shape().head_dim());
    let params = SummaryParams {
        k: address(store.k().values())?,
        pages: address(pages)?,
        summaries: address(summaries.pool().values())?,
        kind: summary_code(kind),
        max_pages: pages.dim(1)? as i32,
        block_size: block_size as i32,
        first: blocks.start as i32,
        head_dim: head_dim as i32,
    };
    let spread = Spread::new([blocks.len(), store.shape().kv_heads(), 1], head_dim);
    // SAFETY: the keys of these blocks are written, and the pool has room for their rows.
    unsafe { kernels.launch(&name("summarise_blocks", store.k())?, spread, &params) }
}
