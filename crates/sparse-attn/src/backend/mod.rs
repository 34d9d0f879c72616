//! Backends: one device's way to write the cache and to attend.

pub mod cpu;
#[cfg(feature = "cuda")]
pub mod cuda;
#[cfg(not(feature = "cuda"))]
#[path = "no_cuda.rs"]
pub mod cuda;
mod reads;
pub mod reference;

pub use cpu::Cpu;
pub use reference::Reference;

use crate::HeadShape;
use crate::attention::Products;
use crate::block_router::BlockRouter;
use crate::cache::{KvDtypes, LayerStore, ReadCount, Step};
use crate::place::{Destination, Place};
use crate::select::{Limits, Selection, TILE};
use candle_core::{DType, Device, Result, Tensor, bail};
use std::sync::Arc;

/// One device's way to compute. Every backend equals [`Reference`] within its dtype's tolerance.
pub trait AttentionBackend: std::fmt::Debug + Send + Sync {
    /// The name users see.
    fn name(&self) -> &'static str;

    /// Stores the keys and values of `step`, each `[step.len, kv_heads, head_dim]`, in the slots that
    /// were reserved for them, after [`LayerStore::take_moves`], and where a device has the pools after [`crate::KvCache::bring_tables`].
    ///
    /// # Errors
    /// If a shape does not fit the store.
    fn write(&self, k: &Tensor, v: &Tensor, step: Step, store: &mut LayerStore) -> Result<()>;

    /// Whether it makes queries, keys and values of products by itself.
    fn takes_products(&self) -> bool {
        false
    }

    /// Makes queries, keys and values of what products gave, and stores keys and values as [`AttentionBackend::write`] does. Returns the queries,
    /// `[step.len, q_heads, head_dim]`, as [`AttentionBackend::dtype_of_queries`] says, in `place`.
    ///
    /// # Errors
    /// If a shape does not fit the store, or this backend does not take products.
    fn write_products(&self, _products: &Products<'_>, _step: Step, _store: &mut LayerStore, _place: &mut Place) -> Result<Tensor> {
        bail!("{}: it takes queries, keys and values, not what they are made of", self.name())
    }

    /// Whether [`AttentionBackend::write_products`] and attention of several queries to all of this layer take no memory but what they are given, and only
    /// launch kernels.
    fn only_launches(&self, _store: &LayerStore) -> bool {
        false
    }

    /// Attention of the queries of `step`, `[step.len, q_heads, head_dim]`, over what `selection` lets
    /// them read. Returns the same shape, f32.
    ///
    /// # Errors
    /// If a shape does not fit the store.
    fn attend(&self, q: &Tensor, scale: f32, store: &LayerStore, step: Step, selection: &Selection) -> Result<Tensor>;

    /// [`AttentionBackend::attend`] for a product that rounds what it gets: it may come so.
    ///
    /// # Errors
    /// If a shape does not fit the store.
    fn attend_to(
        &self,
        q: &Tensor,
        scale: f32,
        store: &LayerStore,
        step: Step,
        selection: &Selection,
        _to: Destination<'_>,
    ) -> Result<Tensor> {
        self.attend(q, scale, store, step, selection)
    }

    /// Whether it can attend with heads of this shape to keys and values stored like this.
    ///
    /// # Errors
    /// What it cannot, and what it can instead.
    fn supports(&self, _shape: HeadShape, _dtypes: KvDtypes) -> Result<()> {
        Ok(())
    }

    /// Scores, selects and attends where the keys are, in one go; `None`: this backend cannot do that here, and each is done by
    /// itself, on the host. What is selected is the same, as far as rounding goes.
    ///
    /// # Errors
    /// If a shape does not fit the store.
    fn attend_routed(&self, _job: &RoutedJob<'_>) -> Result<Option<Routed>> {
        Ok(None)
    }

    /// What it rounds queries to that read these keys: they may come so.
    fn dtype_of_queries(&self, _store: &LayerStore) -> DType {
        DType::F32
    }

    /// Queries that best share a selection in steps of several, where `group_size` query heads share keys.
    fn preferred_tile(&self, _group_size: usize) -> usize {
        TILE
    }

    /// From which position on queries are faster if tokens are hidden from them; those before see all: see [`Routing::token_dense_len`](crate::Routing).
    fn preferred_token_dense_len(&self) -> usize {
        0
    }

    /// Up to which length a prompt is no faster if tokens are hidden from its queries, heads of this shape: see
    /// [`Routing::token_dense_prompt`](crate::Routing).
    fn preferred_token_dense_prompt(&self, _shape: HeadShape) -> usize {
        0
    }

    /// Bytes of keys and values that one query could read in the time that scoring and selecting takes at the least: shorter sequences
    /// are faster read whole.
    fn selection_bytes(&self) -> usize {
        0
    }
}

/// What a backend needs to route a step by itself.
#[derive(Debug, Clone, Copy)]
pub struct RoutedJob<'a> {
    /// Queries after rope, `[step.len, q_heads, head_dim]`.
    pub q: &'a Tensor,
    /// Factor of `q . k`.
    pub scale: f32,
    /// The layer's keys and values, those of the step and their summaries included.
    pub store: &'a LayerStore,
    /// The step.
    pub step: Step,
    /// The layer's limits.
    pub limits: Limits,
    /// How blocks are scored.
    pub router: &'a dyn BlockRouter,
    /// Whether someone asks what was selected.
    pub wants_selection: bool,
    /// As for [`AttentionBackend::attend_to`].
    pub dtype: DType,
}

/// What came of it.
#[derive(Debug)]
pub struct Routed {
    /// `[step.len, q_heads, head_dim]`, f32 or as it was to be.
    pub out: Tensor,
    /// What was selected, where it was asked for.
    pub selection: Option<Selection>,
    /// Keys that were read.
    pub count: ReadCount,
}

/// The fastest backend for a device.
///
/// # Errors
/// If no backend for the device is in this build.
pub fn for_device(device: &Device) -> Result<Arc<dyn AttentionBackend>> {
    match device {
        Device::Cpu => Ok(Arc::new(Cpu)),
        Device::Cuda(_) => Ok(Arc::new(cuda::Cuda::new(device)?)),
        other => bail!("no attention backend for {:?} in this build", other.location()),
    }
}
