//! Rows in pools: written, moved, summarised.

use super::params::{
    CompactParams, CompactedLayer, Kept, ScatterParams, StoreGatedParams, StoreParams, StoreProjectedParams, SummariesParams,
    SummaryParams, TransformParams, WidenParams,
};
use super::{Kernels, Spread, Verdict, address, by_tokens, gate, queries_of, summary_code, uninitialised};
use crate::attention::Products;
use crate::cache::{KvDtype, LayerStore, Layout, Pool, Step, Summaries};
use crate::place::Place;
use candle_core::{DType, Result, Tensor, bail};
use std::ops::Range;

fn name(stem: &str, pool: &Pool) -> Result<String> {
    match pool.dtype() {
        dtype @ (KvDtype::F16 | KvDtype::Bf16 | KvDtype::Q8_0) => Ok(format!("{stem}_{}", dtype.name())),
        other @ KvDtype::F32 => Err(no_kernels(other)),
    }
}

/// Kernels that store steps: alone, beside verdicts of a gate of one layer or two by products that are there, and of a layer of one by f32 or bf16.
struct StoreKernels {
    alone: &'static str,
    projected: [&'static str; 2],
    gate: [&'static str; 2],
}

macro_rules! store_kernels {
    ($dtype:literal) => {
        StoreKernels {
            alone: concat!("store_step_", $dtype),
            projected: [concat!("store_step_", $dtype, "_projected_1"), concat!("store_step_", $dtype, "_projected_2")],
            gate: [concat!("store_step_", $dtype, "_gate_f32"), concat!("store_step_", $dtype, "_gate_bf16")],
        }
    };
}

impl StoreKernels {
    fn of(pool: &Pool) -> Result<Self> {
        Ok(match pool.dtype() {
            KvDtype::F16 => store_kernels!("f16"),
            KvDtype::Bf16 => store_kernels!("bf16"),
            KvDtype::Q8_0 => store_kernels!("q8_0"),
            KvDtype::F32 => return Err(no_kernels(KvDtype::F32)),
        })
    }
}

fn no_kernels(dtype: KvDtype) -> candle_core::Error {
    candle_core::Error::Msg(format!("cuda: there are no kernels for keys and values in {}, only in f16, bf16 and q8_0", dtype.name()))
}

/// Where the scales of a pool are; 0: it has none.
pub fn scales_of(pool: &Pool) -> Result<u64> {
    pool.scales().map_or(Ok(0), address)
}

/// Threads of a thread block that stores rows, and most such thread blocks of a multiprocessor.
const STORED: usize = 256;
const STORING: usize = 8;

/// Words that are copied by a thread block at a time.
const COPIED: usize = 256;

/// Layers that are compacted by a launch, and those of which blocks are summarised.
const COMPACTED: usize = 16;
const SUMMARISED: usize = 32;

/// Numbers that are widened by a thread block.
const WIDENED: usize = 16 * 256;

/// The rows of a pool in 16 bits, `[pages, PAGE_SIZE, width]`, for kernels that read no others: those of bytes, or the pool's own.
pub(super) fn in_halves(pool: &Pool) -> Result<Tensor> {
    let Some(scales) = pool.scales() else { return Ok(pool.values().clone()) };
    let out = uninitialised(pool.values().shape(), DType::F16, pool.values().device())?;
    let count = out.elem_count();
    let params = WidenParams { values: address(pool.values())?, scales: address(scales)?, out: address(&out)?, count: count as i64 };
    let kernels = Kernels::of(pool.values().device())?;
    // SAFETY: all have `count` numbers, or a scale for each 32, and live until the stream frees them.
    unsafe { kernels.launch("widen_bytes", Spread::new([count.div_ceil(WIDENED), 1, 1], 256), &params) }?;
    Ok(out)
}

/// The Hadamard transform of `q` `[tokens, q_heads, head_dim]`, f16, by groups of neighbours.
pub(super) fn transformed(q: &Tensor) -> Result<Tensor> {
    let out = uninitialised(q.shape(), DType::F16, q.device())?;
    let count = out.elem_count();
    let params = TransformParams { x: address(q)?, out: address(&out)?, count: count as i64 };
    // SAFETY: both have `count` numbers, and live until the stream frees them.
    unsafe { Kernels::of(q.device())?.launch("transform_f16", Spread::new([count.div_ceil(256), 1, 1], 256), &params) }?;
    Ok(out)
}

/// Stores `k` and `v` `[step.len, kv_heads, head_dim]` in the places that the page table gives them, and makes a verdict on them.
pub(super) fn store_step(k: &Tensor, v: &Tensor, step: Step, store: &LayerStore, verdict: Option<Verdict<'_>>) -> Result<()> {
    let rows = |rows: &Tensor| by_fours(&rows.to_dtype(DType::F32)?);
    let ((_k, k_rows, k_apart), (_v, v_rows, v_apart)) = (rows(k)?, rows(v)?);
    let params = StoreParams { rows: [0, k_rows, v_rows], apart: [0, k_apart as i32, v_apart as i32], ..StoreParams::default() };
    launch_store(params, step, store, verdict)
}

/// Makes queries, keys and values of `products`, stores as [`store_step`] does, and returns the queries, `[step.len, q_heads, head_dim]`, in `place`.
pub(super) fn store_products(
    products: &Products<'_>,
    step: Step,
    store: &LayerStore,
    verdict: Option<Verdict<'_>>,
    place: &mut Place,
) -> Result<Tensor> {
    let Products { q, k, v, biases, norms, angles: [cos, sin] } = *products;
    let shape = store.shape();
    let (q_heads, kv_heads, head_dim) = (shape.q_heads(), shape.kv_heads(), shape.head_dim());
    let heads = [q_heads, kv_heads, kv_heads];
    let fits = |rows: &Tensor, dims: &[usize]| rows.dims() == dims && rows.dtype() == DType::F32;
    let rows_fit = [q, k, v].iter().zip(heads).all(|(rows, heads)| fits(rows, &[step.len, heads, head_dim]));
    let biases_fit = biases.iter().zip(heads).all(|(bias, heads)| bias.is_none_or(|bias| fits(bias, &[heads * head_dim])));
    let norms_fit = norms.is_none_or(|(norms, _)| norms.iter().all(|norm| fits(norm, &[head_dim])));
    if !(rows_fit && biases_fit && norms_fit && [cos, sin].iter().all(|table| fits(table, &[step.len, head_dim / 2]))) {
        let (dims, tables) = ([q, k, v].map(Tensor::dims), [cos, sin].map(Tensor::dims));
        let (biases, norms) = (biases.map(|bias| bias.map(Tensor::dims)), norms.map(|(norms, _)| norms.map(Tensor::dims)));
        bail!("cuda: products {dims:?}, biases {biases:?}, norms {norms:?}, angles {tables:?} of {} tokens, f32, for {shape:?}", step.len);
    }
    let ((_q, q_rows, q_apart), (_k, k_rows, k_apart), (_v, v_rows, v_apart)) = (by_fours(q)?, by_fours(k)?, by_fours(v)?);
    let out = place.take((step.len, q_heads, head_dim), queries_of(store).tensor_dtype(), q.device())?;
    let mut params = StoreParams {
        rows: [q_rows, k_rows, v_rows],
        cos: at_fours(cos)?,
        sin: at_fours(sin)?,
        q: address(&out)?,
        apart: [q_apart, k_apart, v_apart].map(|apart| apart as i32),
        q_heads: q_heads as i32,
        ..StoreParams::default()
    };
    for (to, bias) in params.biases.iter_mut().zip(biases) {
        *to = bias.map_or(Ok(0), at_fours)?;
    }
    if let Some(([q_norm, k_norm], eps)) = norms {
        (params.norms, params.eps) = ([at_fours(q_norm)?, at_fours(k_norm)?], eps);
    }
    launch_store(params, step, store, verdict)?;
    Ok(out)
}

/// Numbers that are read at once, and bytes of them.
const FOUR: usize = 4;
const FOUR_BYTES: u64 = (FOUR * size_of::<f32>()) as u64;

/// [`by_tokens`] of what is read by fours.
fn by_fours(rows: &Tensor) -> Result<(Tensor, u64, usize)> {
    let (tensor, at, apart) = by_tokens(rows)?;
    if at.is_multiple_of(FOUR_BYTES) && apart.is_multiple_of(FOUR) { Ok((tensor, at, apart)) } else { by_tokens(&rows.force_contiguous()?) }
}

/// [`address`] of what is read by fours.
fn at_fours(tensor: &Tensor) -> Result<u64> {
    let at = address(tensor)?;
    if !at.is_multiple_of(FOUR_BYTES) {
        bail!("cuda: a tensor {:?} begins {} bytes after a multiple of {FOUR_BYTES}", tensor.shape(), at % FOUR_BYTES);
    }
    Ok(at)
}

/// Stores the rows of `params`, which says what there is of queries.
fn launch_store(params: StoreParams, step: Step, store: &LayerStore, verdict: Option<Verdict<'_>>) -> Result<()> {
    let (pages, shape) = (store.device_pages()?, store.shape());
    let params = StoreParams {
        pools: [address(store.k().values())?, address(store.v().values())?],
        scales: [scales_of(store.k())?, scales_of(store.v())?],
        pages: address(pages)?,
        max_pages: pages.dim(1)? as i32,
        start: step.start as i32,
        tokens: step.len as i32,
        kv_heads: shape.kv_heads() as i32,
        head_dim: shape.head_dim() as i32,
        ..params
    };
    let (kernels, names) = (Kernels::of(pages.device())?, StoreKernels::of(store.k())?);
    // No more than are there at once: some that begin late are what all wait for.
    let most = |threads: usize| STORING * STORED / threads * kernels.multiprocessors();
    // Half a warp has a row of 64 numbers of 16 bits.
    let at_once = if shape.head_dim() == 64 && store.k().dtype() != KvDtype::Q8_0 { 2 } else { 1 };
    let blocks = |threads: usize| {
        let rows = step.len * (params.q_heads + 2 * params.kv_heads) as usize;
        rows.div_ceil(threads / 32 * at_once).min(most(threads))
    };
    // A gate is done meanwhile, but for those of many heads.
    if let Some((gate, gates)) = verdict.map(gate::of_projected).transpose()?.flatten() {
        let name = names.projected[usize::from(gate.weight != 0)];
        let params = StoreProjectedParams { gates: gates as i32, store: params, gate };
        // Where there is room, those of the gate have nothing to store.
        let spread = Spread::new([(blocks(STORED) + gates).min(most(STORED)).max(gates), 1, 1], STORED);
        // SAFETY: as below, and the tensors of the gate have the shapes of its parameters.
        return unsafe { kernels.launch_following(name, spread, &params) };
    }
    let gate = verdict.map(gate::Layer::of_verdict).transpose()?.flatten().filter(|gate| gate.grid[1] == 1);
    if let Some(gate) = gate {
        let (gates, name) = (gate.grid[0], names.gate[usize::from(gate.is_rounded)]);
        let most = most(gate::THREADS);
        let stores = blocks(gate::THREADS).min(most.saturating_sub(gates).max(most / 2));
        let params = StoreGatedParams { store: params, gate: gate.params, gates: gates as i32 };
        // SAFETY: as below, and the tensors of the gate have the shapes of its parameters.
        return unsafe { kernels.launch_following(name, Spread::new([gates + stores, 1, 1], gate::THREADS), &params) };
    }
    // SAFETY: the table has a page for each position of the step; what the kernel reads lives until the stream frees it.
    unsafe { kernels.launch_following(names.alone, Spread::new([blocks(STORED), 1, 1], STORED), &params) }?;
    verdict.map_or(Ok(()), gate::note_verdicts)
}

/// Stores `rows` `[slots, width]` into slots of `pool`, which the caller has checked to lie inside.
pub(crate) fn scatter_rows(pool: &Pool, rows: &Tensor, slots: &[u32]) -> Result<()> {
    let kernels = Kernels::of(rows.device())?;
    let rows = rows.to_dtype(DType::F32)?.contiguous()?;
    let slots = Tensor::new(slots, rows.device())?;
    let count = slots.elem_count();
    let params = ScatterParams {
        rows: address(&rows)?,
        slots: address(&slots)?,
        pool: address(pool.values())?,
        scales: scales_of(pool)?,
        count: count as i32,
        width: pool.width() as i32,
        transforms: i32::from(pool.is_transformed()),
    };
    let threads = pool.width().min(256).next_multiple_of(32);
    // SAFETY: the slots lie inside the pool; what the kernel reads lives until the stream frees it.
    unsafe { kernels.launch(&name("scatter_rows", pool)?, Spread::new([count, 1, 1], threads), &params) }
}

/// The tensors of two pools, as rows of words.
#[derive(Debug, Default)]
struct Rows {
    at: [u64; 4],
    words: [i32; 4],
    tensors: usize,
}

fn rows_of(pools: [&Pool; 2]) -> Result<Rows> {
    let mut rows = Rows::default();
    for tensor in pools.into_iter().flat_map(Pool::tensors) {
        let bytes = tensor.dim(2)? * tensor.dtype().size_in_bytes();
        if !bytes.is_multiple_of(size_of::<u32>()) {
            bail!("cuda: rows of {bytes} bytes, they are copied by four");
        }
        (rows.at[rows.tensors], rows.words[rows.tensors]) = (address(tensor)?, (bytes / size_of::<u32>()) as i32);
        rows.tensors += 1;
    }
    Ok(rows)
}

/// A layer whose tokens go to new pools.
#[derive(Debug)]
pub(crate) struct Compacted<'a> {
    pub(crate) store: &'a LayerStore,
    /// The same pools, where it is only what left the window that moves.
    pub(crate) new: [&'a Pool; 2],
    /// Where the tables that tell their places are staged.
    pub(crate) layout: Layout,
    /// How many kept pages of a head are written at the most, and recent ones.
    pub(crate) pages: [usize; 2],
}

/// Copies all tokens of `layers` to their new pools, by the tables that are staged in `numbers`: kept ones, and recent ones. In pools that are
/// not new, what left the window moves.
pub(crate) fn compact(layers: &[Compacted<'_>], numbers: &Tensor) -> Result<()> {
    let kernels = Kernels::of(numbers.device())?;
    let at = address(numbers)?;
    for layers in layers.chunks(COMPACTED) {
        let (mut params, mut grid) = (CompactParams::default(), [0; 3]);
        for (layer, to) in layers.iter().zip(&mut params.layers) {
            let (of_layer, tensors) = compacted(layer, at)?;
            (*to, params.tensors) = (of_layer, tensors as i32);
            let heads = layer.store.shape().kv_heads();
            grid = [grid[0].max(layer.pages[0] + layer.pages[1]), heads, tensors * layers.len()];
        }
        // SAFETY: both tables lead to pages inside their pools; what the kernel reads lives until the stream frees it.
        unsafe { kernels.launch("compact_pages", Spread::new(grid, COPIED), &params) }?;
    }
    Ok(())
}

/// A layer, and how many tensors it has; the tables are staged from `numbers` on.
fn compacted(&Compacted { store, new, layout, pages }: &Compacted<'_>, numbers: u64) -> Result<(CompactedLayer, usize)> {
    let (Some(kept), recent) = (store.device_kept(), store.device_pages()?) else { bail!("cuda: no token router leaves tokens here") };
    let at = |range: Range<usize>| numbers + (range.start * size_of::<u32>()) as u64;
    let (from, to) = (rows_of([store.k(), store.v()])?, rows_of(new)?);
    let [max_pages, max_kept] = layout.rooms.map(|room| room as i32);
    let layer = CompactedLayer {
        from: from.at,
        to: to.at,
        words: to.words,
        old_pages: address(recent)?,
        old: Kept::of(store)?,
        pages: at(layout.pages()),
        kept: Kept {
            pages: at(layout.kept_pages()),
            counts: at(layout.counts()),
            masks: address(&kept.masks)?,
            ranks: at(layout.ranks()),
            max_pages: max_kept,
        },
        old_max_pages: recent.dim(1)? as i32,
        max_pages,
        kept_pages: pages[0] as i32,
        recent_pages: pages[1] as i32,
    };
    Ok((layer, to.tensors))
}

/// Blocks of a layer that are to be summarised, for which its summaries have room.
#[derive(Debug)]
pub(crate) struct Summarised<'a> {
    pub(crate) store: &'a LayerStore,
    pub(crate) summaries: &'a Summaries,
    pub(crate) blocks: Range<usize>,
}

impl Summarised<'_> {
    fn params(&self) -> Result<SummaryParams> {
        let Self { store, summaries, blocks } = self;
        let pages = store.device_pages()?;
        Ok(SummaryParams {
            k: address(store.k().values())?,
            k_scales: scales_of(store.k())?,
            pages: address(pages)?,
            masks: store.device_kept().map_or(0, |kept| kept.verdicts.at),
            summaries: address(summaries.pool().values())?,
            scales: scales_of(summaries.pool())?,
            kind: summary_code(summaries.kind()),
            max_pages: pages.dim(1)? as i32,
            block_size: summaries.block_size() as i32,
            first: blocks.start as i32,
            blocks: blocks.len() as i32,
            head_dim: store.shape().head_dim() as i32,
        })
    }

    /// Whether one launch can summarise both.
    fn is_like(&self, other: &Self) -> bool {
        self.store.shape() == other.store.shape() && self.store.k().dtype() == other.store.k().dtype()
    }
}

/// Summarises what a token router keeps of these blocks.
pub(crate) fn summarise(layers: &[Summarised<'_>]) -> Result<()> {
    for layers in layers.chunk_by(Summarised::is_like).flat_map(|alike| alike.chunks(SUMMARISED)) {
        let mut params = SummariesParams::default();
        for (to, layer) in params.layers.iter_mut().zip(layers) {
            *to = layer.params()?;
        }
        let most = layers.iter().map(|layer| layer.blocks.len()).max().unwrap_or(0);
        let [Summarised { store, .. }, ..] = layers else { continue };
        let spread = Spread::new([most, store.shape().kv_heads(), layers.len()], store.shape().head_dim());
        let kernels = Kernels::of(store.k().values().device())?;
        // SAFETY: the keys of these blocks are written, and the pools have room for their rows.
        unsafe { kernels.launch(&name("summarise_blocks", store.k())?, spread, &params) }?;
    }
    Ok(())
}
