//! Llama 2, Llama 3.x, SmolLM2, TinyLlama, and what GGUF calls `llama` (Mistral among them).

use crate::Weights;
use crate::layers::{AttentionParts, PreNormDecoder};
use candle_core::Result;

pub(super) fn load(weights: &Weights) -> Result<PreNormDecoder> {
    PreNormDecoder::load(weights, AttentionParts::load)
}
