//! The CPU backend: keys and values read in their own dtype, work spread over candle's thread pool.

mod item;
mod reads;
mod write;

use super::AttentionBackend;
use crate::cache::{LayerStore, Step};
use crate::parallel::{self, Unset};
use crate::select::Selection;
use crate::simd::{Rows, with_f32, with_rows};
use candle_core::{Device, Result, Tensor};
use item::{Partial, Scratch};
use reads::Reads;

/// Query positions of one work item in prefill; tiles are aligned to absolute positions.
const QUERY_TILE: usize = 32;

/// Steps up to this many queries also split the keys, or a single head would keep a single core busy.
const MAX_SPLIT_QUERIES: usize = 8;

/// Octets of keys of one split. The splits follow from what is read alone.
const SPLIT_OCTETS: usize = 64;

/// Attention on the CPU.
///
/// Work is cut into items (a key/value head, a tile of queries, some octets of keys). An item makes one pass
/// over its keys with a running softmax in f32; partial results are merged split by split, in order, whether one thread had all
/// splits or several had some: the result depends neither on the number of threads nor on that of queries.
#[derive(Debug, Clone, Copy, Default)]
pub struct Cpu;

impl AttentionBackend for Cpu {
    fn name(&self) -> &'static str {
        "cpu"
    }

    fn write(&self, k: &Tensor, v: &Tensor, step: Step, store: &mut LayerStore) -> Result<()> {
        store.check_step(k, v, step)?;
        write::write(k, v, step, store)
    }

    fn attend(&self, q: &Tensor, scale: f32, store: &LayerStore, step: Step, selection: &Selection) -> Result<Tensor> {
        store.check_queries(q, step)?;
        let out = with_f32(q, |q| with_rows(store.k(), |k| with_rows(store.v(), |v| attend(q, scale, [k, v], store, step, selection)))?)?;
        Tensor::from_vec(out, q.shape(), &Device::Cpu)
    }
}

/// `q` and the result: `[q_len, q_heads, head_dim]`.
fn attend(q: &[f32], scale: f32, kv: [Rows<'_>; 2], store: &LayerStore, step: Step, selection: &Selection) -> Vec<f32> {
    let shape = store.shape();
    let pieces = selection.pieces(step, QUERY_TILE);
    let keys = parallel::map(shape.kv_heads() * pieces.len(), |index| {
        let (head, queries) = (index / pieces.len(), &pieces[index % pieces.len()]);
        reads::octets(store, head, queries, &selection.ranges(queries.start, head, queries.end, store))
    });
    let most = if step.len <= MAX_SPLIT_QUERIES { SPLIT_OCTETS } else { usize::MAX };
    let mut items = Vec::with_capacity(keys.len());
    for (index, keys) in keys.iter().enumerate() {
        let (kv_head, queries) = (index / pieces.len(), &pieces[index % pieces.len()]);
        let split = keys.len() > most;
        items.extend(keys.chunks(most).map(|octets| {
            let reads = Reads { store, kv_head, queries: queries.clone(), octets };
            Item { reads, partial: split.then(|| Partial::new(queries.len() * shape.group_size(), shape.head_dim())) }
        }));
    }
    // Every query reads itself at least, so every piece has keys, and all of the list is written.
    let mut out = Unset::new(q.len());
    let places = out.places();
    parallel::for_each_long(&mut items, Scratch::default, |scratch, Item { reads, partial }| match partial {
        Some(partial) => item::attend(reads, q, scale, kv, step, scratch, partial),
        None => {
            // In the same splits, one after the other: sums are the same however a prompt was cut into steps.
            let (mut whole, mut next) = (std::mem::take(&mut scratch.whole), std::mem::take(&mut scratch.next));
            for (split, octets) in reads.octets.chunks(SPLIT_OCTETS).enumerate() {
                let part = Reads { store, kv_head: reads.kv_head, queries: reads.queries.clone(), octets };
                let partial = if split == 0 { &mut whole } else { &mut next };
                partial.reset(reads.queries.len() * shape.group_size(), shape.head_dim());
                item::attend(&part, q, scale, kv, step, scratch, partial);
                if split > 0 {
                    whole.merge(&next);
                }
            }
            whole.write(reads, step, &places);
            (scratch.whole, scratch.next) = (whole, next);
        }
    });
    // Splits of the same queries follow each other.
    for splits in items.chunk_by_mut(|a, b| a.reads.kv_head == b.reads.kv_head && a.reads.queries == b.reads.queries) {
        let Some((Item { reads, partial: Some(merged) }, others)) = splits.split_first_mut() else { continue };
        others.iter().filter_map(|other| other.partial.as_ref()).for_each(|other| merged.merge(other));
        merged.write(reads, step, &places);
    }
    // SAFETY: the pieces hold every query once, and every head had an item for each.
    unsafe { out.set() }
}

/// A piece of work.
struct Item<'a> {
    reads: Reads<'a>,
    /// Where its keys are some of its queries' only.
    partial: Option<Partial>,
}
