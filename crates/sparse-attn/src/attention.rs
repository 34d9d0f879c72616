//! Attention of one layer in one step: admit, write, score, select, attend.

use crate::backend::AttentionBackend;
use crate::block_router::{self, BlockRouter};
use crate::cache::{KvCache, Step};
use crate::select::{Limits, Selection, select};
use crate::token_router::{self, RouterInput, TokenRouter};
use candle_core::{Result, Tensor, bail};
use std::sync::Arc;

/// The tensors of one layer in one step.
#[derive(Debug, Clone, Copy)]
pub struct AttentionInput<'a> {
    /// The attention input (after the layer's norm), `[tokens, hidden_size]`: what token routers see.
    pub hidden: &'a Tensor,
    /// Queries after rope, `[tokens, q_heads, head_dim]`.
    pub q: &'a Tensor,
    /// Keys after rope, `[tokens, kv_heads, head_dim]`.
    pub k: &'a Tensor,
    /// Values, `[tokens, kv_heads, head_dim]`.
    pub v: &'a Tensor,
    /// Factor of `q . k`, usually `1 / sqrt(head_dim)`.
    pub scale: f32,
}

/// What is routed, and how far.
#[derive(Debug, Clone)]
pub struct Routing {
    /// Which tokens keep full attention.
    pub token_router: Arc<dyn TokenRouter>,
    /// Which blocks a query reads.
    pub block_router: Arc<dyn BlockRouter>,
    /// Window, block, budget, and the length below which all is dense.
    pub limits: Limits,
    /// The first layers stay dense: their attention is diffuse (Quest, arXiv:2406.10774).
    pub dense_layers: usize,
}

impl Routing {
    /// Every token kept, every block read.
    pub fn dense() -> Self {
        Self {
            token_router: Arc::new(token_router::All),
            block_router: Arc::new(block_router::All),
            limits: Limits { window: 256, block_size: 32, budget: None, dense_len: usize::MAX },
            dense_layers: 0,
        }
    }
}

/// The two routers and the backend that computes. Holds no state of a sequence: the cache is passed.
#[derive(Debug, Clone)]
pub struct RoutedAttention {
    routing: Routing,
    backend: Arc<dyn AttentionBackend>,
}

impl RoutedAttention {
    /// Attention by `routing` on `backend`.
    ///
    /// # Errors
    /// If the window or the block is 0.
    pub fn new(routing: Routing, backend: Arc<dyn AttentionBackend>) -> Result<Self> {
        if routing.limits.window == 0 || routing.limits.block_size == 0 {
            bail!("routing: window {} and block {} must be above 0", routing.limits.window, routing.limits.block_size);
        }
        Ok(Self { routing, backend })
    }

    /// Dense attention: every token kept, every block read.
    pub fn dense(backend: Arc<dyn AttentionBackend>) -> Self {
        Self { routing: Routing::dense(), backend }
    }

    /// Dense attention on the same backend.
    pub fn to_dense(&self) -> Self {
        Self::dense(self.backend.clone())
    }

    /// What is routed.
    pub fn routing(&self) -> &Routing {
        &self.routing
    }

    /// The backend's name.
    pub fn backend_name(&self) -> &'static str {
        self.backend.name()
    }

    /// Writes the step's keys and values to the cache and attends.
    ///
    /// `out[t, h] = softmax(scale * q[t, h] . K') V` over the keys that are selected for `t` at positions
    /// `<= t`, and inside the layer's sliding window where it has one. Sums are f32.
    ///
    /// Returns `[tokens, q_heads, head_dim]`, f32.
    ///
    /// # Errors
    /// If a shape does not fit the layer. The cache's committed tokens never change here.
    pub fn forward(&self, layer: usize, input: AttentionInput<'_>, step: Step, cache: &mut KvCache) -> Result<Tensor> {
        let Routing { token_router, block_router, limits, dense_layers } = &self.routing;
        let store = cache.layer_mut(layer);
        let admission = token_router.admit(layer, RouterInput { hidden: input.hidden, k: input.k })?;
        self.backend.write(input.k, input.v, &admission, step, store)?;
        // Layers with a sliding window read no more than that anyway.
        let routed = layer >= *dense_layers && store.sliding_window().is_none();
        let selection = if routed {
            store.finish_write(step, block_router.summary(), limits.block_size)?;
            if step.end() <= limits.dense_len {
                Selection::Every
            } else {
                let scores = block_router.score(input.q, store, limits.block_size)?;
                select(&scores, limits, step, store.shape().kv_heads())
            }
        } else {
            Selection::Every
        };
        let out = self.backend.attend(input.q, input.scale, store, step, &selection)?;
        self.count(layer, step, &selection, cache);
        Ok(out)
    }

    /// Adds what the layer read to the cache's count.
    fn count(&self, layer: usize, step: Step, selection: &Selection, cache: &mut KvCache) {
        let store = cache.layer(layer);
        let (mut read, mut visible) = (0u64, 0u64);
        for t in step.start..step.end() {
            let all = (t + 1 - store.first_visible(t)) as u64 * store.shape().kv_heads() as u64;
            visible += all;
            read += match selection {
                Selection::Every => all,
                Selection::Blocks(blocks) => {
                    let keys = |head| blocks.ranges(t, head, t + 1).iter().map(|range| range.len() as u64).sum::<u64>();
                    (0..store.shape().kv_heads()).map(keys).sum()
                }
            };
        }
        let bytes_per_key = 2 * store.shape().head_dim() * store.k_pages().dtype().size_in_bytes();
        cache.count_read(read, visible, bytes_per_key);
    }
}
