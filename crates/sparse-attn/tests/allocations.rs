//! A decode step's attention allocates nothing but the tensor that it returns, and the list that candle makes of the arguments of an
//! operation in place. Alone in its process: the allocator counts for all.

use candle_core::{Device, Result, Tensor};
use sparse_attn::backend::{AttentionBackend, Cpu};
use sparse_attn::select::Selection;
use sparse_attn::{HeadShape, KvCache, KvDtype, LayerSpec};
use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicUsize, Ordering};

struct Counting;

static ALLOCATIONS: AtomicUsize = AtomicUsize::new(0);

// SAFETY: the system's allocator does the work; the number of calls does not matter to it.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
        // SAFETY: the caller's.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, place: *mut u8, layout: Layout) {
        // SAFETY: the caller's.
        unsafe { System.dealloc(place, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Keys, values: one operation in place each.
const POOLS: usize = 2;

fn allocations<R>(f: impl FnOnce() -> R) -> (usize, R) {
    let before = ALLOCATIONS.load(Ordering::Relaxed);
    let result = f();
    (ALLOCATIONS.load(Ordering::Relaxed) - before, result)
}

#[test]
fn a_decode_step_allocates_only_what_it_returns() -> Result<()> {
    let shape = HeadShape::new(8, 4, 64)?;
    for dtype in [KvDtype::F32, KvDtype::F16, KvDtype::Bf16] {
        let mut cache = KvCache::new(&[LayerSpec::full(shape)], dtype.into(), &Device::Cpu, 3000)?;
        let token = |tokens: usize, heads: usize| Tensor::randn(0f32, 1.0, (tokens, heads, shape.head_dim()), &Device::Cpu);
        let prompt = cache.reserve(2500)?;
        let kv = token(prompt.len, shape.kv_heads())?;
        Cpu.write(&kv, &kv, prompt, cache.layer_mut(0))?;
        cache.commit(prompt)?;
        let (q, kv) = (token(1, shape.q_heads())?, token(1, shape.kv_heads())?);
        // 2500 keys of a head are cut into several items. Which thread gets them is chance: each has its buffers after some steps.
        let mut more = Vec::new();
        for _ in 0..12 {
            let step = cache.reserve(1)?;
            let store = cache.layer_mut(0);
            let (writing, written) = allocations(|| Cpu.write(&kv, &kv, step, store));
            written?;
            let (attending, out) = allocations(|| Cpu.attend(&q, 0.125, store, step, &Selection::Every));
            let values = out?.flatten_all()?.to_vec1::<f32>()?;
            let (returning, tensor) = allocations(|| Tensor::from_vec(values.clone(), q.shape(), &Device::Cpu));
            tensor?;
            more.push((writing.saturating_sub(POOLS), attending.saturating_sub(returning)));
            cache.commit(step)?;
        }
        let none = more.iter().filter(|more| **more == (0, 0)).count();
        assert!(none >= 6, "{}: more allocations in each step: {more:?}", dtype.name());
    }
    Ok(())
}
