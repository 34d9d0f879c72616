//! Matrices and whole decode steps on a GPU; in a build without one, what stands in their place.

#[cfg(feature = "cuda")]
mod cuda;
#[cfg(feature = "cuda")]
pub use cuda::DeviceMatrix;
#[cfg(feature = "cuda")]
pub(crate) use cuda::{
    Bundles, Parts, Unpacked, add_norm, add_product, angles, fetch, gated, multiply_parts, multiply_unpacked, record, rotated,
};

#[cfg(not(feature = "cuda"))]
mod absent;
#[cfg(not(feature = "cuda"))]
pub use absent::DeviceMatrix;
#[cfg(not(feature = "cuda"))]
pub(crate) use absent::{
    Bundles, Parts, Unpacked, add_norm, add_product, angles, fetch, gated, multiply_parts, multiply_unpacked, record, rotated,
};

use crate::config::Activation;
use crate::layers::{Linear, RmsNorm, Rope};
use crate::weights::Matrix;
use candle_core::Tensor;
use sparse_attn::HeadShape;

/// Matrices that are multiplied with the same activations, and where there is one, a plain matrix of bf16 beside them.
#[derive(Debug)]
pub(crate) struct Group<'a, M> {
    pub(crate) matrices: Vec<&'a M>,
    pub(crate) beside: Option<&'a Tensor>,
    /// The product has a multiple of so many rows.
    pub(crate) whole: usize,
}

/// What the kernel of a norm does beside it, on a GPU.
#[derive(Debug, Default)]
#[cfg_attr(not(feature = "cuda"), expect(dead_code, reason = "for builds with a GPU"))]
pub(crate) struct Along<'a> {
    /// Where the norm is kept, if it is rounded.
    pub(crate) kept: Option<&'a mut Parts>,
    /// Weights that are still to be unpacked.
    pub(crate) unpacked: Option<&'a mut Unpacked>,
}

/// The parts of a decoder, for devices that run a step of one token as a whole.
#[derive(Debug)]
#[cfg_attr(not(feature = "cuda"), expect(dead_code, reason = "for builds with a GPU"))]
pub(crate) struct DecoderParts<'a> {
    pub(crate) heads: HeadShape,
    pub(crate) scale: f32,
    pub(crate) embedding: &'a Matrix,
    /// What embeddings are multiplied with.
    pub(crate) embedding_factor: f32,
    pub(crate) layers: Vec<LayerParts<'a>>,
    pub(crate) norm: &'a RmsNorm,
    pub(crate) head: &'a Matrix,
}

/// The parts of a decoder layer: `x += post(attention(norm(x)))`, then `x += post(mlp(norm(x)))`.
#[derive(Debug)]
#[cfg_attr(not(feature = "cuda"), expect(dead_code, reason = "for builds with a GPU"))]
pub(crate) struct LayerParts<'a> {
    pub(crate) attention_norm: &'a RmsNorm,
    pub(crate) qkv: [&'a Linear; 3],
    pub(crate) qk_norm: Option<(&'a RmsNorm, &'a RmsNorm)>,
    pub(crate) rope: &'a Rope,
    pub(crate) output: &'a Linear,
    pub(crate) post_attention_norm: Option<&'a RmsNorm>,
    pub(crate) mlp_norm: &'a RmsNorm,
    pub(crate) gate: &'a Linear,
    pub(crate) up: &'a Linear,
    pub(crate) down: &'a Linear,
    pub(crate) activation: Activation,
    pub(crate) post_mlp_norm: Option<&'a RmsNorm>,
}
