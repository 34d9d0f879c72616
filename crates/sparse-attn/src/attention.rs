//! Attention of one layer in one step: admit, write, score, select, attend.

use crate::backend::AttentionBackend;
use crate::block_router::{self, BlockRouter};
use crate::cache::{KvCache, Step};
use crate::select::select;
use crate::token_router::{self, RouterInput, TokenRouter};
use candle_core::{Result, Tensor};
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

/// The two routers and the backend that computes. Holds no state of a sequence: the cache is passed.
#[derive(Debug, Clone)]
pub struct RoutedAttention {
    token_router: Arc<dyn TokenRouter>,
    block_router: Arc<dyn BlockRouter>,
    backend: Arc<dyn AttentionBackend>,
}

impl RoutedAttention {
    /// Attention by these routers on this backend.
    pub fn new(token_router: Arc<dyn TokenRouter>, block_router: Arc<dyn BlockRouter>, backend: Arc<dyn AttentionBackend>) -> Self {
        Self { token_router, block_router, backend }
    }

    /// Dense attention: every token kept, every block read.
    pub fn dense(backend: Arc<dyn AttentionBackend>) -> Self {
        Self::new(Arc::new(token_router::All), Arc::new(block_router::All), backend)
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
        let store = cache.layer_mut(layer);
        let admission = self.token_router.admit(layer, RouterInput { hidden: input.hidden, k: input.k })?;
        self.backend.write(input.k, input.v, &admission, step, store)?;
        let scores = self.block_router.score(input.q, store)?;
        let selection = select(&scores);
        self.backend.attend(input.q, input.scale, store, step, &selection)
    }
}
