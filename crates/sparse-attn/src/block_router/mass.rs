use super::{BlockRouter, BlockScores, Queries, score_summaries};
use crate::LayerStore;
use crate::cache::Summary;
use candle_core::Result;

/// The logarithm of the attention that falls on a key of the block in the mean, as if the keys were normal with these means and
/// variances: `s q . mean + s^2/2 sum_j q_j^2 variance_j`, the second-order expansion of `ln mean exp(s q . k)`.
///
/// A block with one outstanding key scores above one of equal keys, as with [`super::Bound`], but by how much that key
/// would weigh, not by a corner of the box that no key may be in. Queries that share a selection score by the mean of their
/// logarithms, which costs as much as one of them.
#[derive(Debug, Clone, Copy, Default)]
pub struct Mass;

impl BlockRouter for Mass {
    fn name(&self) -> &'static str {
        "mass"
    }

    fn summary(&self) -> Summary {
        Summary::MeanVariance
    }

    fn score(&self, queries: &Queries<'_>, store: &LayerStore) -> Result<BlockScores> {
        let scale = queries.scale;
        score_summaries(queries, queries.tiles(), store, |q, out| {
            out.extend(q.iter().map(|x| x * scale));
            out.extend(q.iter().map(|x| 0.5 * (x * scale).powi(2)));
        })
    }
}
