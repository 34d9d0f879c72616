//! Qwen2 and Qwen2.5: Llama's decoder, with biases on the query, key and value projections.

use crate::Weights;
use crate::layers::{AttentionParts, Linear, PreNormDecoder, name};
use candle_core::{Result, bail};

pub(super) fn load(weights: &Weights) -> Result<PreNormDecoder> {
    PreNormDecoder::load(weights, |scope, config| {
        // Linear takes a bias where there is one; here its absence is damage.
        if Linear::load_bias(scope, name("self_attn.q_proj", "attn_q"), config.heads.q_heads() * config.heads.head_dim())?.is_none() {
            bail!("qwen2: the bias of the query projection is missing");
        }
        AttentionParts::load(scope, config)
    })
}
