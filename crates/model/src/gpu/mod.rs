//! Matrices and whole decode steps on a GPU; in a build without one, what stands in their place.

#[cfg(feature = "cuda")]
mod cuda;
#[cfg(feature = "cuda")]
pub use cuda::DeviceMatrix;
#[cfg(feature = "cuda")]
pub(crate) use cuda::{Parts, Place, add_norm, add_product, angles, fetch, gated, multiply_parts, multiply_unpacked, record, rotated};

#[cfg(not(feature = "cuda"))]
mod absent;
#[cfg(not(feature = "cuda"))]
pub use absent::DeviceMatrix;
#[cfg(not(feature = "cuda"))]
pub(crate) use absent::{Parts, Place, add_norm, add_product, angles, fetch, gated, multiply_parts, multiply_unpacked, record, rotated};

use crate::config::{Activation, Config};
use crate::layers::{GatedMlp, Linear, RmsNorm, Rope, SelfAttention};
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

impl<'a> LayerParts<'a> {
    /// A layer with norms before attention and before the feedforward part, and none after.
    pub(crate) fn new(config: &Config, rope: &'a Rope, norms: [&'a RmsNorm; 2], attention: &'a SelfAttention, mlp: &'a GatedMlp) -> Self {
        let (parts, [gate, up, down], [attention_norm, mlp_norm]) = (attention.parts(), mlp.projections(), norms);
        Self {
            attention_norm,
            qkv: [&parts.q_proj, &parts.k_proj, &parts.v_proj],
            qk_norm: parts.qk_norm.as_ref().map(|(q, k)| (q, k)),
            rope,
            output: &parts.o_proj,
            post_attention_norm: None,
            mlp_norm,
            gate,
            up,
            down,
            activation: config.activation,
            post_mlp_norm: None,
        }
    }
}
