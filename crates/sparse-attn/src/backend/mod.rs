//! Backends: one device's way to write the cache and to attend.

pub mod cpu;
pub mod reference;

pub use cpu::Cpu;
pub use reference::Reference;

use crate::cache::{LayerStore, Step};
use crate::select::Selection;
use candle_core::{Device, Result, Tensor, bail};
use std::sync::Arc;

/// One device's way to compute. Every backend equals [`Reference`] within its dtype's tolerance.
pub trait AttentionBackend: std::fmt::Debug + Send + Sync {
    /// The name users see.
    fn name(&self) -> &'static str;

    /// Stores the keys and values of `step`, each `[step.len, kv_heads, head_dim]`, in the slots that
    /// were reserved for them, after [`LayerStore::take_moves`].
    ///
    /// # Errors
    /// If a shape does not fit the store.
    fn write(&self, k: &Tensor, v: &Tensor, step: Step, store: &mut LayerStore) -> Result<()>;

    /// Attention of the queries of `step`, `[step.len, q_heads, head_dim]`, over what `selection` lets
    /// them read. Returns the same shape, f32.
    ///
    /// # Errors
    /// If a shape does not fit the store.
    fn attend(&self, q: &Tensor, scale: f32, store: &LayerStore, step: Step, selection: &Selection) -> Result<Tensor>;
}

/// The fastest backend for a device.
///
/// # Errors
/// If no backend for the device is in this build.
pub fn for_device(device: &Device) -> Result<Arc<dyn AttentionBackend>> {
    match device {
        Device::Cpu => Ok(Arc::new(Cpu)),
        other => bail!("no attention backend for {:?} in this build", other.location()),
    }
}
