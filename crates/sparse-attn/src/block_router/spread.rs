use super::{BlockRouter, BlockScores, Queries, score_summaries};
use crate::LayerStore;
use crate::cache::Summary;
use candle_core::Result;

/// `q . mean + sum_j |q_j| deviation_j`: the largest `q . k` in the box of one standard deviation around the block's mean.
///
/// [`super::Bound`] takes the box that holds every key, whose corners lie far from all of them; [`super::Mean`] a box of no
/// size, in which one outstanding key is lost. An estimate, not a bound. Queries that share a selection score by their
/// mean, which costs as much as one of them.
#[derive(Debug, Clone, Copy, Default)]
pub struct Spread;

impl BlockRouter for Spread {
    fn name(&self) -> &'static str {
        "spread"
    }

    fn summary(&self) -> Summary {
        Summary::MeanDeviation
    }

    fn joins_queries(&self) -> bool {
        true
    }

    fn score(&self, queries: &Queries<'_>, store: &LayerStore) -> Result<BlockScores> {
        score_summaries(queries, queries.tiles(), store, |q, out| {
            out.extend_from_slice(q);
            out.extend(q.iter().map(|x| x.abs()));
        })
    }
}
