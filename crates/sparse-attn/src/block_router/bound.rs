use super::{BlockRouter, BlockScores, dot, score_groups};
use crate::LayerStore;
use crate::cache::Summary;
use candle_core::{Result, Tensor};

/// `sum_j max(q_j min_j, q_j max_j) = relu(q) . max - relu(-q) . min`: never below `q . k` of any key in the block.
/// Quest, arXiv:2406.10774.
#[derive(Debug, Clone, Copy, Default)]
pub struct Bound;

impl BlockRouter for Bound {
    fn name(&self) -> &'static str {
        "bound"
    }

    fn summary(&self) -> Summary {
        Summary::MinMax
    }

    fn score(&self, q: &Tensor, store: &LayerStore, _block_size: usize) -> Result<BlockScores> {
        let summaries = store.summaries()?;
        let head_dim = store.shape().head_dim();
        score_groups(q, store, summaries.blocks(), |head, q, out| {
            let rows = summaries.head(head);
            let part = |sign: f32| q.iter().map(|x| (sign * x).max(0.0)).collect::<Vec<f32>>();
            dot(1.0, &part(1.0), &rows.high, head_dim, out, false);
            dot(-1.0, &part(-1.0), &rows.low, head_dim, out, true);
        })
    }
}
