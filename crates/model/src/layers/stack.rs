//! Decoder layers, one after the other.

use super::{DecoderLayer, Residual, RopeTables, Workspace};
use candle_core::Result;
use sparse_attn::{KvCache, RoutedAttention, Step};
use std::collections::HashMap;

/// Layers of each kind that a GPU gets kernel by kernel: the first takes the memory that others use after it, has page tables brought and its products
/// looked up; by the second these are recorded.
const SINGLE: usize = 2;

/// Layers that it gets at once, from then on. Launches are what short prompts of small models wait for, and of kernels that are launched together each takes
/// the host a quarter of the time (0.8 of 3 us, H100); but the GPU is not to wait long for the first of them.
const TOGETHER: usize = 2;

/// Most tokens of a step whose layers are launched so: of more (1024 of SmolLM2, H100) the host is done well before the GPU.
const MOST_TOKENS: usize = 1024;

/// Has a step go through `layers`, each with what `rope` gives for it. Changes the stream in place.
///
/// # Errors
/// If a shape does not fit the cache, or memory runs out.
pub(crate) fn forward<'a, 'r>(
    layers: &'a [DecoderLayer],
    rope: impl Fn(usize) -> &'r RopeTables,
    stream: &mut Residual<'a>,
    workspace: &mut Workspace,
    attention: &RoutedAttention,
    step: Step,
    cache: &mut KvCache,
) -> Result<()> {
    let device = cache.device().clone();
    // Layers of a kind have the same kernels, with memory of the same size.
    let stack_of = |layer| attention.routing().token_router.as_gate()?.stacked(layer).map(|[stack, _]| stack);
    let kind_of = |layer, cache: &KvCache| (cache.layer(layer).sliding_window(), stack_of(layer));
    let mut single: HashMap<_, usize> = HashMap::new();
    let mut next = 0;
    while next < layers.len() {
        let is_ready = |layer: &usize| {
            let is_known = single.get(&kind_of(*layer, cache)).is_some_and(|count| *count >= SINGLE);
            is_known && layers[*layer].only_launches(step.len) && attention.only_launches(*layer, step, cache.layer(*layer))
        };
        let most = if workspace.keeps() && step.len <= MOST_TOKENS { TOGETHER } else { 0 };
        let together = (next..layers.len()).take(most).take_while(is_ready).count();
        if together == 0 {
            *single.entry(kind_of(next, cache)).or_default() += 1;
            layers[next].forward(stream, workspace, rope(next), attention, step, cache)?;
            next += 1;
            continue;
        }
        // Layers have all else of the workspace meanwhile.
        let mut bundles = std::mem::take(&mut workspace.bundles);
        let forward = |layer: usize| layers[layer].forward(stream, workspace, rope(layer), attention, step, cache);
        bundles.launch(together, &device, || (next..next + together).try_for_each(forward))?;
        workspace.bundles = bundles;
        next += together;
    }
    Ok(())
}
