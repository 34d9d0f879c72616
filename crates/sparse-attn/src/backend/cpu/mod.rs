//! The CPU backend: keys and values read in their own dtype, work spread over candle's thread pool.

mod item;
mod reads;
mod write;

use super::AttentionBackend;
use crate::cache::{LayerStore, Step};
use crate::parallel;
use crate::select::Selection;
use crate::simd::{Rows, with_rows};
use candle_core::{DType, Device, Result, Storage, Tensor, bail};
use item::{Partial, Scratch};
use reads::{Reads, TileRef};
use std::ops::Range;

/// Query positions of one work item in prefill; tiles are aligned to absolute positions.
const QUERY_TILE: usize = 32;

/// Steps up to this many queries also split the keys, or a single head would keep a single core busy.
const MAX_SPLIT_QUERIES: usize = 8;

/// Key tiles of one split. The number of splits follows from what is read alone.
const SPLIT_TILES: usize = 32;

/// Attention on the CPU.
///
/// Work is cut into items (a key/value head, a tile of queries, some tiles of keys). An item makes one pass
/// over its keys with a running softmax in f32; where keys were split, partial results are merged in
/// the order of the splits, so the result does not depend on the number of threads.
#[derive(Debug, Clone, Copy, Default)]
pub struct Cpu;

/// The queries and keys of an item.
#[derive(Debug, Clone)]
struct Work {
    kv_head: usize,
    queries: Range<usize>,
    /// Of the step's list of key tiles.
    tiles: Range<usize>,
}

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
        let q = q.to_dtype(DType::F32)?.contiguous()?;
        let (q_storage, q_layout) = q.storage_and_layout();
        let Storage::Cpu(q_storage) = &*q_storage else { bail!("attend: the cpu backend got queries of another device") };
        let q_values = &q_storage.as_slice::<f32>()?[q_layout.start_offset()..][..q.elem_count()];
        let out = with_rows(store.k(), |k| with_rows(store.v(), |v| attend(q_values, scale, [k, v], store, step, selection)))??;
        Tensor::from_vec(out, q.shape(), &Device::Cpu)
    }
}

/// `q` and the result: `[q_len, q_heads, head_dim]`.
fn attend(q: &[f32], scale: f32, kv: [Rows<'_>; 2], store: &LayerStore, step: Step, selection: &Selection) -> Vec<f32> {
    let shape = store.shape();
    let mut out = vec![0f32; q.len()];
    let (items, tiles) = work(store, step, selection);
    let mut partials: Vec<Partial> =
        items.iter().map(|work| Partial::new(work.queries.len() * shape.group_size(), shape.head_dim())).collect();
    parallel::for_each_mut(&mut partials, Scratch::default, |scratch, index, partial| {
        let work = &items[index];
        let reads = Reads { store, kv_head: work.kv_head, queries: work.queries.clone(), tiles: &tiles[work.tiles.clone()] };
        item::attend(&reads, q, scale, kv, step, scratch, partial);
    });
    // Splits of the same queries follow each other.
    let mut at = 0;
    while at < items.len() {
        let work = &items[at];
        let splits = items[at..].iter().take_while(|other| other.kv_head == work.kv_head && other.queries == work.queries).count();
        let (merged, others) = partials[at..at + splits].split_at_mut(1);
        for other in others {
            merged[0].merge(other);
        }
        merged[0].write(work, step, shape, &mut out);
        at += splits;
    }
    out
}

/// All items of a step, splits of the same queries next to each other, and the key tiles that they read.
fn work(store: &LayerStore, step: Step, selection: &Selection) -> (Vec<Work>, Vec<TileRef>) {
    let (mut items, mut tiles) = (Vec::new(), Vec::new());
    let pieces = selection.pieces(step, QUERY_TILE);
    for kv_head in 0..store.shape().kv_heads() {
        for queries in &pieces {
            let from = tiles.len();
            reads::push_tiles(store, kv_head, queries, &selection.ranges(queries.start, kv_head, queries.end, store), &mut tiles);
            let most = if step.len <= MAX_SPLIT_QUERIES { SPLIT_TILES } else { usize::MAX };
            let mut start = from;
            while start < tiles.len() {
                let end = tiles.len().min(start.saturating_add(most));
                items.push(Work { kv_head, queries: queries.clone(), tiles: start..end });
                start = end;
            }
        }
    }
    (items, tiles)
}
