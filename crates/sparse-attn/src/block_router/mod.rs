//! Block routers: which blocks of the store a query reads (the read side).

mod all;

pub use all::All;

use crate::LayerStore;
use candle_core::{Result, Tensor};
use std::sync::Arc;

/// How much each block matters to each query; higher is better.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub enum BlockScores {
    /// Every block matters: read them all.
    Every,
}

/// Scores the blocks of a layer's store for the queries of a step.
pub trait BlockRouter: std::fmt::Debug + Send + Sync {
    /// The name users type.
    fn name(&self) -> &'static str;

    /// `q`: `[q_len, q_heads, head_dim]`, after rope.
    ///
    /// # Errors
    /// If `q` does not fit the store.
    fn score(&self, q: &Tensor, store: &LayerStore) -> Result<BlockScores>;
}

/// One of every block router.
pub fn all() -> Vec<Arc<dyn BlockRouter>> {
    vec![Arc::new(All)]
}
