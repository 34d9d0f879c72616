//! The plain twin of every backend: tensor code that follows the formulas, on any device.

use super::AttentionBackend;
use crate::cache::{LANES, LayerStore, Order, PAGE_SIZE, Pool, Step};
use crate::select::Selection;
use candle_core::{D, DType, IndexOp, Result, Tensor};

/// Slow, plain, and right: what the other backends are compared with.
#[derive(Debug, Clone, Copy, Default)]
pub struct Reference;

impl AttentionBackend for Reference {
    fn name(&self) -> &'static str {
        "reference"
    }

    fn write(&self, k: &Tensor, v: &Tensor, step: Step, store: &mut LayerStore) -> Result<()> {
        store.check_step(k, v, step)?;
        for token in store.take_moves().into_iter().flatten() {
            for pool in [store.k(), store.v()] {
                for tensor in pool.tensors() {
                    set_row(pool, tensor, token.to, &row(pool, tensor, token.from)?)?;
                }
            }
        }
        for head in 0..store.shape().kv_heads() {
            for (pool, new) in [(store.k(), k), (store.v(), v)] {
                let new = pool.encode(&new.i((.., head))?.contiguous()?)?;
                for (tensor, new) in pool.tensors().zip(new) {
                    for token in 0..step.len {
                        set_row(pool, tensor, store.table().recent_slot(head, step.start + token), &new.narrow(0, token, 1)?)?;
                    }
                }
            }
        }
        Ok(())
    }

    fn attend(&self, q: &Tensor, scale: f32, store: &LayerStore, step: Step, selection: &Selection) -> Result<Tensor> {
        store.check_queries(q, step)?;
        let group_size = store.shape().group_size();
        let mut heads = Vec::with_capacity(store.shape().kv_heads());
        for kv_head in 0..store.shape().kv_heads() {
            let (positions, k, v) = store.rows(kv_head, step.end())?; // [n], [n, head_dim], [n, head_dim]
            let q = q.narrow(1, kv_head * group_size, group_size)?.to_dtype(DType::F32)?; // [q_len, group_size, head_dim]
            let mut rows = Vec::with_capacity(step.len);
            for t in step.start..step.end() {
                let read = selection.positions(store, t, kv_head);
                let index: Vec<u32> =
                    positions.iter().zip(0..).filter(|(position, _)| read.binary_search(position).is_ok()).map(|(_, i)| i).collect();
                let index = Tensor::new(index, q.device())?;
                let (k, v) = (k.index_select(&index, 0)?, v.index_select(&index, 0)?);
                let q = q.i(t - step.start)?.contiguous()?;
                let attn_scores = (q.matmul(&k.t()?)? * f64::from(scale))?; // [group_size, visible]
                let weights = attn_scores.broadcast_sub(&attn_scores.max_keepdim(D::Minus1)?)?.exp()?;
                let weights = weights.broadcast_div(&weights.sum_keepdim(D::Minus1)?)?;
                rows.push(weights.matmul(&v)?); // [group_size, head_dim]
            }
            heads.push(Tensor::stack(&rows, 0)?); // [q_len, group_size, head_dim]
        }
        Tensor::cat(&heads, 1) // [q_len, q_heads, head_dim]
    }
}

/// One page of a tensor of a pool, row after row: `[PAGE_SIZE, width]`.
fn page(pool: &Pool, tensor: &Tensor, page: usize) -> Result<Tensor> {
    let page = tensor.i(page)?;
    match pool.order() {
        Order::Tiles => page.transpose(1, 2)?.flatten_to(1),
        Order::Rows => Ok(page),
    }
}

/// The row of a slot, `[1, width]`.
fn row(pool: &Pool, tensor: &Tensor, slot: u32) -> Result<Tensor> {
    let slot = slot as usize;
    page(pool, tensor, slot / PAGE_SIZE)?.narrow(0, slot % PAGE_SIZE, 1)
}

/// Replaces the row of a slot, by the whole page with that row exchanged.
fn set_row(pool: &Pool, tensor: &Tensor, slot: u32, row: &Tensor) -> Result<()> {
    let (slot, width) = (slot as usize, row.dim(1)?);
    let (old, at) = (page(pool, tensor, slot / PAGE_SIZE)?, slot % PAGE_SIZE);
    let new = Tensor::cat(&[&old.narrow(0, 0, at)?, row, &old.narrow(0, at + 1, PAGE_SIZE - at - 1)?], 0)?;
    let new = match pool.order() {
        Order::Tiles => new.reshape((1, PAGE_SIZE / LANES, LANES, width))?.transpose(2, 3)?.contiguous()?,
        Order::Rows => new.unsqueeze(0)?.contiguous()?,
    };
    tensor.slice_set(&new, 0, slot / PAGE_SIZE)
}
