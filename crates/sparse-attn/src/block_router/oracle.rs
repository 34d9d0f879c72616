use super::{BlockRouter, BlockScores, Queries, score_groups};
use crate::LayerStore;
use crate::simd::with_f32;
use candle_core::Result;

/// The largest `q . k` of the block itself: reads every key, so it saves nothing. What estimators are measured against.
#[derive(Debug, Clone, Copy, Default)]
pub struct Oracle;

impl BlockRouter for Oracle {
    fn name(&self) -> &'static str {
        "oracle"
    }

    fn score(&self, queries: &Queries<'_>, store: &LayerStore) -> Result<BlockScores> {
        let block_size = queries.block_size;
        let (blocks, head_dim) = (store.written() / block_size, store.shape().head_dim());
        let heads = (0..store.shape().kv_heads()).map(|head| store.admitted_keys(head, 0..blocks * block_size));
        let heads = heads.collect::<Result<Vec<_>>>()?;
        let score_head = |head: usize, tiles: &[Vec<f32>], out: &mut Vec<f32>| {
            out.clear();
            let (positions, keys) = &heads[head];
            for q in tiles.iter().flat_map(|queries| queries.chunks_exact(head_dim)) {
                let from = out.len();
                out.resize(from + blocks, f32::NEG_INFINITY);
                for (position, key) in positions.iter().zip(keys.chunks_exact(head_dim)) {
                    let score = q.iter().zip(key).map(|(x, y)| x * y).sum::<f32>();
                    let best = &mut out[from + position / block_size];
                    *best = best.max(score);
                }
            }
        };
        with_f32(queries.q, |q| Ok(score_groups(q, queries.each(), store, blocks, score_head)))
    }
}
