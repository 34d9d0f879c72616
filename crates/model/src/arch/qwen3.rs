//! Qwen3: Llama's decoder, with norms on queries and keys and no biases.

use crate::Weights;
use crate::layers::{AttentionParts, PreNormDecoder, RmsNorm, name};
use candle_core::Result;

pub(super) fn load(weights: &Weights) -> Result<PreNormDecoder> {
    PreNormDecoder::load(weights, |scope, config| {
        let norm = |name| RmsNorm::load(scope, name, config.heads.head_dim(), config.rms_norm_eps);
        let qk_norm = Some((norm(name("self_attn.q_norm", "attn_q_norm"))?, norm(name("self_attn.k_norm", "attn_k_norm"))?));
        Ok(AttentionParts { qk_norm, ..AttentionParts::load(scope, config)? })
    })
}
