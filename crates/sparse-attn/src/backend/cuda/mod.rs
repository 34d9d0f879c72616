//! The CUDA backend: keys and values of 16 or 8 bits in device memory, kernels of kernels/cuda.

mod decode;
mod gate;
mod kernels;
mod lists;
mod mark;
mod params;
mod pinned;
mod rows;
mod select;

pub use decode::{DecodeCall, DecodeLists, DecodeScratch, decode};
pub use gate::gate_layer;
pub(crate) use gate::{Told, Verdict, decide, note_verdicts, tell};
pub use kernels::{Kernels, Spread, address, by_tokens};
pub(crate) use mark::Mark;
pub use pinned::Pinned;
pub use rows::scales_of;
pub(crate) use rows::{Compacted, Summarised, compact, scatter_rows, summarise};
use rows::{in_halves, transformed};
pub use select::{Budgeted, SelectCall, SelectScratch, kind_of, score_and_select};

use super::{AttentionBackend, Routed, RoutedJob};
use crate::HeadShape;
use crate::attention::Products;
use crate::cache::{KvDtype, KvDtypes, LayerStore, Pool, Step, Summary};
use crate::place::{Destination, Place};
use crate::select::Selection;
use candle_core::cuda_backend::WrapErr;
use candle_core::cuda_backend::cudarc::driver::result;
use candle_core::{DType, Device, Result, Tensor, bail};
use lists::Lists;
use params::{Kept, PrefillParams};
use std::sync::Arc;

/// Rows (a query and a head of its group) of a thread block of prefill.
const ROWS: usize = 128;

/// Queries that share a selection, at the most, unless asked for more: a thread block would take twice as many, but the best blocks of 32
/// cost twice the perplexity of those of 16 (SmolLM2, 8192 tokens: KL .0156, .0106, .0096, .0080 for 32, 16, 8, 4).
const SHARED_BY: usize = 16;

/// Prompts up to about this length are as fast dense: finding what is kept costs as much as it saves (small models, H100).
const TOKEN_DENSE_LEN: usize = 2048;

/// Keys and values that a GPU has near: a good part of the L2 cache of those that these kernels are for.
const NEAR_BYTES: usize = 32 << 20;

/// Attention on an NVIDIA GPU.
///
/// One query: the keys are split over the device, and the parts merged in order. Many: tiles of queries on the tensor cores. Blocks are
/// scored and selected on the device, too, for the routers that have kernels ([`Budgeted`]).
#[derive(Debug)]
pub struct Cuda {
    kernels: Arc<Kernels>,
    /// Whether its multiprocessors have products of whole warpgroups.
    has_wgmma: bool,
}

impl Cuda {
    /// The backend on `device`.
    ///
    /// # Errors
    /// If it is no CUDA device, or one that none of the code in this build runs on.
    pub fn new(device: &Device) -> Result<Self> {
        let kernels = Kernels::of(device)?;
        let has_wgmma = kernels.has("attend_prefill_wgmma_f16_64");
        Ok(Self { kernels, has_wgmma })
    }

    /// Attention over lists of octets that are on the device, or over everything; of several queries as f32 or bf16.
    fn attend_lists(
        &self,
        q: &Tensor,
        scale: f32,
        store: &LayerStore,
        step: Step,
        lists: Option<&Lists>,
        to: Destination<'_>,
    ) -> Result<Tensor> {
        let shape = store.shape();
        check_store(store)?;
        let q = q.to_dtype(queries_of(store).tensor_dtype())?.contiguous()?; // [tokens, q_heads, head_dim]
        let out_shape = (step.len, shape.q_heads(), shape.head_dim());
        if step.len == 1 {
            let out = to.place.take(out_shape, DType::F32, q.device())?;
            let position = Tensor::new(&[step.start as u32], q.device())?;
            let scratch = DecodeScratch::new(&self.kernels, store, q.device())?;
            let call = DecodeCall {
                q: address(&q)?,
                position: address(&position)?,
                lists: lists.map(Lists::of_decode).transpose()?,
                out: address(&out)?,
                out_q8: 0,
                scale,
            };
            // SAFETY: the tensors are of these shapes, and live until the stream frees them after the kernel.
            unsafe { decode(&self.kernels, call, &scratch, store) }?;
            return Ok(out);
        }
        let tile = lists.map_or_else(|| self.queries_at_once(store, step), |lists| lists.tile);
        let pages = store.device_pages()?;
        // Whether the token router hides anything from these queries.
        let local = store.local().filter(|local| lists.is_some() || step.end() > local.hides_from());
        // Queries that see all are in tiles of their own.
        let dense = step.split_at(local.map_or(0, |local| local.dense_len)).0.len;
        let dense_tiles = dense.div_ceil(tile);
        let (firsts, tiles) = match lists {
            Some(lists) => (Some(&lists.firsts), lists.pieces),
            None => (None, dense_tiles + (step.len - dense).div_ceil(tile)),
        };
        // Widening all is little beside what many queries read of it.
        let (k, v) = (in_halves(store.k())?, in_halves(store.v())?);
        let q = if store.k().is_transformed() { transformed(&q)? } else { q };
        // The longest tiles of all heads first leave the least to wait for at the end. Of long sequences a head's keys are to be near while they are read.
        let bytes = step.end() * shape.kv_heads() * shape.head_dim() * 2 * size_of::<u16>();
        let by_turns = lists.is_none() && bytes <= NEAR_BYTES;
        let is_rounded = to.dtype == DType::BF16;
        let out = to.place.take(out_shape, if is_rounded { DType::BF16 } else { DType::F32 }, q.device())?;
        let params = PrefillParams {
            q: address(&q)?,
            k: address(&k)?,
            v: address(&v)?,
            pages: address(pages)?,
            kept: local.map_or(Ok(Kept::default()), |_| Kept::of(store))?,
            octets: lists.map_or(Ok(0), |lists| address(&lists.octets))?,
            counts: lists.map_or(Ok(0), |lists| address(&lists.counts))?,
            firsts: firsts.map_or(Ok(0), address)?,
            lists: lists.map_or(Ok(0), |lists| address(&lists.of_pieces))?,
            windows: lists.and_then(|lists| lists.windows.on_device.as_ref()).map_or(Ok(0), address)?,
            out: address(&out)?,
            max_pages: pages.dim(1)? as i32,
            max_octets: lists.map_or(0, |lists| lists.most) as i32,
            frontier: store.frontier() as i32,
            start: step.start as i32,
            tokens: step.len as i32,
            tile: tile as i32,
            kv_heads: shape.kv_heads() as i32,
            group_size: shape.group_size() as i32,
            sliding_window: store.sliding_window().unwrap_or(0) as i32,
            is_rounded: i32::from(is_rounded),
            by_turns: i32::from(by_turns),
            local_window: local.map_or(0, |local| local.window) as i32,
            dense: dense as i32,
            dense_tiles: dense_tiles as i32,
            scale,
        };
        let (name, threads, shared_bytes) = self.prefill_kernel(store, tile * shape.group_size(), lists.is_some(), local.is_some());
        let grid = if by_turns { [shape.kv_heads(), tiles, 1] } else { [tiles, shape.kv_heads(), 1] };
        let spread = Spread { grid, threads, shared_bytes };
        // SAFETY: the tensors are of these shapes, and live until the stream frees them after the kernel.
        unsafe { self.kernels.launch_following(&name, spread, &params) }?;
        Ok(out)
    }

    /// Queries of a thread block where each reads all that it sees: as many as it has rows for, or half as many, with two halves of the keys at the same
    /// time, where more thread blocks are done sooner.
    fn queries_at_once(&self, store: &LayerStore, step: Step) -> usize {
        let shape = store.shape();
        let (whole, half) = (ROWS / shape.group_size(), ROWS / 2 / shape.group_size());
        if !self.goes_by_warpgroups(shape) || half == 0 {
            return whole;
        }
        // The longest thread blocks begin first: all is done no sooner than one of them, nor than what each multiprocessor has of all.
        let seen = |tokens: usize| store.sliding_window().map_or(tokens, |window| tokens.min(window));
        let (longest, mean) = (seen(step.end()), (seen(step.start) + seen(step.end())) / 2);
        let keys = |queries: usize| {
            let blocks = step.len.div_ceil(queries) * shape.kv_heads();
            longest.max(blocks.div_ceil(self.kernels.multiprocessors()) * mean)
        };
        // Halved, 128 keys take 16/19 of the time (head_dim 64, H100).
        if 16 * keys(half) < 19 * keys(whole) { half } else { whole }
    }

    fn goes_by_warpgroups(&self, shape: HeadShape) -> bool {
        self.has_wgmma && shape.head_dim() <= 128
    }

    /// The kernel for tiles of up to `rows` rows, by lists or where a token router hides something, its threads, and the shared memory that it takes.
    fn prefill_kernel(&self, store: &LayerStore, rows: usize, is_listed: bool, hides: bool) -> (String, usize, usize) {
        let head_dim = store.shape().head_dim();
        let halves = if 2 * rows <= ROWS { "_halves" } else { "" };
        let kind = match (is_listed, hides) {
            (true, _) => "_listed",
            (false, true) => "_kept",
            (false, false) => "",
        };
        if self.goes_by_warpgroups(store.shape()) {
            let name = format!("attend_prefill_wgmma{halves}{kind}_{}_{head_dim}", queries_of(store).name());
            // The queries, three stages of keys and of values, in tiles of 128 rows; and room to align them.
            return (name, 384, 7 * ROWS * head_dim * size_of::<u16>() + 1024);
        }
        // Two stages of keys and of values.
        let keys = if head_dim > 128 { 32 } else { 64 };
        (format!("attend_prefill_{}_{head_dim}", queries_of(store).name()), 256, 2 * 2 * keys * head_dim * size_of::<u16>())
    }
}

impl AttentionBackend for Cuda {
    fn name(&self) -> &'static str {
        "cuda"
    }

    fn write(&self, k: &Tensor, v: &Tensor, step: Step, store: &mut LayerStore) -> Result<()> {
        store.check_step(k, v, step)?;
        with_verdict(step, store, |store, verdict| rows::store_step(k, v, step, store, verdict))
    }

    fn takes_products(&self) -> bool {
        true
    }

    fn write_products(&self, products: &Products<'_>, step: Step, store: &mut LayerStore, place: &mut Place) -> Result<Tensor> {
        with_verdict(step, store, |store, verdict| rows::store_products(products, step, store, verdict, place))
    }

    fn only_launches(&self, store: &LayerStore) -> bool {
        // What is stored in bytes is widened to memory of its own.
        [store.k(), store.v()].iter().all(|pool| pool.scales().is_none())
    }

    fn attend(&self, q: &Tensor, scale: f32, store: &LayerStore, step: Step, selection: &Selection) -> Result<Tensor> {
        self.attend_to(q, scale, store, step, selection, Destination { dtype: DType::F32, place: &mut Place::default() })
    }

    fn attend_to(
        &self,
        q: &Tensor,
        scale: f32,
        store: &LayerStore,
        step: Step,
        selection: &Selection,
        to: Destination<'_>,
    ) -> Result<Tensor> {
        store.check_queries(q, step)?;
        // Where everything is read, the kernels go by the page tables.
        let lists = match selection {
            Selection::Every => None,
            Selection::Blocks(_) => Some(Lists::of_selection(selection, store, step, queries_of_a_tile(store.shape().group_size()))?),
        };
        self.attend_lists(q, scale, store, step, lists.as_ref(), to)
    }

    fn supports(&self, shape: HeadShape, dtypes: KvDtypes) -> Result<()> {
        check(shape, dtypes)
    }

    fn attend_routed(&self, job: &RoutedJob<'_>) -> Result<Option<Routed>> {
        let RoutedJob { q, scale, store, step, limits, router, wants_selection, dtype } = *job;
        let Some(call) = Budgeted::new(router, limits, store, step) else { return Ok(None) };
        store.check_queries(q, step)?;
        check_store(store)?;
        let rounded = q.to_dtype(queries_of(store).tensor_dtype())?.contiguous()?;
        let selected = call.select_step(&self.kernels, &rounded, store, wants_selection)?;
        let to = Destination { dtype, place: &mut Place::default() };
        let out = self.attend_lists(&rounded, scale, store, step, Some(&selected.lists), to)?;
        let selection = if wants_selection { Some(call.read_back(&selected)?) } else { None };
        let picked = selected.picked.as_ref().map(|picked| picked.flatten_all()?.to_vec1::<u32>()).transpose()?;
        Ok(Some(Routed { out, selection, count: call.count(store, &picked.unwrap_or_default()) }))
    }

    fn dtype_of_queries(&self, store: &LayerStore) -> DType {
        queries_of(store).tensor_dtype()
    }

    fn preferred_tile(&self, group_size: usize) -> usize {
        queries_of_a_tile(group_size).min(SHARED_BY)
    }

    fn preferred_token_dense_len(&self) -> usize {
        TOKEN_DENSE_LEN
    }

    fn preferred_token_dense_prompt(&self, shape: HeadShape) -> usize {
        if !self.goes_by_warpgroups(shape) {
            return 0;
        }
        // Up to two thread blocks for each multiprocessor the longest one decides when all are done, which spares little: most layers have a head that keeps
        // nearly everything.
        2 * self.kernels.multiprocessors() / shape.kv_heads() * (ROWS / shape.group_size())
    }

    fn selection_bytes(&self) -> usize {
        // Two kernels of about 5 us each, at 2.4 TB/s (H100).
        24 << 20
    }
}

/// What `write` does to a store that is ready for it, with the verdict that is to be made meanwhile.
fn with_verdict<T>(step: Step, store: &mut LayerStore, write: impl FnOnce(&LayerStore, Option<Verdict<'_>>) -> Result<T>) -> Result<T> {
    check_store(store)?;
    store.apply_moves()?;
    let asked = store.take_asked();
    write(store, asked.as_ref().and_then(|asked| store.verdict(step, asked)))
}

/// Most queries that a thread block of prefill takes: a power of two, so that tiles of selections and these are cut alike.
fn queries_of_a_tile(group_size: usize) -> usize {
    let most = (ROWS / group_size).max(1);
    if most.is_power_of_two() { most } else { most.next_power_of_two() / 2 }
}

/// Memory that a kernel fills.
pub fn uninitialised(shape: impl Into<candle_core::Shape>, dtype: DType, device: &Device) -> Result<Tensor> {
    // SAFETY: the callers launch a kernel that writes every number before anything reads one.
    unsafe { Tensor::empty(shape, dtype, device) }
}

/// Puts `numbers` into the first places of `to`, contiguous u32, in the order of its device's stream.
///
/// # Errors
/// If `to` is no such tensor or has fewer places, or its device fails.
pub(crate) fn put_numbers(numbers: &[u32], to: &Tensor) -> Result<()> {
    if to.dtype() != DType::U32 || to.elem_count() < numbers.len() {
        bail!("cuda: {} numbers u32 go to {:?} {:?}", numbers.len(), to.shape(), to.dtype());
    }
    let (at, kernels) = (address(to)?, Kernels::of(to.device())?);
    let stream = kernels.stream();
    stream.context().bind_to_thread().w()?;
    // SAFETY: there is room for so many, and of memory that is not page-locked the driver has a copy when it returns.
    unsafe { result::memcpy_htod_async(at, numbers, stream.cu_stream()) }.w()
}

/// A kernel's name for keys of this storage.
fn kernel(stem: &str, pool: &Pool, head_dim: usize) -> String {
    format!("{stem}_{}_{head_dim}", pool.dtype().name())
}

/// How queries come that read these keys, and block summaries of 16 bits.
pub fn queries_of(store: &LayerStore) -> KvDtype {
    match store.k().dtype() {
        KvDtype::Q8_0 => KvDtype::F16,
        other => other,
    }
}

/// Whether there are kernels for these keys, values and heads.
fn check(shape: HeadShape, KvDtypes { k, v }: KvDtypes) -> Result<()> {
    if k != v || k == KvDtype::F32 {
        bail!("cuda: keys are {} and values {}, there are kernels where both are f16, both bf16 or both q8_0", k.name(), v.name());
    }
    if !matches!(shape.head_dim(), 64 | 128 | 256) {
        bail!("cuda: head_dim is {}, there are kernels for 64, 128 and 256", shape.head_dim());
    }
    if shape.group_size() > ROWS {
        bail!("cuda: {} query heads share a key/value head, there are kernels for up to {ROWS}", shape.group_size());
    }
    Ok(())
}

/// [`check`] of a layer.
fn check_store(store: &LayerStore) -> Result<()> {
    check(store.shape(), KvDtypes { k: store.k().dtype(), v: store.v().dtype() })
}

/// The kernels' number for a summary.
pub(crate) fn summary_code(kind: Summary) -> i32 {
    match kind {
        Summary::None | Summary::Mean => 0,
        Summary::MaxMin => 1,
        Summary::MeanDeviation => 2,
    }
}
