//! Token routers: which tokens keep full attention once they leave the window (the write side).

mod all;

pub use all::All;

use candle_core::{Result, Tensor};
use std::sync::Arc;

/// What a token router may look at: the tokens of one step in one layer.
#[derive(Debug, Clone, Copy)]
pub struct RouterInput<'a> {
    /// The attention input (after the layer's norm), `[tokens, hidden_size]`.
    pub hidden: &'a Tensor,
    /// Keys after rope, `[tokens, kv_heads, head_dim]`.
    pub k: &'a Tensor,
}

/// A token router's verdict on the tokens of a step.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub enum Admission {
    /// Every token of every head keeps full attention.
    Every,
}

/// Decides, for each token and key/value head, whether the token keeps full attention.
///
/// The verdict must follow from the token alone, never from its neighbours in the step, so that
/// cutting a prompt into other chunks changes nothing.
pub trait TokenRouter: std::fmt::Debug + Send + Sync {
    /// The name users type.
    fn name(&self) -> &'static str;

    /// # Errors
    /// If the tensors do not fit this router.
    fn admit(&self, layer: usize, input: RouterInput<'_>) -> Result<Admission>;
}

/// One of every token router that needs no file.
pub fn all() -> Vec<Arc<dyn TokenRouter>> {
    vec![Arc::new(All)]
}
