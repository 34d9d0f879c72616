//! The CPU backend: keys and values read in their own dtype, work spread over candle's thread pool.

mod element;
mod softmax;
mod tile;
mod write;

use super::AttentionBackend;
use crate::cache::{LayerStore, Step};
use crate::select::Selection;
use crate::token_router::Admission;
use candle_core::{CpuStorage, DType, Device, Result, Storage, Tensor, bail};
use element::Element;
use tile::{Partial, Scratch, Work};

/// Query positions of one work item in prefill; tiles are aligned to absolute positions.
const QUERY_TILE: usize = 32;

/// Steps up to this many queries also split the keys, or a single head would keep a single core busy.
const MAX_SPLIT_QUERIES: usize = 8;

/// Keys of one split. The number of splits follows from the visible length alone.
const SPLIT_KEYS: usize = 512;

/// Attention on the CPU.
///
/// Work is cut into items (a key/value head, a tile of queries, a range of keys). An item makes one pass
/// over its keys with a running softmax in f32; where keys were split, partial results are merged in
/// the order of the splits, so the result does not depend on the number of threads.
#[derive(Debug, Clone, Copy, Default)]
pub struct Cpu;

impl AttentionBackend for Cpu {
    fn name(&self) -> &'static str {
        "cpu"
    }

    fn write(&self, k: &Tensor, v: &Tensor, admission: &Admission, step: Step, store: &mut LayerStore) -> Result<()> {
        let Admission::Every = admission;
        store.check_step(k, v, step)?;
        write::write(store.k_pages(), k, step, store.table())?;
        write::write(store.v_pages(), v, step, store.table())
    }

    fn attend(&self, q: &Tensor, scale: f32, store: &LayerStore, step: Step, selection: &Selection) -> Result<Tensor> {
        store.check_queries(q, step)?;
        let q = q.to_dtype(DType::F32)?.contiguous()?;
        let (q_storage, q_layout) = q.storage_and_layout();
        let (k_storage, _) = store.k_pages().storage_and_layout();
        let (v_storage, _) = store.v_pages().storage_and_layout();
        let (Storage::Cpu(q_storage), Storage::Cpu(k), Storage::Cpu(v)) = (&*q_storage, &*k_storage, &*v_storage) else {
            bail!("attend: the cpu backend got tensors of another device");
        };
        let q_values = &q_storage.as_slice::<f32>()?[q_layout.start_offset()..][..q.elem_count()];
        let out = match (k, v) {
            (CpuStorage::F32(k), CpuStorage::F32(v)) => attend(q_values, scale, k, v, store, step, selection),
            (CpuStorage::F16(k), CpuStorage::F16(v)) => attend(q_values, scale, k, v, store, step, selection),
            (CpuStorage::BF16(k), CpuStorage::BF16(v)) => attend(q_values, scale, k, v, store, step, selection),
            _ => bail!("attend: keys and values stored as {:?} have no cpu kernel", store.k_pages().dtype()),
        };
        Tensor::from_vec(out, q.shape(), &Device::Cpu)
    }
}

/// `q` and the result: `[q_len, q_heads, head_dim]`.
fn attend<T: Element>(
    q: &[f32],
    scale: f32,
    k_pages: &[T],
    v_pages: &[T],
    store: &LayerStore,
    step: Step,
    selection: &Selection,
) -> Vec<f32> {
    let shape = store.shape();
    let mut out = vec![0f32; q.len()];
    let items = work_items(store, step, selection);
    let mut partials: Vec<Partial> =
        items.iter().map(|work| Partial::new(work.queries.len() * shape.group_size(), shape.head_dim())).collect();
    {
        let partials = Slots(partials.as_mut_ptr());
        candle_core::utils::barrier_pool().execute_chunked(items.len(), |range| {
            let mut scratch = Scratch::default();
            for index in range {
                // SAFETY: execute_chunked hands out every index of 0..items.len() exactly once, partials has as
                // many members, and it is not touched otherwise until execute_chunked returns.
                let partial = unsafe { &mut *partials.slot(index) };
                tile::attend(&items[index], q, scale, k_pages, v_pages, store, step, &mut scratch, partial);
            }
        });
    }
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

/// All items of a step, splits of the same queries next to each other.
fn work_items(store: &LayerStore, step: Step, selection: &Selection) -> Vec<Work> {
    let mut items = Vec::new();
    for kv_head in 0..store.shape().kv_heads() {
        let mut t = step.start;
        while t < step.end() {
            let queries = t..step.end().min((t / QUERY_TILE + 1) * QUERY_TILE);
            let ranges = match selection {
                Selection::Every => vec![store.first_visible(t)..queries.end],
                Selection::Blocks(blocks) => blocks.ranges(t, kv_head, queries.end),
            };
            let splits = if step.len <= MAX_SPLIT_QUERIES { tile::cut(&ranges, SPLIT_KEYS) } else { vec![ranges] };
            items.extend(splits.into_iter().map(|keys| Work { kv_head, queries: queries.clone(), keys }));
            t = queries.end;
        }
    }
    items
}

/// A pointer to slots that threads fill, each its own.
struct Slots(*mut Partial);

impl Slots {
    fn slot(&self, index: usize) -> *mut Partial {
        self.0.wrapping_add(index)
    }
}

// SAFETY: the one user above hands every slot to one thread only.
unsafe impl Sync for Slots {}
