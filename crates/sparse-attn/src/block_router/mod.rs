//! Block routers: which blocks of the store a query reads (the read side).

mod all;
mod bound;
mod mass;
mod mean;
mod oracle;
mod recent;

pub use all::All;
pub use bound::Bound;
pub use mass::Mass;
pub use mean::Mean;
pub use oracle::Oracle;
pub use recent::Recent;

use crate::LayerStore;
use crate::cache::{LANES, OCTET, PAGE_SIZE, Step, Summary};
use crate::parallel;
use crate::simd::{dot_octets, raise, with_rows};
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
    values: Vec<Vec<f32>>, // [pieces of QUERIES * kv_heads][queries, blocks]
}

impl QueryScores {
    /// The scores of all blocks for query number `query` of the step.
    pub fn row(&self, query: usize, kv_head: usize) -> &[f32] {
        &self.values[query / QUERIES * self.kv_heads + kv_head][query % QUERIES * self.blocks..][..self.blocks]
    }
}

/// Queries that are scored together.
const QUERIES: usize = 4;

/// What blocks are scored for.
#[derive(Debug, Clone, Copy)]
pub struct Queries<'a> {
    /// `[q_len, q_heads, head_dim]`, after rope.
    pub q: &'a Tensor,
    /// The factor of `q . k`.
    pub scale: f32,
    /// Their positions.
    pub step: Step,
    /// Positions per block.
    pub block_size: usize,
}

/// Scores the blocks of a layer's store for the queries of a step.
pub trait BlockRouter: std::fmt::Debug + Send + Sync {
    /// The name users type.
    fn name(&self) -> &'static str;

    /// What the cache keeps of each block for this router.
    fn summary(&self) -> Summary {
        Summary::None
    }

    /// Whether it selects blocks as long as the budget lasts, so that what fits is all selected.
    fn fills_budget(&self) -> bool {
        true
    }

    /// The score of a complete block is the maximum over the query heads that share a key/value head. Blocks without an
    /// admitted token, or with a key from a query's future, have no meaning.
    ///
    /// # Errors
    /// If the queries do not fit the store.
    fn score(&self, queries: &Queries<'_>, store: &LayerStore) -> Result<BlockScores>;
}

/// One of every block router.
pub fn all() -> Vec<Arc<dyn BlockRouter>> {
    vec![Arc::new(All), Arc::new(Recent), Arc::new(Mean), Arc::new(Bound), Arc::new(Mass), Arc::new(Oracle)]
}

/// The router of this name.
pub fn by_name(name: &str) -> Option<Arc<dyn BlockRouter>> {
    all().into_iter().find(|router| router.name() == name)
}

/// Queries `[q_len, q_heads, head_dim]` on the host.
fn host_queries(q: &Tensor) -> Result<Vec<f32>> {
    q.to_dtype(DType::F32)?.contiguous()?.flatten_all()?.to_vec1()
}

/// Scores that are products of the block's summary with what `expand` makes of a query `[head_dim]`, which it appends to
/// its second argument.
fn score_summaries(queries: &Queries<'_>, store: &LayerStore, expand: impl Fn(&[f32], &mut Vec<f32>) + Sync) -> Result<BlockScores> {
    let summaries = store.summaries()?;
    let (shape, blocks) = (store.shape(), summaries.blocks());
    let pairs_of = |head: usize| -> Vec<[u32; 2]> {
        let octets = summaries.pages(head).flat_map(|page| {
            let first = page * (PAGE_SIZE / OCTET) as u32;
            (first..first + (PAGE_SIZE / OCTET) as u32).step_by(2).map(|octet| [octet, octet + 1])
        });
        octets.take(blocks.div_ceil(LANES)).collect()
    };
    let pairs: Vec<Vec<[u32; 2]>> = (0..shape.kv_heads()).map(pairs_of).collect();
    let q = host_queries(queries.q)?;
    with_rows(summaries.pool(), |rows| {
        score_groups(&q, store, blocks, |head, q, out| {
            let mut expanded = Vec::with_capacity(q.len() / shape.head_dim() * rows.width);
            q.chunks_exact(shape.head_dim()).for_each(|row| expand(row, &mut expanded));
            out.resize(expanded.len() / rows.width * pairs[head].len() * LANES, 0.0);
            dot_octets(rows, &expanded, &pairs[head], out);
        })
    })
}

/// `score_head` gets a key/value head and rows `[n, head_dim]`, those of several queries, and leaves `[n, >= blocks]` scores, of
/// which the maximum over each query's group is kept. Queries are spread over the threads.
fn score_groups(q: &[f32], store: &LayerStore, blocks: usize, score_head: impl Fn(usize, &[f32], &mut Vec<f32>) + Sync) -> BlockScores {
    if blocks == 0 {
        return BlockScores::Forced; // nothing is complete yet
    }
    let shape = store.shape();
    let (kv_heads, group_size, head_dim) = (shape.kv_heads(), shape.group_size(), shape.head_dim());
    let queries: Vec<&[f32]> = q.chunks_exact(shape.q_heads() * head_dim).collect();
    let best_of_groups = |index: usize| {
        let (head, queries) = (index % kv_heads, queries.chunks(QUERIES).nth(index / kv_heads).unwrap_or_default());
        let own = head * group_size * head_dim..(head + 1) * group_size * head_dim;
        let rows: Vec<f32> = queries.iter().flat_map(|q| &q[own.clone()]).copied().collect();
        let mut scores = Vec::new();
        score_head(head, &rows, &mut scores);
        let stride = scores.len() / (queries.len() * group_size);
        let mut best = vec![f32::NEG_INFINITY; queries.len() * blocks];
        for (best, scores) in best.chunks_exact_mut(blocks).zip(scores.chunks_exact(group_size * stride)) {
            scores.chunks_exact(stride).for_each(|scores| raise(best, &scores[..blocks]));
        }
        best
    };
    let values = parallel::map(queries.len().div_ceil(QUERIES) * kv_heads, best_of_groups);
    BlockScores::PerQuery(QueryScores { kv_heads, blocks, values })
}
