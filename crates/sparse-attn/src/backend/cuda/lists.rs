//! Lists of octets on the device: what each tile of queries reads.

use super::{DecodeLists, address};
use crate::backend::reads::set_octets;
use crate::cache::{LayerStore, Step};
use crate::parallel;
use crate::select::Selection;
use candle_core::{Device, Result, Tensor};

/// The lists of a step.
#[derive(Debug)]
pub(super) struct Lists {
    pub(super) octets: Tensor,    // [lists, kv_heads, most, 2] u32
    pub(super) counts: Tensor,    // [lists, kv_heads] u32
    pub(super) firsts: Tensor,    // [pieces + 1] u32: first query of each piece
    pub(super) of_pieces: Tensor, // [pieces] u32: its list
    pub(super) pieces: usize,
    pub(super) tile: usize, // most queries of a piece
    pub(super) most: usize,
    pub(super) windows: Windows,
}

/// The newest positions of which queries see what a token router drops, for each list.
#[derive(Debug)]
pub(super) struct Windows {
    pub(super) on_device: Option<Tensor>, // [lists] u32; `None`: nothing is dropped
    pub(super) first: usize,              // that of the first list; 0: nothing is dropped
}

impl Windows {
    pub(super) fn new(windows: impl Iterator<Item = Option<usize>>, device: &Device) -> Result<Self> {
        let windows = windows.map(|window| window.map(|window| window as u32)).collect::<Option<Vec<u32>>>();
        let first = windows.iter().flatten().next().map_or(0, |window| *window as usize);
        Ok(Self { on_device: windows.map(|windows| Tensor::new(windows, device)).transpose()?, first })
    }
}

impl Lists {
    /// What a selection lets the queries of a step read, in pieces of at most `most` queries. Made on the host.
    pub(super) fn of_selection(selection: &Selection, store: &LayerStore, step: Step, most: usize) -> Result<Self> {
        let mut pieces = Vec::new();
        selection.each_piece(step, most, store, |queries| pieces.push(queries));
        let kv_heads = store.shape().kv_heads();
        let windows: Vec<Option<usize>> = pieces.iter().map(|queries| selection.local_window(queries.start, store)).collect();
        let lists = parallel::map(pieces.len() * kv_heads, |index| {
            let (piece, head) = (index / kv_heads, index % kv_heads);
            let queries = &pieces[piece];
            let (mut ranges, mut octets) = (Vec::new(), Vec::new());
            selection.set_ranges(queries.start, head, queries.end, store, &mut ranges);
            set_octets(store, head, queries, windows[piece], &ranges, &mut octets);
            octets.into_iter().flat_map(|octet| octet.on_device(store, head)).collect::<Vec<u32>>()
        });
        let longest = lists.iter().map(Vec::len).max().unwrap_or(0);
        let counts: Vec<u32> = lists.iter().map(|list| list.len() as u32 / 2).collect();
        let mut octets = vec![0u32; lists.len() * longest];
        for (row, list) in octets.chunks_exact_mut(longest.max(1)).zip(&lists) {
            row[..list.len()].copy_from_slice(list);
        }
        let device = store.k().values().device();
        let firsts: Vec<u32> =
            pieces.iter().map(|queries| queries.start - step.start).chain([step.len]).map(|query| query as u32).collect();
        let of_pieces: Vec<u32> = (0..pieces.len() as u32).collect();
        let tile = match selection {
            Selection::Every => most,
            Selection::Blocks(blocks) => blocks.limits().tile.min(most),
        };
        Ok(Self {
            octets: Tensor::from_vec(octets, (pieces.len(), kv_heads, longest / 2, 2), device)?,
            counts: Tensor::from_vec(counts, (pieces.len(), kv_heads), device)?,
            firsts: Tensor::new(firsts, device)?,
            of_pieces: Tensor::new(of_pieces, device)?,
            pieces: pieces.len(),
            tile,
            most: longest / 2,
            windows: Windows::new(windows.into_iter(), device)?,
        })
    }

    /// The lists of a step of one query.
    pub(super) fn of_decode(&self) -> Result<DecodeLists> {
        Ok(DecodeLists {
            octets: address(&self.octets)?,
            counts: address(&self.counts)?,
            most: self.most,
            local_window: self.windows.first,
        })
    }
}
