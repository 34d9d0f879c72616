//! Block routers: which blocks of the store a query reads (the read side).

mod all;
mod bound;
mod mean;
mod oracle;
mod recent;
mod spread;

pub use all::All;
pub use bound::Bound;
pub use mean::Mean;
pub use oracle::Oracle;
pub use recent::Recent;
pub use spread::Spread;

use crate::LayerStore;
use crate::cache::{LANES, OCTET, PAGE_SIZE, Step, Summary};
use crate::parallel;
use crate::select::tiles;
use crate::simd::{dot_octets, raise, with_f32, with_rows};
use candle_core::{Result, Tensor};
use std::ops::Range;
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

/// Scores `[tiles, kv_heads, blocks]`: queries that score together are a tile.
#[derive(Debug, Clone)]
pub struct QueryScores {
    kv_heads: usize,
    blocks: usize,
    /// Queries of the step.
    tiles: Vec<Range<usize>>,
    values: Vec<Vec<f32>>, // [pieces of TILES * kv_heads][tiles, blocks]
}

impl QueryScores {
    /// The scores of all blocks for query number `query` of the step.
    pub fn row(&self, query: usize, kv_head: usize) -> &[f32] {
        let tile = self.tiles.partition_point(|tile| tile.end <= query);
        &self.values[tile / TILES * self.kv_heads + kv_head][tile % TILES * self.blocks..][..self.blocks]
    }

    /// The scores for `queries`, one row for each tile.
    pub(crate) fn rows(&self, queries: Range<usize>, kv_head: usize) -> impl Iterator<Item = &[f32]> {
        let firsts = queries
            .clone()
            .filter(move |query| *query == queries.start || self.tiles.binary_search_by_key(query, |tile| tile.start).is_ok());
        firsts.map(move |query| self.row(query, kv_head))
    }
}

/// Tiles that are scored together.
const TILES: usize = 4;

/// What blocks are scored for.
#[derive(Debug, Clone, Copy)]
pub struct Queries<'a> {
    /// `[q_len, q_heads, head_dim]`, after rope.
    pub q: &'a Tensor,
    /// Their positions.
    pub step: Step,
    /// Positions per block.
    pub block_size: usize,
    /// Queries that will share a selection, aligned to absolute positions.
    pub tile: usize,
}

impl Queries<'_> {
    /// The queries of the step, one by one.
    fn each(&self) -> Vec<Range<usize>> {
        (0..self.step.len).map(|query| query..query + 1).collect()
    }

    /// The queries of the step that will share a selection.
    fn tiles(&self) -> Vec<Range<usize>> {
        let start = self.step.start;
        tiles(self.step, self.tile).into_iter().map(|tile| tile.start - start..tile.end - start).collect()
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

    /// Whether a score is the product of a summary with its query: `q . mean`, `relu(q) . max - relu(-q) . min`, or
    /// `q . mean + |q| . deviation`. Backends may score themselves then.
    fn is_product(&self) -> bool {
        self.summary() != Summary::None
    }

    /// Whether queries that share a selection score by the mean of their products, instead of the best.
    fn joins_queries(&self) -> bool {
        false
    }

    /// Whether it selects blocks as long as the budget lasts, so that what fits is all selected.
    fn fills_budget(&self) -> bool {
        true
    }

    /// The score of a complete block is the maximum over the query heads that share a key/value head. Blocks without an
    /// admitted token, or with a key from a query's future, have no meaning. Queries that share a selection may score
    /// together.
    ///
    /// # Errors
    /// If the queries do not fit the store.
    fn score(&self, queries: &Queries<'_>, store: &LayerStore) -> Result<BlockScores>;
}

/// One of every block router.
pub fn all() -> Vec<Arc<dyn BlockRouter>> {
    vec![Arc::new(All), Arc::new(Recent), Arc::new(Mean), Arc::new(Bound), Arc::new(Spread), Arc::new(Oracle)]
}

/// The router of this name.
pub fn by_name(name: &str) -> Option<Arc<dyn BlockRouter>> {
    all().into_iter().find(|router| router.name() == name)
}

/// Scores that are products of the block's summary with what `expand` makes of a query `[head_dim]`, which it appends to
/// its second argument; of a tile of several queries, the mean.
fn score_summaries(
    queries: &Queries<'_>,
    tiles: Vec<Range<usize>>,
    store: &LayerStore,
    expand: impl Fn(&[f32], &mut Vec<f32>) + Sync,
) -> Result<BlockScores> {
    let summaries = store.needed_summaries()?;
    let (shape, blocks) = (store.shape(), summaries.blocks());
    let pool = summaries.pool().on_host()?;
    let pairs_of = |head: usize| -> Vec<[u32; 2]> {
        let octets = summaries.pages(head).flat_map(|page| {
            let first = page * (PAGE_SIZE / OCTET) as u32;
            (first..first + (PAGE_SIZE / OCTET) as u32).step_by(2).map(|octet| [octet, octet + 1])
        });
        octets.take(blocks.div_ceil(LANES)).collect()
    };
    let pairs: Vec<Vec<[u32; 2]>> = (0..shape.kv_heads()).map(pairs_of).collect();
    let group = shape.group_size() * shape.head_dim();
    with_f32(queries.q, |q| {
        with_rows(&pool, |rows| {
            score_groups(q, tiles, store, blocks, |head, tiles, out| {
                // [tiles, group_size, width]
                let mut expanded = Vec::new();
                for queries in tiles {
                    let at = expanded.len();
                    for (index, q) in queries.chunks_exact(group).enumerate() {
                        let own = expanded.len();
                        q.chunks_exact(shape.head_dim()).for_each(|row| expand(row, &mut expanded));
                        if index > 0 {
                            let (first, other) = expanded.split_at_mut(own);
                            first[at..].iter_mut().zip(&*other).for_each(|(sum, x)| *sum += x);
                            expanded.truncate(own);
                        }
                    }
                    let count = queries.len() / group;
                    if count > 1 {
                        expanded[at..].iter_mut().for_each(|sum| *sum /= count as f32);
                    }
                }
                out.resize(expanded.len() / rows.width * pairs[head].len() * LANES, 0.0);
                dot_octets(rows, &expanded, &pairs[head], out);
            })
        })
    })
}

/// `score_head` gets a key/value head and, for some tiles, the queries of each `[queries, group_size, head_dim]`; it leaves
/// `[tiles, group_size, >= blocks]` scores, of which the maximum over each group is kept. Tiles are spread over the threads.
fn score_groups(
    q: &[f32],
    tiles: Vec<Range<usize>>,
    store: &LayerStore,
    blocks: usize,
    score_head: impl Fn(usize, &[Vec<f32>], &mut Vec<f32>) + Sync,
) -> BlockScores {
    if blocks == 0 {
        return BlockScores::Forced; // nothing is complete yet
    }
    let shape = store.shape();
    let (kv_heads, group_size, head_dim) = (shape.kv_heads(), shape.group_size(), shape.head_dim());
    let pieces: Vec<&[Range<usize>]> = tiles.chunks(TILES).collect();
    let best_of_groups = |index: usize| {
        let (head, tiles) = (index % kv_heads, pieces[index / kv_heads]);
        let queries_of = |tile: &Range<usize>| -> Vec<f32> {
            let rows = tile.clone().map(|query| (query * shape.q_heads() + head * group_size) * head_dim);
            rows.flat_map(|at| &q[at..at + group_size * head_dim]).copied().collect()
        };
        let queries: Vec<Vec<f32>> = tiles.iter().map(queries_of).collect();
        let mut scores = Vec::new();
        score_head(head, &queries, &mut scores);
        let stride = scores.len() / (tiles.len() * group_size);
        let mut best = vec![f32::NEG_INFINITY; tiles.len() * blocks];
        for (best, scores) in best.chunks_exact_mut(blocks).zip(scores.chunks_exact(group_size * stride)) {
            scores.chunks_exact(stride).for_each(|scores| raise(best, &scores[..blocks]));
        }
        best
    };
    let values = parallel::map(pieces.len() * kv_heads, best_of_groups);
    BlockScores::PerQuery(QueryScores { kv_heads, blocks, tiles, values })
}
