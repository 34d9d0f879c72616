//! The plain twin of every backend: tensor code that follows the formulas, on any device.

use super::AttentionBackend;
use crate::cache::{LayerStore, NO_PAGE, PAGE_SIZE, Step};
use crate::select::Selection;
use crate::token_router::Admission;
use candle_core::{D, DType, IndexOp, Result, Tensor};

/// Slow, plain, and right: what the other backends are compared with.
#[derive(Debug, Clone, Copy, Default)]
pub struct Reference;

impl AttentionBackend for Reference {
    fn name(&self) -> &'static str {
        "reference"
    }

    fn write(&self, k: &Tensor, v: &Tensor, admission: &Admission, step: Step, store: &mut LayerStore) -> Result<()> {
        let Admission::Every = admission;
        store.check_step(k, v, step)?;
        for head in 0..store.shape().kv_heads() {
            for (pool, new) in [(store.k_pages(), k), (store.v_pages(), v)] {
                let new = new.i((.., head))?.contiguous()?.to_dtype(pool.dtype())?; // [tokens, head_dim]
                for position in step.start..step.end() {
                    let page = store.table().head(head)[position / PAGE_SIZE] as usize;
                    let row = new.narrow(0, position - step.start, 1)?.unsqueeze(0)?.contiguous()?;
                    pool.narrow(0, page, 1)?.slice_set(&row, 1, position % PAGE_SIZE)?;
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
            let (k, v, first) = keys_and_values(store, kv_head, step.end())?; // [end - first, head_dim]
            let q = q.narrow(1, kv_head * group_size, group_size)?.to_dtype(DType::F32)?; // [q_len, group_size, head_dim]
            let mut rows = Vec::with_capacity(step.len);
            for t in step.start..step.end() {
                let positions: Vec<u32> = visible(store, selection, t, kv_head).map(|position| (position - first) as u32).collect();
                let positions = Tensor::new(positions, q.device())?;
                let (k, v) = (k.index_select(&positions, 0)?, v.index_select(&positions, 0)?);
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

/// The positions that the query at `t` reads.
fn visible(store: &LayerStore, selection: &Selection, t: usize, kv_head: usize) -> impl Iterator<Item = usize> {
    let ranges = match selection {
        Selection::Every => vec![store.first_visible(t)..t + 1],
        Selection::Blocks(blocks) => blocks.ranges(t, kv_head, t + 1),
    };
    ranges.into_iter().flatten().filter(move |position| *position <= t)
}

/// Keys and values of one head at positions `[first, end)`, f32, and `first`.
fn keys_and_values(store: &LayerStore, head: usize, end: usize) -> Result<(Tensor, Tensor, usize)> {
    let pages = &store.table().head(head)[..end.div_ceil(PAGE_SIZE)];
    let recycled = pages.iter().take_while(|page| **page == NO_PAGE).count();
    let first = recycled * PAGE_SIZE;
    let ids = Tensor::new(&pages[recycled..], store.k_pages().device())?;
    let gather = |pool: &Tensor| pool.index_select(&ids, 0)?.flatten_to(1)?.narrow(0, 0, end - first)?.to_dtype(DType::F32);
    Ok((gather(store.k_pages())?, gather(store.v_pages())?, first))
}
