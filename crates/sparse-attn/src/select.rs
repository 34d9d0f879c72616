//! From block scores to the blocks that are read: causality, forced blocks, budget, ties.

use crate::LayerStore;
use crate::block_router::BlockScores;
use crate::cache::Step;
use crate::parallel;
use crate::simd::raise;
use std::ops::Range;

/// Query positions that share one selection in prefill, aligned to absolute positions. Decode selects per query.
///
/// The best blocks of 64 queries are chosen by the luckiest estimates among 64; of 4, the divergence from dense is half of
/// that, at nine tenths of the speed (models/README.md).
pub const TILE: usize = 4;

/// How many tokens a query may read beyond its window, forced blocks included: the larger of both limits.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Budget {
    /// That many.
    pub tokens: usize,
    /// This part of what is kept beyond the window, 0 to 1.
    pub part: f32,
}

impl Budget {
    /// No limit.
    pub const ALL: Self = Self { tokens: usize::MAX, part: 1.0 };

    /// `tokens` at most.
    pub fn tokens(tokens: usize) -> Self {
        Self { tokens, part: 0.0 }
    }

    /// Both limits times `factor`.
    pub fn times(self, factor: f32) -> Self {
        let tokens = if self.tokens == usize::MAX { self.tokens } else { (self.tokens as f64 * f64::from(factor)).round() as usize };
        Self { tokens, part: self.part * factor }
    }

    /// The limit where `kept` tokens lie beyond the window.
    pub fn limit(&self, kept: usize) -> usize {
        let part = if self.part >= 1.0 { usize::MAX } else { (f64::from(self.part) * kept as f64).ceil() as usize };
        part.max(self.tokens)
    }
}

/// The limits of a selection, in tokens.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Limits {
    /// The newest positions, which every query reads: `(t - window, t]`. At least 1.
    pub window: usize,
    /// The first positions, which a token router always admits.
    pub sinks: usize,
    /// Positions per routing block. At least 1; up to `window + 1`, or the block at a query's edge holds tokens to come, and
    /// how many of them a token router admits would count.
    pub block_size: usize,
    /// Tokens a query may read beyond its window.
    pub budget: Budget,
    /// Up to this many positions a query reads every block.
    pub dense_len: usize,
    /// Queries that share a selection in steps of several; 1: a selection each.
    pub tile: usize,
}

impl Limits {
    /// The block that holds the newest position outside the window of the query at `t`.
    pub fn edge(&self, t: usize) -> Option<usize> {
        (t + 1).checked_sub(self.window + 1).map(|position| position / self.block_size)
    }

    /// The newest positions of which a query that selects blocks sees what a token router drops; `None`: nothing is dropped.
    pub fn local_window(&self, store: &LayerStore) -> Option<usize> {
        store.local().map(|local| local.window.min(self.window))
    }

    /// Whether the queries of a tile read everything, by their positions alone.
    pub(crate) fn is_dense(&self, tile: &Range<usize>, step: Step) -> bool {
        let end = if step.len == 1 { tile.end } else { tile.end.next_multiple_of(self.tile) };
        end <= self.dense_len
    }
}

/// The blocks that the queries of a step read.
#[derive(Debug, Clone, PartialEq)]
pub enum Selection {
    /// All that is visible: causality, the model's own sliding window and the token router are the only limits.
    Every,
    /// Each tile of queries its own blocks.
    Blocks(BlockSelection),
}

/// Selected blocks per tile and key/value head.
#[derive(Debug, Clone, PartialEq)]
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
    /// The blocks of each tile: its queries, and per head the blocks, ascending; `None`: everything.
    #[cfg_attr(not(feature = "cuda"), expect(dead_code, reason = "for backends that select themselves"))]
    pub(crate) fn new(limits: Limits, tiles: impl Iterator<Item = (Range<usize>, Option<Vec<Vec<usize>>>)>) -> Self {
        Self { limits, tiles: tiles.map(|(queries, heads)| Tile { queries, heads }).collect() }
    }

    /// The selected blocks of the query at `t`, ascending, up to its edge; `None`: it reads everything.
    pub fn blocks(&self, t: usize, kv_head: usize) -> Option<Vec<usize>> {
        let edge = self.limits.edge(t);
        let heads = self.tile_of(t)?.heads.as_ref()?;
        Some(heads[kv_head].iter().copied().filter(|block| edge.is_some_and(|edge| *block <= edge)).collect())
    }

    /// The limits that it was made by.
    #[cfg_attr(not(feature = "cuda"), expect(dead_code, reason = "for backends whose kernels differ by the tile"))]
    pub(crate) fn limits(&self) -> &Limits {
        &self.limits
    }

    /// The queries that share a selection, tile by tile.
    pub fn tiles(&self) -> impl Iterator<Item = Range<usize>> + '_ {
        self.tiles.iter().map(|tile| tile.queries.clone())
    }

    fn tile_of(&self, t: usize) -> Option<&Tile> {
        let after = self.tiles.partition_point(|tile| tile.queries.start <= t);
        after.checked_sub(1).map(|tile| &self.tiles[tile]).filter(|tile| tile.queries.contains(&t))
    }

    /// Appends the positions that queries from `t` on, of one tile, may read, as ascending ranges apart from each other;
    /// the last one is open to the newest position `end`. What lies in the future of a query, or was not admitted, is
    /// still in it.
    fn add_ranges(&self, t: usize, kv_head: usize, end: usize, ranges: &mut Vec<Range<usize>>) {
        let Some(heads) = self.tile_of(t).and_then(|tile| tile.heads.as_ref()) else { return ranges.push(0..end) };
        let size = self.limits.block_size;
        // From the first query's edge on, everything is a later query's edge or in a window.
        let tail = self.limits.edge(t).unwrap_or(0);
        let blocks = heads[kv_head].iter().filter(|block| **block < tail).map(|block| block * size..(block + 1) * size);
        for range in blocks.chain([tail * size..end]) {
            match ranges.last_mut() {
                Some(last) if last.end == range.start => last.end = range.end,
                _ => ranges.push(range),
            }
        }
    }
}

impl Selection {
    /// Calls `piece` with the queries of a step that share what they may read: at most `most`, aligned to absolute positions, and cut where a token
    /// router begins to hide tokens from them.
    pub(crate) fn each_piece(&self, step: Step, most: usize, store: &LayerStore, mut piece: impl FnMut(Range<usize>)) {
        let mut cut = |queries: Range<usize>| {
            let mut t = queries.start;
            while t < queries.end {
                let end = queries.end.min((t / most + 1) * most);
                piece(t..end);
                t = end;
            }
        };
        match self {
            Self::Every => {
                let (dense, rest) = step.split_at(store.local().map_or(0, |local| local.dense_len));
                cut(dense.start..dense.end());
                cut(rest.start..rest.end());
            }
            Self::Blocks(blocks) => blocks.tiles().for_each(cut),
        }
    }

    /// The newest positions of which the query at `t` sees what a token router drops; `None`: nothing is dropped.
    pub(crate) fn local_window(&self, t: usize, store: &LayerStore) -> Option<usize> {
        let selects = |blocks: &BlockSelection| blocks.tile_of(t).is_some_and(|tile| tile.heads.is_some());
        match self {
            Self::Blocks(blocks) if selects(blocks) => blocks.limits.local_window(store),
            _ => store.local().map(|local| local.window_at(t)),
        }
    }

    /// The positions that the query at `t` reads, ascending: selected, visible, and admitted or still in the window.
    pub fn positions(&self, store: &LayerStore, t: usize, kv_head: usize) -> Vec<usize> {
        let local_window = self.local_window(t, store);
        let read = |position: &usize| {
            let in_window = local_window.is_some_and(|window| position + window > t);
            in_window || store.admitted(kv_head).is_none_or(|admitted| admitted.contains(*position))
        };
        let (from, mut ranges) = (store.first_visible(t), Vec::new());
        self.set_ranges(t, kv_head, t + 1, store, &mut ranges);
        ranges.into_iter().flatten().filter(|p| (from..=t).contains(p)).filter(read).collect()
    }

    /// The positions that queries from `t` on, which share what they may read, may read: ascending ranges apart from each
    /// other, in place of what was in `ranges`.
    pub(crate) fn set_ranges(&self, t: usize, kv_head: usize, end: usize, store: &LayerStore, ranges: &mut Vec<Range<usize>>) {
        ranges.clear();
        match self {
            Self::Every => ranges.push(store.first_visible(t)..end),
            Self::Blocks(blocks) => blocks.add_ranges(t, kv_head, end, ranges),
        }
    }
}

/// The queries of a step that share a selection: `tile` of them, aligned to absolute positions; a step of one has its own.
pub(crate) fn tiles(step: Step, tile: usize) -> Vec<Range<usize>> {
    let mut tiles = Vec::new();
    let mut t = step.start;
    while t < step.end() {
        let end = if step.len == 1 { t + 1 } else { step.end().min((t / tile + 1) * tile) };
        tiles.push(t..end);
        t = end;
    }
    tiles
}

/// Turns scores into a selection. Deterministic: equal scores, equal selection.
///
/// Per tile and head, block 0 and the edges of all its queries are forced. The other blocks that lie before some
/// query's edge and hold an admitted token follow, best score first and of equal ones the later, as long as the tokens
/// of all fit the budget: so a larger budget selects a superset.
pub fn select(scores: &BlockScores, limits: &Limits, step: Step, store: &LayerStore) -> Selection {
    if matches!(scores, BlockScores::Every) {
        return Selection::Every;
    }
    let tiles = tiles(step, limits.tile);
    let kv_heads = store.shape().kv_heads();
    let blocks = limits.edge(step.end() - 1).map_or(0, |edge| edge + 1);
    let tokens: Vec<Vec<u32>> = (0..kv_heads).map(|head| tokens_of_blocks(limits.block_size, blocks, head, store)).collect();
    let chosen = parallel::map(tiles.len() * kv_heads, |index| {
        let (queries, head) = (tiles[index / kv_heads].clone(), index % kv_heads);
        (!limits.is_dense(&queries, step)).then(|| tile_blocks(scores, limits, queries, step, head, &tokens[head], store))
    });
    let heads = chosen.chunks(kv_heads).map(|heads| heads.iter().cloned().collect::<Option<Vec<_>>>());
    let tiles: Vec<Tile> = tiles.iter().cloned().zip(heads).map(|(queries, heads)| Tile { queries, heads }).collect();
    if tiles.iter().all(|tile| tile.heads.is_none()) {
        return Selection::Every;
    }
    Selection::Blocks(BlockSelection { limits: *limits, tiles })
}

/// Admitted tokens of the first `blocks` blocks of a head.
fn tokens_of_blocks(block_size: usize, blocks: usize, head: usize, store: &LayerStore) -> Vec<u32> {
    let Some(admitted) = store.admitted(head) else { return vec![block_size as u32; blocks] };
    let mut before = 0;
    let next = |block: usize| {
        let rank = admitted.rank((block + 1) * block_size);
        let tokens = rank - before;
        before = rank;
        tokens as u32
    };
    (0..blocks).map(next).collect()
}

/// The blocks of one tile and head, ascending.
fn tile_blocks(
    scores: &BlockScores,
    limits: &Limits,
    queries: Range<usize>,
    step: Step,
    head: usize,
    tokens: &[u32],
    store: &LayerStore,
) -> Vec<usize> {
    let Some(last) = queries.clone().filter_map(|t| limits.edge(t)).max() else { return Vec::new() };
    let first = queries.clone().find_map(|t| limits.edge(t)).unwrap_or(last);
    let mut chosen = vec![false; last + 1];
    chosen[0] = true;
    // Neighbouring queries have the same edge or neighbouring ones.
    chosen[first..].fill(true);
    let mut total: usize = (0..=last).filter(|block| chosen[*block]).map(|block| tokens[block] as usize).sum();
    let budget = limits.budget.limit(store.count_admitted(head, 0..queries.end.saturating_sub(limits.window)));
    if let BlockScores::PerQuery(scores) = scores {
        let mut best = vec![f32::NEG_INFINITY; first];
        let scored = queries.start.max(limits.window) - step.start..queries.end - step.start;
        scores.rows(scored, head).for_each(|row| raise(&mut best, &row[..first]));
        // The score, then the block: the largest is the best, and of equal ones the later.
        let rank = |block: usize| u64::from(ordered(best[block])) << 32 | block as u64;
        let mut candidates: Vec<u64> = (1..first).filter(|block| tokens[*block] > 0).map(rank).collect();
        let among: usize = (1..first).map(|block| tokens[block] as usize).sum();
        let mut rest = candidates.as_mut_slice();
        // Sorted are only those that may fit: as many as fit of middling ones and a few more, then the next as many.
        let middling = among.div_ceil(rest.len().max(1)).max(1);
        let of_one_size = store.admitted(head).is_none();
        let room = (budget.saturating_sub(total) / middling).min(rest.len());
        let portion = if of_one_size { room } else { room * 5 / 4 + 1 };
        if of_one_size && room < rest.len() {
            // The best are enough, in any order.
            rest.select_nth_unstable_by(room, |a, b| b.cmp(a));
            rest = &mut rest[..room];
        }
        'fits: while !rest.is_empty() {
            let count = portion.clamp(1, rest.len());
            if count < rest.len() {
                rest.select_nth_unstable_by(count - 1, |a, b| b.cmp(a));
            }
            let (portion, others) = rest.split_at_mut(count);
            if !of_one_size {
                portion.sort_unstable_by(|a, b| b.cmp(a));
            }
            for block in portion.iter().map(|rank| *rank as u32 as usize) {
                let more = tokens[block] as usize;
                if total + more > budget {
                    break 'fits;
                }
                chosen[block] = true;
                total += more;
            }
            rest = others;
        }
    }
    (0..=last).filter(|block| chosen[*block]).collect()
}

/// Bits that are in the order of the numbers, as [`f32::total_cmp`] has it.
fn ordered(x: f32) -> u32 {
    let bits = x.to_bits();
    if bits >> 31 == 0 { bits | 1 << 31 } else { !bits }
}

#[cfg(test)]
mod tests {
    use super::ordered;

    #[test]
    fn bits_are_in_the_order_of_the_numbers() {
        let numbers = [f32::NEG_INFINITY, -1e30, -1.0, -1e-40, -0.0, 0.0, 1e-40, 1.0, 1e30, f32::INFINITY, f32::NAN];
        assert!(numbers.windows(2).all(|pair| ordered(pair[0]) < ordered(pair[1]) && pair[0].total_cmp(&pair[1]).is_lt()));
    }
}
