use super::{BlockRouter, BlockScores, score_summaries};
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

    fn score(&self, q: &Tensor, _scale: f32, store: &LayerStore, _block_size: usize) -> Result<BlockScores> {
        score_summaries(q, store, |q, out| out.extend_from_slice(q))
    }
}
