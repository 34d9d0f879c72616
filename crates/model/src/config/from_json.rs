//! `config.json`, as published (`rope_theta`, `rope_scaling`) and as transformers 5 writes it
//! (`rope_parameters`).

use super::{Activation, Config, RopeConfig, RopeScaling, sliding_pattern};
use candle_core::{Result, bail};
use serde::Deserialize;
use serde_json::Value;
use sparse_attn::HeadShape;

#[derive(Deserialize)]
struct Raw {
    model_type: String,
    hidden_size: usize,
    intermediate_size: usize,
    num_hidden_layers: usize,
    vocab_size: usize,
    num_attention_heads: usize,
    num_key_value_heads: Option<usize>,
    head_dim: Option<usize>,
    #[serde(default = "default_eps")]
    rms_norm_eps: f64,
    #[serde(default = "default_context")]
    max_position_embeddings: usize,
    rope_theta: Option<f64>,
    rope_scaling: Option<Value>,
    rope_parameters: Option<Value>,
    rope_local_base_freq: Option<f64>,
    sliding_window: Option<usize>,
    #[serde(alias = "_sliding_window_pattern")]
    sliding_window_pattern: Option<usize>,
    use_sliding_window: Option<bool>,
    max_window_layers: Option<usize>,
    layer_types: Option<Vec<String>>,
    query_pre_attn_scalar: Option<f64>,
    #[serde(alias = "hidden_activation")]
    hidden_act: Option<String>,
    tie_word_embeddings: Option<bool>,
    attn_logit_softcapping: Option<f64>,
    final_logit_softcapping: Option<f64>,
    bos_token_id: Option<Value>,
    eos_token_id: Option<Value>,
}

fn default_eps() -> f64 {
    1e-6
}

fn default_context() -> usize {
    2048
}

/// Reads `config.json`.
///
/// # Errors
/// If a field is missing, of the wrong type, out of range, or names what is not supported.
pub(super) fn from_json(text: &str) -> Result<Config> {
    let raw: Raw = serde_json::from_str(text).map_err(|error| candle_core::Error::Msg(format!("config.json: {error}")))?;
    let gemma = raw.model_type.starts_with("gemma");
    let head_dim = match raw.head_dim {
        Some(head_dim) => head_dim,
        None if raw.num_attention_heads > 0 => raw.hidden_size / raw.num_attention_heads,
        None => 0,
    };
    if raw.attn_logit_softcapping.is_some() || raw.final_logit_softcapping.is_some() {
        bail!("config.json: logit soft-capping (Gemma 2) is not supported");
    }
    if raw.num_hidden_layers > 4096 {
        bail!("config: num_hidden_layers is {}, expected 1 to 4096", raw.num_hidden_layers);
    }
    let config = Config {
        hidden_size: raw.hidden_size,
        intermediate_size: raw.intermediate_size,
        num_layers: raw.num_hidden_layers,
        vocab_size: raw.vocab_size,
        heads: HeadShape::new(raw.num_attention_heads, raw.num_key_value_heads.unwrap_or(raw.num_attention_heads), head_dim)?,
        rms_norm_eps: raw.rms_norm_eps,
        context: raw.max_position_embeddings,
        rope: rope(&raw, "full_attention", raw.rope_theta)?,
        local_rope: if gemma { Some(local_rope(&raw)?) } else { None },
        sliding_window: sliding_windows(&raw, gemma)?,
        attn_scale: raw.query_pre_attn_scalar.unwrap_or(head_dim as f64).powf(-0.5),
        activation: activation(raw.hidden_act.as_deref())?,
        tied_embedding: raw.tie_word_embeddings.unwrap_or(gemma),
        bos: token_ids("bos_token_id", raw.bos_token_id.as_ref())?.first().copied(),
        eos: token_ids("eos_token_id", raw.eos_token_id.as_ref())?,
        model_type: raw.model_type,
    };
    config.check()
}

fn activation(name: Option<&str>) -> Result<Activation> {
    match name {
        None | Some("silu") => Ok(Activation::Silu),
        Some("gelu_pytorch_tanh") => Ok(Activation::GeluTanh),
        Some(other) => bail!("config.json: hidden_act {other:?} is not supported (silu and gelu_pytorch_tanh are)"),
    }
}

/// A token id, a list of them, or null.
fn token_ids(field: &str, value: Option<&Value>) -> Result<Vec<u32>> {
    let one = |value: &Value| match value.as_u64().and_then(|id| u32::try_from(id).ok()) {
        Some(id) => Ok(id),
        None => bail!("config.json: {field} holds {value}, expected a token id"),
    };
    match value {
        None | Some(Value::Null) => Ok(Vec::new()),
        Some(Value::Array(ids)) => ids.iter().map(one).collect(),
        Some(value) => Ok(vec![one(value)?]),
    }
}

fn sliding_windows(raw: &Raw, gemma: bool) -> Result<Vec<Option<usize>>> {
    let layers = raw.num_hidden_layers;
    let Some(window) = raw.sliding_window.filter(|_| raw.use_sliding_window != Some(false)) else {
        return Ok(vec![None; layers]);
    };
    if window == 0 {
        bail!("config.json: sliding_window is 0, expected null or a positive number");
    }
    if let Some(types) = &raw.layer_types {
        return types
            .iter()
            .map(|layer| match layer.as_str() {
                "sliding_attention" => Ok(Some(window)),
                "full_attention" => Ok(None),
                other => bail!("config.json: layer_types holds {other:?}, expected full_attention or sliding_attention"),
            })
            .collect();
    }
    if gemma {
        return match raw.sliding_window_pattern.unwrap_or(6) {
            0 => bail!("config.json: sliding_window_pattern is 0, expected a positive number"),
            period => Ok(sliding_pattern(layers, window, period)),
        };
    }
    // Qwen: the first `max_window_layers` layers see everything. Mistral: every layer slides.
    let first = raw.max_window_layers.filter(|_| raw.use_sliding_window == Some(true)).unwrap_or(0);
    Ok((0..layers).map(|layer| (layer >= first).then_some(window)).collect())
}

/// The rope of layers of `layer_type`.
fn rope(raw: &Raw, layer_type: &str, theta: Option<f64>) -> Result<RopeConfig> {
    let parameters = raw.rope_parameters.as_ref().map(|all| all.get(layer_type).unwrap_or(all));
    let theta = parameters.and_then(|p| p.get("rope_theta")).and_then(Value::as_f64).or(theta).unwrap_or(10_000.0);
    let scaling = match parameters.or(raw.rope_scaling.as_ref()) {
        Some(scaling) if !scaling.is_null() => rope_scaling(scaling, raw.max_position_embeddings)?,
        _ => RopeScaling::None,
    };
    Ok(RopeConfig { theta, scaling })
}

fn local_rope(raw: &Raw) -> Result<RopeConfig> {
    if raw.rope_parameters.is_some() {
        return rope(raw, "sliding_attention", None);
    }
    Ok(RopeConfig { theta: raw.rope_local_base_freq.unwrap_or(10_000.0), scaling: RopeScaling::None })
}

fn rope_scaling(fields: &Value, context: usize) -> Result<RopeScaling> {
    let number = |name: &str| fields.get(name).and_then(Value::as_f64);
    let required = |name: &str| match number(name) {
        Some(value) => Ok(value),
        None => bail!("config.json: rope scaling lacks a number {name}"),
    };
    let original = fields.get("original_max_position_embeddings").and_then(Value::as_u64).map(|n| n as usize);
    match fields.get("rope_type").or_else(|| fields.get("type")).and_then(Value::as_str) {
        None | Some("default") => Ok(RopeScaling::None),
        Some("linear") => Ok(RopeScaling::Linear { factor: required("factor")? }),
        Some("llama3") => Ok(RopeScaling::Llama3 {
            factor: required("factor")?,
            low_freq_factor: required("low_freq_factor")?,
            high_freq_factor: required("high_freq_factor")?,
            original_context: original.unwrap_or(context),
        }),
        Some("yarn") => {
            let original_context = original.unwrap_or(context);
            let factor = number("factor").unwrap_or(context as f64 / original_context.max(1) as f64);
            Ok(RopeScaling::Yarn {
                factor,
                original_context,
                beta_fast: number("beta_fast").unwrap_or(32.0),
                beta_slow: number("beta_slow").unwrap_or(1.0),
                attention_factor: number("attention_factor").unwrap_or_else(|| yarn_attention_factor(factor)),
            })
        }
        Some(other) => bail!("config.json: rope type {other:?} is not supported (default, linear, llama3 and yarn are)"),
    }
}

/// `0.1 ln(factor) + 1`, from the YaRN paper.
pub(super) fn yarn_attention_factor(factor: f64) -> f64 {
    if factor <= 1.0 { 1.0 } else { 0.1 * factor.ln() + 1.0 }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LLAMA: &str = r#"{"model_type":"llama","hidden_size":64,"intermediate_size":128,"num_hidden_layers":2,"vocab_size":100,
        "num_attention_heads":4,"num_key_value_heads":2,"max_position_embeddings":4096,"rope_theta":500000.0,"#;

    fn parse(tail: &str) -> Result<Config> {
        from_json(&format!("{LLAMA}{tail}}}"))
    }

    #[test]
    fn the_published_form_and_that_of_transformers_5_agree() {
        let scaling =
            r#"{"rope_type":"llama3","factor":8.0,"low_freq_factor":1.0,"high_freq_factor":4.0,"original_max_position_embeddings":64"#;
        let published = parse(&format!(r#""rope_scaling":{scaling}}}"#)).unwrap();
        let new = parse(&format!(r#""rope_parameters":{scaling},"rope_theta":500000.0}}"#)).unwrap();
        assert_eq!(published.rope, new.rope);
        assert_eq!(published.heads.head_dim(), 16);
        assert!(matches!(published.rope.scaling, RopeScaling::Llama3 { original_context: 64, .. }));
    }

    #[test]
    fn sliding_windows_follow_the_architecture() {
        let mistral = parse(r#""sliding_window":8"#).unwrap();
        assert_eq!(mistral.sliding_window, vec![Some(8), Some(8)]);
        let qwen = parse(r#""sliding_window":8,"use_sliding_window":false,"max_window_layers":1"#).unwrap();
        assert_eq!(qwen.sliding_window, vec![None, None]);
        let qwen = parse(r#""sliding_window":8,"use_sliding_window":true,"max_window_layers":1"#).unwrap();
        assert_eq!(qwen.sliding_window, vec![None, Some(8)]);
        let gemma = from_json(&format!(
            "{}{}",
            LLAMA.replace("llama", "gemma3_text").replace("layers\":2", "layers\":7"),
            r#""sliding_window":8}"#
        ))
        .unwrap();
        assert_eq!(gemma.sliding_window.iter().filter(|window| window.is_none()).count(), 1);
        assert_eq!((gemma.sliding_window[5], gemma.tied_embedding), (None, true));
        assert_eq!(gemma.rope_of_layer(0).theta, 10_000.0);
        assert_eq!(gemma.rope_of_layer(5).theta, 500_000.0);
    }

    #[test]
    fn what_cannot_be_is_refused_by_name() {
        for (tail, name) in [
            (r#""num_hidden_layers":1000000000,"x":0"#, "duplicate field"),
            (r#""head_dim":0"#, "head_dim"),
            (r#""sliding_window":0"#, "sliding_window"),
            (r#""hidden_act":"mish""#, "hidden_act"),
            (r#""rope_scaling":{"type":"longrope"}"#, "longrope"),
            (r#""rope_scaling":{"type":"linear"}"#, "factor"),
            (r#""rope_scaling":{"type":"linear","factor":0}"#, "factor"),
            (r#""eos_token_id":[2,"x"]"#, "eos_token_id"),
            (r#""eos_token_id":100"#, "100"),
            (r#""layer_types":["full_attention"],"sliding_window":8"#, "layer_types"),
        ] {
            let error = parse(tail).unwrap_err().to_string();
            assert!(error.contains(name), "{tail}: {error}");
        }
        for (from, to, name) in
            [("500000.0", "-1.0", "rope_theta"), ("heads\":2", "heads\":3", "3"), ("\"hidden_size\":64,", "", "hidden_size")]
        {
            let error = from_json(&format!("{}\"x\":0}}", LLAMA.replace(from, to))).unwrap_err().to_string();
            assert!(error.contains(name), "{to}: {error}");
        }
    }
}
