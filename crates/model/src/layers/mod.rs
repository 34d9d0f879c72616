//! The parts that decoders are built of. Activations are `[tokens, width]`, f32.

mod attention;
mod decoder_layer;
mod embedding;
pub(crate) mod fused;
mod linear;
mod mlp;
mod norm;
mod pre_norm;
mod residual;
mod rope;
pub(crate) mod stack;
mod workspace;

pub use attention::{AttentionParts, SelfAttention};
pub use decoder_layer::DecoderLayer;
pub use embedding::{Embedding, OutputHead};
pub use linear::Linear;
pub use mlp::GatedMlp;
pub use norm::RmsNorm;
pub use pre_norm::PreNormDecoder;
pub use residual::Residual;
pub use rope::{Rope, RopeTables};

pub(crate) use workspace::{Workspace, Workspaces, decide, settle};

use crate::weights::Name;

/// A tensor that is called by both names, in Hugging Face checkpoints and in GGUF.
pub(crate) const fn name<'a>(hf: &'a str, gguf: &'a str) -> Name<'a> {
    Name { hf, gguf }
}
