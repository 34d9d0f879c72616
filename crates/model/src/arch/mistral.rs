//! Mistral 7B v0.1 to v0.3: Llama's decoder; v0.1 attends through a sliding window of 4096, which the config
//! names and the cache keeps to.

use crate::Weights;
use crate::layers::{AttentionParts, PreNormDecoder};
use candle_core::Result;

pub(super) fn load(weights: &Weights) -> Result<PreNormDecoder> {
    PreNormDecoder::load(weights, AttentionParts::load)
}
