use super::{BlockRouter, BlockScores, score_summaries};
use crate::LayerStore;
use crate::cache::Summary;
use candle_core::{Result, Tensor};

/// The logarithm of the attention that falls on the block, as if its keys were normal with these means and variances:
/// `s q . mean + s^2/2 sum_j q_j^2 variance_j`, which is the second-order expansion of `log mean exp(s q . k)`.
///
/// A block with one outstanding key scores above one of equal keys, as with [`super::Bound`], but by how much that key
/// would weigh, not by a corner of the box that no key may be in.
#[derive(Debug, Clone, Copy, Default)]
pub struct Mass;

impl BlockRouter for Mass {
    fn name(&self) -> &'static str {
        "mass"
    }

    fn summary(&self) -> Summary {
        Summary::MeanVariance
    }

    fn score(&self, q: &Tensor, scale: f32, store: &LayerStore, _block_size: usize) -> Result<BlockScores> {
        score_summaries(q, store, |q, out| {
            out.extend(q.iter().map(|x| x * scale));
            out.extend(q.iter().map(|x| 0.5 * (x * scale).powi(2)));
        })
    }
}
