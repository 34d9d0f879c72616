use super::{BlockRouter, BlockScores, Queries, score_summaries};
use crate::LayerStore;
use crate::cache::Summary;
use candle_core::Result;

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

    fn score(&self, queries: &Queries<'_>, store: &LayerStore) -> Result<BlockScores> {
        score_summaries(queries, queries.each(), store, |q, out| out.extend_from_slice(q))
    }
}
