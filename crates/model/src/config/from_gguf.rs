//! The metadata of a GGUF file.

use super::from_json::yarn_attention_factor;
use super::{Activation, Config, RopeConfig, RopeScaling, sliding_pattern};
use crate::weights::gguf::GgufFile;
use candle_core::{Result, bail};
use sparse_attn::HeadShape;

impl Config {
    /// Reads the metadata of a GGUF file.
    ///
    /// # Errors
    /// If a key is missing, of the wrong type, out of range, or names what is not supported.
    pub fn from_gguf(file: &GgufFile) -> Result<Self> {
        let name = file.string("general.architecture")?;
        let model_type = match name {
            "gemma3" => "gemma3_text",
            other => other,
        };
        let gemma = name.starts_with("gemma");
        let key = |field: &str| format!("{name}.{field}");
        let count = |field: &str| file.count(&key(field));
        let hidden_size = count("embedding_length")?;
        let q_heads = count("attention.head_count")?;
        let kv_heads = file.optional_count(&key("attention.head_count_kv"))?.unwrap_or(q_heads);
        let head_dim = match file.optional_count(&key("attention.key_length"))? {
            Some(head_dim) => head_dim,
            None if q_heads > 0 => hidden_size / q_heads,
            None => 0,
        };
        let num_layers = count("block_count")?;
        if num_layers > 4096 {
            bail!("gguf: {} is {num_layers}, expected 1 to 4096", key("block_count"));
        }
        let context = count("context_length")?;
        let sliding_window = match file.optional_count(&key("attention.sliding_window"))?.filter(|window| *window > 0) {
            Some(window) if gemma => sliding_pattern(num_layers, window, 6),
            Some(window) => vec![Some(window); num_layers],
            None => vec![None; num_layers],
        };
        // Gemma 3 27B scales by its hidden width per head; the file does not say so, its depth does.
        let scale_dim = if gemma && num_layers == 62 { hidden_size / q_heads.max(1) } else { head_dim };
        let vocab_size = match file.tensor("token_embd.weight") {
            Some(tensor) if tensor.dims.len() == 2 => tensor.dims[0],
            _ => bail!("gguf: tensor token_embd.weight is missing or not a matrix"),
        };
        let config = Self {
            model_type: model_type.to_string(),
            hidden_size,
            intermediate_size: count("feed_forward_length")?,
            num_layers,
            vocab_size,
            heads: HeadShape::new(q_heads, kv_heads, head_dim)?,
            rms_norm_eps: file.float(&key("attention.layer_norm_rms_epsilon"))?,
            context,
            rope: RopeConfig {
                theta: file.optional_float(&key("rope.freq_base"))?.unwrap_or(10_000.0),
                scaling: rope_scaling(file, name, context)?,
            },
            local_rope: gemma.then_some(RopeConfig { theta: 10_000.0, scaling: RopeScaling::None }),
            sliding_window,
            attn_scale: (scale_dim as f64).powf(-0.5),
            activation: if gemma { Activation::GeluTanh } else { Activation::Silu },
            tied_embedding: file.tensor("output.weight").is_none(),
            bos: file.optional_id("tokenizer.ggml.bos_token_id")?,
            eos: eos(file)?,
        };
        config.check()
    }
}

fn rope_scaling(file: &GgufFile, name: &str, context: usize) -> Result<RopeScaling> {
    let key = |field: &str| format!("{name}.rope.scaling.{field}");
    let factor = || file.float(&key("factor"));
    match file.optional_string(&key("type"))? {
        None | Some("none") => Ok(RopeScaling::None),
        Some("linear") => Ok(RopeScaling::Linear { factor: factor()? }),
        Some("yarn") => {
            let factor = factor()?;
            Ok(RopeScaling::Yarn {
                factor,
                original_context: file.optional_count(&key("original_context_length"))?.unwrap_or(context),
                beta_fast: file.optional_float(&key("yarn_beta_fast"))?.unwrap_or(32.0),
                beta_slow: file.optional_float(&key("yarn_beta_slow"))?.unwrap_or(1.0),
                attention_factor: yarn_attention_factor(factor) * file.optional_float(&key("attn_factor"))?.unwrap_or(1.0),
            })
        }
        Some(other) => bail!("gguf: {} is {other:?}, which is not supported (none, linear and yarn are)", key("type")),
    }
}

/// The end-of-text token, and the end-of-turn tokens that llama.cpp also stops at.
fn eos(file: &GgufFile) -> Result<Vec<u32>> {
    let mut ids = Vec::new();
    for key in ["tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id", "tokenizer.ggml.eom_token_id"] {
        ids.extend(file.optional_id(key)?);
    }
    if let Some(tokens) = file.optional_strings("tokenizer.ggml.tokens")? {
        let ends = ["<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<end_of_turn>", "<|endoftext|>", "<|end_of_text|>"];
        ids.extend(tokens.iter().enumerate().filter(|(_, token)| ends.contains(&token.as_str())).map(|(id, _)| id as u32));
    }
    ids.sort_unstable();
    ids.dedup();
    Ok(ids)
}
