//! Which keys an item reads: tiles of slots, and which lanes of each a query sees.

use crate::cache::{LANES, LayerStore, PAGE_SIZE};
use std::ops::Range;

/// `position` of a tile of kept tokens: all are before every window.
const KEPT: usize = usize::MAX;

/// [`LANES`] neighbouring slots of one head.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct TileRef {
    /// Its number in the pools: the first slot divided by [`LANES`].
    pub(super) tile: u32,
    /// The lanes that are read.
    mask: u16,
    /// Position of the first lane; or [`KEPT`].
    position: usize,
}

/// The keys of an item.
#[derive(Debug)]
pub(super) struct Reads<'a> {
    pub(super) store: &'a LayerStore,
    pub(super) kv_head: usize,
    pub(super) queries: Range<usize>,
    pub(super) tiles: &'a [TileRef],
}

/// The lanes of `range`, of those from `first` on.
fn lanes(range: Range<usize>, first: usize) -> u16 {
    let clamp = |position: usize| position.saturating_sub(first).min(LANES);
    let (from, to) = (clamp(range.start), clamp(range.end));
    if from >= to { 0 } else { ((1u32 << to) - (1u32 << from)) as u16 }
}

/// Adds the tiles of `head` that hold positions of `ranges`, which ascend: kept ones, then recent ones. Those of which none of
/// `queries` sees a lane are left out: what is read, not how it was selected, then decides how sums are cut.
pub(super) fn push_tiles(store: &LayerStore, head: usize, queries: &Range<usize>, ranges: &[Range<usize>], tiles: &mut Vec<TileRef>) {
    let own = tiles.len();
    let mut push = |pages: &[u32], slots: Range<usize>, recent: bool| {
        let mut first = slots.start / LANES * LANES;
        while first < slots.end {
            let tile = pages[first / PAGE_SIZE] * (PAGE_SIZE / LANES) as u32 + (first % PAGE_SIZE / LANES) as u32;
            let mask = lanes(slots.clone(), first);
            match tiles[own..].last_mut() {
                // Two ranges may share a tile.
                Some(last) if last.tile == tile => last.mask |= mask,
                _ => tiles.push(TileRef { tile, mask, position: if recent { first } else { KEPT } }),
            }
            first += LANES;
        }
    };
    let frontier = if store.admitted(head).is_some() { store.frontier() } else { 0 };
    if let Some(admitted) = store.admitted(head) {
        for range in ranges.iter().filter(|range| range.start < frontier) {
            let slots = admitted.rank(range.start)..admitted.rank(range.end.min(frontier));
            push(store.table().kept(head), slots, false);
        }
    }
    for range in ranges.iter().filter(|range| range.end > frontier) {
        push(store.table().recent(head), range.start.max(frontier)..range.end, true);
    }
    if store.admitted(head).is_some() {
        let added = tiles.split_off(own);
        let reads = Reads { store, kv_head: head, queries: queries.clone(), tiles: &[] };
        tiles.extend(added.into_iter().filter(|tile| queries.clone().any(|t| reads.visible(*tile, t) != 0)));
    }
}

impl Reads<'_> {
    /// Whether all queries of the item see the same lanes of `tile`.
    pub(super) fn is_shared(&self, tile: TileRef) -> bool {
        self.queries.len() == 1
            || tile.position == KEPT
            || self.visible(tile, self.queries.start) == tile.mask && self.visible(tile, self.queries.end - 1) == tile.mask
    }

    /// The lanes of `tile` that the query at `t` sees.
    pub(super) fn visible(&self, tile: TileRef, t: usize) -> u16 {
        if tile.position == KEPT {
            return tile.mask;
        }
        let mask = tile.mask & lanes(self.store.first_visible(t)..t + 1, tile.position);
        match (self.store.admitted(self.kv_head), self.store.local_window()) {
            (Some(admitted), Some(window)) => {
                let in_window = lanes((t + 1).saturating_sub(window)..t + 1, tile.position);
                mask & (in_window | admitted.lanes(tile.position))
            }
            _ => mask,
        }
    }
}

impl TileRef {
    /// The slot in the pools of a lane.
    pub(super) fn slot(self, lane: usize) -> u32 {
        self.tile * LANES as u32 + lane as u32
    }
}
