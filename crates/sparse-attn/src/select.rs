//! From block scores to the blocks that are read: causality, forced blocks, budget, ties.

use crate::block_router::BlockScores;
use crate::cache::Step;
use std::ops::Range;

/// Query positions that share one selection in prefill, aligned to absolute positions. Decode selects per query.
pub const TILE: usize = 64;

/// The limits of a selection, in tokens.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// The newest positions, which every query reads: `(t - window, t]`. At least 1.
    pub window: usize,
    /// Positions per routing block. At least 1.
    pub block_size: usize,
    /// Tokens a query may read beyond its window, forced blocks included (`None`: no limit).
    pub budget: Option<usize>,
    /// Up to this many positions a query reads everything.
    pub dense_len: usize,
}

impl Limits {
    /// The block that holds the newest position outside the window of the query at `t`.
    pub fn edge(&self, t: usize) -> Option<usize> {
        (t + 1).checked_sub(self.window + 1).map(|position| position / self.block_size)
    }

    /// The queries that share a selection with the one at `t`, in a step.
    fn tile(&self, t: usize, step: Step) -> Range<usize> {
        if step.len == 1 { t..t + 1 } else { t..step.end().min((t / TILE + 1) * TILE) }
    }

    /// Whether the queries of a tile read everything, by their positions alone.
    fn is_dense(&self, tile: &Range<usize>, step: Step) -> bool {
        let end = if step.len == 1 { tile.end } else { tile.end.next_multiple_of(TILE) };
        end <= self.dense_len
    }
}

/// The blocks that the queries of a step read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Selection {
    /// All that is visible: causality and the model's own sliding window are the only limits.
    Every,
    /// Each tile of queries its own blocks.
    Blocks(BlockSelection),
}

/// Selected blocks per tile and key/value head.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BlockSelection {
    limits: Limits,
    tiles: Vec<Tile>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Tile {
    queries: Range<usize>,
    /// Per head, ascending; `None`: everything.
    heads: Option<Vec<Vec<usize>>>,
}

impl BlockSelection {
    /// The selected blocks of the query at `t`, ascending, up to its edge; `None`: it reads everything.
    pub fn blocks(&self, t: usize, kv_head: usize) -> Option<Vec<usize>> {
        let edge = self.limits.edge(t);
        let heads = self.tile_of(t)?.heads.as_ref()?;
        Some(heads[kv_head].iter().copied().filter(|block| edge.is_some_and(|edge| *block <= edge)).collect())
    }

    fn tile_of(&self, t: usize) -> Option<&Tile> {
        self.tiles.iter().find(|tile| tile.queries.contains(&t))
    }

    /// The positions that queries from `t` on, of one tile, may read, as ascending ranges apart from each other;
    /// the last one is open to the newest position `end`. What lies in the future of a query is still in it.
    pub fn ranges(&self, t: usize, kv_head: usize, end: usize) -> Vec<Range<usize>> {
        let Some(heads) = self.tile_of(t).and_then(|tile| tile.heads.as_ref()) else { return vec![0..end] };
        let size = self.limits.block_size;
        // From the first query's edge on, everything is a later query's edge or in a window.
        let tail = self.limits.edge(t).unwrap_or(0);
        let blocks = heads[kv_head].iter().filter(|block| **block < tail).map(|block| block * size..(block + 1) * size);
        let mut ranges: Vec<Range<usize>> = Vec::new();
        for range in blocks.chain([tail * size..end]) {
            match ranges.last_mut() {
                Some(last) if last.end == range.start => last.end = range.end,
                _ => ranges.push(range),
            }
        }
        ranges
    }
}

/// Turns scores into a selection. Deterministic: equal scores, equal selection.
///
/// Per tile and head, block 0 and the edges of all its queries are forced. The other blocks that lie before some
/// query's edge follow, best score first and of equal ones the later, as long as all fit the budget: so a larger budget
/// selects a superset.
pub fn select(scores: &BlockScores, limits: &Limits, step: Step, kv_heads: usize) -> Selection {
    if matches!(scores, BlockScores::Every) {
        return Selection::Every;
    }
    let mut tiles = Vec::new();
    let mut t = step.start;
    while t < step.end() {
        let queries = limits.tile(t, step);
        let heads = if limits.is_dense(&queries, step) {
            None
        } else {
            Some((0..kv_heads).map(|head| tile_blocks(scores, limits, queries.clone(), step, head)).collect())
        };
        t = queries.end;
        tiles.push(Tile { queries, heads });
    }
    if tiles.iter().all(|tile| tile.heads.is_none()) {
        return Selection::Every;
    }
    Selection::Blocks(BlockSelection { limits: *limits, tiles })
}

/// The blocks of one tile and head, ascending.
fn tile_blocks(scores: &BlockScores, limits: &Limits, queries: Range<usize>, step: Step, head: usize) -> Vec<usize> {
    let Some(last) = queries.clone().filter_map(|t| limits.edge(t)).max() else { return Vec::new() };
    let first = queries.clone().find_map(|t| limits.edge(t)).unwrap_or(last);
    let mut chosen = vec![false; last + 1];
    chosen[0] = true;
    // Neighbouring queries have the same edge or neighbouring ones.
    chosen[first..].fill(true);
    let mut total = chosen.iter().filter(|chosen| **chosen).count() * limits.block_size;
    let mut candidates: Vec<(f32, usize)> = match scores {
        BlockScores::Every | BlockScores::Forced => Vec::new(),
        BlockScores::PerQuery(scores) => (1..first)
            .map(|block| {
                let rows = queries.clone().filter(|t| limits.edge(*t).is_some_and(|edge| block < edge));
                (rows.map(|t| scores.get(t - step.start, head, block)).fold(f32::NEG_INFINITY, f32::max), block)
            })
            .collect(),
    };
    candidates.sort_unstable_by(|a, b| b.0.total_cmp(&a.0).then(b.1.cmp(&a.1)));
    for (_, block) in candidates {
        if limits.budget.is_some_and(|budget| total + limits.block_size > budget) {
            break;
        }
        chosen[block] = true;
        total += limits.block_size;
    }
    (0..=last).filter(|block| chosen[*block]).collect()
}
