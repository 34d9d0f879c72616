//! The CPU backend: keys and values read in their own dtype, work spread over candle's thread pool.

mod item;
mod workspace;
mod write;

use super::AttentionBackend;
use crate::cache::{LayerStore, Step};
use crate::select::Selection;
use crate::simd::{with_f32, with_rows};
use candle_core::{Device, Result, Tensor};
use workspace::Workspace;
use write::write_rows;

/// Attention on the CPU.
///
/// Work is cut into items (a key/value head, a tile of queries, some octets of keys). An item makes one pass
/// over its keys with a running softmax in f32; partial results are merged split by split, in order, whether one thread had all
/// splits or several had some: the result depends neither on the number of threads nor on that of queries. A step of few
/// queries allocates nothing but the tensor that it returns, and rotated queries where keys are.
#[derive(Debug, Clone, Copy, Default)]
pub struct Cpu;

impl AttentionBackend for Cpu {
    fn name(&self) -> &'static str {
        "cpu"
    }

    fn write(&self, k: &Tensor, v: &Tensor, step: Step, store: &mut LayerStore) -> Result<()> {
        store.check_step(k, v, step)?;
        write_rows(k, v, step, store)
    }

    fn attend(&self, q: &Tensor, scale: f32, store: &LayerStore, step: Step, selection: &Selection) -> Result<Tensor> {
        store.check_queries(q, step)?;
        let out = with_f32(q, |q| {
            let q = store.k().transformed(q);
            with_rows(store.k(), |k| with_rows(store.v(), |v| Workspace::attend(&q, scale, [k, v], store, step, selection)))?
        })?;
        Tensor::from_vec(out, q.shape(), &Device::Cpu)
    }
}
