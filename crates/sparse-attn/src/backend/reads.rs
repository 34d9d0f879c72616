//! Which keys an item reads: octets of slots, and which lanes of each a query sees.

use crate::cache::{LANES, LayerStore, OCTET, PAGE_SIZE};
use std::ops::Range;

/// `position` of an octet of kept tokens: all are before every window.
const KEPT: usize = usize::MAX;

/// [`OCTET`] neighbouring slots of one head.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct OctetRef {
    /// Its number in the pools: the first slot divided by [`OCTET`].
    pub(super) octet: u32,
    /// The lanes that are read.
    mask: u8,
    /// Position of the first lane; or [`KEPT`].
    position: usize,
}

/// The keys of an item.
#[derive(Debug)]
pub(super) struct Reads<'a> {
    pub(super) store: &'a LayerStore,
    pub(super) kv_head: usize,
    pub(super) queries: Range<usize>,
    /// See [`crate::select::Selection::local_window`].
    pub(super) local_window: Option<usize>,
    pub(super) octets: &'a [OctetRef],
}

/// The lanes of `range`, of those from `first` on.
fn lanes(range: Range<usize>, first: usize) -> u8 {
    let clamp = |position: usize| position.saturating_sub(first).min(OCTET);
    let (from, to) = (clamp(range.start), clamp(range.end));
    if from >= to { 0 } else { ((1u32 << to) - (1u32 << from)) as u8 }
}

/// The octets of `head` that hold positions of `ranges`, which ascend: kept ones, then recent ones, in place of what was in
/// `octets`; `local_window`: as of [`Reads`]. Those of which none of `queries` sees a lane are left out: what is read, not how it was selected, then
/// decides how sums are cut.
pub(super) fn set_octets(
    store: &LayerStore,
    head: usize,
    queries: &Range<usize>,
    local_window: Option<usize>,
    ranges: &[Range<usize>],
    octets: &mut Vec<OctetRef>,
) {
    octets.clear();
    let mut push = |pages: &[u32], slots: Range<usize>, recent: bool| {
        let mut first = slots.start / OCTET * OCTET;
        while first < slots.end {
            let octet = pages[first / PAGE_SIZE] * (PAGE_SIZE / OCTET) as u32 + (first % PAGE_SIZE / OCTET) as u32;
            let mask = lanes(slots.clone(), first);
            match octets.last_mut() {
                // Two ranges may share an octet.
                Some(last) if last.octet == octet => last.mask |= mask,
                _ => octets.push(OctetRef { octet, mask, position: if recent { first } else { KEPT } }),
            }
            first += OCTET;
        }
    };
    let Some(admitted) = store.admitted(head) else {
        // Where a window slides, whole pairs of octets: a key's lane does not depend on where the window begins.
        let unit = if store.sliding_window().is_some() { LANES } else { 1 };
        ranges.iter().for_each(|range| push(store.table().recent(head), range.start / unit * unit..range.end, true));
        return;
    };
    let frontier = store.frontier();
    for range in ranges.iter().filter(|range| range.start < frontier) {
        let slots = admitted.rank(range.start)..admitted.rank(range.end.min(frontier));
        push(store.table().kept(head), slots, false);
    }
    for range in ranges.iter().filter(|range| range.end > frontier) {
        push(store.table().recent(head), range.start.max(frontier)..range.end, true);
    }
    let reads = Reads { store, kv_head: head, queries: queries.clone(), local_window, octets: &[] };
    octets.retain(|octet| queries.clone().any(|t| reads.visible(*octet, t) != 0));
}

impl Reads<'_> {
    /// The octets, `count` at a time. Where a window slides, they are cut at the same positions wherever it begins.
    pub(super) fn parts(&self, count: usize) -> impl Iterator<Item = Range<usize>> {
        let first = match self.octets.first() {
            Some(octet) if self.store.sliding_window().is_some() && octet.position != KEPT => octet.position / OCTET % count,
            _ => 0,
        };
        let all = self.octets.len();
        let starts = std::iter::once(0).chain((count - first..all).step_by(count));
        starts.map(move |start| start..all.min(start + if start == 0 { count - first } else { count }))
    }

    /// Some of the octets.
    pub(super) fn some(&self, octets: Range<usize>) -> Self {
        Self { queries: self.queries.clone(), octets: &self.octets[octets], ..*self }
    }

    /// Whether all queries of the item see the same lanes of `octet`.
    pub(super) fn is_shared(&self, octet: OctetRef) -> bool {
        self.queries.len() == 1
            || octet.position == KEPT
            || self.visible(octet, self.queries.start) == octet.mask && self.visible(octet, self.queries.end - 1) == octet.mask
    }

    /// The lanes of `octet` that the query at `t` sees.
    pub(super) fn visible(&self, octet: OctetRef, t: usize) -> u8 {
        if octet.position == KEPT {
            return octet.mask;
        }
        let mask = octet.mask & lanes(self.store.first_visible(t)..t + 1, octet.position);
        match (self.store.admitted(self.kv_head), self.local_window) {
            (Some(admitted), Some(window)) => {
                let in_window = lanes((t + 1).saturating_sub(window)..t + 1, octet.position);
                mask & (in_window | admitted.octet(octet.position))
            }
            _ => mask,
        }
    }
}

impl OctetRef {
    /// The slot in the pools of the first lane.
    pub(super) fn first_slot(self) -> u32 {
        self.octet * OCTET as u32
    }

    /// As kernels read it, see `Octet` of kernels/params.h. The lanes of a recent octet are those of admitted tokens; all of the
    /// window are read anyway.
    #[cfg_attr(not(feature = "cuda"), expect(dead_code, reason = "for the CUDA backend"))]
    pub(super) fn on_device(self, store: &LayerStore, kv_head: usize) -> [u32; 2] {
        let (mask, position) = match self.position {
            KEPT => (self.mask, u32::MAX),
            position => (self.mask & store.admitted(kv_head).map_or(u8::MAX, |admitted| admitted.octet(position)), position as u32),
        };
        [self.octet << 8 | u32::from(mask), position]
    }
}
