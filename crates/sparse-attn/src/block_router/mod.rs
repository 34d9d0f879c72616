//! Block routers: which blocks of the store a query reads (the read side).

mod all;
mod bound;
mod mean;
mod oracle;
mod recent;

pub use all::All;
pub use bound::Bound;
pub use mean::Mean;
pub use oracle::Oracle;
pub use recent::Recent;

use crate::LayerStore;
use crate::cache::Summary;
use crate::matrix::{Matrix, multiply};
use candle_core::{DType, Result, Tensor};
use std::sync::Arc;

/// How much each block matters to each query; higher is better.
#[derive(Debug, Clone)]
pub enum BlockScores {
    /// Every block matters: read them all.
    Every,
    /// No block matters but those that are always read.
    Forced,
    /// A number each.
    PerQuery(QueryScores),
}

/// Scores `[q_len, kv_heads, blocks]`.
#[derive(Debug, Clone)]
pub struct QueryScores {
    kv_heads: usize,
    blocks: usize,
    values: Vec<f32>,
}

impl QueryScores {
    /// The score of `block` for query number `query` of the step.
    pub fn get(&self, query: usize, kv_head: usize, block: usize) -> f32 {
        self.values[(query * self.kv_heads + kv_head) * self.blocks + block]
    }
}

/// Scores the blocks of a layer's store for the queries of a step.
pub trait BlockRouter: std::fmt::Debug + Send + Sync {
    /// The name users type.
    fn name(&self) -> &'static str;

    /// What the cache keeps of each block for this router.
    fn summary(&self) -> Summary {
        Summary::None
    }

    /// `q`: `[q_len, q_heads, head_dim]`, after rope. Blocks are of `block_size` positions and complete; the score of
    /// one is the maximum over the query heads that share a key/value head.
    ///
    /// # Errors
    /// If `q` does not fit the store.
    fn score(&self, q: &Tensor, store: &LayerStore, block_size: usize) -> Result<BlockScores>;
}

/// One of every block router.
pub fn all() -> Vec<Arc<dyn BlockRouter>> {
    vec![Arc::new(All), Arc::new(Recent), Arc::new(Mean), Arc::new(Bound), Arc::new(Oracle)]
}

/// The router of this name.
pub fn by_name(name: &str) -> Option<Arc<dyn BlockRouter>> {
    all().into_iter().find(|router| router.name() == name)
}

/// Scores that are linear in the query: per key/value head, `score_head` writes `[rows, blocks]` for the rows
/// `[q_len * group_size, head_dim]` of its group, of which the maximum over the group is kept.
fn score_groups(
    q: &Tensor,
    store: &LayerStore,
    blocks: usize,
    mut score_head: impl FnMut(usize, &[f32], &mut [f32]),
) -> Result<BlockScores> {
    if blocks == 0 {
        return Ok(BlockScores::Forced); // nothing is complete yet
    }
    let shape = store.shape();
    let (kv_heads, group_size) = (shape.kv_heads(), shape.group_size());
    let q_len = q.dim(0)?;
    let mut values = vec![f32::NEG_INFINITY; q_len * kv_heads * blocks];
    let mut scores = vec![0f32; q_len * group_size * blocks];
    for head in 0..kv_heads {
        let rows = q.narrow(1, head * group_size, group_size)?.to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>()?;
        score_head(head, &rows, &mut scores);
        for query in 0..q_len {
            let best = &mut values[(query * kv_heads + head) * blocks..][..blocks];
            for row in scores[query * group_size * blocks..][..group_size * blocks].chunks_exact(blocks) {
                best.iter_mut().zip(row).for_each(|(best, score)| *best = best.max(*score));
            }
        }
    }
    Ok(BlockScores::PerQuery(QueryScores { kv_heads, blocks, values }))
}

/// `out[rows, blocks] = factor * q[rows, head_dim] . summaries[blocks, head_dim]'`, or `+=`.
fn dot(factor: f32, q: &[f32], summaries: &[f32], head_dim: usize, out: &mut [f32], add: bool) {
    let shape = [q.len() / head_dim, summaries.len() / head_dim, head_dim];
    multiply(factor, Matrix::rows(q, head_dim), Matrix::columns(summaries, head_dim), shape, out, add);
}
