use super::{BlockRouter, BlockScores, Queries, score_summaries};
use crate::LayerStore;
use crate::cache::Summary;
use candle_core::Result;

/// `sum_j max(q_j min_j, q_j max_j) = relu(q) . max - relu(-q) . min`: never below `q . k` of any key in the block.
/// Quest, arXiv:2406.10774.
#[derive(Debug, Clone, Copy, Default)]
pub struct Bound;

impl BlockRouter for Bound {
    fn name(&self) -> &'static str {
        "bound"
    }

    fn summary(&self) -> Summary {
        Summary::MaxMin
    }

    fn score(&self, queries: &Queries<'_>, store: &LayerStore) -> Result<BlockScores> {
        score_summaries(queries, queries.each(), store, |q, out| {
            out.extend(q.iter().map(|x| x.max(0.0)));
            out.extend(q.iter().map(|x| x.min(0.0)));
        })
    }
}
