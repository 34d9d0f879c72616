//! Scores and selection of blocks on the device.

use super::lists::{Lists, Windows};
use super::params::{ExpandParams, Kept, ScoreParams, SelectParams};
use super::{DecodeLists, Kernels, Spread, address, queries_of, queries_of_a_tile, scales_of, summary_code, uninitialised};
use crate::block_router::BlockRouter;
use crate::cache::{LayerStore, OCTET, PAGE_SIZE, ReadCount, Step};
use crate::select::{BlockSelection, Limits, Selection, tiles};
use candle_core::{DType, Device, Result, Tensor, bail};
use std::ops::Range;

/// Blocks of a thread of the selecting kernel, and threads of its thread block.
const BLOCKS_OF_A_THREAD: [usize; 5] = [1, 4, 8, 16, 32];
const MOST_BLOCKS_OF_A_THREAD: usize = BLOCKS_OF_A_THREAD[BLOCKS_OF_A_THREAD.len() - 1];
const SELECT_THREADS: usize = 1024;

/// Blocks that a thread block scores.
const SCORED_AT_ONCE: usize = 64;

/// Bytes of scores that are on the device at once.
const SCORE_BYTES: usize = 64 << 20;

/// The number of a router's kernel; `None`: it scores on the host.
pub fn kind_of(router: &dyn BlockRouter) -> Option<i32> {
    router.is_product().then(|| summary_code(router.summary()))
}

/// Room for the scores of the blocks of `len` positions: a multiple of 4, as the kernel reads them.
pub(super) fn most_scores(len: usize, block_size: usize) -> usize {
    (len / block_size + 1).next_multiple_of(4)
}

/// The most shared memory that a selection takes, in bytes; and positions more than there are now that it must have room for.
const SHARED_BYTES: usize = 200 << 10;
const SPARE: usize = 32 << 10;

/// A step whose queries read a budget of blocks: which, follows from the scores alone.
#[derive(Debug)]
pub struct Budgeted {
    limits: Limits,
    step: Step,
    kind: i32,
    tiles: Vec<Range<usize>>,
}

/// What was selected.
#[derive(Debug)]
pub(super) struct Selected {
    pub(super) lists: Lists,
    pub(super) picked: Option<Tensor>, // [tiles, kv_heads] u32, where a token router drops some
    blocks: Option<Tensor>,            // [tiles, kv_heads, most_scores] u32, u32::MAX beyond those chosen
}

impl Budgeted {
    /// `None` where the host must do it: blocks are no octets, or longer than the window where a token router drops tokens, the router's
    /// scores are no products with summaries, or the queries of a tile score by the best of them; or there are too many blocks.
    pub fn new(router: &dyn BlockRouter, limits: Limits, store: &LayerStore, step: Step) -> Option<Self> {
        let kind = kind_of(router)?;
        let blocks = step.end() / limits.block_size;
        let is_short = store.local().is_none_or(|_| limits.block_size <= limits.window);
        let shared_bytes = select_bytes(most_scores(step.end() + SPARE, limits.block_size), limits.block_size, store);
        if !is_short
            || !limits.block_size.is_multiple_of(OCTET)
            || blocks >= SELECT_THREADS * MOST_BLOCKS_OF_A_THREAD
            || shared_bytes > SHARED_BYTES
        {
            return None;
        }
        let joins = router.joins_queries() || step.len == 1 || limits.tile == 1;
        joins.then(|| Self { limits, step, kind, tiles: tiles(step, limits.tile) })
    }

    /// Tokens of each head that the budget has room for in the tile of these queries, beside those of the forced blocks.
    pub fn takes(limits: &Limits, queries: &Range<usize>, is_dense: bool, store: &LayerStore) -> Vec<u32> {
        let heads = 0..store.shape().kv_heads();
        if is_dense {
            return vec![i32::MAX as u32; heads.len()];
        }
        let edges = |t: usize| limits.edge(t);
        let (first, last) = (queries.clone().find_map(edges), edges(queries.end - 1));
        let (Some(first), Some(last)) = (first, last) else { return vec![0; heads.len()] };
        let beyond = queries.end.saturating_sub(limits.window);
        let kept = |head: usize, range: Range<usize>| match store.admitted(head) {
            Some(_) => store.count_admitted(head, range),
            None => range.len(),
        };
        let take = |head: usize| {
            let block_0 = if first > 0 { kept(head, 0..limits.block_size) } else { 0 };
            let forced = block_0 + kept(head, first * limits.block_size..(last + 1) * limits.block_size);
            limits.budget.limit(kept(head, 0..beyond)).saturating_sub(forced).min(i32::MAX as usize) as u32
        };
        heads.map(take).collect()
    }

    /// Scores, selects, and lists what each tile reads. `q`: in the dtype of the keys.
    pub(super) fn select_step(&self, kernels: &Kernels, q: &Tensor, store: &LayerStore, keeps_blocks: bool) -> Result<Selected> {
        let (shape, device, limits, step) = (store.shape(), q.device(), self.limits, self.step);
        let (kv_heads, count) = (shape.kv_heads(), self.tiles.len());
        let max_scores = most_scores(step.end(), limits.block_size);
        let takes = |tile: &Range<usize>| Self::takes(&limits, tile, limits.is_dense(tile, step), store);
        let takes: Vec<u32> = self.tiles.iter().flat_map(takes).collect();
        let kept = (0..kv_heads).map(|head| store.count_admitted(head, 0..store.frontier())).max().unwrap_or(0);
        let is_thinned = store.local().is_some();
        let listed = |take: u32, tile: &Range<usize>| {
            if is_thinned {
                return kept.div_ceil(OCTET) + tile.end.div_ceil(OCTET) - store.frontier() / OCTET;
            }
            let edge = limits.edge(tile.start).unwrap_or(0);
            let chosen = (take as usize / limits.block_size).min(edge) + 1;
            chosen * (limits.block_size / OCTET) + tile.end.div_ceil(OCTET) - edge * (limits.block_size / OCTET)
        };
        let most = takes.iter().step_by(kv_heads).zip(&self.tiles).map(|(take, tile)| listed(*take, tile)).max().unwrap_or(0);
        let octets = uninitialised((count, kv_heads, most, 2), DType::U32, device)?;
        let counts = uninitialised((count, kv_heads), DType::U32, device)?;
        let blocks = keeps_blocks.then(|| uninitialised((count, kv_heads, max_scores), DType::U32, device)).transpose()?;
        let picked = is_thinned.then(|| uninitialised((count, kv_heads), DType::U32, device)).transpose()?;
        let takes = Tensor::new(takes, device)?;
        let position = Tensor::new(&[step.start as u32], device)?;
        let tile = if step.len == 1 { 1 } else { limits.tile };
        let at_once = (SCORE_BYTES / (kv_heads * max_scores * 4)).clamp(1, count);
        let scores = uninitialised((at_once, kv_heads, max_scores), DType::F32, device)?;
        let expanded = uninitialised((at_once, shape.q_heads(), 2 * shape.head_dim()), q.dtype(), device)?;
        for first_tile in (0..count).step_by(at_once) {
            let tiles = at_once.min(count - first_tile);
            let params = ExpandParams {
                q: address(q)?,
                out: address(&expanded)?,
                kind: self.kind,
                start: step.start as i32,
                tokens: step.len as i32,
                tile: tile as i32,
                first_row: first_tile as i32,
                q_heads: shape.q_heads() as i32,
                head_dim: shape.head_dim() as i32,
            };
            let spread = Spread::new([tiles, shape.q_heads(), 1], shape.head_dim());
            // SAFETY: the tensors have these shapes and live until the stream frees them.
            unsafe { kernels.launch(&format!("expand_queries_{}", queries_of(store).name()), spread, &params) }?;
            let call = SelectCall {
                q: address(&expanded)?,
                expanded: true,
                position: address(&position)?,
                takes: address(&takes)?,
                scores: address(&scores)?,
                lists: DecodeLists { octets: address(&octets)?, counts: address(&counts)?, most, local_window: 0 },
                picked: picked.as_ref().map_or(Ok(0), address)?,
                blocks: blocks.as_ref().map_or(Ok(0), address)?,
                kind: self.kind,
                max_scores,
                tokens: step.len,
                tile,
                tiles: first_tile..first_tile + tiles,
            };
            // SAFETY: the tensors have these shapes and live until the stream frees them.
            unsafe { score_and_select(kernels, &call, &limits, store) }?;
        }
        let most_queries = queries_of_a_tile(shape.group_size());
        let pieces = self.pieces(most_queries);
        let firsts: Vec<u32> = pieces.iter().map(|(queries, _)| (queries.start - step.start) as u32).chain([step.len as u32]).collect();
        let of_pieces: Vec<u32> = pieces.iter().map(|(_, list)| *list as u32).collect();
        let lists = Lists {
            octets,
            counts,
            firsts: Tensor::new(firsts, device)?,
            of_pieces: Tensor::new(of_pieces, device)?,
            pieces: pieces.len(),
            tile: self.limits.tile.min(most_queries),
            most,
            windows: Windows::new(self.tiles.iter().map(|tile| self.local_window(tile, store)), device)?,
        };
        Ok(Selected { lists, picked, blocks })
    }

    /// See [`Selection::local_window`].
    fn local_window(&self, tile: &Range<usize>, store: &LayerStore) -> Option<usize> {
        let is_dense = self.limits.is_dense(tile, self.step);
        if is_dense { store.local().map(|local| local.window_at(tile.start)) } else { self.limits.local_window(store) }
    }

    /// The queries of thread blocks, and the tile of each.
    fn pieces(&self, most: usize) -> Vec<(Range<usize>, usize)> {
        let mut pieces = Vec::new();
        for (index, tile) in self.tiles.iter().enumerate() {
            let mut t = tile.start;
            while t < tile.end {
                let end = tile.end.min((t / most + 1) * most);
                pieces.push((t..end, index));
                t = end;
            }
        }
        pieces
    }

    /// The blocks that were chosen, on the host.
    pub(super) fn read_back(&self, selected: &Selected) -> Result<Selection> {
        let Some(blocks) = &selected.blocks else { bail!("select: the chosen blocks were not kept") };
        let rows = blocks.to_vec3::<u32>()?;
        let tiles = self.tiles.iter().cloned().zip(rows).map(|(queries, heads)| {
            // Those before the edge were chosen by score, all others are read.
            let edge = self.limits.edge(queries.start).unwrap_or(0);
            let last = self.limits.edge(queries.end - 1);
            let all = |head: Vec<u32>| -> Vec<usize> {
                let chosen = head.into_iter().take_while(|block| *block != u32::MAX).map(|block| block as usize);
                chosen.chain(edge..last.map_or(0, |last| last + 1)).collect()
            };
            let reads_all = self.limits.is_dense(&queries, self.step);
            (queries, (!reads_all).then(|| heads.into_iter().map(all).collect()))
        });
        Ok(Selection::Blocks(BlockSelection::new(self.limits, tiles)))
    }

    /// The keys that are read. `picked`: `[tiles, kv_heads]` kept tokens of block 0 and the chosen ones, see params.h; needed where a token
    /// router drops some.
    pub fn count(&self, store: &LayerStore, picked: &[u32]) -> ReadCount {
        let (kv_heads, limits) = (store.shape().kv_heads(), self.limits);
        let (mut read, mut visible) = (0u64, 0u64);
        for (index, tile) in self.tiles.iter().enumerate() {
            let edge = limits.edge(tile.start).unwrap_or(0);
            let is_dense = limits.is_dense(tile, self.step);
            let takes = Self::takes(&limits, tile, is_dense, store);
            let local_window = self.local_window(tile, store);
            for (head, take) in takes.into_iter().enumerate() {
                // Block 0 and the chosen ones; then everything from the edge on.
                let chosen = match local_window {
                    // Everything is the tail then.
                    Some(_) if is_dense => 0,
                    Some(_) => picked.get(index * kv_heads + head).map_or(0, |picked| *picked as usize),
                    None if edge == 0 => 0,
                    None => ((take as usize / limits.block_size).min(edge - 1) + 1) * limits.block_size,
                };
                for t in tile.clone() {
                    let tail = if is_dense && local_window.is_some() { 0 } else { edge * limits.block_size };
                    let window = local_window.map_or(tail, |window| (t + 1).saturating_sub(window).max(tail));
                    let beyond = if window > tail { store.count_admitted(head, tail..window) } else { 0 };
                    read += (chosen + beyond + t + 1 - window) as u64;
                }
            }
            visible += tile.clone().map(|t| kv_heads as u64 * (t as u64 + 1)).sum::<u64>();
        }
        // Of the blocks that are complete, though the newest may have no summary yet.
        let blocks = (self.step.len * kv_heads * (self.step.end() / limits.block_size)) as u64;
        let scored = store.summaries().map_or(0, |summaries| blocks * summaries.pool().dtype().row_bytes(summaries.pool().width()) as u64);
        let row = |pool: &crate::cache::Pool| pool.dtype().row_bytes(pool.width()) as u64;
        ReadCount { read, visible, bytes: read * (row(store.k()) + row(store.v())) + scored }
    }
}

/// Shared memory of a selection.
fn select_bytes(max_scores: usize, block_size: usize, store: &LayerStore) -> usize {
    // A bit for each kept token.
    let bits = if store.local().is_some() { (max_scores * block_size).div_ceil(32) * 4 } else { 0 };
    (max_scores + 1) * 4 + bits
}

/// Addresses of what scoring and selecting take and make; see params.h.
#[derive(Debug, Clone)]
pub struct SelectCall {
    /// Queries in the dtype of the keys: expanded ones `[rows, q_heads, 2 head_dim]`, or one as it is.
    pub q: u64,
    /// Whether they are expanded.
    pub expanded: bool,
    /// Position of the step's first query, i32.
    pub position: u64,
    /// Tokens to take beside those of the forced blocks, `[tiles of the step, kv_heads]` i32.
    pub takes: u64,
    /// Room for `[rows, kv_heads, max_scores]` f32.
    pub scores: u64,
    /// Room for the lists of all tiles of the step.
    pub lists: DecodeLists,
    /// Room for how many kept tokens block 0 and the chosen ones have, `[tiles, kv_heads]` i32; 0: not wanted.
    pub picked: u64,
    /// Room for the chosen blocks `[tiles, kv_heads, max_scores]`; 0: not wanted.
    pub blocks: u64,
    /// See [`kind_of`].
    pub kind: i32,
    /// See [`most_scores`].
    pub max_scores: usize,
    /// Queries of the step.
    pub tokens: usize,
    /// Queries of a tile.
    pub tile: usize,
    /// The tiles to select for.
    pub tiles: Range<usize>,
}

/// Puts scoring and selection into the stream: a row of scores for each tile.
///
/// # Safety
/// The addresses must be of what their fields say, and live until the kernels have run.
///
/// # Errors
/// If a kernel cannot be launched.
pub unsafe fn score_and_select(kernels: &Kernels, call: &SelectCall, limits: &Limits, store: &LayerStore) -> Result<()> {
    let (shape, pages, summaries) = (store.shape(), store.device_pages()?, store.needed_summaries()?);
    let (kv_heads, first) = (shape.kv_heads(), call.tiles.start);
    let params = ScoreParams {
        q: call.q,
        summaries: address(summaries.pool().values())?,
        scales: scales_of(summaries.pool())?,
        position: call.position,
        scores: call.scores,
        kind: call.kind,
        expanded: i32::from(call.expanded),
        group_size: shape.group_size() as i32,
        max_scores: call.max_scores as i32,
        window: limits.window as i32,
        block_size: limits.block_size as i32,
        tile: call.tile as i32,
        first_row: first as i32,
    };
    let spread = Spread::new([call.max_scores.div_ceil(SCORED_AT_ONCE), kv_heads, call.tiles.len()], 128);
    let stored = if summaries.pool().scales().is_some() { "bytes" } else { "blocks" };
    let name = format!("score_{stored}_{}_{}", queries_of(store).name(), shape.head_dim());
    // SAFETY: the caller's.
    unsafe { kernels.launch_following(&name, spread, &params) }?;
    let of_tile = |address: u64, bytes: usize| if address == 0 { 0 } else { address + (first * kv_heads * bytes) as u64 };
    let params = SelectParams {
        scores: call.scores,
        pages: address(pages)?,
        kept: Kept::of(store)?,
        position: call.position,
        takes: call.takes,
        octets: of_tile(call.lists.octets, call.lists.most * 8),
        counts: of_tile(call.lists.counts, 4),
        picked: of_tile(call.picked, 4),
        blocks: of_tile(call.blocks, call.max_scores * 4),
        max_scores: call.max_scores as i32,
        max_pages: pages.dim(1)? as i32,
        max_octets: call.lists.most as i32,
        rows: 1,
        tokens: call.tokens as i32,
        window: limits.window as i32,
        block_size: limits.block_size as i32,
        tile: call.tile as i32,
        first_tile: first as i32,
    };
    // Blocks that the window has are no candidates.
    let candidates = call.max_scores.saturating_sub(limits.window / limits.block_size);
    let Some(each) = BLOCKS_OF_A_THREAD.iter().find(|each| **each * SELECT_THREADS >= candidates) else {
        bail!("cuda: {} blocks are more than can be selected from: {}", call.max_scores, MOST_BLOCKS_OF_A_THREAD * SELECT_THREADS);
    };
    let shared_bytes = select_bytes(call.max_scores, limits.block_size, store);
    let spread = Spread { grid: [kv_heads, call.tiles.len(), 1], threads: SELECT_THREADS, shared_bytes };
    let stem = if store.local().is_some() { "select_kept" } else { "select_blocks" };
    // SAFETY: the caller's.
    unsafe { kernels.launch_following(&format!("{stem}_{each}"), spread, &params) }
}

/// Room on the device for what one query's selection makes.
#[derive(Debug)]
pub struct SelectScratch {
    /// `[kv_heads, max_scores]`.
    pub scores: Tensor,
    /// `[kv_heads, most, 2]`.
    pub octets: Tensor,
    /// `[kv_heads]`.
    pub counts: Tensor,
    /// See [`most_scores`].
    pub max_scores: usize,
    /// Octets of a list.
    pub most: usize,
}

impl SelectScratch {
    /// For sequences of up to `len` positions.
    ///
    /// # Errors
    /// If the device has no memory for it.
    pub fn new(kv_heads: usize, len: usize, block_size: usize, device: &Device) -> Result<Self> {
        let (max_scores, most) = (most_scores(len, block_size), len.div_ceil(OCTET) + PAGE_SIZE / OCTET);
        Ok(Self {
            scores: Tensor::zeros((kv_heads, max_scores), DType::F32, device)?,
            octets: Tensor::zeros((kv_heads, most, 2), DType::U32, device)?,
            counts: Tensor::zeros(kv_heads, DType::U32, device)?,
            max_scores,
            most,
        })
    }
}
