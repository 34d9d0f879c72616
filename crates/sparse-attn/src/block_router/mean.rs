use super::{BlockRouter, BlockScores, dot, score_groups};
use crate::LayerStore;
use crate::cache::Summary;
use candle_core::{Result, Tensor};

/// `q . mean(keys)`: MoBA, arXiv:2502.13189.
#[derive(Debug, Clone, Copy, Default)]
pub struct Mean;

impl BlockRouter for Mean {
    fn name(&self) -> &'static str {
        "mean"
    }

    fn summary(&self) -> Summary {
        Summary::Mean
    }

    fn score(&self, q: &Tensor, store: &LayerStore, _block_size: usize) -> Result<BlockScores> {
        let summaries = store.summaries()?;
        let head_dim = store.shape().head_dim();
        score_groups(q, store, summaries.blocks(), |head, q, out| dot(1.0, q, &summaries.head(head).low, head_dim, out, false))
    }
}
