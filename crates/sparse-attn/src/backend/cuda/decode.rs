//! Attention of one query.

use super::params::{DecodeParams, Kept};
use super::{Kernels, Spread, address, kernel, scales_of};
use crate::cache::{DeviceKept, LayerStore};
use candle_core::{DType, Device, Result, Tensor};

/// Query heads that a thread block takes.
const QUERIES: usize = 8;

/// Thread blocks for each multiprocessor, at most.
const BLOCKS_EACH: usize = 2;

/// Most parts that keys are split into; the kernel merges no more.
const MOST_SPLITS: usize = 256;

/// Where parts of a result lie until they are merged. One for all layers of a shape: they run one after the other.
#[derive(Debug)]
pub struct DecodeScratch {
    partial: Tensor,
    tickets: Tensor,
    splits: usize,
}

impl DecodeScratch {
    /// For layers of the shape of `store`.
    ///
    /// # Errors
    /// If the device has no memory for it.
    pub fn new(kernels: &Kernels, store: &LayerStore, device: &Device) -> Result<Self> {
        let shape = store.shape();
        let parts = shape.kv_heads() * shape.group_size().div_ceil(QUERIES);
        let splits = (kernels.multiprocessors() * BLOCKS_EACH / parts).clamp(1, MOST_SPLITS);
        Ok(Self {
            partial: Tensor::zeros(parts * splits * QUERIES * (shape.head_dim() + 2), DType::F32, device)?,
            tickets: Tensor::zeros(parts, DType::U32, device)?,
            splits,
        })
    }
}

impl Kept {
    /// Of a layer; nothing where every token is kept.
    pub(super) fn of(store: &LayerStore) -> Result<Self> {
        let Some(DeviceKept { pages, counts, masks, ranks, .. }) = store.device_kept() else { return Ok(Self::default()) };
        let max_pages = pages.dim(1)? as i32;
        Ok(Self { pages: address(pages)?, counts: address(counts)?, masks: address(masks)?, ranks: address(ranks)?, max_pages })
    }
}

/// What a query reads of each head: addresses of `[kv_heads, most]` octets and `[kv_heads]` counts.
#[derive(Debug, Clone, Copy)]
pub struct DecodeLists {
    /// Of the octets.
    pub octets: u64,
    /// Of how many there are.
    pub counts: u64,
    /// Room for octets.
    pub most: usize,
    /// The newest positions of which the query sees what a token router drops; 0: nothing is dropped.
    pub local_window: usize,
}

/// Addresses of what one query's attention takes and makes.
#[derive(Debug, Clone, Copy)]
pub struct DecodeCall {
    /// The query, `[q_heads, head_dim]` in the dtype of the keys.
    pub q: u64,
    /// Its position, i32.
    pub position: u64,
    /// What it reads; `None`: everything visible.
    pub lists: Option<DecodeLists>,
    /// The result, `[q_heads, head_dim]` f32.
    pub out: u64,
    /// The result in 8 bits (weights.cuh); 0: not wanted.
    pub out_q8: u64,
    /// Factor of `q . k`.
    pub scale: f32,
}

/// Puts the attention of one query into the stream.
///
/// # Safety
/// The addresses must be of what their fields say, and live until the kernel has run.
///
/// # Errors
/// If the kernel cannot be launched.
pub unsafe fn decode(kernels: &Kernels, call: DecodeCall, scratch: &DecodeScratch, store: &LayerStore) -> Result<()> {
    let (shape, pages) = (store.shape(), store.device_pages()?);
    let head_dim = shape.head_dim();
    let (local_window, hides_from) = store.local().map_or((0, 0), |local| (local.window, local.hides_from()));
    let lists = call.lists.unwrap_or(DecodeLists { octets: 0, counts: 0, most: 0, local_window });
    let params = DecodeParams {
        q: call.q,
        k: address(store.k().values())?,
        v: address(store.v().values())?,
        k_scales: scales_of(store.k())?,
        v_scales: scales_of(store.v())?,
        pages: address(pages)?,
        kept: Kept::of(store)?,
        octets: lists.octets,
        counts: lists.counts,
        position: call.position,
        partial: address(&scratch.partial)?,
        tickets: address(&scratch.tickets)?,
        out: call.out,
        out_q8: call.out_q8,
        max_pages: pages.dim(1)? as i32,
        max_octets: lists.most as i32,
        group_size: shape.group_size() as i32,
        sliding_window: store.sliding_window().unwrap_or(0) as i32,
        local_window: lists.local_window as i32,
        hides_from: hides_from as i32,
        scale: call.scale,
    };
    // A warp's stages of keys and values, and, of bytes, a tile of them widened; then the warps' parts; then what each split counts for.
    let row_bytes = store.k().dtype().row_bytes(head_dim);
    let widened = if store.k().scales().is_some() { 2 * 16 * head_dim * 2 } else { 0 };
    let shared_bytes = (4 * (3 * 2 * 16 * row_bytes + widened)).max(4 * QUERIES * (head_dim + 2) * 4).max(QUERIES * scratch.splits * 4);
    let spread = Spread { grid: [scratch.splits, shape.kv_heads(), shape.group_size().div_ceil(QUERIES)], threads: 128, shared_bytes };
    // SAFETY: the caller's, and the scratch is of this shape.
    unsafe { kernels.launch_following(&kernel("attend_decode", store.k(), head_dim), spread, &params) }
}
