use super::{BlockRouter, BlockScores, dot, score_groups};
use crate::LayerStore;
use candle_core::{Result, Tensor};

/// The largest `q . k` of the block itself: reads every key, so it saves nothing. What estimators are measured against.
#[derive(Debug, Clone, Copy, Default)]
pub struct Oracle;

impl BlockRouter for Oracle {
    fn name(&self) -> &'static str {
        "oracle"
    }

    fn score(&self, q: &Tensor, store: &LayerStore, block_size: usize) -> Result<BlockScores> {
        let (blocks, head_dim) = (store.written() / block_size, store.shape().head_dim());
        let keys = (0..store.shape().kv_heads()).map(|head| store.keys(head, blocks * block_size)).collect::<Result<Vec<_>>>()?;
        score_groups(q, store, blocks, |head, q, out| {
            let mut exact = vec![0f32; q.len() / head_dim * blocks * block_size];
            dot(1.0, q, &keys[head], head_dim, &mut exact, false);
            for (best, scores) in out.iter_mut().zip(exact.chunks_exact(block_size)) {
                *best = scores.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            }
        })
    }
}
