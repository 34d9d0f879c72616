//! Attention of one token, alone: microseconds and bytes per second of keys and values read, beside what the machine reads.
//!
//! `cargo bench -p sparse-attn` (`-- 1024 4096` for these contexts only). Mistral 7B's shape, f16 and q8_0; as many layers as it
//! takes to be larger than the caches. Medians.

#![allow(clippy::print_stdout, reason = "a table is what it is for")]

mod machine;

use candle_core::utils::get_num_threads;
use candle_core::{Device, Result, Tensor};
use machine::{bandwidth, median};
use sparse_attn::backend::{AttentionBackend, Cpu};
use sparse_attn::block_router::Spread;
use sparse_attn::select::{Budget, Limits};
use sparse_attn::{AttentionInput, HeadShape, KvCache, KvDtype, LayerSpec, RoutedAttention, Routing};
use std::hint::black_box;
use std::sync::Arc;
use std::time::Duration;

/// More than any cache holds.
const BEYOND_CACHES: usize = 192 << 20;

/// Tokens written at once.
const CHUNK: usize = 512;

fn main() -> Result<()> {
    let asked: Vec<usize> = std::env::args().skip(1).filter_map(|arg| arg.parse().ok()).collect();
    let contexts = if asked.is_empty() { vec![1024, 4096, 16384, 32768, 131_072] } else { asked };
    println!("{} threads", get_num_threads());
    println!("| keys and values | context | attention | us per layer | KV read | GB/s | the machine's | part of it |");
    println!("| --- | --- | --- | --- | --- | --- | --- | --- |");
    let shape = HeadShape::new(32, 8, 128)?;
    for dtype in [KvDtype::F16, KvDtype::Q8_0] {
        for context in &contexts {
            let bytes = shape.kv_heads() * 2 * dtype.row_bytes(shape.head_dim());
            let layers = (BEYOND_CACHES / (context * bytes)).clamp(1, 64);
            let mut cache = filled(shape, dtype, *context, layers)?;
            let limits = Limits { budget: Budget::tokens(2048), block_size: 16, dense_len: 0, ..Routing::dense().limits };
            let routed = Routing { block_router: Arc::new(Spread), limits, ..Routing::dense() };
            for (name, routing) in [("dense", Routing::dense()), ("spread 2048, blocks of 16", routed)] {
                let attention = RoutedAttention::new(routing, Arc::new(Cpu))?;
                let read = bandwidth(); // at the same time: shared machines vary
                let (time, kv) = measure(&attention, shape, &mut cache, layers)?;
                let rate = kv / time.as_secs_f64();
                println!(
                    "| {} | {context} | {name} | {:.0} | {:.2} MiB | {:.1} | {:.1} | {:.0} % |",
                    dtype.name(),
                    time.as_secs_f64() * 1e6,
                    kv / f64::from(1 << 20),
                    rate / 1e9,
                    read / 1e9,
                    100.0 * rate / read
                );
            }
        }
    }
    Ok(())
}

/// A cache of random keys and values.
fn filled(shape: HeadShape, dtype: KvDtype, tokens: usize, layers: usize) -> Result<KvCache> {
    let mut cache = KvCache::new(&vec![LayerSpec::full(shape); layers], dtype.into(), &Device::Cpu, tokens + 1)?;
    let kv = Tensor::randn(0f32, 1.0, (CHUNK, shape.kv_heads(), shape.head_dim()), &Device::Cpu)?;
    while cache.len() < tokens {
        let step = cache.reserve(CHUNK.min(tokens - cache.len()))?;
        let part = kv.narrow(0, 0, step.len)?;
        for layer in 0..layers {
            Cpu.write(&part, &part, step, cache.layer_mut(layer))?;
        }
        cache.commit(step)?;
    }
    Ok(cache)
}

/// The median time of one layer, and the bytes that it read.
fn measure(attention: &RoutedAttention, shape: HeadShape, cache: &mut KvCache, layers: usize) -> Result<(Duration, f64)> {
    let token = |heads: usize| Tensor::randn(0f32, 1.0, (1, heads, shape.head_dim()), &Device::Cpu);
    let (q, kv) = (token(shape.q_heads())?, token(shape.kv_heads())?);
    let input = AttentionInput {
        hidden: &q,
        projected: None,
        q: &q,
        k: &kv,
        k_before_rope: &kv,
        v: &kv,
        scale: (shape.head_dim() as f32).powf(-0.5),
    };
    // The step is never committed: each time it is the same.
    let step = |cache: &mut KvCache| -> Result<()> {
        let step = cache.reserve(1)?;
        for layer in 0..layers {
            black_box(attention.forward(layer, input, step, cache)?);
        }
        Ok(())
    };
    step(cache)?;
    let mut failed = Ok(());
    let time = median(15, || {
        if let Err(error) = step(cache) {
            failed = Err(error);
        }
    });
    failed?;
    Ok((time / layers as u32, cache.read_count().bytes as f64 / layers as f64))
}
