//! What a run will take in memory, compared with what is free, before anything is loaded.

use crate::args::MemoryLimit;
use crate::device;
use crate::failure::{Failure, Kind};
use crate::ui::bytes;
use anyhow::Result;
use candle_core::Device;
use model::Config;
use sparse_attn::{KvDtype, KvDtypes, LayerSpec, RoutedAttention};

/// Kept for everything else that runs.
const MARGIN: u64 = 128 << 20;
/// Below this many tokens, or the trained length if that is shorter, a context is not lowered unasked.
const LEAST_CONTEXT: usize = 4096;
/// Where the memory of a run goes, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Plan {
    pub(crate) weights: u64,
    pub(crate) kv: u64,
    pub(crate) work: u64,
}

/// How keys and values will be kept.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Storage<'a> {
    pub(crate) attention: &'a RoutedAttention,
    pub(crate) dtypes: KvDtypes,
    /// Tokens computed at once in prefill.
    pub(crate) chunk: usize,
}

impl Plan {
    /// For `context` tokens.
    pub(crate) fn new(config: &Config, weights: u64, storage: Storage<'_>, context: usize) -> Self {
        let kv = storage.attention.planned_bytes(&config.layer_specs(), storage.dtypes, context) as u64;
        let rows = storage.chunk.min(context) as u64;
        // Activations of one layer (a chunk wide, several alive at once) and the logits of one position.
        let width = (8 * config.hidden_size + 4 * config.intermediate_size) as u64;
        // Where tokens leave as a window moves on, those of a chunk are there on top of it, until the chunk is done.
        let specs = storage.attention.layer_specs(&config.layer_specs());
        let beyond = |spec: &LayerSpec| {
            let tokens = rows.min(context.saturating_sub(spec.window()?) as u64);
            Some(tokens * (spec.shape.kv_heads() * storage.dtypes.bytes(spec.shape.head_dim())) as u64)
        };
        let beyond: u64 = specs.iter().filter_map(beyond).sum();
        let work = 4 * (rows * width + 6 * config.vocab_size as u64) + beyond + (32 << 20);
        Self { weights, kv, work }
    }

    pub(crate) fn total(&self) -> u64 {
        self.weights + self.kv + self.work
    }
}

/// Bytes that a run may use: what is free on the GPU, or on the machine or in its container; and no more than `limit`.
pub(crate) fn available(limit: Option<MemoryLimit>, device: &Device) -> u64 {
    // A system that does not tell is not held back: what does not fit fails as it is allocated.
    let free = device::describe(device).map(|gpu| gpu.free).or_else(|| Some(machine()?.1)).unwrap_or(u64::MAX);
    let free = free.saturating_sub(MARGIN);
    match limit {
        None => free,
        Some(MemoryLimit::Bytes(limit)) => limit.min(free),
        Some(MemoryLimit::Fraction(part)) => (free as f64 * part) as u64,
    }
}

/// Bytes of memory in all and those free, of the machine or its container, where the system tells.
pub(crate) fn machine() -> Option<(u64, u64)> {
    let mut system = sysinfo::System::new().ok()?;
    system.refresh_memory();
    let (total, free) = (system.total_memory(), system.available_memory());
    Some(system.cgroup_limits().map_or((total, free), |container| (total.min(container.total_memory), free.min(container.free_memory))))
}

/// The processor's name, where the system tells.
pub(crate) fn processor() -> String {
    let name = std::fs::read_to_string("/proc/cpuinfo").ok().and_then(|text| {
        let line = text.lines().find(|line| line.starts_with("model name"))?;
        Some(line.split_once(':')?.1.trim().to_string())
    });
    name.unwrap_or_else(|| std::env::consts::ARCH.to_string())
}

/// The context to use: what was asked for, or the trained length lowered to what fits.
pub(crate) fn choose_context(asked: Option<usize>, config: &Config, weights: u64, storage: Storage<'_>, free: u64) -> Result<usize> {
    let fits = |context: usize| Plan::new(config, weights, storage, context).total() <= free;
    let largest = largest(config.context, fits);
    match asked {
        Some(context) if fits(context) => Ok(context),
        Some(context) => Err(too_large(config, weights, storage, context, free, largest)),
        None if largest >= LEAST_CONTEXT.min(config.context) => Ok(largest),
        None => Err(too_large(config, weights, storage, LEAST_CONTEXT.min(config.context), free, largest)),
    }
}

/// The most tokens, up to `most`, that fit.
fn largest(most: usize, fits: impl Fn(usize) -> bool) -> usize {
    let (mut low, mut high) = (0, most);
    while low < high {
        let middle = (low + high).div_ceil(2);
        if fits(middle) { low = middle } else { high = middle - 1 }
    }
    // Whole pages below the trained length: the same bytes, a rounder number.
    if low == most { low } else { low / 64 * 64 }
}

fn too_large(config: &Config, weights: u64, storage: Storage<'_>, context: usize, free: u64, largest: usize) -> anyhow::Error {
    let plan = Plan::new(config, weights, storage, context);
    let parts = format!(
        "weights {} + KV {} for {context} tokens + work {} = {}, and {} may be used",
        bytes(plan.weights),
        bytes(plan.kv),
        bytes(plan.work),
        bytes(plan.total()),
        bytes(free)
    );
    let small = Storage { dtypes: KvDtype::Q8_0.into(), ..storage };
    let narrow = storage.dtypes != small.dtypes && Plan::new(config, weights, small, context).total() <= free;
    let hint = match largest {
        _ if narrow => "--cache-type q8_0".to_string(),
        0 => "a smaller model or quant, or a larger --mem-limit".to_string(),
        largest => format!("-c {largest}"),
    };
    Failure::new(Kind::OutOfMemory, "the model and this context do not fit in memory").why(parts).hint(hint).into()
}

/// The most memory this process ever held, where the system tells.
pub(crate) fn peak_bytes() -> Option<u64> {
    own_status("VmHWM:")
}

/// The memory this process holds now, where the system tells.
pub(crate) fn resident_bytes() -> Option<u64> {
    own_status("VmRSS:")
}

fn own_status(name: &str) -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix(name))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kib << 10)
}

#[cfg(test)]
mod tests {
    use super::*;
    use sparse_attn::Routing;
    use sparse_attn::backend::Cpu;
    use sparse_attn::token_router::SinkWindow;
    use std::sync::Arc;

    fn config() -> Config {
        let json = r#"{"model_type":"llama","hidden_size":4096,"intermediate_size":14336,"num_hidden_layers":32,"vocab_size":32000,
            "num_attention_heads":32,"num_key_value_heads":8,"max_position_embeddings":32768}"#;
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("config.json"), json).unwrap();
        let empty = 2u64.to_le_bytes().into_iter().chain(*b"{}").collect::<Vec<u8>>();
        std::fs::write(dir.path().join("model.safetensors"), empty).unwrap();
        model::Weights::open(dir.path(), &candle_core::Device::Cpu, None).unwrap().config().clone()
    }

    fn dense() -> RoutedAttention {
        RoutedAttention::dense(Arc::new(Cpu))
    }

    #[test]
    fn mistral_7b_takes_128_kib_a_token_at_16_bit_and_68_at_8() {
        let attention = dense();
        for (dtype, kib) in [(KvDtype::F16, 128), (KvDtype::Q8_0, 68)] {
            let plan = Plan::new(&config(), 0, Storage { attention: &attention, dtypes: dtype.into(), chunk: 512 }, 32768);
            assert_eq!(plan.kv, 32768 * (kib << 10));
        }
    }

    #[test]
    fn a_chunk_beyond_the_window_is_planned_for() {
        let dense = dense();
        let routing = Routing { token_router: Arc::new(SinkWindow), token_window: Some(1024), ..Routing::dense() };
        let routed = RoutedAttention::new(routing, Arc::new(Cpu)).unwrap();
        let work = |attention: &RoutedAttention, context: usize| {
            Plan::new(&config(), 0, Storage { attention, dtypes: KvDtype::F16.into(), chunk: 512 }, context).work
        };
        assert_eq!(work(&routed, 32768), work(&dense, 32768) + 512 * (128 << 10));
        assert_eq!(work(&routed, 1024), work(&dense, 1024));
    }

    #[test]
    fn the_context_is_lowered_to_fit_and_an_asked_one_is_not() {
        let (config, gib) = (config(), 1u64 << 30);
        let attention = dense();
        let storage = Storage { attention: &attention, dtypes: KvDtype::F16.into(), chunk: 512 };
        let choose = |asked, free| choose_context(asked, &config, 4 * gib, storage, free);
        assert_eq!(choose(None, 16 * gib).unwrap(), 32768);
        let lowered = choose(None, 6 * gib).unwrap();
        assert!((4096..32768).contains(&lowered) && Plan::new(&config, 4 * gib, storage, lowered).total() <= 6 * gib);
        let error = choose(Some(32768), 6 * gib).unwrap_err();
        assert_eq!(error.downcast_ref::<Failure>().unwrap().kind, Kind::OutOfMemory);
        // What the error proposes does fit.
        assert!(choose(Some(lowered), 6 * gib).is_ok());
        assert!(choose(None, 4 * gib).is_err());
    }
}
