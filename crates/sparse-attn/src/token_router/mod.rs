//! Token routers: which tokens keep full attention once they leave the window (the write side).

mod all;
mod gate;
mod random;
mod sink_window;

pub use all::All;
pub use gate::{Feedforward, Gate, GateLayer, GateStack, KeyGate, SinkGate};
pub use random::Random;
pub use sink_window::SinkWindow;

use crate::backend::cuda;
use crate::cache::Step;
use candle_core::{Result, Tensor};
use std::sync::Arc;

/// What a token router may look at: the tokens of one step in one layer.
#[derive(Debug, Clone, Copy)]
pub struct RouterInput<'a> {
    /// The attention input (after the layer's norm), `[tokens, hidden_size]`.
    pub hidden: &'a Tensor,
    /// Its product with [`TokenRouter::projection`], `[tokens, rows]`, where it was made beside others.
    pub projected: Option<&'a Tensor>,
    /// Keys after rope, `[tokens, kv_heads, head_dim]`.
    pub k: &'a Tensor,
    /// The same before rope.
    pub k_before_rope: &'a Tensor,
    /// Their positions.
    pub step: Step,
}

/// A token router's verdict on the tokens of a step.
#[derive(Debug, Clone)]
pub enum Admission {
    /// Every token of every head keeps full attention.
    Every,
    /// Those that are true, `[tokens, kv_heads]`.
    Some(Vec<bool>),
    /// Those whose score reaches the threshold. Where both are on a device, the host need not wait for it.
    Scored(Scored),
}

/// A verdict by scores.
#[derive(Debug, Clone)]
pub struct Scored {
    /// What is to reach the threshold.
    pub scores: Scores,
    /// The score from which a token is kept.
    pub tau: f32,
}

/// Scores of tokens.
#[derive(Debug, Clone)]
pub enum Scores {
    /// `[tokens, kv_heads]`, f32.
    Made(Tensor),
    /// Those that the last layer of a gate is to make on a GPU, which can decide by them at once.
    Asked {
        /// `[tokens, width]`
        x: Tensor,
        /// `[kv_heads, width]`
        weight: Tensor,
        /// `[kv_heads]`
        bias: Tensor,
    },
    /// Those of which a GPU has the products of a gate's first layer.
    Projected(Projected),
}

/// What came of [`TokenRouter::projection`], and what is to become of it.
#[derive(Debug, Clone)]
pub struct Projected {
    /// `[tokens, rows]`: sums of products with weights in bf16.
    pub sums: Tensor,
    /// `[rows]`
    pub bias: Tensor,
    /// `[kv_heads, rows]` and `[kv_heads]`: a layer on GELU of the first one, where there are two.
    pub last: Option<(Tensor, Tensor)>,
}

impl Projected {
    /// Tokens and heads.
    fn dims(&self) -> Result<[usize; 2]> {
        let rows = self.last.as_ref().map_or(&self.bias, |(_, bias)| bias);
        Ok([self.sums.dim(0)?, rows.dims1()?])
    }

    /// `[tokens, kv_heads]`
    fn made(&self) -> Result<Tensor> {
        let first = self.sums.broadcast_add(&self.bias)?;
        match &self.last {
            Some((weight, bias)) => first.gelu_erf()?.matmul(&weight.t()?)?.broadcast_add(bias),
            None => Ok(first),
        }
    }
}

impl Scores {
    /// Tokens and heads.
    ///
    /// # Errors
    /// If they are no matrices.
    pub fn dims(&self) -> Result<[usize; 2]> {
        match self {
            Self::Made(scores) => scores.dims2().map(|(tokens, kv_heads)| [tokens, kv_heads]),
            Self::Asked { x, weight, .. } => Ok([x.dim(0)?, weight.dim(0)?]),
            Self::Projected(projected) => projected.dims(),
        }
    }

    /// The numbers, `[tokens, kv_heads]`, f32.
    ///
    /// # Errors
    /// If shapes do not fit each other, or the device is out of memory.
    pub fn made(&self) -> Result<Tensor> {
        match self {
            Self::Made(scores) => Ok(scores.clone()),
            Self::Asked { x, weight, bias } => cuda::gate_layer(x, weight, bias, false),
            Self::Projected(projected) => projected.made(),
        }
    }
}

/// Decides, for each token and key/value head, whether the token keeps full attention.
///
/// The verdict must follow from the token alone, never from its neighbours in the step, so that
/// cutting a prompt into other chunks changes nothing.
pub trait TokenRouter: std::fmt::Debug + Send + Sync {
    /// The name users type.
    fn name(&self) -> &'static str;

    /// The part of the tokens that it admits, as far as it knows; 1 only if it always admits all.
    fn kept_fraction(&self) -> f32;

    /// The gate that it is, for devices that compute gates themselves.
    fn as_gate(&self) -> Option<&Gate> {
        None
    }

    /// What it would have multiplied with a layer's attention input beside the matrices of queries, keys and values, `[rows, hidden_size]`
    /// in bf16, on the model's device.
    fn projection(&self, _layer: usize) -> Option<&Tensor> {
        None
    }

    /// Whether it looks at keys in a layer. Where it says no, those of its input may be no keys, but tensors of their shape: a device then makes keys
    /// only where it stores them.
    fn reads_keys(&self, _layer: usize) -> bool {
        true
    }

    /// # Errors
    /// If the tensors do not fit this router.
    fn admit(&self, layer: usize, input: RouterInput<'_>) -> Result<Admission>;
}

/// One of every token router that needs no file.
pub fn all() -> Vec<Arc<dyn TokenRouter>> {
    vec![Arc::new(All), Arc::new(SinkWindow), Arc::new(Random::default())]
}

/// The router of this name that needs no file.
pub fn by_name(name: &str) -> Option<Arc<dyn TokenRouter>> {
    all().into_iter().find(|router| router.name() == name)
}
