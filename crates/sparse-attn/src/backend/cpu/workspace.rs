//! One step's work: what is read by whom, cut into items for the threads; and the buffers that are kept from step to step.

use super::item::{self, Partial, Scratch};
use crate::backend::reads::{OctetRef, Reads, set_octets};
use crate::cache::{LayerStore, Step};
use crate::parallel::{self, Places, Unset};
use crate::select::Selection;
use crate::simd::Rows;
use std::cell::{Cell, RefCell};
use std::ops::Range;

/// Query positions of one work item in prefill; tiles are aligned to absolute positions.
const QUERY_TILE: usize = 32;

/// Steps up to this many queries also split the keys, or a single head would keep a single core busy.
const MAX_SPLIT_QUERIES: usize = 8;

/// Octets of keys of one split. The splits follow from what is read alone.
const SPLIT_OCTETS: usize = 64;

thread_local! {
    /// Of the thread that asks for attention.
    static KEPT: Cell<Workspace> = Cell::default();
    /// Of each thread that computes.
    static SCRATCH: RefCell<Scratch> = RefCell::default();
}

/// The buffers of a step.
#[derive(Debug, Default)]
pub(super) struct Workspace {
    pieces: Vec<Range<usize>>,
    lists: Vec<List>, // [kv_heads, pieces], and what longer steps left
    items: Vec<Item>,
}

/// What the queries of a piece read of a head.
#[derive(Debug, Default)]
struct List {
    ranges: Vec<Range<usize>>,
    octets: Vec<OctetRef>,
    local_window: Option<usize>,
}

/// A piece of work.
#[derive(Debug, Default)]
struct Item {
    list: usize,
    octets: Range<usize>,
    /// Whether its keys are some of its queries' only: then what came of them is in `partial`.
    split: bool,
    partial: Partial,
}

/// What a step attends with.
#[derive(Clone, Copy)]
struct Input<'a> {
    q: &'a [f32], // [q_len, q_heads, head_dim]
    scale: f32,
    kv: [Rows<'a>; 2],
    store: &'a LayerStore,
    step: Step,
}

impl Workspace {
    /// `q` and the result: `[q_len, q_heads, head_dim]`.
    pub(super) fn attend(q: &[f32], scale: f32, kv: [Rows<'_>; 2], store: &LayerStore, step: Step, selection: &Selection) -> Vec<f32> {
        let mut workspace = KEPT.take();
        let out = workspace.run(Input { q, scale, kv, store, step }, selection);
        if step.len <= MAX_SPLIT_QUERIES {
            KEPT.set(workspace); // that of a long prompt is larger than what later steps need
        }
        out
    }

    fn run(&mut self, input: Input<'_>, selection: &Selection) -> Vec<f32> {
        let count = self.plan(input, selection);
        let (pieces, lists, items) = (&self.pieces, &self.lists, &mut self.items[..count]);
        let reads = |list: usize, octets: Range<usize>| Reads {
            store: input.store,
            kv_head: list / pieces.len(),
            queries: pieces[list % pieces.len()].clone(),
            local_window: lists[list].local_window,
            octets: &lists[list].octets[octets],
        };
        // Every query reads itself at least, so every piece has keys, and all of the list is written.
        let mut out = Unset::new(input.q.len());
        let places = out.places();
        parallel::for_each_long(
            items,
            || (),
            |(), item| {
                SCRATCH.with_borrow_mut(|scratch| match item.split {
                    true => attend(&reads(item.list, item.octets.clone()), input, scratch, &mut item.partial),
                    false => attend_whole(&reads(item.list, item.octets.clone()), input, scratch, &places),
                });
            },
        );
        // Splits of the same queries follow each other.
        for splits in items.chunk_by_mut(|a, b| a.list == b.list) {
            let Some((first, others)) = splits.split_first_mut().filter(|(first, _)| first.split) else { continue };
            others.iter().for_each(|other| first.partial.merge(&other.partial));
            first.partial.write(&reads(first.list, 0..0), input.step, &places);
        }
        // SAFETY: the pieces hold every query once, and every head had an item for each.
        unsafe { out.set() }
    }

    /// Fills in what is read, and the items; how many there are.
    fn plan(&mut self, input: Input<'_>, selection: &Selection) -> usize {
        let Input { store, step, .. } = input;
        let Self { pieces, lists, items } = self;
        pieces.clear();
        selection.each_piece(step, QUERY_TILE, store, |queries| pieces.push(queries));
        let wanted = store.shape().kv_heads() * pieces.len();
        if lists.len() < wanted {
            lists.resize_with(wanted, List::default);
        }
        parallel::for_each_mut(
            &mut lists[..wanted],
            || (),
            |(), index, List { ranges, octets, local_window }| {
                let (head, queries) = (index / pieces.len(), &pieces[index % pieces.len()]);
                selection.set_ranges(queries.start, head, queries.end, store, ranges);
                *local_window = selection.local_window(queries.start, store);
                set_octets(store, head, queries, *local_window, ranges, octets);
            },
        );
        let mut count = 0;
        for (list, List { octets, local_window, .. }) in lists[..wanted].iter().enumerate() {
            let mut push = |octets: Range<usize>, split: bool| {
                if count == items.len() {
                    items.push(Item::default());
                }
                let item = &mut items[count];
                (item.list, item.octets, item.split) = (list, octets, split);
                count += 1;
            };
            if step.len > MAX_SPLIT_QUERIES {
                push(0..octets.len(), false);
                continue;
            }
            let (kv_head, queries) = (list / pieces.len(), pieces[list % pieces.len()].clone());
            let reads = Reads { store, kv_head, queries, local_window: *local_window, octets };
            reads.parts(SPLIT_OCTETS).for_each(|part| push(part.clone(), part.len() < octets.len()));
        }
        count
    }
}

/// Starts `partial` anew with the keys of `reads`.
fn attend(reads: &Reads<'_>, input: Input<'_>, scratch: &mut Scratch, partial: &mut Partial) {
    let shape = input.store.shape();
    partial.reset(reads.queries.len() * shape.group_size(), shape.head_dim());
    item::attend(reads, input.q, input.scale, input.kv, input.step, scratch, partial);
}

/// All keys of some queries, in the same splits as where several threads have them, one after the other: sums are the same
/// however a prompt was cut into steps.
fn attend_whole(reads: &Reads<'_>, input: Input<'_>, scratch: &mut Scratch, out: &Places<f32>) {
    let (mut whole, mut next) = (std::mem::take(&mut scratch.whole), std::mem::take(&mut scratch.next));
    for (split, octets) in reads.parts(SPLIT_OCTETS).enumerate() {
        let partial = if split == 0 { &mut whole } else { &mut next };
        attend(&reads.some(octets), input, scratch, partial);
        if split > 0 {
            whole.merge(&next);
        }
    }
    whole.write(reads, input.step, out);
    (scratch.whole, scratch.next) = (whole, next);
}
